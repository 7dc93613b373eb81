"""Numerics while training: the figures are right, and observing changes nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import float64_recipe as independent
import numpy as np
import pytest
import torch
from observe_support import ALL, Heard, mlp, observed, only, step, uses
from support import DEVICES, float64, recorded_seeds
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import quartet_compile as quartet

# ---------------------------------------------------------------- figures


def test_the_errors_of_a_gaussian_layer_are_those_of_the_numerics_page() -> None:
    """Four-over-six: MSE 7.562e-3 +- 1%, 1 - gain 0.0034; MS-EDEN: 9.328e-3 +- 1%, 1 - gain below 2e-4; both within 4 standard errors."""
    model, x = nn.Linear(1024, 1024, bias=False), torch.randn(1024, 1024, requires_grad=True)
    nn.init.normal_(model.weight)
    compiled, observer = observed(model)
    y = compiled(x)
    y.backward(torch.randn_like(y))
    operands = [r for r in observer if r.operand]
    assert len(operands) == 6
    for r in operands:
        mse, lost, margin = (7.562e-3, 0.0034, 1e-4) if r.product == "y" else (9.328e-3, 0.0, 2e-4)
        assert r.elements == 2**20
        assert r.error == pytest.approx(mse, rel=0.01), r
        assert 1 - r.gain == pytest.approx(lost, abs=margin + 4 * math.sqrt(mse / r.elements)), r
    # A gradient's error is that of its operands, each quantized once or twice, independently.
    for product, twice in (("dx", "w"), ("dw", "x")):
        result = only(observer, "*", f"{product} ")
        parts = sum(only(observer, "*", use).error for use in (f"{product} e", f"{product} {twice}", f"y {twice}"))
        assert result.error == pytest.approx(parts, rel=0.05)
        assert result.cosine == pytest.approx(1 - parts / 2, abs=1e-3)
        assert result.gain == pytest.approx(only(observer, "*", f"y {twice}").gain, abs=2e-3)


def decoded(packed: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """(values, the largest value that the group of each could hold) of a packed matrix, by the definition of the format."""
    codes, bits, g = packed[0].numpy(), packed[1].view(torch.uint8).numpy(), float(packed[2])
    nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(codes.shape[0], -1)
    scales = np.where(bits < 8, bits * 2.0**-9, (1 + bits % 8 / 8) * 2.0 ** (bits // 8 - 7.0)).repeat(16, 1) * g
    return independent.GRID[nibbles % 8] * np.where(nibbles < 8, 1, -1) * scales, 6 * scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_figure_of_a_small_layer_is_that_of_float64(dtype: torch.dtype) -> None:
    """Odd sizes, with outliers and zeros; operands quantized again by the operators from the same seeds, all else in NumPy."""
    model, x = nn.Linear(200, 72, bias=False).to(dtype), torch.randn(150, 200).to(dtype)
    x[:, 7] *= 100
    x[:, 11] = 0
    x.requires_grad_()
    compiled, observer = observed(model)
    with recorded_seeds() as seeds:
        y = compiled(x)
        e = torch.randn_like(y)
        y.backward(e)
    quantize = torch.ops.quartet.quantize
    plain, turned = torch.tensor(seeds.plain), torch.tensor(seeds.transposed)
    xq, wq = quantize(x.detach(), "four_over_six"), quantize(model.weight.detach(), "four_over_six")
    w64, x64, e64 = (float64(t) for t in (model.weight, x, e))
    again = torch.ops.quartet.requantize
    rotated = [(plain, e64), (plain, decoded(wq)[0][:, :200].T), (turned, e64.T), (turned, decoded(xq)[0][:, :200].T)]
    packed = {
        "dx e": torch.ops.quartet.quantize_grad(e, plain, 0, "ms_eden", False), "dx w": again(*wq, 200, plain, 0, "ms_eden"),
        "dw e": torch.ops.quartet.quantize_grad(e, turned, 0, "ms_eden", True), "dw x": again(*xq, 200, turned, 0, "ms_eden"),
    }  # fmt: skip
    before = {use: (independent.rotate(t, int(s[0])), np.abs(t).max()) for use, (s, t) in zip(packed, rotated, strict=True)}
    before |= {"y x": (independent.pad(x64, 16), np.abs(x64).max()), "y w": (independent.pad(w64, 16), np.abs(w64).max())}
    packed |= {"y x": xq, "y w": wq}
    tolerance = pytest.approx
    for use, (t, amax) in before.items():
        q, largest = decoded(packed[use])
        r, numbers = only(observer, "(root)", use), np.count_nonzero(t)
        assert r.rule == ("four_over_six" if use[0] == "y" else "ms_eden")
        assert r.error == tolerance(((q - t) ** 2).sum() / (t**2).sum(), rel=1e-9), use
        assert r.gain == tolerance((q * t).sum() / (t**2).sum(), rel=1e-9), use
        assert r.cosine == tolerance((q * t).sum() / np.sqrt((t**2).sum() * (q**2).sum()), rel=1e-9), use
        assert r.saturated == tolerance(((np.abs(t) > largest) & (q != 0)).sum() / numbers, abs=1e-12), use
        assert r.underflowed == tolerance(((t != 0) & (q == 0)).sum() / numbers, abs=1e-12), use
        assert r.amax == tolerance(amax, rel=1e-7), use
    assert only(observer, "(root)", "y x").saturated > 0
    assert only(observer, "(root)", "y x").underflowed > only(observer, "(root)", "y w").underflowed + 0.05, "beside the outliers"
    for use, ours, exact in (("dx ", x.grad, e64 @ w64), ("dw ", model.weight.grad, e64.T @ x64)):
        r, ours64 = only(observer, "(root)", use), float64(ours)
        # The product that it is compared with is rounded to the dtype.
        rel = 1e-5 if dtype is torch.float32 else 1e-2
        assert r.error == tolerance(((ours64 - exact) ** 2).sum() / (exact**2).sum(), rel=rel), use
        assert r.cosine == tolerance((ours64 * exact).sum() / np.linalg.norm(ours64) / np.linalg.norm(exact), rel=rel / 100), use
        assert r.gain == tolerance((ours64 * exact).sum() / (exact**2).sum(), rel=rel / 10), use
        assert r.amax == tolerance(np.abs(exact).max(), rel=rel)
        assert (r.saturated, r.underflowed, r.rule) == (None, None, "")


def test_a_sample_of_rows_estimates_the_whole() -> None:
    """Rows are chosen at random: 32 of 512 tokens tell of the layer's error, whichever operand."""
    torch.manual_seed(1)
    results = []
    for elements in (None, 2**14):
        torch._dynamo.reset()
        torch.manual_seed(1)
        model, x = nn.Linear(512, 256), torch.randn(512, 512, requires_grad=True)
        compiled, observer = observed(model, elements=elements)
        y = compiled(x)
        y.backward(torch.randn_like(y))
        results.append({(r.product, r.operand): r for r in observer})
    for use, whole in results[0].items():
        few = results[1][use]
        assert few.elements <= 2**14 < whole.elements
        assert few.elements > 2**13
        assert few.error == pytest.approx(whole.error, rel=0.1), use
        if use in (("y", "x"), ("y", "w"), ("dx", "e"), ("dw", "e")):
            assert few.amax == whole.amax, "of the whole tensor"


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_numbers_that_are_not_finite_are_recorded_as_such(bad: float, tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(8, 64)
    compiled, observer = observed(model, file=tmp_path / "new" / "n.jsonl")
    x[3, 5] = bad
    compiled(x).sum().backward()
    r = only(observer, "0", "y x")
    assert repr(r.amax) == repr(bad)
    assert all(math.isnan(v) for v in (r.error, r.gain, r.cosine, r.saturated, r.underflowed))
    assert only(observer, "0", "y w").error < 0.01
    dw = only(observer, "0", "dw ")
    assert math.isnan(dw.cosine)
    again = quartet.read_observations(tmp_path / "new" / "n.jsonl")
    assert repr(list(again)) == repr(list(observer))
    assert "nan" in observer.table("0")


def test_a_zero_operand_has_no_relative_error() -> None:
    model = nn.Linear(64, 64)
    compiled, observer = observed(model)
    compiled(torch.zeros(8, 64)).sum().backward()
    r = only(observer, "(root)", "y x")
    assert (r.error, r.gain, r.cosine, r.saturated, r.underflowed, r.amax) == (None,) * 5 + (0.0,)
    assert only(observer, "(root)", "dw ").error is None
    assert " - " in observer.table()


@pytest.mark.parametrize("backend", [pytest.param("quartet", marks=pytest.mark.slow), "passes"])
@pytest.mark.parametrize("device", DEVICES)
def test_an_observed_step_has_the_bits_of_one_that_is_not(backend: str, device: str) -> None:
    """What is left of the random state, too."""
    model, x = mlp().to(device), torch.randn(32, 64, device=device, requires_grad=True)
    compiled = torch.compile(model, backend=Heard() if backend == "passes" else backend)
    plain = step(compiled, x)
    state = torch.get_rng_state()
    observer = quartet.observe(compiled, every=1, file=None)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(plain, step(compiled, x), strict=True))
        assert torch.equal(state, torch.get_rng_state())
    assert uses(observer.of(call=1)) == {"0": ALL, "2": ALL}
    observer.remove()
    assert all(torch.equal(a, b) for a, b in zip(plain, step(compiled, x), strict=True))
    assert len(observer) == 2 * 16


@pytest.mark.slow
def test_code_of_calls_that_are_not_observed_is_byte_for_byte_what_it_is_without_an_observer() -> None:
    model, x = nn.Linear(64, 64), torch.randn(8, 64, requires_grad=True)
    compiled = torch.compile(model, backend="quartet")
    with torch._inductor.config.patch(force_disable_caches=True):
        _, without = run_and_get_code(step, compiled, x)
        torch._dynamo.reset()
        quartet.observe(compiled, every=2, file=None)
        _, first = run_and_get_code(step, compiled, x)
        _, second = run_and_get_code(step, compiled, x)
    assert len(without) == 2, "forward and backward"
    # But for the number of the compilation in the process.
    assert [re.sub(r"^# AOT ID: \['\d+_", "", code) for code in without] == [re.sub(r"^# AOT ID: \['\d+_", "", code) for code in second]
    assert "observed" not in "".join(without)
    assert all("quartet.show.default(" in code and "quartet.measure_fresh.default(" in code for code in first)
    assert not re.search("(quantize|grad|matmul)_observed", "".join(first)), "they are for the joint graph"


@pytest.mark.usefixtures("fresh_caches")
def test_caches_serve_calls_that_are_not_observed_as_before_and_never_one_for_the_other() -> None:
    model, x = nn.Linear(64, 64), torch.randn(8, 64, requires_grad=True)
    compiled = torch.compile(model, backend="quartet")
    step(compiled, x)
    torch._dynamo.reset()
    found = []
    observer = quartet.observe(compiled, every=2, file=None)
    for _ in range(2):
        counters.clear()
        step(compiled, x)
        found.append((counters["aot_autograd"]["autograd_cache_miss"], counters["aot_autograd"]["autograd_cache_hit"]))
    assert found == [(1, 0), (0, 1)]
    torch._dynamo.reset()
    counters.clear()
    observer.calls = 0
    step(compiled, x)
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1, "the observed version is cached, too"
    assert uses(observer)["(root)"] == sorted(ALL * 2, key=ALL.index)


# ---------------------------------------------------------------- forms of a linear


@pytest.mark.parametrize("again", ["none", "weights", "operands"])
def test_operands_that_the_backward_pass_makes_again(again: str) -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    compiled, observer = observed(model, recompute=again)
    compiled(torch.randn(8, 64, requires_grad=True)).sum().backward()
    assert uses(observer) == {"0": ALL, "2": ALL}


def test_under_autocast_the_gradients_are_compared_with_products_in_bfloat16() -> None:
    model, x = nn.Linear(128, 64), torch.randn(256, 128, requires_grad=True)
    compiled, observer = observed(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(x)
    e = torch.randn_like(y)
    y.backward(e)
    assert uses(observer) == {"(root)": ALL}
    exact = float64(e.bfloat16()).T @ float64(x.bfloat16())
    ours = float64(model.weight.grad)
    expected = (ours * exact).sum() / np.linalg.norm(ours) / np.linalg.norm(exact)
    assert only(observer, "(root)", "dw ").cosine == pytest.approx(expected, abs=1e-5)


def test_a_weight_on_the_left_a_batch_a_convolution_and_dynamic_tokens() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.each = (nn.Parameter(torch.randn(*s)) for s in ((64, 64), (2, 64, 64)))
            self.pixels = nn.Conv2d(64, 64, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = (self.left @ x.t()).t()
            x = torch.bmm(torch.stack([x, 2 * x]), self.each)
            return self.pixels(x.transpose(1, 2).unsqueeze(-1))

    model = Model()
    backend = Heard()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    observer = quartet.observe(compiled, every=1, file=None)
    for tokens in (24, 40):
        compiled(torch.randn(tokens, 64, requires_grad=True)).square().sum().backward()
    for call in (0, 1):
        own = observer.of(call=call)
        assert uses(own) == {"left": ALL, "each[0]": ALL, "each[1]": ALL, "pixels": ALL}
        for record in own:
            assert record.cosine > 0.97, record
            assert record.error < 0.06, record


def test_operands_of_grouped_experts_are_measured_and_their_gradients_are_not_compared() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 64, 96, dtype=torch.bfloat16))

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return torch._grouped_mm(x, self.w, offs=ends)

    x, ends = torch.randn(40, 64).bfloat16().requires_grad_(), torch.tensor([10, 10, 40], dtype=torch.int32)
    compiled, observer = observed(Experts())
    compiled(x, ends).float().square().sum().backward()
    assert uses(observer) == {"w[0:3]": [use for use in ALL if not use.endswith(" ")]}
    assert all(5e-3 < r.error < 1.2e-2 for r in observer)
    assert all(r.underflowed < 0.2 for r in observer), "padded rows do not count"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_figures_are_those_of_a_cpu() -> None:
    """The same operands, all of them measured, but other seeds: errors are means over thousands of groups, so they differ by a percent."""
    model, x, e = nn.Linear(512, 256, bias=False), torch.randn(640, 512), torch.randn(640, 256)
    found = []
    for device in ("cpu", "cuda"):
        torch._dynamo.reset()
        own = x.to(device).requires_grad_()
        compiled = torch.compile(deepcopy(model).to(device), backend=Heard())
        observer = quartet.observe(compiled, file=None, elements=None)
        compiled(own).backward(e.to(device))
        found.append({(r.product, r.operand): r for r in observer})
    assert len(found[0]) == len(found[1]) == 8
    for use, here in found[0].items():
        there = found[1][use]
        assert there.elements == here.elements
        for name in ("error", "gain", "cosine", "saturated", "underflowed", "amax"):
            ours, theirs = getattr(here, name), getattr(there, name)
            assert ours is None if theirs is None else ours == pytest.approx(theirs, rel=0.03, abs=2e-3), (use, name)
