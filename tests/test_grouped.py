"""Experts as one product of groups, `torch._grouped_mm`: what is found, and what is computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support import capture, relative_error
from test_emulate import emulation_everywhere
from test_emulate import step as inductor_step
from torch import Tensor, nn
from torch._functorch._aot_autograd.descriptors import PlainAOTInput
from torch._inductor.utils import run_and_get_code
from torch.fx import Graph

from quartet_compile.kernels import grouped_ops, reference
from quartet_compile.kernels.format import Quantized
from quartet_compile.passes.match import match
from quartet_compile.passes.site import Site, Unsupported

quartet = torch.ops.quartet

ENDS = [
    pytest.param([100, 100, 228, 300], id="one empty, one of exactly 128, one ragged"),
    pytest.param([1, 2, 130, 131], id="small"),
    pytest.param([0, 0, 0, 0], id="all empty"),
    pytest.param([0, 128, 256, 290], id="tokens behind the last end"),
]
TOKENS = 300


class Experts(nn.Module):
    """A SwiGLU for each group of tokens. transposed: weights are stored [G, O, I]."""

    def __init__(self, groups: int = 4, features: int = 64, hidden: int = 96, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        for name, ins, outs in (("gate", features, hidden), ("up", features, hidden), ("down", hidden, features)):
            shape = (groups, outs, ins) if transposed else (groups, ins, outs)
            self.register_parameter(name, nn.Parameter((torch.randn(shape) / ins**0.5).bfloat16()))

    def weight(self, name: str) -> Tensor:
        weight: Tensor = getattr(self, name)
        return weight.transpose(-2, -1) if self.transposed else weight

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        gate = torch._grouped_mm(x, self.weight("gate"), offs=ends)
        up = torch._grouped_mm(x, self.weight("up"), offs=ends)
        return torch._grouped_mm(nn.functional.silu(gate) * up, self.weight("down"), offs=ends)


class OneProduct(nn.Module):
    def __init__(self, features: int, outs: int, groups: int = 4) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(groups, features, outs).bfloat16())

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(x, self.w, offs=ends)


def int32(ends: list[int]) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


def spans(ends: list[int]) -> list[tuple[int, int]]:
    return list(zip([0, *ends[:-1]], ends, strict=True))


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("ends", ENDS)
def test_rows_are_moved_to_multiples_of_128_and_back(ends: list[int]) -> None:
    padded_ends, sources, places = quartet.group_rows(int32(ends), TOKENS)
    expected_sources, expected_places = [-1] * grouped_ops.padded_rows(TOKENS, len(ends)), [-1] * TOKENS
    row, expected_ends = 0, []
    for start, end in spans(ends):
        for token in range(start, end):
            expected_sources[row], expected_places[token] = token, row
            row += 1
        row += -row % 128
        expected_ends.append(row)
    assert padded_ends.tolist() == expected_ends
    assert sources.tolist() == expected_sources
    assert places.tolist() == expected_places


@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 129, 1000])
def test_the_padded_rows_suffice_for_the_worst_groups(tokens: int) -> None:
    for groups in (1, 3, 8):
        worst = [1] * min(groups - 1, tokens)
        worst += [tokens - sum(worst)]
        assert sum(-(-size // 128) * 128 for size in worst) <= grouped_ops.padded_rows(tokens, groups)


def test_rows_that_nobody_asks_for_are_never_seen() -> None:
    x = torch.full((3, 2), torch.nan)
    x[1] = 7.0
    assert quartet.take_rows(x, torch.tensor([-1, 1, -1], dtype=torch.int32)).tolist() == [[0, 0], [7, 7], [0, 0]]
    assert quartet.take_rows(x[:0], torch.tensor([-1], dtype=torch.int32)).tolist() == [[0, 0]]


# ---------------------------------------------------------------- graphs


@pytest.mark.parametrize("transposed", [False, True])
def test_each_product_of_groups_is_a_linear(transposed: bool) -> None:
    model, x = Experts(transposed=transposed), torch.randn(TOKENS, 64, dtype=torch.bfloat16, requires_grad=True)
    compiled, backend = capture(model)
    compiled(x, int32([100, 100, 228, 300])).sum().backward()
    linears = backend.report(model).linears
    assert [linear.name for linear in linears] == ["gate[0:4]", "up[0:4]", "down[0:4]"]
    assert all(linear.products == ("y", "dx", "dw") for linear in linears)
    assert [linear.shape for linear in linears] == [(300, 64, 96), (300, 64, 96), (300, 96, 64)]
    rows = 128 * (300 // 128 + 4)  # padded, whatever the groups are
    assert [linear.saved_after for linear in linears] == [rows * 64 * 9 // 16 + 4, 0, rows * 96 * 9 // 16 + 4]
    assert [linear.weight_bytes for linear in linears] == [4 * 128 * ins * 9 // 16 + 4 for ins in (64, 64, 96)]
    (graph,) = backend.graphs
    assert graph.forward.count("quartet.quantize.") == 5, "x once for gate and up"
    assert graph.forward.count("quartet.group_rows") == 1
    assert "aten._grouped_mm" not in graph.forward + graph.backward


def test_a_product_of_groups_that_is_no_linear_is_reported() -> None:
    class Columns(nn.Module):
        """A weight with the tokens as columns: each group of them meets a matrix of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 64, 64).bfloat16())

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return torch._grouped_mm(self.w, x, offs=ends)

    model = Columns()
    compiled, backend = capture(model)
    compiled(torch.randn(64, 48).bfloat16(), int32([16, 16, 32, 48]))
    (linear,) = backend.report(model).linears
    assert linear.left_because == "unsupported"
    assert "not one of tokens" in linear.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes_are_reported(dtype: torch.dtype) -> None:
    """Versions of torch differ in what they capture; this graph is made by hand."""
    graph = Graph()
    shapes = {"x": (10, 64), "w": (4, 64, 64), "ends": (4,)}
    x, w, ends = (graph.placeholder(name) for name in shapes)
    product = graph.call_function(torch.ops.aten._grouped_mm.default, (x, w, ends))
    for node, shape, of in ((x, shapes["x"], dtype), (w, shapes["w"], dtype), (ends, (4,), torch.int32), (product, (10, 64), dtype)):
        node.meta["val"] = torch.empty(shape, dtype=of, device="meta")
    x.meta["desc"], w.meta["desc"], ends.meta["desc"] = (PlainAOTInput(i) for i in range(3))
    graph.output((product,))
    (found,) = match(graph, {1: "w"})
    if dtype is torch.bfloat16:
        assert isinstance(found, Site)
    else:
        assert isinstance(found, Unsupported)
        assert found.reason == "its _grouped_mm is not in bfloat16"


@pytest.mark.parametrize("ends", [[10, 5, 20, 30], [0, 10, 20, 301], [-1, 10, 20, 30]])
def test_ends_that_are_none_are_refused(ends: list[int]) -> None:
    with pytest.raises(ValueError, match="must not decrease, nor lie behind the 300 tokens"):
        quartet.group_rows(int32(ends), TOKENS)


# ---------------------------------------------------------------- numbers


def quantized(x: Tensor) -> np.ndarray:
    """What four-over-six makes of the rows of x, in float64."""
    return reference.four_over_six(x.float()).dequantize(torch.float64)[:, : x.shape[1]].numpy()


def steps(model: nn.Module, x: Tensor, ends: list[int], e: Tensor, count: int = 1) -> Iterator[tuple[Tensor, Any, Any]]:
    """y, dx, dw of steps of one compiled model with a gradient of e."""
    compiled, backend = capture(model, min_features=1)
    for _ in range(count):
        model.zero_grad()
        leaf = x.detach().requires_grad_()
        y = compiled(leaf, int32(ends))
        y.backward(e)
        yield y.detach(), leaf.grad, model.w.grad
    assert len(backend.graphs) == 1, "compiled once, and rewritten in every step"


@pytest.mark.feature("Ways to write a linear", "experts: torch._grouped_mm")
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize(("features", "outs"), [(64, 128), (48, 40)], ids=["128 out", "40 out: weights padded"])
def test_every_token_meets_the_weight_of_its_group(ends: list[int], features: int, outs: int) -> None:
    model = OneProduct(features, outs)
    x, e = torch.randn(TOKENS, features).bfloat16(), torch.randn(TOKENS, outs).bfloat16()
    x[ends[-1] :], e[ends[-1] :] = torch.nan, torch.nan  # belongs to nobody
    ((y, dx, dw),) = steps(model, x, ends, e)
    own = x.clone()
    own[ends[-1] :] = 0
    x64 = quantized(own)
    w64 = quantized(model.w.detach().transpose(1, 2).flatten(0, 1)).reshape(4, outs, features)
    expected = np.zeros((TOKENS, outs))
    for g, (start, end) in enumerate(spans(ends)):
        expected[start:end] = x64[start:end] @ w64[g].T
        if start == end:
            assert dw[g].count_nonzero() == 0
            continue
        # MS-EDEN's two operands have a relative error of about 0.1 each
        exact = x64[start:end].T @ e[start:end].double().numpy()
        assert relative_error(dw[g], exact) < 0.2, g
        assert relative_error(dx[start:end], e[start:end].double().numpy() @ w64[g]) < 0.2, g
    assert np.array_equal(y.double().numpy(), torch.tensor(expected).bfloat16().double().numpy())
    assert dx[ends[-1] :].count_nonzero() == 0


def test_gradients_are_unbiased_in_every_group() -> None:
    ends, draws = [20, 20, 148, 300], 48
    model, x, e = OneProduct(64, 128), torch.randn(TOKENS, 64).bfloat16(), torch.randn(TOKENS, 128).bfloat16()
    _, dx, dw = (torch.stack(results).double() for results in zip(*steps(model, x, ends, e, draws), strict=True))
    x64 = torch.tensor(quantized(x))
    w64 = torch.tensor(quantized(model.w.detach().transpose(1, 2).flatten(0, 1))).unflatten(0, (4, 128))
    for g, (start, end) in enumerate(spans(ends)):
        for ours, exact in ((dw[:, g], x64[start:end].t() @ e[start:end].double()), (dx[:, start:end], e[start:end].double() @ w64[g])):
            if start == end:
                continue
            one = ((ours - exact) ** 2).mean(0)  # variance of one draw, an element
            mean = (ours.mean(0) - exact) ** 2
            # The mean's squared error is a share 1/draws of one draw's, on average over thousands of elements: 5% is many standard errors.
            assert float(mean.sum() / one.sum()) == pytest.approx(1 / draws, rel=0.1), g


def test_the_packed_weights_are_those_of_all_groups_together() -> None:
    """One tensor scale: a group of small weights still has its six significant bits, because scales are E4M3 numbers of their own."""
    w = torch.randn(4, 128, 64) * torch.tensor([1.0, 1e-2, 1.0, 1e-3])[:, None, None]
    packed = quartet.quantize(w.flatten(0, 1), "four_over_six")
    ours = Quantized(*packed).dequantize().unflatten(0, (4, 128))
    for g in range(4):
        assert relative_error(ours[g], w[g]) < 0.11, g


def test_views_behind_it_find_the_order_in_memory_that_they_were_traced_with() -> None:
    """Features are padded inside; the result is not a part of something wider."""
    model, x, ends = OneProduct(64, 40), torch.randn(TOKENS, 64).bfloat16(), int32([100, 100, 228, 300])
    plain, _ = capture(model, min_features=1)
    flat, _ = capture(lambda x, ends: model(x, ends).view(2, -1), min_features=1)
    y = flat(x, ends)
    assert y.stride() == (TOKENS * 20, 1)
    assert torch.equal(y.view(TOKENS, 40), plain(x, ends))
    y.sum().backward()
    assert model.w.grad is not None


def test_no_token_at_all() -> None:
    model = OneProduct(64, 128)
    ((y, dx, dw),) = steps(model, torch.randn(0, 64).bfloat16(), [0, 0, 0, 0], torch.randn(0, 128).bfloat16())
    assert y.shape == (0, 128)
    assert dx.shape == (0, 64)
    assert dw.count_nonzero() == 0


def test_a_number_that_is_not_finite_is_not_hidden() -> None:
    model, x, ends = OneProduct(64, 128), torch.randn(TOKENS, 64).bfloat16(), [100, 100, 228, 300]
    x[7, 3] = torch.inf
    ((y, _, _),) = steps(model, x, ends, torch.randn(TOKENS, 128).bfloat16())
    assert y.isnan().all()


@pytest.mark.slow
def test_compiled_with_dynamic_tokens() -> None:
    model = Experts()
    compiled = torch.compile(model, backend="quartet", dynamic=True, fullgraph=True)
    for ends in ([100, 100, 228, 300], [10, 20, 30, 40], [0, 500, 500, 501]):
        x = torch.randn(ends[-1], 64).bfloat16()
        y = compiled(x, int32(ends))
        y.float().square().sum().backward()
        assert 0.05 < relative_error(y, model(x, int32(ends)).detach().double()) < 0.35


@pytest.mark.slow
@pytest.mark.parametrize("ends", ENDS)
def test_values_give_the_numbers_of_the_packed_products(ends: list[int]) -> None:
    """As GPUs compute them: torch's own product of groups on bfloat16 values. The float32 sums may differ in their order."""
    model = Experts().bfloat16()
    x = torch.randn(TOKENS, 64).bfloat16().requires_grad_()
    expected = inductor_step(model, x, int32(ends))
    with emulation_everywhere() as graphs:
        ours = inductor_step(model, x, int32(ends))
    assert len(graphs) == 2
    assert all("quartet.grouped_" not in graph and "aten._grouped_mm" in graph for graph in graphs)
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).float().norm() <= 2**-7 * b.float().norm()


@pytest.mark.slow
def test_rows_are_moved_by_pointwise_code_where_kernels_are_lowered() -> None:
    pytest.importorskip("triton")
    import quartet_compile.kernels.lowerings  # noqa: F401  (registers them, for every device)

    def move(x: Tensor, rows: Tensor) -> Tensor:
        return quartet.take_rows(x * 2, rows) + 1

    x, rows = torch.randn(5, 64), torch.tensor([3, -1, 0, 4, -1, 3], dtype=torch.int32)
    x[1] = torch.nan
    for dynamic in (False, True):
        ours, code = run_and_get_code(torch.compile(move, dynamic=dynamic, fullgraph=True), x, rows)
        assert torch.equal(ours, move(x, rows))
        assert "= torch.ops.quartet.take_rows" not in "".join(code)
