"""Behind step 5, on observed steps only: observed operators (`kernels.observed_ops`) in place of the plain ones.

    quantize(x)                                     quantize_observed(x, elements, call, uses)
    matmul(quantize_grad(e), requantize(w), 1/128)  matmul_observed(..., e, w, elements, call, uses), which also multiplies rows of e by w

`call` is one node in the forward graph. The backward pass finds it saved, and beside the packed operands those that it is compared with.
`show` makes plain operators of them once the graphs are split. Products of groups are not compared; their operands are measured like all
others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from quartet_compile.kernels import grouped_ops, observed_ops  # noqa: F401  (register the operators)
from quartet_compile.passes.nodes import add_call

if TYPE_CHECKING:
    from quartet_compile.passes.rewrite import Written

quartet = torch.ops.quartet

OBSERVED = {
    quartet.quantize.default: quartet.quantize_observed.default,
    quartet.quantize_grad.default: quartet.quantize_grad_observed.default,
    quartet.requantize.default: quartet.requantize_observed.default,
}


def observe(graph: Graph, written: Sequence[Written], elements: int) -> None:
    """Have the operators of these products observed; in place. They keep their names, metadata and results.

    elements: numbers to be measured of each at most, 0 for all.
    """
    uses: dict[Node, list[str]] = {}
    compared: list[tuple[Node, Node, Node, bool, str]] = []
    for one in written:
        site, kind, result = one
        if not result.users:
            continue  # nobody needed it: it left the graph
        first, second = one.quantizers
        operands = {"x": first, "w": second} if kind == "y" else {"e": first, "w" if kind == "dx" else "x": second}
        if kind != "y" and one.product.target is quartet.matmul.default:
            compared.append((one.product, first, second, one.swapped, f"{kind} - {site.name}"))
        for role, quantizer in operands.items():
            uses.setdefault(quantizer, []).append(f"{kind} {role} {site.name}")
    if not uses:
        return
    call = _call(graph, next(node for node in graph.nodes if node in uses))
    for product, e, saved, swapped, use in compared:
        matrix, *_, transposed = e.args[:5]
        source: Any = saved.args[0].args[0]  # type: ignore[union-attr]
        product.args = (*product.args, matrix, transposed, source.args[0], swapped, elements, call, [use])
        product.target = quartet.matmul_observed.default
    for quantizer, its_uses in uses.items():
        target: Any = quantizer.target
        quantizer.args = (*quantizer.args, elements, call, its_uses)
        quantizer.target = OBSERVED[target]


def _call(graph: Graph, first: Node) -> Node:
    """The number of the call, before the first quantizer. It is never asked for again: the backward pass would get another one."""
    with graph.inserting_before(first):
        call = add_call(graph, quartet.observed_call.default, (first.args[0],), first, "observed_call")
    call.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return call
