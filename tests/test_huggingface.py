"""Models of Hugging Face Transformers: every linear is accounted for, logits are the recipe's, and the models train.

On a CPU the graphs are run by torch.fx's interpreter, and the example's test compiles one model with Inductor. On a GPU Inductor compiles
all of them.
"""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support import DEVICES, capture, relative_error
from torch import Tensor

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

from huggingface_models import MODELS, forward_quantized, llama, mixtral, parameter_of, parameters_multiplied  # noqa: E402

from quartet_compile.reports import Report  # noqa: E402

ROOT = Path(__file__).parent.parent

LEFT = {
    "llama": {"lm_head": "output head"},
    "qwen3": {"lm_head": "output head"},
    "mixtral": {"lm_head": "output head", "gate": "4 features", "gate_up_proj": "picked from", "down_proj": "picked from"},
    "gpt2": {"lm_head": "also an embedding"},
    "bert": {"decoder": "also an embedding"},
    "t5": {"lm_head": "also an embedding"},
    "vit": {"classifier": "output head"},
    "whisper": {"proj_out": "also an embedding"},
    "mamba": {"lm_head": "also an embedding", "x_proj": "24 features", "dt_proj": "8 features"},
    "mamba2": {"lm_head": "output head"},
}
"""What the defaults leave of each model, by the last part of its name."""


BROKEN = {"whisper": ("model.encoder.conv1.weight", "model.encoder.conv2.weight")}
"""What is left to eager code where a version of torch breaks the graph of a model."""


@dataclass
class Run:
    """report, in_report: of the first step, and how often each parameter is in it. multiplied: how often eager code multiplies by each.
    logits: before training, in NVFP4, in eager float32, and there with the same linears quantized. losses: of four steps. not_reached:
    parameters without a finite gradient."""

    report: Report
    in_report: Counter[str]
    multiplied: Counter[str]
    logits: Tensor
    logits_float32: Tensor
    logits_recipe: Tensor
    losses: list[float]
    not_reached: list[str]


@functools.cache
def run(name: str, device: str) -> Run:
    model, inputs = MODELS[name]()
    model, inputs = model.to(device), {key: value.to(device) for key, value in inputs.items()}
    compiled, backend = capture(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with torch.no_grad():
        float32 = model(**inputs).logits
    multiplied = parameters_multiplied(model, inputs)
    outputs = compiled(**inputs)
    report = backend.report(model)
    if device == "cuda":
        compiled = torch.compile(model, backend="quartet")
        outputs = compiled(**inputs)
    first = outputs.logits.detach()
    with torch.no_grad(), forward_quantized(model, [name for linear in report.rewritten for name in linear.names]):
        recipe = model(**inputs).logits
    losses = []
    for _ in range(4):
        outputs.loss.backward()
        not_reached = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(outputs.loss.detach()))
        outputs = compiled(**inputs)
    in_report = Counter(parameter_of(model, name) for linear in report.linears for name in linear.names)
    return Run(report, in_report, multiplied, first, float32, recipe, losses, not_reached)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("on", DEVICES)
def test_every_linear_is_accounted_for(name: str, on: str) -> None:
    result = run(name, on)
    experts = {n for n in result.multiplied if ".experts." in n}  # as often as experts are hit
    assert set(result.in_report) == set(result.multiplied)
    assert {n: k for n, k in result.in_report.items() if n not in experts} == {
        n: k for n, k in result.multiplied.items() if n not in experts
    }
    assert result.report.not_captured == (BROKEN.get(name, ()) if len(result.report.graphs) > 1 else ())


@pytest.mark.feature("Models", "{name}")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("on", DEVICES)
def test_all_but_the_defaults_run_in_nvfp4(name: str, on: str) -> None:
    linears = run(name, on).report.linears
    for linear in linears:
        left = LEFT[name].get(linear.name.rpartition(".")[2])
        assert linear.products == (() if left else ("y", "dx", "dw")), linear
        assert (left or "") in linear.reason
    assert {linear.name.rpartition(".")[2] for linear in linears if not linear.products} == set(LEFT[name])


@pytest.mark.feature("Models", "{name}")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("on", DEVICES)
def test_logits_are_those_of_the_recipe(name: str, on: str) -> None:
    """Float32 differs by the recipe's error. The recipe in eager float64 differs by far less: where sums in another order round to another
    code, which moves one number of hundreds by one step."""
    result = run(name, on)
    error = relative_error(result.logits_recipe, result.logits_float32)
    assert relative_error(result.logits, result.logits_recipe) < 0.02 * error
    assert relative_error(result.logits, result.logits_float32) == pytest.approx(error, rel=0.02)


@pytest.mark.feature("Models", "{name}")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("on", DEVICES)
def test_trains_on_one_batch(name: str, on: str) -> None:
    result = run(name, on)
    assert all(map(math.isfinite, result.losses))
    assert result.losses == sorted(result.losses, reverse=True), result.losses
    assert result.not_reached == []


@pytest.mark.parametrize(
    ("experts", "dtype", "reason"),
    [
        ("eager", torch.float32, None),
        ("grouped_mm", torch.float32, "transformers.grouped_mm_fallback"),  # also under autocast, which leaves the parameters in float32
        ("grouped_mm", torch.bfloat16, ""),
    ],
)
def test_experts_are_accounted_for(experts: str, dtype: torch.dtype, reason: str | None) -> None:
    """"eager" loops over the experts that data hits: Dynamo leaves that to eager PyTorch, so no graph contains them. In bfloat16 they
    are one `torch._grouped_mm`, which is rewritten."""
    model, inputs = mixtral(experts)
    compiled, backend = capture(model.to(dtype))
    compiled(**inputs).loss.backward()
    report = backend.report(model)
    names = [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    if reason is None:
        assert list(report.not_captured) == names
    else:
        assert report.not_captured == ()
        found = [linear for linear in report.linears if linear.name.partition("[")[0] in names]
        assert [linear.name.partition("[")[0] for linear in found] == names
        assert all(linear.products == (() if reason else ("y", "dx", "dw")) and reason in linear.reason for linear in found)
    assert sum(linear.products == ("y", "dx", "dw") for linear in report.linears if "self_attn" in linear.name) == 4


@pytest.mark.feature("Ways to train", "bfloat16 autocast")
def test_autocast() -> None:
    model, inputs = llama(layers=1)
    compiled, backend = capture(model)
    with torch.no_grad():
        float32 = model(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        outputs = compiled(**inputs)
    outputs.loss.backward()
    linears = backend.report(model).linears
    assert [linear.name for linear in linears if not linear.products] == ["lm_head"]
    with torch.no_grad(), forward_quantized(model, [linear.name for linear in linears if linear.products]):
        recipe = model(**inputs).logits
    error = relative_error(recipe, float32)
    assert relative_error(outputs.logits, float32) == pytest.approx(error, rel=0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_lengths_that_change_are_compiled_once_more() -> None:
    model, _ = llama(layers=1)
    compiled, backend = capture(model)
    for length in (8, 12, 16, 20):
        compiled(**llama(layers=1, length=length)[1]).loss.backward()
    first, dynamic = backend.report(model).graphs
    assert [(n.name, n.products) for n in first.linears] == [(n.name, n.products) for n in dynamic.linears]
    assert dynamic.linears[0].shape == (24, 128, 128), "tokens of the second call, for which it was compiled"


def test_blocks_compiled_one_by_one() -> None:
    """In a graph names begin at the block; the report of the whole model has them whole."""
    model, inputs = llama()
    _, backend = capture(model)
    for block in model.model.layers:
        block.compile(backend=backend)
    model(**inputs).loss.backward()
    report = backend.report(model)
    assert {linear.products for linear in report.linears} == {("y", "dx", "dw")}
    names = [name for linear in report.linears for name in linear.names]
    assert sorted(names) == [n for n, m in sorted(model.model.named_modules(prefix="model")) if isinstance(m, torch.nn.Linear)]
    assert report.not_captured == ("lm_head",)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code with the repository's root as the working folder, and so on the path."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)


def test_the_folder_kernels_is_not_taken_for_the_package() -> None:
    """Transformers looks for a package `kernels`; in the root of the repository Python finds a folder of this name."""
    done = python(
        "import sys, pathlib, importlib.util; sys.path.append('tests')\n"
        "assert pathlib.Path(importlib.util.find_spec('kernels').origin).parent == pathlib.Path('kernels').resolve()\n"
        "import huggingface_models as hf, quartet_compile\n"
        "from transformers.utils import is_kernels_available\n"
        "assert not is_kernels_available()\n"
        "for make in (hf.gpt2, lambda: hf.mixtral('grouped_mm')):\n"
        "    model, inputs = make(); model(**inputs).loss.backward()\n"
        "print('ran')"
    )
    assert done.stdout.strip() == "ran", done.stderr


@pytest.mark.feature("Models", "Hugging Face Trainer")
def test_the_trainer_trains_in_nvfp4(tmp_path: Path) -> None:
    """Under Inductor, each step quantizes the gradients of 14 linears, for two products each."""
    steps, text = 6, tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of a text that repeats itself, {i * i}\n" for i in range(400)))
    done = python(
        "import sys, json; sys.path += ['tests', 'examples']\n"
        "import hf_finetune; from support import recorded_seeds\n"
        "with recorded_seeds() as seeds: trainer = hf_finetune.main(sys.argv[1:])\n"
        "losses = [entry['loss'] for entry in trainer.state.log_history if 'loss' in entry]\n"
        "print(json.dumps([losses, len(seeds.plain), len(seeds.transposed)]))",
        "--data", str(text), "--out", str(tmp_path / "out"), "--steps", str(steps), "--context", "32", "--batch", "4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "14 of 15 linears in NVFP4" in done.stdout
    losses, plain, transposed = json.loads(done.stdout.splitlines()[-1])
    assert (plain, transposed) == (14 * steps, 14 * steps)
    assert len(losses) == steps
    assert losses[-1] < losses[0] - 0.5
    from safetensors.torch import load_file

    assert "model.layers.0.self_attn.q_proj.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_accelerate_refuses_backends_it_does_not_know(tmp_path: Path) -> None:
    """Where this fails, the example no longer needs `model.compile`."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), torch_compile_backend="quartet", report_to="none")
    with pytest.raises(ValueError, match="DynamoBackend"):
        transformers.Trainer(model=llama(layers=1)[0], args=arguments)
