"""The operators of observed steps: kernels against the definition of their sums, and what passes make of the operators."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import expecttest
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton_support import DTYPES, INTERPRETED, NEEDS_GPU, SEEDS

from quartet_compile.kernels import measure, measure_ops, ops, philox, reference_ops  # noqa: F401  (registers operators)
from quartet_compile.kernels.format import Quantized
from quartet_compile.kernels.observed_ops import heard_by, label
from quartet_compile.kernels.value_ops import product_order, values_of
from quartet_compile.passes.emulate import EmulationPass
from quartet_compile.passes.native import NativePass
from quartet_compile.passes.show import ShowPass, show

quartet = torch.ops.quartet
DEVICES = ["interpreted"] if INTERPRETED else ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
SHAPES = ((37, 70), (130, 257), (128, 128), (1, 16), (16, 1))
CASES = [(dtype, shape, elements) for dtype in DTYPES for shape in SHAPES for elements in (0, 500)]
if INTERPRETED:
    CASES = [(dtype, SHAPES[0], 500) for dtype in DTYPES[:2]]  # half a minute each


def on(device: str, name: str, *arguments: Any) -> Tensor:
    """An operator of a device; interpreted, that of a GPU."""
    op = getattr(quartet, name).default
    if device == "interpreted":
        return ops.ON_GPU[op](*arguments)
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
    return op(*moved).cpu()


def hard(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers with an outlier, a column of zeros and rows of very different sizes."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    x *= torch.logspace(-3, 3, rows).unsqueeze(1)
    x[rows // 2, columns // 2] *= 100
    x[:, 0] = 0 if columns > 1 else 1
    return x.to(dtype)


def assert_close(sums: Tensor, expected: Tensor, exact: bool) -> None:
    """The same sums, but for float32 additions in rotations, which turn some zeros into numbers and move some numbers over a bound."""
    totals = torch.cat([sums[:, :7].sum(0), sums[:, 7].amax(0, keepdim=True), sums[:, 8].sum(0, keepdim=True)])
    counted = expected[0, 4:7]
    torch.testing.assert_close(totals[:4], expected[0, :4], rtol=1e-12 if exact else 1e-5, atol=0)
    torch.testing.assert_close(totals[4:7], counted, rtol=0, atol=0 if exact else 2 + 2e-3 * float(expected[0, 8]))
    torch.testing.assert_close(totals[7:], expected[0, 7:], rtol=1e-7, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "shape", "elements"), CASES)
def test_kernels_measure_what_the_definition_says(dtype: torch.dtype, shape: tuple[int, int], elements: int, device: str) -> None:
    """Fresh operands in both orientations, rotated or not, saved ones, and products, of some rows and of all."""
    x, seeds, index = hard(*shape, dtype), torch.tensor(SEEDS), 1
    signs = philox.rotation_signs(philox.seed_for_rank(SEEDS[index], 0))
    rows, across = (measure.chosen_rows(s[0], measure.chosen(s, elements)) for s in (shape, shape[::-1]))
    packed = reference_ops.quantize(x, "four_over_six")
    amax = x.float().abs().max()
    assert device == "interpreted" or on(device, "largest", x) == on(device, "largest", x.t()) == amax
    assert_close(
        on(device, "measure_fresh", x, amax, False, *packed, None, 0, elements),
        measure.fresh_sums(x, rows, amax, measure.rows_of_packed(Quantized(*packed), rows), None), exact=True,
    )  # fmt: skip
    exact = device == "cpu"
    for transposed, some in ((False, rows), (True, across)):
        e = reference_ops.quantize_grad(x, seeds, index, "ms_eden", transposed, 0)
        expected = measure.fresh_sums(x.t() if transposed else x, some, amax, measure.rows_of_packed(Quantized(*e), some), signs)
        assert_close(on(device, "measure_fresh", x, amax, transposed, *e, seeds, index, elements), expected, exact)
        values = product_order(values_of(*e, scale=1 / 128))
        ours = on(device, "measure_fresh_values", x, amax, transposed, values, 1 / 128, seeds, index, "ms_eden", elements)
        assert_close(ours, expected, exact)
    again = reference_ops.requantize(*packed, shape[1], seeds, index, "ms_eden", 0)
    expected = measure.saved_sums(Quantized(*packed), across, measure.rows_of_packed(Quantized(*again), across), signs)
    assert_close(on(device, "measure_saved", *packed, shape[1], *again, seeds, index, elements), expected, exact)
    values = product_order(values_of(*again))
    assert_close(on(device, "measure_saved_values", *packed, shape[1], values, seeds, index, "ms_eden", elements), expected, exact)
    saved, result = torch.randn(shape[1], 24).to(dtype), torch.randn(shape[0], 24).to(dtype)
    some = measure.chosen_rows(shape[0], measure.chosen((shape[0], 24), elements))
    product = (x.float().index_select(0, some) @ saved.float()).to(dtype)
    for swapped, transposed in ((False, False), (True, True)):
        ours = result.t().contiguous() if swapped else result
        sums = on(device, "measure_product", ours, swapped, x.t() if transposed else x, transposed, saved, elements)
        # On a GPU the product is rounded from sums in another order.
        expected = measure.product_sums(result, some, product)
        if exact:
            assert_close(sums, expected, exact=True)
        else:
            torch.testing.assert_close(sums.sum(0)[:4], expected[0, :4], rtol=1e-2, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_stays(device: str) -> None:
    """Wherever it stands."""
    for place in (0, 9, 20, 39):
        x = torch.randn(4, 40)
        x[2, place] = math.nan
        saved = torch.eye(40)
        assert on(device, "measure_product", x, False, x, False, saved, 0)[:, 7].amax().isnan()
        assert device == "interpreted" or on(device, "largest", x).isnan()


@pytest.mark.skipif(INTERPRETED, reason="the kernels of a CPU")
def test_without_a_compiler_a_cpu_measures_by_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARTET_CPU_KERNELS", "reference")
    test_kernels_measure_what_the_definition_says(torch.bfloat16, (37, 70), 500, "cpu")


def test_rows_are_chosen_at_random_one_of_each_stretch() -> None:
    for count, few in ((1000, 1000), (1000, 100), (997, 61), (5, 1), (0, 0)):
        rows = measure.chosen_rows(count, few)
        assert rows.tolist() == sorted(set(rows.tolist()))
        stretches = [(i * count // few, (i + 1) * count // few) for i in range(few)]
        assert all(start <= row < end for row, (start, end) in zip(rows.tolist(), stretches, strict=True))
    places = (measure.chosen_rows(100_000, 1000) % 100).bincount(minlength=100)
    assert places.max() < 30, "1000 balls in 100 urns"
    assert [measure.chosen((100, 64), n) for n in (0, 1, 640, 10**6)] == [100, 1, 10, 100]


# ---------------------------------------------------------------- operators


class Ear:
    """Remembers what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[list[str], Tensor]] = []

    def take(self, labels: list[str], sums: Tensor) -> None:
        self.heard.append((labels, sums))


def a_step(x: Tensor, w: Tensor, e: Tensor, seeds: Tensor) -> list[Tensor]:
    """The operators of an observed step of one linear, as the passes write them."""
    call = quartet.observed_call(x)
    packed_x, packed_w = (quartet.quantize_observed(t, "four_over_six", 512, call, [f"y {role} l"]) for t, role in ((x, "x"), (w, "w")))
    y = quartet.matmul(*packed_x, *packed_w, None, 1.0, x.dtype)
    packed_e = quartet.quantize_grad_observed(e, seeds, 0, "ms_eden", False, 512, call, ["dx e l"])
    again = quartet.requantize_observed(*packed_w, w.shape[1], seeds, 0, "ms_eden", 512, call, ["dx w l"])
    return [call, y, quartet.matmul_observed(*packed_e, *again, None, 1 / 128, x.dtype, e, False, w, False, 512, call, ["dx - l"])]


def inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.randn(24, 80), torch.randn(40, 80), torch.randn(24, 40), torch.tensor([3])


def shown(program: Callable[..., Any], *arguments: Tensor) -> torch.fx.GraphModule:
    graph = make_fx(program, tracing_mode="fake")(*arguments)
    show(graph.graph)
    graph.recompile()
    return graph


LABELS = [label("four_over_six", ["y x l"]), label("four_over_six", ["y w l"]), label("ms_eden", ["dx e l"]), label("ms_eden", ["dx w l"])]
LABELS.append(label("", ["dx - l"]))


def test_split_graphs_compute_and_show_what_the_observed_operators_do() -> None:
    arguments = inputs()
    both: list[tuple[list[Tensor], Ear]] = []
    for program in (a_step, shown(a_step, *arguments)):
        ear = Ear()
        with heard_by(ear):
            both.append((program(*arguments), ear))
    (eager, one_by_one), (split, together) = both
    assert all(torch.equal(a, b) for a, b in zip(eager[1:], split[1:], strict=True))
    assert [labels for labels, _ in one_by_one.heard] == [[each] for each in LABELS]
    ((labels, sums),) = together.heard
    assert labels == LABELS
    assert torch.equal(sums, torch.cat([s for _, s in one_by_one.heard]))


def test_where_values_are_multiplied_the_sums_are_those_of_the_packed_matrices() -> None:
    arguments = inputs()
    graph = shown(a_step, *arguments)
    heard = []
    for each in (graph, emulated(graph)):
        ear = Ear()
        with heard_by(ear):
            each(*arguments)
        heard.append(ear.heard)
    ((labels, sums),), ((same_labels, same_sums),) = heard
    assert labels == same_labels
    torch.testing.assert_close(same_sums, sums, rtol=1e-12, atol=0)
    assert "measure_saved_values" in emulated(graph).code


def emulated(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    copy = deepcopy(graph)
    EmulationPass(lambda device: False)(copy.graph)
    copy.recompile()
    return copy


def test_nobody_hears_of_a_call_of_nobody() -> None:
    ear = Ear()
    with heard_by(ear):
        pass
    call, *_ = a_step(*inputs())
    assert call == 0
    assert not ear.heard


def folded(code: str) -> str:
    """A graph without what is deleted after each line, and with packed matrices as ``*name``."""
    lines = [re.sub(r"; .* = None|  # .*", "", line).strip().replace("torch.ops.", "") for line in code.splitlines()]
    parts: dict[str, str] = {}
    for line in lines:
        if found := re.fullmatch(r"(\w+) = (\w+)\[\d\]", line):
            parts[found[1]] = found[2]
    text = "\n".join(line for line in lines if line and not re.fullmatch(r"\w+ = (\w+)\[\d\]", line))
    for name in sorted(parts, key=len, reverse=True):
        text = re.sub(rf"\b{name}\b", f"*{parts[name]}", text)
    return re.sub(r"(\*\w+), \1, \1", r"\1", text)


class TestSnapshots(expecttest.TestCase):
    maxDiff = None

    def test_plain_operators_and_their_sums_shown_at_the_end(self) -> None:
        self.assertExpectedInline(folded(shown(a_step, *inputs()).code), """\
def forward(self, x_1, w_1, e_1, seeds_1) -> _list_Tensor_:
observed_call = quartet.observed_call.default(x_1)
largest = quartet.largest.default(x_1)
quantize = quartet.quantize.default(x_1, 'four_over_six')
sums = quartet.measure_fresh.default(x_1, largest, False, *quantize, None, 0, 512)
largest_1 = quartet.largest.default(w_1)
quantize_1 = quartet.quantize.default(w_1, 'four_over_six')
sums_1 = quartet.measure_fresh.default(w_1, largest_1, False, *quantize_1, None, 0, 512)
matmul = quartet.matmul.default(*quantize, *quantize_1, None, 1.0, torch.float32)
largest_2 = quartet.largest.default(e_1)
quantize_grad = quartet.quantize_grad.default(e_1, seeds_1, 0, 'ms_eden', False)
sums_2 = quartet.measure_fresh.default(e_1, largest_2, False, *quantize_grad, seeds_1, 0, 512)
requantize = quartet.requantize.default(*quantize_1, 80, seeds_1, 0, 'ms_eden')
sums_3 = quartet.measure_saved.default(*quantize_1, 80, *requantize, seeds_1, 0, 512)
matmul_1 = quartet.matmul.default(*quantize_grad, *requantize, None, 0.0078125, torch.float32)
sums_4 = quartet.measure_product.default(matmul_1, False, e_1, False, w_1, 512)
seen = aten.empty.memory_format([0], device = device(type='cpu'))
show = quartet.show.default(seen, observed_call, [sums, sums_1, sums_2, sums_3, sums_4], ['four_over_six\\ny x l', 'four_over_six\\ny w l', 'ms_eden\\ndx e l', 'ms_eden\\ndx w l', '\\ndx - l'])
return [observed_call, matmul, matmul_1]""")


def test_operators_agree_with_their_shapes() -> None:
    x, w, e, seeds = inputs()
    call = quartet.observed_call(x)
    saved = quartet.quantize(w, "four_over_six")
    left, right = quartet.quantize_grad(e, seeds, 0, "ms_eden", False), quartet.requantize(*saved, 80, seeds, 0, "ms_eden")
    dx = quartet.matmul(*left, *right, None, 1 / 128, x.dtype)
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    check = functools.partial(torch.library.opcheck, test_utils=tests)
    check(quartet.observed_call.default, (x,))
    check(quartet.quantize_observed.default, (x, "four_over_six", 0, call, ["y x l"]))
    check(quartet.quantize_grad_observed.default, (e, seeds, 0, "ms_eden", True, 9, call, ["dw e l"]))
    check(quartet.requantize_observed.default, (*saved, 80, seeds, 0, "ms_eden", 0, call, ["dx w l"]))
    check(quartet.matmul_observed.default, (*left, *right, None, 1 / 128, x.dtype, e, False, w, False, 0, call, ["dx - l"]))
    amax = quartet.largest(e)
    check(quartet.largest.default, (e,))
    check(quartet.measure_fresh.default, (e, amax, False, *left, seeds, 0, 9))
    check(quartet.measure_saved.default, (*saved, 80, *right, seeds, 0, 0))
    values = product_order(values_of(*left)), product_order(values_of(*right))
    check(quartet.measure_fresh_values.default, (e, amax, False, values[0], 1.0, seeds, 0, "ms_eden", 9))
    check(quartet.measure_saved_values.default, (*saved, 80, values[1], seeds, 0, "ms_eden", 0))
    check(quartet.measure_product.default, (dx, False, e, False, w, 0))
    with FakeTensorMode(), pytest.raises(ValueError, match="1 sums and 2 labels"):
        quartet.show(torch.empty(0), torch.empty(0), [torch.empty(1, 9)], ["a", "b"])


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("capability", [90, 100])
def test_inductor_generates_an_observed_step_for_a_gpu(capability: int) -> None:
    """Plain operators as on any step, their sums, and one call that shows them; nothing is moved between the CPU and the GPU."""
    pytest.importorskip("triton")
    from fake_gpu import fake_gpu, generate

    def on_gpu() -> list[Tensor]:
        shapes = ((256, 128), (384, 128), (256, 384))
        tensors = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
        return [*tensors, torch.empty(1, dtype=torch.int64, device="cuda")]

    with fake_gpu(capability):
        program, _ = generate(a_step, on_gpu, [ShowPass(), EmulationPass(), NativePass()])
    values = ("measure_fresh_values", "measure_saved_values") if capability == 90 else ("measure_saved",)
    for operator in ("observed_call", "measure_fresh", *values, "measure_product", "show"):
        assert f"torch.ops.quartet.{operator}.default(" in program
    assert ("torch.ops.quartet.requantize.default(" in program) == (capability == 100), "only where the product reads it"
    assert program.count("torch.ops.quartet.show.default(") == 1
    assert "_observed" not in program
    assert ".copy_(" not in program
