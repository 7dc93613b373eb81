"""The report of a model of thirty unlike layers accounts for every product of the captured graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import nop
from page_support import Page
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition
from torch.fx import GraphModule
from unlike_layers import Unlike

import quartet_compile as quartet

NAMES = (
    "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "_grouped_mm", "_trilinear", "convolution", "convolution_backward",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward",
)  # fmt: skip
"""Operators of aten that multiply matrices."""


HIDDEN = "not looked into"
"""What the reason of a linear says whose products are inside something else."""


def products_of_aten_graphs(model: torch.nn.Module, tokens: torch.Tensor) -> list[Counter[str]]:
    """Of each graph that Dynamo captures, what AOTAutograd makes of it, forward and backward, without our passes and decompositions."""
    graphs: list[Counter[str]] = []

    def partition(joint: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        names = [node.target.overloadpacket.__name__ for node in joint.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        graphs.append(Counter(name for name in names if name in NAMES))
        return default_partition(joint, inputs, **kwargs)

    torch.compile(model, backend=aot_autograd(fw_compiler=nop, bw_compiler=nop, partition_fn=partition))(tokens).sum().backward()
    return graphs


@pytest.mark.parametrize("in_a_loop", [pytest.param(True, marks=pytest.mark.slow), False])
def test_every_product_is_accounted_for(in_a_loop: bool, tmp_path: Path) -> None:
    """In a loop: a graph break there leaves the loop to eager code, and torch's own modules with it, which Dynamo does not compile."""
    model, tokens = Unlike(in_a_loop), torch.randint(0, 96, (2, 12))
    report = quartet.explain(model, tokens)
    torch._dynamo.reset()
    counted = products_of_aten_graphs(model, tokens)
    assert [graph.products for graph in report.graphs] == [sum(counter.values()) for counter in counted]
    assert sum(graph.products for graph in report.graphs) > 70
    for graph in report.graphs:
        claimed = {node for linear in graph.linears if HIDDEN not in linear.reason for node in linear.before}
        others = {product.node for product in graph.others}
        assert not claimed & others
        assert len(claimed) + len(others) == graph.products

    # every module with a matrix of its own that is a linear is in the report, or named as not captured
    lines = {name.partition("[")[0].removesuffix(".kernel") for linear in report.linears for name in linear.names}
    in_branches = {"layers.24.one", "layers.24.other"}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - in_branches
    left_to_eager = {"layers.0", "layers.1", "layers.6.0", "layers.6.2", "layers.28", "lm_head"} if in_a_loop else set()
    assert linears - lines == left_to_eager
    assert left_to_eager | in_branches <= set(report.not_captured)

    # the page shows the same
    page = Page(report.save(tmp_path / "report.html").read_text())
    states = Counter(str(leaf.attributes["class"]).split()[1] for leaf in page.root.all("li", class_="leaf"))
    named = Counter(linear.left_because or "nvfp4" for linear in report.linears for _ in linear.names)
    modules = {(i, product.module) for i, graph in enumerate(report.graphs) for product in graph.others}  # one leaf for those of a module
    assert states == named | Counter(other=len(modules), missing=len(report.not_captured))
    text = page.root.text
    assert all(name in text for linear in report.linears for name in (*linear.names, linear.source, linear.reason))
    assert all(product.node in text for product in report.others)
    assert all(name in text for name in report.not_captured)
    assert all(note in text for graph in report.graphs for note in graph.notes)
