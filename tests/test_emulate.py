"""Products of values on devices without FP4 tensor cores: the graphs, and that they compute what the packed products do."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import expecttest
import pytest
import torch
from test_graphs import MLP, readable
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from quartet_compile import backend
from quartet_compile.passes.emulate import EmulationPass, emulate, multiplies_packed

quartet = torch.ops.quartet


def never(device: torch.device) -> bool:
    """No device is native."""
    return False


@contextmanager
def emulation_everywhere() -> Iterator[list[str]]:
    """Compilations emulate on every device. Their graphs, as they come: forward, backward."""
    graphs: list[str] = []

    class Recording(EmulationPass):
        def __init__(self) -> None:
            super().__init__(never)

        def __call__(self, graph: Graph) -> None:
            super().__call__(graph)
            graphs.append(readable(GraphModule({}, graph).print_readable(print_output=False)))

        def uuid(self) -> Any:
            return None  # no cache may answer in its place

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "EmulationPass", Recording)
        yield graphs


def step(model: nn.Module, *inputs: Tensor, **options: Any) -> list[Tensor]:
    """Output and gradients of one compiled step with seed 5."""
    torch._dynamo.reset()
    torch.manual_seed(5)
    leaves = [leaf for leaf in (*model.parameters(), *inputs) if leaf.requires_grad]
    for leaf in leaves:
        leaf.grad = None
    y = torch.compile(model, backend="quartet", options=options or None)(*inputs)
    y.float().square().sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


class SharedInput(nn.Module):
    """Two linears that read one activation, in three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(70, 90, bias=False), nn.Linear(70, 90)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) * self.k(x)


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.mlp(x)


@pytest.mark.parametrize(
    ("model", "shape", "dtype"),
    [
        (MLP, (48, 64), torch.bfloat16),
        pytest.param(MLP, (48, 64), torch.float32, marks=pytest.mark.slow),
        (SharedInput, (3, 17, 70), torch.bfloat16),
        pytest.param(Autocast, (48, 64), torch.float32, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("needs_dx", [True, False])
def test_values_give_the_numbers_of_the_packed_products(
    model: Callable[[], nn.Module], shape: Any, dtype: torch.dtype, needs_dx: bool
) -> None:
    module = model().to(dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=needs_dx)
    expected = step(module, x)
    with emulation_everywhere() as graphs:
        ours = step(module, x)
    assert all("quartet.matmul_values" in graph and "quartet.matmul(" not in graph for graph in graphs)
    assert len(graphs) == 2
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


class TestSnapshots(expecttest.TestCase):
    def test_emulated_graphs(self) -> None:
        with emulation_everywhere() as graphs:
            step(MLP(), torch.randn(32, 64, requires_grad=True))
        forward, backward = graphs
        self.assertExpectedInline(forward, """\
def forward(self, primals_1: "f32[128, 64]", primals_2: "f32[128]", primals_3: "f32[32, 64]", primals_4: "f32[64, 128]"):
up_x_and_values = quartet.quantize_with_values(primals_3, 'four_over_six')
up_x_values: "bf16[32, 64]" = up_x_and_values[3]
up_w_and_values = quartet.quantize_with_values(primals_1, 'four_over_six')
up_w_values: "bf16[128, 64]" = up_w_and_values[3]
up_y_values: "f32[32, 128]" = quartet.matmul_values(up_x_values, up_w_values, primals_2, torch.float32)
relu: "f32[32, 128]" = aten.relu(up_y_values)
down_x_and_values = quartet.quantize_with_values(relu, 'four_over_six')
down_x_values: "bf16[32, 128]" = down_x_and_values[3]
down_w_and_values = quartet.quantize_with_values(primals_4, 'four_over_six')
down_w_values: "bf16[64, 128]" = down_w_and_values[3]
down_y_values: "f32[32, 64]" = quartet.matmul_values(down_x_values, down_w_values, None, torch.float32)
le: "b8[32, 128]" = aten.le.Scalar(relu, 0)
return (down_y_values, *up_x, *up_w, *down_x, *down_w, le)""")
        self.assertExpectedInline(backward, """\
def forward(self, *up_x, *up_w, *down_x, *down_w, le: "b8[32, 128]", tangents_1: "f32[32, 64]"):
seeds: "i64[4]" = prims.inductor_seeds(4, device(type='cpu'))
rotations: "bf16[4, 2, 64, 64]" = quartet.rotations(seeds)
down_dw_e_both_values = quartet.grad_values_both(tangents_1, rotations, seeds, 1, 0, 'ms_eden', 0.0078125)
down_xt_values: "bf16[128, 128]" = quartet.requantize_values(*down_x, 128, rotations, seeds, 0, 'ms_eden')
down_dw_values: "f32[64, 128]" = quartet.matmul_values(down_dw_e_transposed_values, down_xt_values, None, torch.float32)
down_wt_values: "bf16[128, 128]" = quartet.requantize_values(*down_w, 128, rotations, seeds, 1, 'ms_eden')
down_dx_values: "f32[32, 128]" = quartet.matmul_values(down_dw_e_values, down_wt_values, None, torch.float32)
full_default: "f32[]" = aten.full([], 0.0, dtype = torch.float32, layout = torch.strided, device = device(type='cpu'), pin_memory = False)
where: "f32[32, 128]" = aten.where.self(le, full_default, down_dx_values)
up_wt_values: "bf16[64, 128]" = quartet.requantize_values(*up_w, 64, rotations, seeds, 2, 'ms_eden')
up_dx_e_both_values = quartet.grad_values_both(where, rotations, seeds, 2, 3, 'ms_eden', 0.0078125)
up_dx_values: "f32[32, 64]" = quartet.matmul_values(up_dx_e_values, up_wt_values, None, torch.float32)
up_xt_values: "bf16[64, 128]" = quartet.requantize_values(*up_x, 64, rotations, seeds, 3, 'ms_eden')
up_dw_values: "f32[128, 64]" = quartet.matmul_values(up_dx_e_transposed_values, up_xt_values, None, torch.float32)
sum_1: "f32[1, 128]" = aten.sum.dim_IntList(where, [0], True)
view: "f32[128]" = aten.reshape(sum_1, [128])
return (up_dw_values, view, up_dx_values, down_dw_values)""")


def test_a_frozen_first_layer_reads_its_gradient_once_in_one_orientation() -> None:
    model = nn.Linear(64, 64, bias=False)
    with emulation_everywhere() as graphs:
        step(model, torch.randn(32, 64))
    assert "quartet.grad_values(" in graphs[1]
    assert "quartet.grad_values_both" not in graphs[1]


def test_inference_multiplies_values() -> None:
    model, x = MLP().eval(), torch.randn(8, 64)
    with torch.no_grad():
        torch._dynamo.reset()
        expected = torch.compile(model, backend="quartet")(x)
        torch._dynamo.reset()
        with emulation_everywhere() as graphs:
            ours = torch.compile(model, backend="quartet")(x)
    assert len(graphs) == 1
    assert "quartet.matmul_values" in graphs[0]
    assert graphs[0].count("quartet.quantize_values(") == 4
    assert "with_values" not in graphs[0]
    assert torch.equal(ours, expected)


def test_codes_are_written_where_they_are_read() -> None:
    """With operands that the backward pass quantizes again, its codes are the only ones."""
    model, x = MLP(), torch.randn(32, 64, requires_grad=True)
    expected = step(model, x)
    with emulation_everywhere() as graphs:
        ours = step(model, x, **{"quartet.recompute": "weights"})
    forward, backward = graphs
    assert [forward.count(f"quartet.{op}(") for op in ("quantize", "quantize_values", "quantize_with_values")] == [0, 2, 2]
    assert [backward.count(f"quartet.{op}(") for op in ("quantize", "requantize_values")] == [2, 4]
    assert all(map(torch.equal, ours, expected))


def graph_of_a_product(scale: float, *, packed_input: bool = False) -> Graph:
    """y = x w^T, both quantized in the graph; or x packed from elsewhere."""
    graph = Graph()
    x, w = torch.randn(16, 32), torch.randn(8, 32)
    values: list[Any] = []
    for name, value in (("x", x), ("w", w)):
        node = graph.placeholder(name)
        node.meta["val"] = value
        if name == "x" and packed_input:
            parts = [graph.placeholder(f"part{i}") for i in range(3)]
            for part, tensor in zip(parts, quartet.quantize(x, "four_over_six"), strict=True):
                part.meta["val"] = tensor
        else:
            both = graph.call_function(quartet.quantize.default, (node, "four_over_six"))
            both.meta["val"] = quartet.quantize(value, "four_over_six")
            parts = [graph.call_function(operator.getitem, (both, i)) for i in range(3)]
            for i, part in enumerate(parts):
                part.meta["val"] = both.meta["val"][i]
        values += parts
    product = graph.call_function(quartet.matmul.default, (*values, None, scale, torch.float32))
    product.meta["val"] = torch.empty(16, 8)
    graph.output(product)
    return graph


def targets(graph: Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_a_product_of_a_saved_operand_stays_packed() -> None:
    graph = graph_of_a_product(1.0, packed_input=True)
    emulate(graph, never)
    assert "quartet.matmul.default" in targets(graph)
    assert "quartet.matmul_values.default" not in targets(graph)


def test_a_scale_that_no_gradient_can_take_stays_packed() -> None:
    graph = graph_of_a_product(0.5)
    emulate(graph, never)
    assert "quartet.matmul.default" in targets(graph)


def test_native_devices_multiply_codes() -> None:
    assert multiplies_packed(torch.device("cpu"))
    graph = graph_of_a_product(1.0)
    before = targets(graph)
    emulate(graph)
    assert targets(graph) == before


class Users(CustomGraphPass):
    """A user's own pass behind the partitioner."""

    calls = 0

    def __call__(self, graph: Graph) -> None:
        Users.calls += 1

    def uuid(self) -> Any:
        return None  # no cache may answer in its place


def test_the_users_own_pass_runs_too() -> None:
    Users.calls = 0
    step(nn.Linear(64, 64), torch.randn(8, 64), post_grad_custom_pre_pass=Users())
    assert Users.calls == 2


@pytest.mark.parametrize("scale", [0.0, -1.0, 0.3])
def test_values_are_scaled_by_powers_of_two_only(scale: float) -> None:
    e, seeds = torch.randn(8, 16), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="must be a power of two"):
        quartet.grad_values(e, quartet.rotations(seeds), seeds, 0, "ms_eden", False, scale)
    with pytest.raises(ValueError, match="must be a power of two"):
        quartet.grad_values_both(e, quartet.rotations(seeds), seeds, 0, 1, "ms_eden", scale)


def test_products_of_other_dtypes_and_lengths_are_refused() -> None:
    a, b = torch.zeros(4, 32, dtype=torch.bfloat16), torch.zeros(4, 48, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"quartet\.matmul_values: the operands contract over 32 and 48"):
        quartet.matmul_values(a, b, None, torch.bfloat16)
    with pytest.raises(TypeError, match=r"values are bfloat16, got torch\.float32"):
        quartet.matmul_values(a.float(), a, None, torch.bfloat16)
