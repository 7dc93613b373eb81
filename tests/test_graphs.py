"""The rewritten graphs of a two-layer MLP, as a reader sees them, and what the rewriting must not do."""

from __future__ import annotations

import re
import sys
from typing import Any

import expecttest
import pytest
import torch
from support import capture, graph_code
from torch import Tensor, nn

from quartet_compile.capture import GraphCapture
from quartet_compile.options import Options
from quartet_compile.passes import pipeline, rewrite


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def readable(source: str) -> str:
    """A printed graph without comments and deletions, the three tensors of a packed operand NAME written as *NAME."""
    lines = []
    for line in source.splitlines()[1:]:
        text = re.sub(r"\s*#.*$|;  .* = None$|;\s*$", "", line).replace("torch.ops.", "").replace(".default(", "(").strip()
        text = re.sub(r'(\w+)_codes(: "[^"]*")?, \1_scales(: "[^"]*")?, \1_tensor_scale(: "[^"]*")?', r"*\1", text)
        if text and not re.search(r"= \w+\[[012]\]$", text):
            lines.append(text)
    return "\n".join(lines)


class TestSnapshots(expecttest.TestCase):
    def graphs(self, model: nn.Module, x: Tensor) -> tuple[str, str]:
        compiled, backend = capture(model)
        compiled(x)
        (graph,) = backend.graphs
        return readable(graph_code(graph.forward)), readable(graph_code(graph.backward))

    def test_forward(self) -> None:
        forward, _ = self.graphs(MLP(), torch.randn(32, 64, requires_grad=True))
        self.assertExpectedInline(forward, """\
def forward(self, primals_1: "f32[128, 64]", primals_2: "f32[128]", primals_3: "f32[32, 64]", primals_4: "f32[64, 128]"):
up_x = quartet.quantize(primals_3, 'four_over_six')
up_w = quartet.quantize(primals_1, 'four_over_six')
up_y: "f32[32, 128]" = quartet.matmul(*up_x, *up_w, primals_2, 1.0, torch.float32)
relu: "f32[32, 128]" = aten.relu(up_y)
alias: "f32[32, 128]" = aten.alias(relu)
down_x = quartet.quantize(relu, 'four_over_six')
down_w = quartet.quantize(primals_4, 'four_over_six')
down_y: "f32[32, 64]" = quartet.matmul(*down_x, *down_w, None, 1.0, torch.float32)
alias_1: "f32[32, 128]" = aten.alias(alias)
le: "b8[32, 128]" = aten.le.Scalar(alias_1, 0)
return (down_y, *up_x, *up_w, *down_x, *down_w, le)""")

    def test_backward(self) -> None:
        _, backward = self.graphs(MLP(), torch.randn(32, 64, requires_grad=True))
        self.assertExpectedInline(backward, """\
def forward(self, *up_x, *up_w, *down_x, *down_w, le: "b8[32, 128]", tangents_1: "f32[32, 64]"):
seeds: "i64[4]" = prims.inductor_seeds(4, device(type='cpu'))
down_dw_e = quartet.quantize_grad(tangents_1, seeds, 0, 'ms_eden', True)
down_xt = quartet.requantize(*down_x, 128, seeds, 0, 'ms_eden')
down_dw: "f32[64, 128]" = quartet.matmul(*down_dw_e, *down_xt, None, 0.0078125, torch.float32)
permute_3: "f32[128, 64]" = aten.permute(down_dw, [1, 0])
down_wt = quartet.requantize(*down_w, 128, seeds, 1, 'ms_eden')
down_dx_e = quartet.quantize_grad(tangents_1, seeds, 1, 'ms_eden', False)
down_dx: "f32[32, 128]" = quartet.matmul(*down_dx_e, *down_wt, None, 0.0078125, torch.float32)
permute_5: "f32[64, 128]" = aten.permute(permute_3, [1, 0])
scalar_tensor: "f32[]" = aten.scalar_tensor(0, dtype = torch.float32, layout = torch.strided, device = device(type='cpu'))
where: "f32[32, 128]" = aten.where.self(le, scalar_tensor, down_dx)
up_wt = quartet.requantize(*up_w, 64, seeds, 2, 'ms_eden')
up_dx_e = quartet.quantize_grad(where, seeds, 2, 'ms_eden', False)
up_dx: "f32[32, 64]" = quartet.matmul(*up_dx_e, *up_wt, None, 0.0078125, torch.float32)
up_xt = quartet.requantize(*up_x, 64, seeds, 3, 'ms_eden')
up_dw_e = quartet.quantize_grad(where, seeds, 3, 'ms_eden', True)
up_dw: "f32[128, 64]" = quartet.matmul(*up_dw_e, *up_xt, None, 0.0078125, torch.float32)
permute_8: "f32[64, 128]" = aten.permute(up_dw, [1, 0])
sum_1: "f32[1, 128]" = aten.sum.dim_IntList(where, [0], True)
view: "f32[128]" = aten.view(sum_1, [128])
permute_9: "f32[128, 64]" = aten.permute(permute_8, [1, 0])
return (permute_9, view, up_dx, permute_5)""")


def test_q_k_and_v_share_one_quantized_input_and_one_rotation() -> None:
    class QKV(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(64, 64, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) * self.k(x) * self.v(x)

    compiled, backend = capture(QKV())
    compiled(torch.randn(2, 16, 64, requires_grad=True))
    forward, backward = backend.graphs[0].forward, backend.graphs[0].backward
    assert forward.count("quartet.quantize.default") == 4, "x once, three weights"
    assert backward.count("quartet.requantize.default") == 4, "x once, three weights"
    assert backward.count("quartet.quantize_grad.default") == 6
    index = re.search(r"_xt = torch.ops.quartet.requantize.default\(.*?seeds, (\d+),", backward)
    assert index is not None
    dw = re.findall(r"dw_e = torch.ops.quartet.quantize_grad.default\(\w+, seeds, (\d+),", backward)
    assert dw == [index[1]] * 3


def test_the_seeds_are_drawn_in_the_backward_graph_only() -> None:
    compiled, backend = capture(MLP())
    compiled(torch.randn(32, 64, requires_grad=True))
    graph = backend.graphs[0]
    assert "inductor_seeds" not in graph.forward
    assert graph.backward.count("inductor_seeds.default(") == 1
    assert "requantize" not in graph.forward


def test_an_error_while_rewriting_leaves_the_graph_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    original = rewrite.Writer.gradient

    def failing(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("planted")
        return original(self, *args)

    monkeypatch.setattr(rewrite.Writer, "gradient", failing)

    backend, seen = GraphCapture(Options()), {}
    real_run = pipeline.run

    def watched(graph: torch.fx.Graph, *args: Any) -> Any:
        seen["graph"], seen["before"] = graph, str(graph)
        return real_run(graph, *args)

    monkeypatch.setattr(sys.modules[GraphCapture.__module__], "run", watched)
    with pytest.raises(Exception, match="planted"):
        torch.compile(MLP(), backend=backend)(torch.randn(32, 64, requires_grad=True))
    assert str(seen["graph"]) == seen["before"]
    assert calls == 3
