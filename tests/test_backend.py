"""The real backend, through Inductor: it trains, keeps the user's settings and caches honestly."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import float64_recipe as independent
import pytest
import torch
from support import recorded_seeds, relative_error
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass

import quartet_compile as quartet
from quartet_compile import backend
from quartet_compile.kernels import ops
from quartet_compile.passes import pipeline


def run_step(model: nn.Module, x: Tensor, **compile_options: Any) -> Tensor:
    y = torch.compile(model, backend="quartet", **compile_options)(x)
    y.square().mean().backward()
    return y.detach()


def is_quantized(model: nn.Linear, x: Tensor, y: Tensor) -> bool:
    """True if y is the recipe's product, False if it is the exact one; anything else is an error."""
    x64, w64 = x.detach().double().numpy(), model.weight.detach().double().numpy()
    bias = model.bias.detach().double()
    quantized = relative_error(y, torch.tensor(independent.linear(x64, w64)) + bias) < 1e-5
    exact = relative_error(y, torch.tensor(x64 @ w64.T) + bias) < 1e-5
    assert quantized != exact
    return quantized


# ---------------------------------------------------------------- package


def test_the_backend_is_registered_and_nothing_else_is_at_the_top_level(tmp_path: Path) -> None:
    """Without importing the package; from a folder where `passes` and `kernels` are no directories."""
    code = (
        "import importlib.util, torch._dynamo as d; assert 'quartet' in d.list_backends();"
        "assert importlib.util.find_spec('quartet_compile.passes') and importlib.util.find_spec('quartet_compile.kernels');"
        "assert importlib.util.find_spec('passes') is None and importlib.util.find_spec('kernels') is None"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_without_triton_everything_runs_on_the_cpu() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch; m = torch.nn.Linear(64, 64); x = torch.randn(8, 64)\n"
        "torch.compile(m, backend='quartet')(x).sum().backward(); assert m.weight.grad.isfinite().all()\n"
        "assert 'quartet_compile.kernels.triton_kernels' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_user_is_told_once_that_the_device_emulates(caplog: pytest.LogCaptureFixture) -> None:
    backend.tell_if_emulated.cache_clear()
    for _ in range(2):
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(nn.Linear(64, 64), backend="quartet")(torch.randn(8, 64))
    lines = [r.getMessage() for r in caplog.records if r.name == "quartet_compile" and r.levelname == "WARNING"]
    assert lines == ["on the CPU NVFP4 is emulated, with the same numbers and no gain in speed"]


# ---------------------------------------------------------------- training


def test_a_training_step_equals_the_independent_recipe() -> None:
    model, x = nn.Linear(80, 96), torch.randn(48, 80, requires_grad=True)
    compiled = torch.compile(model, backend="quartet")
    with recorded_seeds() as seeds:
        y = compiled(x)
        e = torch.randn_like(y)
        y.backward(e)
    assert is_quantized(model, x, y.detach())
    x64, w64, e64 = (t.detach().double().numpy() for t in (x, model.weight, e))
    assert relative_error(x.grad, independent.dgrad(e64, w64, seeds.plain[0])) < 1e-6
    assert relative_error(model.weight.grad, independent.wgrad(e64, x64, seeds.transposed[0])) < 1e-6
    assert relative_error(model.bias.grad, e64.sum(0)) < 1e-5


def test_randomness_is_fresh_each_step_and_reproducible_by_manual_seed() -> None:
    model, x = nn.Linear(64, 64), torch.randn(32, 64)
    compiled = torch.compile(model, backend="quartet")

    def gradient() -> Tensor:
        model.zero_grad()
        compiled(x).square().sum().backward()
        return model.weight.grad.clone()

    torch.manual_seed(5)
    first, second = gradient(), gradient()
    torch.manual_seed(5)
    assert torch.equal(first, gradient())
    assert not torch.equal(first, second)


def test_an_mlp_learns_under_activation_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 128), nn.Linear(128, 64)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda v: self.b(torch.tanh(self.a(v))), x, use_reentrant=False)

    model, x = Model(), torch.randn(128, 64)
    target = torch.tanh(x @ torch.randn(64, 64) / 8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    compiled = torch.compile(model, backend="quartet")
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (compiled(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def saved_tensors(step: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """(result, what autograd keeps for the backward pass)."""
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return step(), kept


@pytest.mark.parametrize("variant", ["bias", "no bias", "autocast"])
def test_autograd_keeps_packed_operands_only(variant: str) -> None:
    model, x = nn.Linear(128, 192, bias=variant != "no bias"), torch.randn(64, 128, requires_grad=True)
    compiled = torch.compile(model, backend="quartet")
    with torch.autocast("cpu", torch.bfloat16, enabled=variant == "autocast"):
        y, kept = saved_tensors(lambda: compiled(x))
    assert y.requires_grad
    x_bytes, w_bytes = (rows * columns * 9 // 16 + 4 for rows, columns in (x.shape, model.weight.shape))
    sizes = sorted((str(t.dtype).removeprefix("torch."), t.numel() * t.element_size()) for t in kept)
    assert {dtype for dtype, _ in sizes} == {"uint8", "float8_e4m3fn", "float32"}
    assert [size for dtype, size in sizes if dtype == "float32"] == [4, 4], "two tensor scales"
    assert sum(size for _, size in sizes) == x_bytes + w_bytes


# ---------------------------------------------------------------- options


@pytest.mark.feature("Ways to compile", "modes and options of torch.compile")
@pytest.mark.parametrize(
    "kwargs",
    [
        {"mode": "max-autotune-no-cudagraphs"},
        {"options": {"max_autotune": True, "quartet.recipe": "quartet2"}},
        {"options": {"quartet.mode": "max-autotune-no-cudagraphs", "epilogue_fusion": False}},
    ],
)
def test_modes_and_options_reach_inductor(kwargs: dict[str, Any]) -> None:
    class Witness(CustomGraphPass):
        """Sees the settings that Inductor compiles with."""

        seen: ClassVar[list[bool]] = []

        def __call__(self, graph: torch.fx.Graph) -> None:
            self.seen.append(torch._inductor.config.max_autotune)

        def uuid(self) -> str:
            return "witness"

    model, x = nn.Linear(64, 64), torch.randn(16, 64, requires_grad=True)
    with torch._inductor.config.patch(joint_custom_pre_pass=Witness(), force_disable_caches=True):
        assert is_quantized(model, x, run_step(model, x, **kwargs))
    assert Witness.seen == [True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quartet.recipee": "bf16"}, r"did you mean quartet\.recipe"),
        ({"exclude": ["*.gate"]}, r"unknown option 'exclude'; did you mean quartet\.exclude\?"),
        ({"quartet.recipe": "fp3"}, "valid are bf16, quartet2"),
        ({"quartet.exclude": [3]}, "glob"),
        ({"quartet.exclude": None}, "takes a glob or a list of globs"),
        ({"quartet.strict": "yes"}, "takes a bool"),
        ({"quartet.min_features": -1}, "whole number"),
        ({"no_such_inductor_option": 1}, "Unexpected optimization option"),
    ],
)
def test_bad_options_say_what_would_be_valid(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        torch.compile(nn.Linear(64, 64), backend="quartet", options=options)(torch.randn(2, 64))


def test_the_users_own_pass_runs_and_global_settings_stay() -> None:
    class Own(CustomGraphPass):
        calls = 0

        def __call__(self, graph: torch.fx.Graph) -> None:
            Own.calls += 1

        def uuid(self) -> str:
            return "own"

    before = torch._inductor.config.joint_custom_pre_pass
    model, x = nn.Linear(64, 64), torch.randn(16, 64)
    with torch._inductor.config.patch(force_disable_caches=True):
        y = run_step(model, x, options={"joint_custom_pre_pass": Own()})
    assert Own.calls == 1
    assert is_quantized(model, x, y)
    assert torch._inductor.config.joint_custom_pre_pass is before
    with torch.no_grad():
        assert not is_quantized(model, x, torch.compile(model, backend="inductor")(x))


def test_strict_names_the_layer_and_the_reason() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(80, 80)

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.linear.bias, x, self.linear.weight.t(), beta=2)

    model = nn.Sequential(Scaled())
    with pytest.raises(Exception, match=r"0\S* \(test_backend.py:\d+\): its addmm scales the product or the bias"):
        torch.compile(model, backend="quartet", options={"quartet.strict": True})(torch.randn(4, 80))
    excluded = {"quartet.strict": True, "quartet.exclude": ["0"]}
    torch.compile(model, backend="quartet", options=excluded)(torch.randn(4, 80))


@pytest.mark.parametrize("where", ["x", "weight", "upstream gradient"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_makes_the_whole_product_nan(where: str, bad: float) -> None:
    model, x = nn.Linear(64, 64), torch.randn(32, 64)
    e = torch.randn(32, 64)
    {"x": x, "weight": model.weight.data, "upstream gradient": e}[where][3, 5] = bad
    x.requires_grad_()
    y = torch.compile(model, backend="quartet")(x)
    y.backward(e)
    assert bool(y.isnan().all()) == (where != "upstream gradient")
    assert bool(x.grad.isnan().all()) == (where != "x")
    assert bool(model.weight.grad.isnan().all()) == (where != "weight")


# ---------------------------------------------------------------- caches


class Annotated(nn.Module):
    """One linear whose recipe is chosen by a context whose name is fixed when the class is made."""

    def __init__(self, recipe: str) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.recipe = recipe

    def forward(self, x: Tensor) -> Tensor:
        with quartet.recipe(self.recipe):
            return self.linear(x)


def cache_events() -> tuple[int, int]:
    """(hits, misses) of AOTAutograd's cache since the last call."""
    aot = counters["aot_autograd"]
    events = aot["autograd_cache_hit"], aot["autograd_cache_miss"]
    counters.clear()
    return events


@pytest.mark.feature("Ways to compile", "compilation caches")
@pytest.mark.usefixtures("fresh_caches")
def test_caches_hit_for_the_same_and_miss_for_another_recipe_option_or_source(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(16, 64, requires_grad=True)

    def run(recipe: str, **kwargs: Any) -> bool:
        torch._dynamo.reset()
        model = Annotated(recipe)
        return is_quantized(model.linear, x, run_step(model, x, **kwargs))

    assert run("quartet2")
    assert cache_events() == (0, 1)
    assert run("quartet2")
    assert cache_events() == (1, 0), "the same again is a hit"
    assert not run("bf16")
    assert cache_events() == (0, 1), "another annotation"
    assert run("quartet2", options={"quartet.min_features": 32})
    assert cache_events() == (0, 1), "another option"
    monkeypatch.setattr(pipeline, "source_hash", lambda: "edited")
    assert run("quartet2")
    assert cache_events() == (0, 1), "an edited source"


def test_the_source_hash_covers_every_file_of_passes_and_kernels() -> None:
    before = pipeline.source_hash()
    passes_folder, kernels_folder = (Path(module.__file__).parent for module in (pipeline, ops))
    for folder in (passes_folder, kernels_folder, kernels_folder / "triton_kernels", kernels_folder / "cpu"):
        probe = folder / "zz_probe.py"
        try:
            probe.write_text("x = 1\n")
            pipeline.source_hash.cache_clear()
            assert pipeline.source_hash() != before
        finally:
            probe.unlink()
            pipeline.source_hash.cache_clear()


@pytest.mark.feature("Ways to compile", "two models with two recipes")
def test_two_models_with_two_recipes_live_in_one_process() -> None:
    a, b, x = nn.Linear(64, 64), nn.Linear(64, 64), torch.randn(16, 64)
    fast = torch.compile(a, backend="quartet")
    plain = torch.compile(b, backend="quartet", options={"quartet.recipe": "bf16"})
    for _ in range(2):
        assert is_quantized(a, x, fast(x))
        assert not is_quantized(b, x, plain(x))
