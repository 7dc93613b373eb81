"""`quartet explain`, `bench` and `demo`: what they find, run and print, and what they say where they cannot."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quartet_compile.cli import loading, output, scripts
from quartet_compile.cli.main import main, parser, split

ROOT = Path(__file__).parent.parent

MODELS = '''
import torch
from torch import nn

print("a module that prints")

class Net(nn.Module):
    def __init__(self, ins=64):
        super().__init__()
        self.table, self.up, self.lm_head = nn.Embedding(50, ins), nn.Linear(ins, 96), nn.Linear(96, 50)
        self.register_buffer("scale", torch.ones(96))

    def forward(self, tokens, twice=False):
        y = self.up(self.table(tokens)) * self.scale
        return self.lm_head(y * 2 if twice else y)

class Deep:
    @staticmethod
    def make():
        return Net(), (torch.zeros(2, 16, dtype=torch.long),), {"twice": True}

class Huge(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(2**17, 2**17)

    def forward(self, x):
        return self.up(x)

class Reads(Net):
    def forward(self, tokens):
        y = super().forward(tokens)
        return y if y.sum().item() > 0 else -y

class Attention(Net):
    def forward(self, tokens):
        y = self.up(self.table(tokens)).unflatten(-1, (4, 24)).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True)
        return self.lm_head(y.transpose(1, 2).flatten(2))

class Double(nn.Linear):
    def __init__(self):
        super().__init__(64, 64, dtype=torch.float64)

net = Net()
number = 3

def make(): return Net()
def with_args(): return Net(), torch.zeros(2, 16, dtype=torch.long)
def other_args(): return Net(), torch.zeros(5, 7, dtype=torch.long)
def with_names(): return Net(), {"tokens": torch.zeros(2, 16, dtype=torch.long)}
def needs(ins, outs=3): return Net(ins)
def wrong(): return 1, 2
'''

LINES = ["up       models.py:14  32 x 64 -> 96  quartet2", "lm_head  models.py:15  32 x 96 -> 50  bf16"]
"""What a report of Net begins its lines with, for 32 tokens."""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The current folder has a file models.py."""
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "models", raising=False)
    yield
    sys.modules.pop("models", None)


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("up ", "lm_head "))]


# ---------------------------------------------------------------- explain

WAYS = {
    "a function": ("models:make", "--input", "2x16:int64"),
    "a function that gives an argument": ("models:with_args",),
    "a function that gives arguments by name": ("models:with_names",),
    "a method, with arguments of both kinds": ("models:Deep.make",),
    "a class": ("models:Net", "--input", "2x16:int64"),
    "a module, argument by name": ("models:net", "--input", "tokens=2x16:int64"),
    "an argument in the place of the factory's": ("models:other_args", "--input", "2x16:int64"),
}


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_name_a_model(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *WAYS[way]]) == 0
    out = capsys.readouterr().out
    assert out.startswith("quartet: 1 of 2 linears in NVFP4, 1 graph(s)")
    for line, expected in zip(lines_of(out), LINES, strict=True):
        assert line.startswith(expected)
    assert "a module that prints" not in out


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("factory", ["models:Attention", "models:net"])
def test_meta_gives_the_report_of_the_cpu(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    reports = []
    for device in ("cpu", "meta"):
        assert main(["explain", factory, "--input", "2x16:int64", "--device", device, "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
        del reports[-1]["graphs"][0]["compile_id"]
    assert reports[0] == reports[1]
    assert [linear["name"] for linear in reports[0]["graphs"][0]["linears"]] == ["up", "lm_head"]


@pytest.mark.usefixtures("models")
def test_meta_needs_no_memory_for_a_model_of_64_gib(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "models:Huge", "--input", "8x131072", "--device", "meta"]) == 0
    assert "8 x 131072 -> 131072  quartet2" in capsys.readouterr().out


@pytest.mark.usefixtures("models")
def test_options_inference_and_graphs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--option", "quartet.include=lm_head", "--option", "quartet.exclude=up", "--option", "quartet.exclude=none", "--option"]
    graphs = tmp_path / "graphs"
    words = ["explain", "models:with_args", *options, "quartet.min_features=1", "--inference", "--graphs", str(graphs)]
    assert main(words) == 0
    out = capsys.readouterr().out
    up, head = lines_of(out)
    assert up.split()[7:9] == ["bf16", "quartet.exclude"]
    assert head.split()[7:] == ["quartet2", "quartet.include", "'lm_head'", "y"]
    assert "quartet.exclude: 'none' matches no linear" in out
    before, after = sorted(graphs.iterdir(), key=lambda path: path.stem == "graph0_forward")
    assert "ops.quartet.matmul" not in before.read_text()
    assert "ops.quartet.matmul" in after.read_text()


@pytest.mark.usefixtures("models")
def test_autocast(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "models:with_args", "--autocast", "bfloat16", "--json"]) == 0
    up = json.loads(capsys.readouterr().out)["graphs"][0]["linears"][0]
    assert up["saved_before"] == 32 * 64 * 2  # in bfloat16


@pytest.mark.usefixtures("models")
def test_a_page_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jinja2", reason="pages need jinja2")
    page = tmp_path / "report.html"
    assert main(["explain", "models:with_args", "--device", "meta", "--save", str(page)]) == 0
    assert "lm_head" in page.read_text()
    assert main(["explain", "models:with_args", "--device", "meta", "--save", str(tmp_path / "report.txt")]) == 2
    assert "report.txt" in capsys.readouterr().err


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["models"], "is no import path: write module:factory"),
        (["models.py:make"], "names a file: write models:make"),
        (["model:make"], "there is no module 'model' in"),
        (["model:make"], "did you mean models?"),
        (["models:mak"], "models has no mak; it has make"),
        (["models:x"], "models has no x; it has Net, Deep, Huge, Reads, Attention, Double, make, with_args"),
        (["models:needs"], "models:needs needs arguments (ins), and explain has none to give: write a function without, for instance def"),
        (["models:number"], "models:number is a int: expected a module, or a function or class that makes one"),
        (["models:wrong"], "models:wrong gave (int, int): expected a model, (model, args) or (model, args, kwargs)"),
        (["models:make"], "give --input, for instance --input 8x1024:int64"),
        (["models:make", "--input", "3xa"], "--input 3xa: expected [NAME=]SHAPE[:DTYPE]"),
        (["models:make", "--input", "3:int63"], "torch has no dtype 'int63'"),
        (["models:make", "--option", "quartet.strict"], "--option quartet.strict: expected KEY=VALUE"),
        (["models:make", "--option", "quartet.exlude=x"], "did you mean quartet.exclude?"),
        (["models:make", "--option", "exclude=x"], "unknown option 'exclude'; did you mean quartet.exclude?"),
        (["models:make", "--option", "max_autotun=true"], "Unexpected optimization option max_autotun\n"),
        (["models:Double", "--option", "quartet.strict=true", "--input", "8x64:float64"], "(root): its dtype is float64"),
        (["models:make", "--input", "2", "--input", "2", "--input", "2"], "takes (tokens, twice=False) and is called with 3 arg"),
        (["models:with_args", "--input", "token=2x16:int64"], "1 argument(s), token=: got an unexpected keyword argument 'token'"),
        (["models:Huge", "--device", "meta", "--input", "2x16"], "the model fails with these arguments: "),
        (["models:with_args", "--save", "report.pdf"], "--save report.pdf: valid suffixes are .html and .json"),
        (["models:with_args", "--save", "no/report.html"], "--save no/report.html: there is no folder no"),
        (["models:with_args", "--autocast", "bf16"], "--autocast bf16: torch has no such dtype"),
        (["models:Reads", "--device", "meta", "--input", "2x16:int64"], "the model reads numbers, which there are none of on meta"),
    ],
)
def test_what_cannot_be_explained(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err


@pytest.mark.usefixtures("models")
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_cuda_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "models:with_args", "--device", "cuda"]) == 2
    assert "quartet doctor tells why" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("models")
def test_explain_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    for factory in ("models:with_args", "models:net"):
        assert main(["explain", factory, "--device", "cuda", *(["--input", "2x16:int64"] if factory == "models:net" else [])]) == 0
        assert [line.startswith(expected) for line, expected in zip(lines_of(capsys.readouterr().out), LINES, strict=True)] == [True, True]


def test_a_module_that_the_users_own_needs_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_models.py").write_text("import no_such_package")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        main(["explain", "broken_models:make"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["quartet.strict=true", "max_autotune=False"], {"quartet.strict": True, "max_autotune": False}),
        (["quartet.min_features=32"], {"quartet.min_features": 32}),
        (["quartet.exclude=0", "quartet.exclude=*.gate"], {"quartet.exclude": ["0", "*.gate"]}),
        (["quartet.recompute=none", "epilogue=[1, 2]"], {"quartet.recompute": "none", "epilogue": [1, 2]}),
    ],
)
def test_options_as_words(words: list[str], expected: dict[str, Any]) -> None:
    assert loading.options(words) == expected


def test_a_report_on_a_terminal_keeps_its_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    text = "linear  recipe\n" + "x" * 200 + "  bf16  default\n  left: x: [unsupported] /"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    output.print_report(text)
    out = capsys.readouterr().out
    assert re.sub(r"\x1b\[[\d;]*m", "", out) == f"{text}\n"
    assert out != f"{text}\n"


def test_the_page_names_every_command_and_option() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text()
    (commands,) = (action for action in parser()._actions if isinstance(action.choices, dict))
    assert commands.choices is not None
    for name, command in dict(commands.choices).items():
        assert f"`quartet {name}" in page
        for option in (option for action in command._actions for option in action.option_strings if option.startswith("--")):
            assert option == "--help" or option in page, f"{name} {option}"


# ---------------------------------------------------------------- bench and demo


@pytest.mark.parametrize(
    ("words", "ours", "rest"),
    [
        ("", "", ""),
        ("doctor --json", "doctor --json", ""),
        ("bench", "bench", ""),
        ("bench --json", "bench --json", ""),
        ("bench linear --quick --json f", "bench linear", "--quick --json f"),
        ("bench linear -- --quick", "bench linear", "--quick"),
        ("demo --preset tiny", "demo", "--preset tiny"),
        ("demo -- --preset tiny", "demo", "--preset tiny"),
    ],
)
def test_what_a_script_is_given(words: str, ours: str, rest: str) -> None:
    assert split(words.split()) == (ours.split(), rest.split())


def test_bench_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    out = capsys.readouterr().out
    about = "How fast one linear is in NVFP4, forward and backward, against BF16 and against the ceiling of emulation."
    assert f"\nlinear        {about}\n" in out
    assert main(["bench", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in listed] == [
        "fsdp_curve", "linear", "numerics", "observe_step", "quantizers", "roofline", "sharded_step", "train_step",
    ]  # fmt: skip
    assert all(Path(one["path"]).is_file() and one["about"] for one in listed)


def test_bench_knows_no_other_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "linaer"]) == 2
    assert "there is no benchmark 'linaer'. Did you mean linear?" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["bench", "linear"], ["demo"]])
def test_a_scripts_own_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    before = sys.argv, sys.path[:]
    assert main([*words, "--help"]) == 0
    name = {"bench": "linear", "demo": "train_gpt"}[words[0]]
    assert capsys.readouterr().out.startswith(f"usage: {name}.py")
    assert (sys.argv, sys.path) == before


def test_a_scripts_exit_status_is_that_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for code, status in (("", 0), ("import sys; sys.exit(3)", 3), ("raise SystemExit('a package is missing')", 1)):
        script = tmp_path / "script.py"
        script.write_text(code)
        assert scripts.run_script(script, []) == status
    assert capsys.readouterr().err == "a package is missing\n"


def test_a_benchmark_runs_from_anywhere_with_its_neighbours(tmp_path: Path) -> None:
    """In a process of its own, whose path does not have the folder: `sharded_step` imports from benchmarks/ and from examples/."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "quartet_compile", "bench", "sharded_step", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: sharded_step.py")


# ---------------------------------------------------------------- installed


@pytest.mark.slow
def test_a_wheel_holds_one_package_and_runs_from_there(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"quartet_compile"}
    assert {"quartet_compile/benchmarks/linear.py", "quartet_compile/examples/train_gpt.py", "quartet_compile/cli/main.py"} <= set(names)

    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    environment = os.environ | {"PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""}
    linear = f'"path": "{site}/quartet_compile/benchmarks/linear.py"'
    for words, expected in ((["bench", "--json"], linear), (["demo", "--help"], "train_gpt.py")):
        command = [sys.executable, "-m", "quartet_compile", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
    script = next((site / "bin").glob("quartet*"))
    assert "quartet_compile.cli.main" in script.read_text()
    for name in ("passes", "kernels", "benchmarks", "examples", "cli"):
        assert not (site / name).exists()
