"""`explain` and its report: complete, true to the graphs, and without traces."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import expecttest
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import quartet_compile as quartet
from quartet_compile.account import implementation
from quartet_compile.capture import GraphCapture
from quartet_compile.options import Options
from quartet_compile.text import brief


class Attention(nn.Module):
    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(features, features, bias=False) for _ in range(3))
        self.mix = nn.Parameter(torch.randn(features, features))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)) @ self.mix


class Model(nn.Module):
    """A bit of everything: an embedding, shared inputs, a head, a small layer, a computed weight, a linear that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(80, 64)
        self.layers = nn.ModuleList([Attention()])
        self.norm = nn.BatchNorm1d(64)
        self.scaled, self.small, self.unused = nn.Linear(64, 64), nn.Linear(64, 8), nn.Linear(64, 64)
        self.lm_head = nn.Linear(64, 80, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.layers[0](self.embedding(tokens))
        x = self.norm(x.flatten(0, 1))
        x = nn.functional.dropout(x, 0.1) + self.small(x).sum()
        return self.lm_head(nn.functional.linear(x, self.scaled.weight * 2))


def tokens() -> Tensor:
    return torch.randint(0, 80, (4, 32))


class TestText(expecttest.TestCase):
    def test_the_printed_report(self) -> None:
        report = quartet.explain(Model(), tokens(), options={"quartet.exclude": "x.*"})
        text = re.sub(r"test_report\.py:\d+", "test_report.py:N", str(report))
        # what else the partitioner keeps differs between versions of torch; test_totals_are_... counts the bytes
        text = re.sub(r"\S+ KiB -> \S+ KiB(,|$)", r"BEFORE -> AFTER\1", text)
        self.assertExpectedInline(text, """\
quartet: 4 of 7 linears in NVFP4, 1 graph(s)

linear        source             T x I -> O      recipe    decided by                 rewritten  input saved
layers.0.q    test_report.py:N  128 x 64 -> 64  quartet2  default                    y dx dw    32.0 KiB -> 4.5 KiB
layers.0.k    test_report.py:N  128 x 64 -> 64  quartet2  default                    y dx dw    shared
layers.0.v    test_report.py:N  128 x 64 -> 64  quartet2  default                    y dx dw    shared
layers.0.mix  test_report.py:N  128 x 64 -> 64  quartet2  default                    y dx dw    32.0 KiB -> 4.5 KiB
small         test_report.py:N  128 x 64 -> 8   bf16      default (min_features)     -          32.0 KiB -> 32.0 KiB
scaled        test_report.py:N  128 x 64 -> 64  bf16      default (computed weight)  -          32.0 KiB -> 32.0 KiB
lm_head       test_report.py:N  128 x 64 -> 80  bf16      default (output head)      -          32.0 KiB -> 32.0 KiB
  left: small: min(in, out) = 8 features, below 64 [default]
  left: scaled: its weight is computed from parameters; quartet.include or a recipe of its own lifts this [default]
  left: lm_head: output head (named lm_head) [default]
  not found: no product in a captured graph belongs to unused
  quartet.exclude: 'x.*' matches no linear

floating point operations of products: 23.2 M, 54.2% in NVFP4, 32.2% of linears left, 13.6% of 6 other products (attention)
multiplied as: emulated on the CPU (4 linears)
kept for the backward pass: activations BEFORE -> AFTER, weights beside the parameters BEFORE -> AFTER""")


def test_every_product_with_a_parameter_is_in_the_report() -> None:
    """Independent count: parameters of two dimensions that are read by a product, found by running the model under a dispatch mode."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            return func(*args, **(kwargs or {}))

    model = Model()
    with Count() as count, torch.no_grad():
        model(tokens())
    report = quartet.explain(model, tokens())
    assert len(report.linears) == count.products == 7
    assert report.not_captured == ("unused",)


def test_totals_are_those_of_the_partitioned_graphs() -> None:
    model, x = nn.Sequential(nn.Linear(64, 128, bias=False)), torch.randn(32, 64)
    report = quartet.explain(model, x.requires_grad_())
    (linear,) = report.linears
    assert linear.saved_before == 32 * 64 * 4
    assert linear.saved_after == 32 * 64 * 9 // 16 + 4
    assert linear.weight_bytes == report.weight_bytes_after == 128 * 64 * 9 // 16 + 4
    assert report.saved_bytes_after == linear.saved_after
    assert report.saved_bytes_before == 0, "x is an input of the graph: keeping it is free"

    hidden = nn.Sequential(nn.Tanh(), nn.Linear(64, 128, bias=False))
    report = quartet.explain(hidden, x)
    # tanh keeps its own output for its backward pass, so the packed copy comes on top
    assert report.saved_bytes_before == 32 * 64 * 4
    assert report.saved_bytes_after == 32 * 64 * 4 + linear.saved_after


def test_an_input_that_is_kept_in_two_forms_counts_in_both() -> None:
    """gate keeps it as it is, up packed; the total is that of the partitioned graph."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gate, self.up, self.down = (nn.Linear(64, 64) for _ in range(4))
            self.w = nn.Parameter(torch.randn(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cos(x + 1)  # which keeps x + 1, a sum of inputs, not its result
            return self.gate(x) + self.up(x) + self.down(x) + (x.view(1, 32, 64) @ self.w).view(32, 64) + self.first(x)

    x, plain, packed = torch.randn(32, 64, requires_grad=True), 32 * 64 * 4, 32 * 64 * 9 // 16 + 4
    report = quartet.explain(Two(), x, options={"quartet.exclude": ["gate", "down", "w"]})
    kept = {linear.name: (linear.saved_before, linear.saved_after) for linear in report.linears}
    assert kept == {"gate": (plain, plain), "up": (0, packed), "down": (0, 0), "w": (0, 0), "first": (0, 0)}
    of_cos = report.saved_bytes_before - plain
    assert of_cos in (0, plain), "x + 1, unless it is computed again"
    assert report.saved_bytes_after == of_cos + plain + packed
    rows = {line.split()[0]: line for line in str(report).splitlines()[3:8]}
    assert rows["up"].endswith("0 B -> 1.1 KiB")
    assert all(rows[name].endswith("shared") for name in ("down", "w", "first"))


def test_parameters_that_are_arguments_have_the_names_of_the_arguments() -> None:
    def mlp(x: Tensor, up: nn.Parameter, down: nn.Parameter) -> Tensor:
        return (x @ up).relu() @ down

    up, down = nn.Parameter(torch.randn(64, 128)), nn.Parameter(torch.randn(128, 64))
    assert [linear.name for linear in quartet.explain(mlp, torch.randn(8, 64), up, down).linears] == ["up", "down"]
    report = quartet.explain(mlp, torch.randn(8, 64), up, down, options={"quartet.exclude": "up"})
    assert [linear.name for linear in report.rewritten] == ["down"], "as a glob, too"


def test_zeros_are_no_weights_that_are_kept() -> None:
    class Top(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            values, places = y.topk(2, -1)
            return y * torch.zeros_like(y).scatter(-1, places, values)

    report = quartet.explain(Top(), torch.randn(8, 64))
    assert report.weight_bytes_before == 0
    assert report.weight_bytes_after == 0, "no dx, so no packed weight either"


def test_floating_point_operations_are_those_that_torch_counts() -> None:
    """Of a step in eager code, forward and backward."""
    model, i = Model(), tokens()
    with FlopCounterMode(display=False) as counter:
        model(i).sum().backward()
    report = quartet.explain(model, i)
    assert report.flops == counter.get_total_flops()
    linears = {linear.name: (linear.flops, linear.flops_in_nvfp4) for linear in report.linears}
    assert linears["layers.0.q"] == (3 * 2 * 128 * 64 * 64,) * 2
    assert linears["lm_head"] == (3 * 2 * 128 * 64 * 80, 0)
    attention = 4 * 32 * 32 * 64 * 2 * (2 + 4)  # sequences of 32 tokens: two products, and four in the backward pass
    assert report.flops_of_others == attention
    with torch.no_grad():
        assert quartet.explain(model, i).flops == report.flops // 3


def test_fused_attention_counts_as_torch_counts_it_on_gpus() -> None:
    """There is no formula of torch's for the CPU's operator."""

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(64, 192)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    report = quartet.explain(Causal(), torch.randn(2, 32, 64))
    assert "flash_attention_for_cpu_backward" in report.graphs[0].backward
    one = 2 * 4 * 32 * 32 * 16 * 2  # sequences, heads, tokens, tokens, features, 2
    assert report.flops_of_others == 2 * one + 5 * one, "scores are computed again in the backward pass"
    assert report.flops == report.flops_of_others + 2 * (2 * 64 * 64 * 192)


def test_a_product_of_groups_counts() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(4, 64, 96).bfloat16())

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return torch._grouped_mm(x, self.experts, offs=ends)

    ends = torch.tensor([10, 30, 60, 100], dtype=torch.int32)
    report = quartet.explain(Model(), torch.randn(100, 64, requires_grad=True).bfloat16(), ends)
    (experts,) = report.linears
    assert experts.flops == experts.flops_in_nvfp4 == report.flops == 3 * (2 * 100 * 64 * 96)
    assert report.flops_of_others == 0


def test_explain_leaves_no_trace() -> None:
    model = Model()
    compiled = torch.compile(model, backend="eager")
    i = tokens()
    compiled(i)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    quartet.explain(model, i)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), "batch norm's statistics too"
    assert all(p.grad is None for p in model.parameters())
    with torch._dynamo.config.patch(error_on_recompile=True, recompile_limit=2):
        compiled(i)
        for _ in range(4):  # more than the recompile limit
            with torch._dynamo.config.patch(error_on_recompile=False):
                quartet.explain(model, i)
        compiled(i)


def test_to_dict_is_plain_data_and_graphs_are_written_as_readable_files(tmp_path: Path) -> None:
    report = quartet.explain(Model(), tokens())
    data = json.loads(json.dumps(report.to_dict()))
    assert [linear["name"] for linear in data["graphs"][0]["linears"]][:3] == ["layers.0.q", "layers.0.k", "layers.0.v"]
    assert data["saved_bytes_after"] == report.saved_bytes_after
    paths = report.write_graphs(tmp_path / "graphs")
    assert [p.stem for p in paths] == ["graph0_forward_before", "graph0_forward", "graph0_backward_before", "graph0_backward"]
    assert "torch.ops.quartet.quantize.default" in paths[1].read_text()
    assert "quartet." not in paths[0].read_text().partition("class GraphModule")[2]


def run_graph(path: Path) -> list[str]:
    return subprocess.run([sys.executable, str(path)], check=True, capture_output=True, text=True).stdout.splitlines()


class Branching(nn.Module):
    """Constants, a branch and a size that is not known when compiling."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.register_buffer("scale", torch.arange(1.0, 4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (self.up(x),))
        return y.relu() @ torch.tensor([[0.5]] * 128) * self.scale


@pytest.mark.slow
def test_graphs_are_files_that_run(tmp_path: Path) -> None:
    """Before and after, forward and backward: they print the shapes of what they compute."""
    x = torch.randn(24, 64, requires_grad=True)
    torch._dynamo.mark_dynamic(x, 0)
    report = quartet.explain(Branching(), x)
    paths = report.write_graphs(tmp_path)
    printed = {path.stem: run_graph(path) for path in paths}
    assert printed["graph0_forward"][0] == printed["graph0_forward_before"][0] == "(24, 3)"
    gradients = ["(24, 64)", "(128, 64)", "(128,)"]
    for name in ("graph0_backward", "graph0_backward_before"):
        assert [line for line in printed[name] if line.startswith("(")] == gradients


def test_what_multiplies_depends_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_gpu.py` sees it on a real one."""

    def said(capability: tuple[int, int], grouped: bool = False, autotuned: bool = False) -> str:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        return implementation(torch.device("cuda"), grouped, autotuned)

    assert said((9, 0)) == "bfloat16 values, cuBLAS"
    assert said((9, 0), autotuned=True) == "bfloat16 values, autotuned"
    assert said((10, 0)) == "FP4 tensor cores, Triton"
    assert said((12, 0), autotuned=True) == "FP4 tensor cores, autotuned"
    assert said((10, 0), grouped=True) == "bfloat16 values, torch._grouped_mm"
    assert implementation(torch.device("meta"), False, False) == "nothing: tensors on meta have no numbers"
    model, x = nn.Linear(64, 64), torch.randn(8, 64)
    for options in ({"max_autotune": True}, {"quartet.mode": "max-autotune-no-cudagraphs"}):
        (linear,) = quartet.explain(model, x, options=options).linears
        assert linear.implementation == "emulated on the CPU"


def test_inference_has_forward_products_only() -> None:
    with torch.no_grad():
        report = quartet.explain(Model().eval(), tokens())
    assert {linear.products for linear in report.linears} == {("y",), ()}
    assert report.saved_bytes_before == report.saved_bytes_after == 0


def test_explain_takes_functions_and_compiled_models() -> None:
    model, i = Model(), tokens()

    def loss(i: Tensor) -> Tensor:
        return model(i).square().mean()

    names = [linear.name for linear in quartet.explain(model, i).linears]
    assert [linear.name for linear in quartet.explain(loss, i).linears] == names
    assert [linear.name for linear in quartet.explain(torch.compile(model), i).linears] == names


def test_parameters_that_no_graph_contains_are_named() -> None:
    """What Dynamo leaves to eager PyTorch is told by the parameters that no graph was called with."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.experts = nn.Linear(64, 64), nn.Parameter(torch.randn(2, 64, 64))

        @torch.compiler.disable
        def eager(self, x: Tensor) -> Tensor:
            return x @ self.experts[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.q(self.eager(x))

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.scale = nn.ModuleList([Block(), Block()]), nn.Parameter(torch.ones(64))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x * self.scale

    model = Blocks()
    report = quartet.explain(model, torch.randn(8, 64))
    assert [linear.products for linear in report.linears] == [("y", "dx", "dw")], "one graph for both blocks"
    assert report.not_captured == ("blocks.0.experts", "blocks.1.experts")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return torch.relu(self.up(x))


class Breaking(nn.Module):
    """Layers with a graph break each, and linears between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(3)])
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
        self.tied = nn.Linear(64, 64)
        self.tied.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[1](self.layers[0](self.first(x)))
        return self.tied(self.layers[2](self.last(x)))


def test_names_behind_graph_breaks_are_those_of_the_model() -> None:
    report = quartet.explain(Breaking(), torch.randn(8, 64))
    assert len(report.graphs) > 2
    names = [name for linear in report.linears for name in linear.names]
    # of the tied weight's two linears the second lies behind a break
    assert sorted(names) == ["first", "first", "last", "layers.0.up", "layers.1.up", "layers.2.up"]
    assert report.not_captured == ()


def test_one_line_for_a_graph_that_serves_several_modules() -> None:
    model, x = nn.Sequential(*(Layer() for _ in range(3))), torch.randn(8, 64, requires_grad=True)
    backend = GraphCapture(Options())
    for block in model:
        block.compile(backend=backend)
    model(x)
    report = backend.report(model)
    (linear,) = report.linears
    assert (linear.name, linear.also) == ("0.up", ("1.up", "2.up"))
    assert "quartet: 3 of 3 linears" in str(report)
    assert "0-2.up " in str(report)
    assert report.flops == report.flops_in_nvfp4 == 3 * linear.flops
    assert report.saved_bytes_after == 3 * report.graphs[0].activations_after
    assert report.not_captured == ()


def test_layers_that_are_alike_share_a_line() -> None:
    layers = [SwiGLU() for _ in range(3)] + [SwiGLU(128)]
    model = nn.Sequential(nn.Linear(64, 64), *layers, nn.Linear(64, 8))
    report = quartet.explain(model, torch.randn(8, 64))
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines[3:11]] == ["0", "1-3.gate", "1-3.up", "1-3.down", "4.gate", "4.up", "4.down", "5"]
    assert lines[0] == "quartet: 13 of 14 linears in NVFP4, 1 graph(s)"
    assert brief(["a.0.b", "a.2.b", "a.3.b"]) == "a.0.b (and 2 more)"
    assert brief(["a.1.b", "a.0.b"]) == "a.0-1.b"
    assert brief(["a.0.b.0", "a.1.b.1"]) == "a.0.b.0 (and 1 more)"
    assert brief([f"a.{layer}.up[{expert}]" for layer in (8, 9, 10) for expert in range(4)]) == "a.8-10.up[0-3]"
    assert brief(["a.up", "a.up"]) == "a.up (2 times)", "called twice"
    assert brief([f"a.{layer}.up[0:4]" for layer in range(3)]) == "a.0-2.up[0:4]"


class SwiGLU(nn.Module):
    def __init__(self, hidden: int = 96) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, hidden), nn.Linear(64, hidden), nn.Linear(hidden, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))
