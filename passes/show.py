"""Behind the partitioner, on observed steps only: operators that are observed become plain ones, which are measured, and one that shows.

    quantize_observed(x, ..., call, uses)      becomes      quantize(x, ...), measure_fresh(x, *packed, ...)
    ...                                                     show(call, [sums, ...], [label, ...])

at the end of the forward and the backward graph. The plain operators are rewritten for the device like those of any other step, so that an
observed step computes what it would compute if nobody looked. What is measured are packed operands: where products read something else
(`emulate`), they are made besides.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

from quartet_compile.kernels import observed_ops
from quartet_compile.passes.nodes import add_call
from quartet_compile.passes.pipeline import source_hash

aten, quartet = torch.ops.aten, torch.ops.quartet


class ShowPass(CustomGraphPass):
    """`show` as a custom pass of Inductor behind the partitioner, in front of those that rewrite the plain operators."""

    def __call__(self, graph: Graph) -> None:
        show(graph)

    def uuid(self) -> Any:
        return "quartet show", source_hash()


class _Measured(NamedTuple):
    """Sums of one operand or product, and what `show` needs besides."""

    call: Node
    sums: Node
    label: str


PLAIN = {
    quartet.quantize_observed.default: quartet.quantize.default,
    quartet.quantize_grad_observed.default: quartet.quantize_grad.default,
    quartet.requantize_observed.default: quartet.requantize.default,
    quartet.matmul_observed.default: quartet.matmul.default,
}
"""An observed operator -> the one that it observes, which takes fewer arguments."""


def show(graph: Graph) -> None:
    """Rewrite the observed operators of a graph; in place."""
    measured: dict[torch.device, list[_Measured]] = {}
    largest: dict[Any, Node] = {}
    for node in [n for n in graph.nodes if n.op == "call_function" and n.target in PLAIN]:
        one = _measure(graph, node, largest)
        measured.setdefault(one.sums.meta["val"].device, []).append(one)
    (output,) = graph.find_nodes(op="output")
    for samples in measured.values():
        with graph.inserting_before(output):
            _show(graph, samples)


def _measure(graph: Graph, node: Node, largest: dict[Any, Node]) -> _Measured:
    """Have a plain operator in place of an observed one, and its result measured. largest: nodes of largest magnitudes, kept."""
    target = PLAIN[node.target]  # type: ignore[index]
    count = len(target._schema.arguments)
    arguments, (*before, elements, call, uses) = node.args[:count], node.args[count:]
    with graph.inserting_before(node):
        plain = add_call(graph, target, arguments, node, node.name.replace("_observed", ""))
    node.replace_all_uses_with(plain)
    graph.erase_node(node)
    with graph.inserting_after(plain):
        if target is quartet.matmul.default:
            e, transposed, saved, swapped = before
            sums = add_call(graph, quartet.measure_product.default, (plain, swapped, e, transposed, saved, elements), plain, "sums")
            return _Measured(call, sums, observed_ops.label("", uses))  # type: ignore[arg-type]
    packed = _packed(graph, plain)
    if target is not quartet.requantize.default and arguments[0] not in largest:
        with graph.inserting_before(plain):
            largest[arguments[0]] = add_call(graph, quartet.largest.default, (arguments[0],), plain, "largest")
    with graph.inserting_after(packed[-1]):
        if target is quartet.quantize.default:
            x, rule = arguments
            made = quartet.measure_fresh.default, (x, largest[x], False, *packed, None, 0, elements)
        elif target is quartet.quantize_grad.default:
            e, seeds, index, rule, transpose = arguments
            made = quartet.measure_fresh.default, (e, largest[e], transpose, *packed, seeds, index, elements)
        else:
            *source, seeds, index, rule = arguments
            made = quartet.measure_saved.default, (*source, *packed, seeds, index, elements)
        return _Measured(call, add_call(graph, *made, plain, "sums"), observed_ops.label(rule, uses))  # type: ignore[arg-type]


def _packed(graph: Graph, quantizer: Node) -> list[Node]:
    """Its three results, right behind it."""
    parts: list[Node] = []
    for i, name in enumerate(("codes", "scales", "tensor_scale")):
        with graph.inserting_after(parts[-1] if parts else quantizer):
            parts.append(add_call(graph, operator.getitem, (quantizer, i), quantizer, f"{quantizer.name}_measured_{name}"))
    return parts


def _show(graph: Graph, samples: Sequence[_Measured]) -> None:
    call = samples[0].call
    seen = add_call(graph, aten.empty.memory_format, ([0],), call, "seen", device=torch.device("cpu"))
    shown = add_call(graph, quartet.show.default, (seen, call, [s.sums for s in samples], [s.label for s in samples]), seen, "show")
    shown.meta["val"] = None
