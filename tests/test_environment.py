"""QUARTET_OPTIONS: what it says, that it is stronger than options in code, that it is read at each compilation, and what caches see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quartet_compile as quartet
from quartet_compile.environment import read_environment
from quartet_compile.options import TYPES, Options, split_options
from quartet_compile.passes.pipeline import QuartetPass
from quartet_compile.passes.place import NOTHING_SAID


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.small, self.lm_head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.up(x) * self.gate(x)) + self.small(x).sum()


def decided(variable: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, tuple[str, str]]:
    """name -> (recipe, who decided), under a value of the variable and options in code."""
    monkeypatch.setenv("QUARTET_OPTIONS", variable)
    in_code = {f"quartet.{name}": value for name, value in options.items()}
    report = quartet.explain(Model(), torch.randn(16, 64), options=in_code)
    return {linear.name: (linear.recipe, linear.decided_by) for linear in report.linears}


@pytest.mark.parametrize(
    "text",
    [
        "recipe=bf16; exclude=*.gate,*.router; strict=true; min_features=32; mode=max-autotune",
        "quartet.recipe = bf16;exclude= *.gate , *.router;\n strict=True; min_features=32; mode=max-autotune;",
        '{"recipe": "bf16", "exclude": ["*.gate", "*.router"], "strict": true, "min_features": 32, "mode": "max-autotune"}',
        ' {"quartet.recipe": "bf16", "exclude": ["*.gate", "*.router"], "strict": true, "min_features": 32, "mode": "max-autotune"}\n',
    ],
)
def test_text_and_json_say_the_same(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARTET_OPTIONS", text)
    options, others = split_options({"max_autotune": True, "quartet.recipe": "quartet2", "quartet.recompute": "weights"})
    assert (options.recipe, options.strict, options.min_features, options.mode) == ("bf16", True, 32, "max-autotune")
    assert [(rule.glob, rule.excludes) for rule in options.policy(NOTHING_SAID).rules] == [("*.gate", True), ("*.router", True)]
    assert options.recompute == "weights", "what the variable does not name is as in code"
    assert others == {"max_autotune": True}


@pytest.mark.parametrize("text", ["", "  ", ";", "{}"])
def test_an_empty_variable_says_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARTET_OPTIONS", text)
    assert split_options(None) == (Options(), {})


@pytest.mark.feature("Choosing recipes", "options by environment variable")
def test_globs_of_the_variable_count_before_those_in_code_which_still_count(monkeypatch: pytest.MonkeyPatch) -> None:
    found = decided("exclude=up; include=gate,lm_head", monkeypatch, exclude=["gate", "small"], include=["up"])
    assert found == {
        "up": ("bf16", "QUARTET_OPTIONS exclude 'up'"),
        "gate": ("quartet2", "QUARTET_OPTIONS include 'gate'"),
        "lm_head": ("quartet2", "QUARTET_OPTIONS include 'lm_head'"),
        "small": ("bf16", "quartet.exclude 'small'"),
    }


def test_a_recipe_of_the_variable_replaces_the_one_in_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(decided("recipe=bf16", monkeypatch, recipe="quartet2").values()) == {("bf16", "QUARTET_OPTIONS recipe")}
    found = decided("recipe=quartet2; min_features=48", monkeypatch, recipe="bf16", min_features=8)
    assert found == {
        "up": ("quartet2", "QUARTET_OPTIONS recipe"),
        "gate": ("quartet2", "QUARTET_OPTIONS recipe"),
        "lm_head": ("bf16", "default (output head)"),
        "small": ("bf16", "QUARTET_OPTIONS min_features"),
    }


def test_set_recipe_and_decorators_are_no_options_and_stay_stronger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARTET_OPTIONS", "exclude=*")
    model = Model()
    quartet.set_recipe(model, "quartet2", only="gate")
    report = quartet.explain(model, torch.randn(16, 64))
    assert [linear.name for linear in report.rewritten] == ["gate"]


def test_a_glob_of_the_variable_that_matches_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARTET_OPTIONS", "exclude=up,layers.*")
    report = quartet.explain(Model(), torch.randn(16, 64))
    assert report.unmatched == (("QUARTET_OPTIONS exclude", "layers.*"),)
    assert "QUARTET_OPTIONS exclude: 'layers.*' matches no linear" in str(report)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipee=bf16", r"QUARTET_OPTIONS: unknown option 'recipee'; valid are exclude, include, min_features, .*recipe.*strict"),
        ("recipe=fp3", r"unknown recipe 'fp3' \(QUARTET_OPTIONS recipe\); valid are bf16, quartet2"),
        ("recipe", "QUARTET_OPTIONS: 'recipe' is not option=value"),
        ("exclude=", "QUARTET_OPTIONS: 'exclude=' is not option=value"),
        ("=bf16", "QUARTET_OPTIONS: '=bf16' is not option=value"),
        ("exclude=a,,b", "QUARTET_OPTIONS: exclude takes globs with a comma between them, got 'a,,b'"),
        ("strict=maybe", "QUARTET_OPTIONS: strict takes true or false, got 'maybe'"),
        ("min_features=few", "QUARTET_OPTIONS: min_features takes a whole number, got 'few'"),
        ("min_features=-1", "'QUARTET_OPTIONS min_features' takes a whole number from 0 on, got -1"),
        ("recompute=all", "'QUARTET_OPTIONS recompute' is one of 'none'"),
        ("recipe=bf16; recipe=quartet2", "QUARTET_OPTIONS gives recipe twice"),
        ('{"recipe": "bf16", "quartet.recipe": "quartet2"}', "QUARTET_OPTIONS gives recipe twice"),
        ('{"recipe": "bf16"', "QUARTET_OPTIONS begins with { but is no JSON: .*column"),
        ('{"max_autotune": true}', "QUARTET_OPTIONS: unknown option 'max_autotune'"),
        ('{"exclude": [3]}', "'QUARTET_OPTIONS exclude' takes a glob or a list of globs"),
        ('{"strict": "true"}', "'QUARTET_OPTIONS strict' takes a bool, got 'true'"),
    ],
)
def test_errors_name_the_variable_the_part_that_is_wrong_and_what_is_valid(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUARTET_OPTIONS", text)
    with pytest.raises((ValueError, TypeError), match=message):
        split_options({})
    with pytest.raises(Exception, match=message):
        torch.compile(nn.Linear(64, 64), backend="quartet")(torch.randn(2, 64))


def test_every_option_can_be_said_in_text(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: dict[str, tuple[str, Any]] = {
        "bool": ("true", True), "int": ("3", 3), "tuple[str, ...]": ("a, b", ["a", "b"]), "str": ("a", "a"), "str | None": ("a", "a"),
    }  # fmt: skip
    for name, kind in TYPES.items():
        text, value = texts[kind]
        monkeypatch.setenv("QUARTET_OPTIONS", f"{name}={text}")
        assert read_environment(TYPES) == {name: value}


@pytest.mark.feature("Choosing recipes", "options by environment variable, changed between compilations")
def test_the_variable_is_read_at_each_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is compiled stays as it is; Dynamo does not guard on the environment."""
    model, other, x = nn.Linear(64, 64), nn.Linear(64, 96), torch.randn(16, 64)
    compiled = torch.compile(model, backend="quartet")
    quantized = compiled(x)
    assert (quantized - model(x)).norm() > 0.05 * model(x).norm()
    monkeypatch.setenv("QUARTET_OPTIONS", "recipe=bf16")
    assert torch.equal(compiled(x), quantized)
    torch.testing.assert_close(torch.compile(other, backend="quartet")(x), other(x))
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(x), model(x))


def test_cache_keys_see_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(variable: str) -> Any:
        monkeypatch.setenv("QUARTET_OPTIONS", variable)
        options, _ = split_options({})
        return QuartetPass({0: "w"}, options.policy(NOTHING_SAID), options.recompute).uuid()

    said = ("", "recipe=bf16", "exclude=up", "include=up", "min_features=32", "strict=true", "recompute=weights")
    assert len({key(variable) for variable in said}) == len(said)
    assert key("exclude=up") == key('{"exclude": "up"}')


def test_a_mode_of_the_variable_is_stronger_than_that_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from quartet_compile.backend import inductor_patches

    monkeypatch.setenv("QUARTET_OPTIONS", "mode=max-autotune-no-cudagraphs")
    options, others = split_options({})
    gm = torch.fx.symbolic_trace(nn.ReLU())
    patches = inductor_patches(gm, {}, frozenset(), options, others, "default", NOTHING_SAID)
    assert patches["max_autotune"] is True


PROGRAM = """
import torch
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
torch.compile(model, backend="quartet")(torch.randn(16, 64))
"""


@pytest.mark.slow
def test_a_program_that_knows_nothing_of_it_is_steered_and_says_so_under_torch_logs(tmp_path: Path) -> None:
    variables = {
        "QUARTET_OPTIONS": json.dumps({"exclude": ["1"]}),
        "TORCH_LOGS": "quartet_compile",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    result = subprocess.run([sys.executable, "-c", PROGRAM], env=os.environ | variables, capture_output=True, text=True, check=True)
    assert "1 of 2 linears in NVFP4" in result.stderr
    assert "left: 1: asked for bf16 [QUARTET_OPTIONS exclude" in result.stderr
    assert "QUARTET_OPTIONS exclude '1'" in result.stderr
