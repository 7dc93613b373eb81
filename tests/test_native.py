"""What is done for GPUs with FP4 tensor cores: scales in their order, gradients read once. The operators and the graphs, on a CPU."""

from __future__ import annotations

from typing import Any

import expecttest
import pytest
import torch
from test_emulate import step
from test_graphs import MLP, readable
from torch import nn
from torch.fx import Graph, GraphModule

from quartet_compile import backend
from quartet_compile.kernels.format import swizzle_scales
from quartet_compile.passes.native import NativePass

quartet = torch.ops.quartet


def packed(rows: int, columns: int) -> list[torch.Tensor]:
    return list(quartet.quantize(torch.randn(rows, columns), "four_over_six"))


@pytest.mark.parametrize("bias", [None, torch.float32])
def test_product_of_swizzled_scales(bias: torch.dtype | None) -> None:
    a, b = packed(150, 96), packed(70, 96)
    bias_row = None if bias is None else torch.randn(70, dtype=bias)
    expected = quartet.matmul(*a, *b, bias_row, 1 / 128, torch.bfloat16)
    for matrix in (a, b):
        matrix[1] = quartet.swizzle(matrix[1])
    assert torch.equal(quartet.matmul_swizzled(*a, *b, bias_row, 1 / 128, torch.bfloat16), expected)


@pytest.mark.parametrize("shape", [(150, 70), (128, 256)])
def test_swizzled_quantizers(shape: tuple[int, int]) -> None:
    e, seeds = torch.randn(shape), torch.tensor([5, 7])
    saved = quartet.quantize(e, "four_over_six")
    calls: list[tuple[Any, Any, tuple[Any, ...]]] = [
        (quartet.quantize_grad, quartet.quantize_grad_swizzled, (e, seeds, 0, "ms_eden", False)),
        (quartet.quantize_grad, quartet.quantize_grad_swizzled, (e, seeds, 0, "ms_eden", True)),
        (quartet.quantize_grad_both, quartet.quantize_grad_both_swizzled, (e, seeds, 0, 1, "ms_eden")),
        (quartet.requantize, quartet.requantize_swizzled, (*saved, shape[1], seeds, 1, "ms_eden")),
    ]
    for plain, swizzled, arguments in calls:
        tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(swizzled.default, arguments, test_utils=tests)
        for i, (ours, expected) in enumerate(zip(swizzled(*arguments), plain(*arguments), strict=True)):
            if i % 3 == 1:
                ours, expected = ours.view(torch.uint8), swizzle_scales(expected).view(torch.uint8)
            assert torch.equal(ours, expected), (swizzled, i)


def test_operators_agree_with_their_shapes() -> None:
    a, b = packed(150, 96), packed(70, 96)
    # Without test_schema, which cannot compare float8.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(quartet.swizzle.default, (a[1],), test_utils=tests)
    a[1], b[1] = swizzle_scales(a[1]), swizzle_scales(b[1])
    torch.library.opcheck(quartet.matmul_swizzled.default, (*a, *b, None, 1.0, torch.bfloat16), test_utils=tests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: [a[0][:, :-8], a[1], a[2]], "multiple of 32"),
        (lambda a: [a[0], a[1][:-4], a[2]], "swizzled scales, not"),
        (lambda a: [a[0].int(), a[1], a[2]], "codes uint8"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    a, b = packed(150, 96), packed(70, 96)
    a[1], b[1] = swizzle_scales(a[1]), swizzle_scales(b[1])
    with pytest.raises((ValueError, TypeError), match=message):
        quartet.matmul_swizzled(*change(a), *b, None, 1.0, torch.bfloat16)


@pytest.fixture
def native_everywhere(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compilations take every device for native. Their graphs, as they come: forward, backward."""
    graphs: list[str] = []

    class Recording(NativePass):
        def __init__(self) -> None:
            super().__init__(lambda device: True)

        def __call__(self, graph: Graph) -> None:
            super().__call__(graph)
            graphs.append(readable(GraphModule({}, graph).print_readable(print_output=False)))

        def uuid(self) -> Any:
            return None  # no cache may answer in its place

    monkeypatch.setattr(backend, "NativePass", Recording)
    return graphs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swizzled_products_give_the_same_numbers(dtype: torch.dtype, native_everywhere: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = MLP().to(dtype), torch.randn(48, 64, dtype=dtype, requires_grad=True)
    ours = step(module, x)
    assert len(native_everywhere) == 2
    assert all("quartet.matmul_swizzled" in graph and "quartet.matmul(" not in graph for graph in native_everywhere)
    monkeypatch.undo()
    for a, b in zip(ours, step(module, x), strict=True):
        assert torch.equal(a, b)


def test_rows_that_tma_cannot_read_stay_plain(native_everywhere: list[str]) -> None:
    """48 features: 24 bytes of codes a row. The backward products, padded to 128, are swizzled."""
    step(nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64)), torch.randn(16, 64, requires_grad=True), **{"quartet.min_features": 1})
    forward, backward = native_everywhere
    assert forward.count("quartet.matmul(") == 1
    assert forward.count("quartet.matmul_swizzled(") == 1
    assert "quartet.matmul(" not in backward


class TestSnapshots(expecttest.TestCase):
    @pytest.fixture(autouse=True)
    def graphs_of(self, native_everywhere: list[str]) -> None:
        self.graphs = native_everywhere

    def test_graphs(self) -> None:
        step(MLP(), torch.randn(32, 64, requires_grad=True))
        self.assertExpectedInline("\n\n".join(self.graphs), """\
def forward(self, primals_1: "f32[128, 64]", primals_2: "f32[128]", primals_3: "f32[32, 64]", primals_4: "f32[64, 128]"):
up_x = quartet.quantize(primals_3, 'four_over_six')
up_x_scales_swizzled: "f8e4m3fn[512]" = quartet.swizzle(up_x_scales)
up_w = quartet.quantize(primals_1, 'four_over_six')
up_w_scales_swizzled: "f8e4m3fn[512]" = quartet.swizzle(up_w_scales)
up_y_swizzled: "f32[32, 128]" = quartet.matmul_swizzled(up_x_codes, up_x_scales_swizzled, up_x_tensor_scale, up_w_codes, up_w_scales_swizzled, up_w_tensor_scale, primals_2, 1.0, torch.float32)
relu: "f32[32, 128]" = aten.relu(up_y_swizzled)
down_x = quartet.quantize(relu, 'four_over_six')
down_x_scales_swizzled: "f8e4m3fn[1024]" = quartet.swizzle(down_x_scales)
down_w = quartet.quantize(primals_4, 'four_over_six')
down_w_scales_swizzled: "f8e4m3fn[1024]" = quartet.swizzle(down_w_scales)
down_y_swizzled: "f32[32, 64]" = quartet.matmul_swizzled(down_x_codes, down_x_scales_swizzled, down_x_tensor_scale, down_w_codes, down_w_scales_swizzled, down_w_tensor_scale, None, 1.0, torch.float32)
le: "b8[32, 128]" = aten.le.Scalar(relu, 0)
return (down_y_swizzled, *up_x, *up_w, *down_x, *down_w, le)

def forward(self, *up_x, *up_w, *down_x, *down_w, le: "b8[32, 128]", tangents_1: "f32[32, 64]"):
seeds: "i64[4]" = prims.inductor_seeds(4, device(type='cpu'))
down_dw_e_both_swizzled = quartet.quantize_grad_both_swizzled(tangents_1, seeds, 1, 0, 'ms_eden')
down_dw_e_tensor_scale_1: "f32[]" = down_dw_e_both_swizzled[5]
down_dw_e_scales_1: "f8e4m3fn[1024]" = down_dw_e_both_swizzled[4]
down_dw_e_codes_1: "u8[64, 64]" = down_dw_e_both_swizzled[3]
down_xt_swizzled = quartet.requantize_swizzled(*down_x, 128, seeds, 0, 'ms_eden')
down_dw_swizzled: "f32[64, 128]" = quartet.matmul_swizzled(down_dw_e_codes_1, down_dw_e_scales_1, down_dw_e_tensor_scale_1, *down_xt, None, 0.0078125, torch.float32)
down_wt_swizzled = quartet.requantize_swizzled(*down_w, 128, seeds, 1, 'ms_eden')
down_dx_swizzled: "f32[32, 128]" = quartet.matmul_swizzled(down_dx_e_codes_1, down_dx_e_scales_1, down_dx_e_tensor_scale_1, *down_wt, None, 0.0078125, torch.float32)
full_default: "f32[]" = aten.full([], 0.0, dtype = torch.float32, layout = torch.strided, device = device(type='cpu'), pin_memory = False)
where: "f32[32, 128]" = aten.where.self(le, full_default, down_dx_swizzled)
up_wt_swizzled = quartet.requantize_swizzled(*up_w, 64, seeds, 2, 'ms_eden')
up_dx_e_both_swizzled = quartet.quantize_grad_both_swizzled(where, seeds, 2, 3, 'ms_eden')
up_dw_e_tensor_scale_1: "f32[]" = up_dx_e_both_swizzled[5]
up_dw_e_scales_1: "f8e4m3fn[1024]" = up_dx_e_both_swizzled[4]
up_dw_e_codes_1: "u8[128, 64]" = up_dx_e_both_swizzled[3]
up_dx_swizzled: "f32[32, 64]" = quartet.matmul_swizzled(up_dx_e_codes_1, up_dx_e_scales_1, up_dx_e_tensor_scale_1, *up_wt, None, 0.0078125, torch.float32)
up_xt_swizzled = quartet.requantize_swizzled(*up_x, 64, seeds, 3, 'ms_eden')
up_dw_swizzled: "f32[128, 64]" = quartet.matmul_swizzled(up_dw_e_codes_1, up_dw_e_scales_1, up_dw_e_tensor_scale_1, *up_xt, None, 0.0078125, torch.float32)
sum_1: "f32[1, 128]" = aten.sum.dim_IntList(where, [0], True)
view: "f32[128]" = aten.reshape(sum_1, [128])
return (up_dw_swizzled, view, up_dx_swizzled, down_dw_swizzled)""")
