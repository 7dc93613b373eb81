"""Numerics while training: the figures are right, belong to the right layer and call, and change nothing."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import float64_recipe as independent
import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed_support import KINDS, RANKS, join, model_and_batch, on_all_ranks, parallel
from support import float64, one_seed, recorded_seeds, relative_error
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import quartet_compile as quartet
from quartet_compile import observer as observing
from quartet_compile.backend import active_scope, parameter_names
from quartet_compile.capture import GraphCapture
from quartet_compile.kernels import measure, philox, reference
from quartet_compile.options import split_options


class Heard(GraphCapture):
    """The passes and the partitioner as `support.capture` has them, and graphs that observers hear of as the backend makes them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(split_options({f"quartet.{k}": v for k, v in options.items()})[0])

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        names = parameter_names(gm, example_inputs)
        compiled = super().__call__(gm, example_inputs)
        return observing.heard(compiled, names) if active_scope().observed else compiled


def observed(model: Any, every: int = 1, elements: int | None = None, file: Any = None, **options: Any) -> tuple[Any, quartet.Observer]:
    compiled = torch.compile(model, backend=Heard(**options))
    return compiled, quartet.observe(compiled, every, file, elements=elements)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))


ALL = ["y x", "y w", "dx e", "dx w", "dx ", "dw e", "dw x", "dw "]
FIRST = [use for use in ALL if not use.startswith("dx")]
"""What is recorded of a linear, and of one whose input takes no gradient."""


def uses(records: Sequence[quartet.Observation]) -> dict[str, list[str]]:
    """What was recorded of each linear, in the order of `ALL`."""
    found: dict[str, list[str]] = {}
    for r in records:
        found.setdefault(r.linear, []).append(f"{r.product} {r.operand}")
    return {linear: sorted(own, key=ALL.index) for linear, own in found.items()}


def only(records: quartet.Observations, linear: str, use: str) -> quartet.Observation:
    (record,) = records.of(linear, product=use.split(" ")[0], operand=use.split(" ")[1])
    return record


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


def test_seeds_and_rotations_of_several_samples_are_those_of_the_reference() -> None:
    seeds = torch.tensor([-(2**63), -1, 0, 5, 2**63 - 1])
    for rank in (0, 1, 7, 4095):
        ours = philox.signed_seeds(seeds, rank).tolist()
        assert [s % 2**64 for s in ours] == [philox.seed_for_rank(s % 2**64, rank) for s in seeds.tolist()]
    x = torch.randn(5, 3, 200, dtype=torch.float64)
    signs = philox.rotations_signs(seeds, torch.zeros_like(seeds))
    for row, matrix, seed in zip(measure.rotate(x, signs), x, seeds.tolist(), strict=True):
        torch.testing.assert_close(row, reference.rotate(matrix, philox.rotation_signs(seed)), rtol=1e-12, atol=1e-12)


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


# ---------------------------------------------------------------- nothing changes


def step(compiled: Any, x: Tensor, seed: int = 7) -> list[Tensor]:
    torch.manual_seed(seed)
    x.grad = None
    model = getattr(compiled, "_orig_mod", compiled)
    model.zero_grad()
    y = compiled(x)
    y.square().mean().backward()
    return [y.detach().clone(), x.grad.clone(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("backend", [pytest.param("quartet", marks=pytest.mark.slow), "passes"])
def test_an_observed_step_has_the_bits_of_one_that_is_not(backend: str) -> None:
    """What is left of the random state, too."""
    model, x = mlp(), torch.randn(32, 64, requires_grad=True)
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
    assert all("observed" in code for code in first)


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


# ---------------------------------------------------------------- operators


def a_step(x: Tensor, w: Tensor, e: Tensor, seeds: Tensor) -> list[Tensor]:
    """The operators of an observed step of one linear, as the passes write them."""
    q = torch.ops.quartet
    call = q.observed_call(x)
    packed_x, packed_w = (q.quantize_observed(t, "four_over_six", call, [f"y {role} l"]) for t, role in ((x, "x"), (w, "w")))
    y = q.matmul(*packed_x, *packed_w, None, 1.0, x.dtype)
    packed_e = q.quantize_grad_observed(e, seeds, 0, "ms_eden", False, call, ["dx e l"])
    again = q.requantize_observed(*packed_w, w.shape[1], seeds, 0, "ms_eden", call, ["dx w l"])
    return [call, y, q.matmul_observed(*packed_e, *again, None, 1 / 128, x.dtype, e, False, w, False, call, ["dx - l"])]


def test_operators_agree_with_their_shapes_and_are_silent_where_nobody_listens() -> None:
    x, w, e, seeds = torch.randn(24, 80), torch.randn(40, 80), torch.randn(24, 40), torch.tensor([3])
    quartet_ops, (call, y, dx) = torch.ops.quartet, a_step(x, w, e, seeds)
    assert call == 0
    saved = quartet_ops.quantize(w, "four_over_six")
    left, right = quartet_ops.quantize_grad(e, seeds, 0, "ms_eden", False), quartet_ops.requantize(*saved, 80, seeds, 0, "ms_eden")
    assert torch.equal(y, quartet_ops.matmul(*quartet_ops.quantize(x, "four_over_six"), *saved, None, 1.0, x.dtype))
    assert torch.equal(dx, quartet_ops.matmul(*left, *right, None, 1 / 128, x.dtype))
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    check = functools.partial(torch.library.opcheck, test_utils=tests)
    check(quartet_ops.observed_call.default, (x,))
    check(quartet_ops.quantize_observed.default, (x, "four_over_six", call, ["y x l"]))
    check(quartet_ops.quantize_grad_observed.default, (e, seeds, 0, "ms_eden", True, call, ["dw e l"]))
    check(quartet_ops.requantize_observed.default, (*saved, 80, seeds, 0, "ms_eden", call, ["dx w l"]))
    check(quartet_ops.matmul_observed.default, (*left, *right, None, 1 / 128, x.dtype, e, False, w, False, call, ["dx - l"]))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("capability", [90, 100])
def test_inductor_generates_an_observed_step_for_a_gpu(capability: int) -> None:
    """The number of the call stays on the CPU; nothing between the operators is moved."""
    pytest.importorskip("triton")
    from fake_gpu import fake_gpu, generate

    def inputs() -> list[Tensor]:
        shapes = ((256, 128), (384, 128), (256, 384))
        tensors = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
        return [*tensors, torch.empty(1, dtype=torch.int64, device="cuda")]

    with fake_gpu(capability):
        program, _ = generate(a_step, inputs)
    for operator in ("observed_call", "quantize_observed", "quantize_grad_observed", "requantize_observed", "matmul_observed"):
        assert f"torch.ops.quartet.{operator}.default(" in program
    assert "['dx - l']" in program
    assert ".copy_(" not in program


# ---------------------------------------------------------------- which calls


def test_every_nth_call_in_training_with_gradients_is_observed() -> None:
    model, x = mlp(), torch.randn(8, 64)
    compiled, observer = observed(model, every=3)
    for _ in range(5):
        compiled(x).sum().backward()
        with torch.no_grad():
            compiled(x)
        compiled.eval()
        compiled(x)
        compiled.train()
    assert sorted({r.call for r in observer}) == [0, 3]
    assert uses(observer.of(call=3)) == {"0": FIRST, "2": ALL}
    assert observer.calls == 5


def test_two_forward_passes_before_their_backward_passes() -> None:
    """Each figure is of the call that it belongs to: the second input is another one."""
    model, a, b = nn.Linear(64, 64), torch.randn(8, 64), 3 * torch.randn(8, 64)
    compiled, observer = observed(model)
    first, second = compiled(a), compiled(b)
    second.sum().backward()
    (5 * first).sum().backward()
    for call, x, e in ((0, a, 5), (1, b, 1)):
        own = observer.of(call=call)
        assert uses(own) == {"(root)": FIRST}
        assert only(own, "(root)", "y x").amax == x.abs().max()
        assert only(own, "(root)", "dw e").amax == e
    assert observer.table().splitlines()[0] == "quartet: call 1, 1 linears"


def test_of_two_backward_passes_of_one_call_the_first_is_recorded() -> None:
    model = nn.Linear(64, 64)
    compiled, observer = observed(model)
    y = compiled(torch.randn(8, 64))
    y.sum().backward(retain_graph=True)
    (3 * y).sum().backward()
    assert uses(observer) == {"(root)": FIRST}
    assert only(observer, "(root)", "dw e").amax == 1


# ---------------------------------------------------------------- which layers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


NAMES = [f"blocks.{i}.{name}" for i in range(3) for name in ("up", "down")]


def scaled_stack() -> Stack:
    """Weights of different size in each block, to tell them apart."""
    net = Stack()
    for i, block in enumerate(net.blocks):
        nn.init.uniform_(block.up.weight, -(10.0**-i), 10.0**-i)
    return net


def check_stack(net: Stack, observer: quartet.Observer, first: list[str]) -> None:
    assert uses(observer) == {name: first if name == NAMES[0] else ALL for name in NAMES}
    for i, block in enumerate(net.blocks):
        for use in ("y w", "dx w") if f"blocks.{i}.up" != NAMES[0] or first == ALL else ("y w",):
            record = only(observer, f"blocks.{i}.up", use)
            assert record.amax == pytest.approx(float(block.up.weight.detach().abs().max()), rel=0.15 if record.product == "dx" else 1e-6)


@pytest.mark.parametrize("how", ["compile", "torch.compile", "whole"])
def test_blocks_that_share_a_graph_are_told_apart(how: str) -> None:
    net, backend = scaled_stack(), Heard()
    compiled: nn.Module = net
    if how == "compile":
        for block in net.blocks:
            block.compile(backend=backend)
    elif how == "torch.compile":
        net.blocks = nn.ModuleList(torch.compile(block, backend=backend) for block in net.blocks)
    else:
        net.compile(backend=backend)
    observer = quartet.observe(compiled, every=2, file=None)
    for _ in range(2):
        compiled(torch.randn(8, 64)).sum().backward()
    check_stack(net, observer, FIRST)
    assert {r.call for r in observer} == {0}
    assert [line.split()[0] for line in observer.table().splitlines()[3:9]] == NAMES


class CheckpointedBlock(Block):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


class CheckpointedStack(Stack):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("how", ["in compiled blocks", "of compiled blocks", "of compiled blocks in wrappers"])
def test_checkpointed_layers_are_recorded_once(how: str, reentrant: bool) -> None:
    """The forward pass that runs again in the backward pass is observed as the first one was."""
    net, backend = scaled_stack(), Heard()
    for block in net.blocks:
        block.compile(backend=backend)
        if how == "in compiled blocks":
            block.__class__, block.reentrant = CheckpointedBlock, reentrant
    if how == "of compiled blocks":
        net.__class__, net.reentrant = CheckpointedStack, reentrant
    if how == "of compiled blocks in wrappers":
        kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
        net.blocks = nn.ModuleList(checkpoint_wrapper(block, kind) for block in net.blocks)
    observer, x = quartet.observe(net, every=2, file=None), torch.randn(8, 64, requires_grad=True)
    steps = [step(net, x) for _ in range(3)]
    for other in steps[1:]:
        assert all(torch.equal(a, b) for a, b in zip(steps[0], other, strict=True))
    assert sorted({r.call for r in observer}) == [0, 2]
    check_stack(net, observer.of(call=0), ALL)
    check_stack(net, observer.of(call=2), ALL)


def test_layers_behind_a_graph_break_and_linears_that_share_an_input() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.out = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.q(x) + self.k(x)
            torch._dynamo.graph_break()
            return self.out(torch.tanh(y))

    compiled, observer = observed(Model())
    compiled(torch.randn(8, 64)).sum().backward()
    assert uses(observer) == {"q": FIRST, "k": FIRST, "out": ALL}
    for use in ("y x", "dw x"):
        q, k = (only(observer, name, use) for name in "qk")
        assert (q.error, q.gain) == (k.error, k.gain), "one tensor, measured once"


def test_a_compiled_function() -> None:
    model = mlp()
    compiled = torch.compile(lambda x: model(x).square(), backend=Heard())
    observer = quartet.observe(compiled, every=1, file=None)
    observer(torch.randn(8, 64)).sum().backward()
    assert uses(observer) == {"0": FIRST, "2": ALL}
    observer.remove()
    observer(torch.randn(8, 64)).sum().backward()
    assert len(observer) == 13


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


# ---------------------------------------------------------------- several processes, GPUs


def train_observed(rank: int, kind: str, device_type: str, port: int, folder: str) -> None:
    """Two steps of one rank, the first of them observed, with the same seeds; gradients and names go to files."""
    device = join(rank, device_type, port)
    torch.save(two_steps(rank, kind, device, folder), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def two_steps(rank: int, kind: str, device: torch.device, folder: str) -> list[Tensor]:
    """The gradients. Model and observer go before the process group does, see `distributed_support.one_step`."""
    net, x = model_and_batch(rank, device)
    with torch.no_grad():
        for i, block in enumerate(net.blocks):
            block.linear.weight.uniform_(-(10.0**-i), 10.0**-i)
    model = parallel(net, kind, device)
    observer = quartet.observe(model, every=2, file=Path(folder, "n.jsonl"))
    results = []
    for _ in range(2):
        net.zero_grad()
        with one_seed():
            model(x).square().mean().backward()
        gradients: list[Any] = [p.grad for p in net.parameters()]
        results += [(g.full_tensor() if hasattr(g, "full_tensor") else g).cpu() for g in gradients]
    observer.remove()
    return results


def check_two_ranks(kind: str, device_type: str, folder: Path) -> None:
    together = on_all_ranks(train_observed, folder, kind, device_type)
    for first, second in zip(together[0][:8], together[0][8:], strict=True):
        if device_type == "cpu":
            assert torch.equal(first, second), "the observed step is like the other one"
        else:
            assert relative_error(first, second) < 1e-3
    prefix = "module." if kind == "ddp" else ""
    both = [quartet.read_observations(folder / f"n.rank{rank}.jsonl") for rank in range(RANKS)]
    for rank, own in enumerate(both):
        assert {(r.rank, r.call) for r in own} == {(rank, 0)}
        expected = {f"{prefix}blocks.{i}.linear": ALL if i else FIRST for i in range(4)}
        assert uses(own) == expected
        for i in range(4):
            assert only(own, f"{prefix}blocks.{i}.linear", "y w").amax == pytest.approx(10.0**-i, rel=0.01)
    x = [only(own, f"{prefix}blocks.0.linear", "y x") for own in both]
    assert x[0].error != x[1].error, "tokens of its own"


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.feature("Several processes", "observed numerics: {kind}")
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.exhaustive) if kind == "fsdp2" else kind for kind in KINDS])
def test_each_rank_records_its_own_numbers_under_the_names_of_the_model(kind: str, tmp_path: Path) -> None:
    check_two_ranks(kind, "cpu", tmp_path)


@pytest.mark.gpu
@pytest.mark.two_gpus
@pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs")
@pytest.mark.feature("Several processes", "observed numerics: {kind}")
@pytest.mark.parametrize("kind", KINDS)
def test_each_gpu_records_its_own_numbers(kind: str, tmp_path: Path) -> None:
    check_two_ranks(kind, "cuda", tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.feature("Ways to compile", "observed numerics beside CUDA graphs (reduce-overhead)")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_on_a_gpu_every_observed_step_is_recorded_and_the_others_run_as_ever(mode: str | None) -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda()
    x = torch.randn(2048, 256, device="cuda", requires_grad=True)
    compiled = torch.compile(model, backend="quartet", options={"quartet.mode": mode})
    observer = quartet.observe(compiled, every=4, file=None, elements=None)
    results = []
    for _ in range(10):
        torch.compiler.cudagraph_mark_step_begin()
        with one_seed():  # rotations are drawn in the graph, but these take what they are given
            results.append(step(compiled, x))
    assert {r.call for r in observer} == {0, 4, 8}
    for call in (0, 4, 8):
        assert uses(observer.of(call=call)) == {"0": ALL, "2": ALL}
    for r in observer:
        assert math.isfinite(r.error)
        if (r.linear, r.product, r.operand) == ("0", "y", "x"):
            assert r.error == pytest.approx(7.562e-3, rel=0.01)
    # In another order of additions; noise would differ by 0.1 in every gradient.
    for other in results[1:4]:
        assert relative_error(other[0], results[0][0]) < 1e-5
        for ours, observed in zip(other[1:], results[0][1:], strict=True):
            assert relative_error(ours, observed) < 1e-2


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


# ---------------------------------------------------------------- what the user sees


def test_remove_leaves_everything_as_it_was() -> None:
    for make in (lambda: torch.compile(mlp(), backend=Heard()), lambda: _compiled(mlp()), _regional):
        model = make()
        before = [dict(m.__dict__) for m in model.modules()], [dict(m._forward_pre_hooks) for m in model.modules()]
        observer = quartet.observe(model, every=1, file=None)
        assert before[0] != [dict(m.__dict__) for m in model.modules()]
        model(torch.randn(8, 64)).sum().backward()
        observer.remove()
        count = len(observer)
        assert count > 0
        model.zero_grad()
        observer.remove()
        assert before[1] == [dict(m._forward_pre_hooks) for m in model.modules()]
        for m, state in zip(model.modules(), before[0], strict=True):
            assert all(m.__dict__[k] is v for k, v in state.items() if k in ("forward", "_compiled_call_impl"))
            assert set(m.__dict__) == set(state)
        model(torch.randn(8, 64)).sum().backward()
        assert len(observer) == count


def _compiled(model: nn.Module) -> nn.Module:
    model.compile(backend=Heard())
    return model


def _regional() -> nn.Module:
    net = Stack()
    for block in net.blocks:
        block.compile(backend=Heard())
    return net


@pytest.mark.parametrize("make", [lambda: torch.compile(mlp(), backend=Heard()), lambda: _compiled(mlp()), lambda: _regional()])
def test_a_model_has_one_observer_at_a_time(make: Callable[[], nn.Module]) -> None:
    model = make()
    first = quartet.observe(model, file=None)
    with pytest.raises(ValueError, match="is observed already"):
        quartet.observe(model, file=None)
    first.remove()
    quartet.observe(model, file=None)


def test_lines_of_json_come_back_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "n.jsonl"
    compiled, observer = observed(mlp(), every=2, file=file)
    for _ in range(3):
        compiled(torch.randn(8, 64)).sum().backward()
    assert len(file.read_text().splitlines()) == 13, "the call before the last one is written, the last one not yet"
    observer.remove()
    lines = file.read_text().splitlines()
    assert len(lines) == 26
    for line in lines:
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = quartet.read_observations(file)
    assert list(again) == list(observer)
    assert again.table() == str(observer)
    assert {r.call for r in again.of("0", product="dw", operand="")} == {0, 2}


@pytest.mark.slow
def test_what_is_left_at_the_end_of_the_process_is_written(tmp_path: Path) -> None:
    code = (
        "import torch, quartet_compile as quartet; from test_observe import Heard, mlp\n"
        "model = torch.compile(mlp(), backend=Heard()); quartet.observe(model)\n"
        "model(torch.randn(8, 64)).sum().backward()"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    assert uses(quartet.read_observations(tmp_path / "numerics.jsonl")) == {"0": FIRST, "2": ALL}


def observation(**fields: Any) -> quartet.Observation:
    base = {
        "call": 0, "rank": 0, "linear": "a", "product": "y", "operand": "x", "rule": "four_over_six", "error": 7.5e-3, "gain": 1.0,
        "cosine": 0.9962, "saturated": 0.02, "underflowed": 0.05, "amax": 3.0, "elements": 4096,
    }  # fmt: skip
    return quartet.Observation(**(base | fields))


def test_a_table_has_one_line_a_linear_and_the_worst_of_all_ranks() -> None:
    result = {"operand": "", "rule": "", "saturated": None, "underflowed": None}
    records = quartet.Observations([
        observation(), observation(rank=1, error=8.5e-3, amax=4.0),
        observation(product="dw", cosine=0.98, gain=1.01, **result), observation(product="dw", rank=1, cosine=0.97, gain=0.99, **result),
        observation(linear="b", underflowed=0.25), observation(linear="b", product="dx", operand="w", saturated=0.04),
        observation(call=1),
    ])  # fmt: skip
    first, _, header, a, b, *_ = records.table().splitlines()
    assert first == "quartet: call 0, 2 linears, the worst of 2 ranks"
    titles = re.split(r" {2,}", header)
    cells = [dict(zip(titles, line.split(), strict=True)) for line in (a, b)]
    assert cells[0] == dict.fromkeys(titles, "-") | {
        "linear": "a", "y:x": "8.50", "cos dw": "0.9700", "gain dw": "0.9900", "sat%": "2.00", "zero%": "5.00", "max x": "4"
    }  # fmt: skip
    assert cells[1] == dict.fromkeys(titles, "-") | {
        "linear": "b", "y:x": "7.50", "dx:w": "7.50", "sat%": "4.00", "zero%": "25.00", "max x": "3"
    }  # fmt: skip
    assert records.table(call=1).splitlines()[0] == "quartet: call 1, 1 linears"
    assert "b" not in [line.split(" ")[0] for line in records.table("a").splitlines()]
    assert quartet.Observations().table() == "quartet: nothing observed yet"


def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = [observation(call=call, error=e) for call, e in ((0, 1e-2), (100, math.nan), (200, None))]
    quartet.Observations(records).plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing observed of linears that match 'z'"):
        quartet.Observations(records).plot(tmp_path / "plot.png", "z")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RuntimeError, match="pip install matplotlib"):
        quartet.Observations([observation()]).plot(tmp_path / "plot.png")


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="no part of Sequential is compiled"):
        quartet.observe(mlp())
    with pytest.raises(TypeError, match=r"takes what torch.compile returned"):
        quartet.observe(print)
    for options in ({"every": 0}, {"every": 1.5}, {"every": None}, {"elements": -1}, {"elements": True}):
        with pytest.raises(ValueError, match=next(iter(options))):
            quartet.observe(torch.compile(mlp(), backend="quartet"), **options)
    _, observer = observed(mlp())
    with pytest.raises(TypeError, match="call the module as before"):
        observer(torch.randn(8, 64))


def test_a_model_without_linears_in_nvfp4_is_told(caplog: pytest.LogCaptureFixture) -> None:
    compiled = torch.compile(mlp(), backend="eager")
    quartet.observe(compiled, every=2, file=None)
    for _ in range(3):
        compiled(torch.randn(8, 64)).sum().backward()
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "observe" in r.getMessage()]
    assert lines == ["quartet.observe: call 0 was to be observed, but no linear in NVFP4 ran in it"]
