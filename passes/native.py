"""Step 6, on GPUs with FP4 tensor cores: a gradient is read once for both its products, and products read scales in the order of the cores.

    quantize_grad(e, ...), quantize_grad(e, ..., transposed)    becomes    quantize_grad_both(e, ...)
    matmul(*quantize(x), *quantize(w), bias)                    becomes    matmul_swizzled(codes, swizzle(scales), tensor_scale, ..., bias)
    swizzle(scales of quantize_grad, requantize)                becomes    scales of quantize_grad_swizzled, requantize_swizzled

behind the partitioner, so that what is saved are the scales row by row, which the backward pass reads. Each matrix is swizzled once: by
Inductor's code in the forward pass, where both orders are needed, and by the quantizers themselves in the backward pass.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from quartet_compile.kernels import swizzled_ops  # noqa: F401  (registers the operators)
from quartet_compile.passes.nodes import add_call
from quartet_compile.passes.pipeline import source_hash

quartet = torch.ops.quartet


def has_fp4_tensor_cores(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10


class NativePass(CustomGraphPass):
    """`read_gradients_once`, `swizzle` and `write_swizzled` as a custom pass of Inductor behind the partitioner."""

    def __init__(self, native: Callable[[torch.device], bool] = has_fp4_tensor_cores) -> None:
        self.native = native

    def __call__(self, graph: Graph) -> None:
        read_gradients_once(graph, self.native)
        swizzle(graph, self.native)
        write_swizzled(graph)

    def uuid(self) -> Any:
        return "quartet native", source_hash(), self.native.__module__, self.native.__qualname__


def read_gradients_once(graph: Graph, native: Callable[[torch.device], bool]) -> None:
    """Make one call of two that quantize a gradient in its two orientations; in place."""
    waiting: dict[Any, Node] = {}
    for node in graph.find_nodes(op="call_function", target=quartet.quantize_grad.default):
        e, seeds, _, rule, transpose = node.args
        other = waiting.pop((e, seeds, rule, not transpose), None)
        if other is None:
            if native(node.meta["val"][0].device):
                waiting[e, seeds, rule, transpose] = node
            continue
        straight, turned = (other, node) if transpose else (node, other)
        with graph.inserting_before(other):  # the first of the two
            args = (e, seeds, straight.args[2], turned.args[2], rule)
            both = add_call(graph, quartet.quantize_grad_both.default, args, other, f"{other.name}_both")
        for each, offset in ((straight, 0), (turned, 3)):
            for part in list(each.users):
                position: Any = part.args[1]
                with graph.inserting_after(both):
                    new = add_call(graph, operator.getitem, (both, position + offset), part, part.name)
                part.replace_all_uses_with(new)
                graph.erase_node(part)
            graph.erase_node(each)


def swizzle(graph: Graph, native: Callable[[torch.device], bool]) -> None:
    """Give products swizzled scales; in place."""
    swizzled: dict[Node, Node] = {}
    for node in graph.find_nodes(op="call_function", target=quartet.matmul.default):
        arguments: list[Any] = list(node.args)
        # Rows of codes are read by TMA, which wants them in multiples of 16 bytes.
        if not native(node.meta["val"].device) or not statically_known_true(arguments[0].meta["val"].shape[1] % 16 == 0):
            continue
        for position in (1, 4):
            scales = arguments[position]
            if scales not in swizzled:
                with graph.inserting_after(scales):
                    swizzled[scales] = add_call(graph, quartet.swizzle.default, (scales,), scales, f"{scales.name}_swizzled")
            arguments[position] = swizzled[scales]
        with graph.inserting_before(node):
            new = add_call(graph, quartet.matmul_swizzled.default, tuple(arguments), node, f"{node.name}_swizzled")
        node.replace_all_uses_with(new)
        graph.erase_node(node)


SWIZZLED = {
    quartet.quantize_grad.default: quartet.quantize_grad_swizzled.default,
    quartet.quantize_grad_both.default: quartet.quantize_grad_both_swizzled.default,
    quartet.requantize.default: quartet.requantize_swizzled.default,
}
"""Quantizers, and those that write scales in the order of the cores."""


def write_swizzled(graph: Graph) -> None:
    """Have quantizers write swizzled scales where nothing else of the scales is read; in place."""
    for plain, swizzled in SWIZZLED.items():
        for node in graph.find_nodes(op="call_function", target=plain):
            parts: list[Any] = list(node.users)
            scales = [part for part in parts if part.args[1] % 3 == 1]
            orders = [next(iter(part.users)) for part in scales if [user.target for user in part.users] == [quartet.swizzle.default]]
            if not scales or len(orders) < len(scales):
                continue
            with graph.inserting_before(node):
                new = add_call(graph, swizzled, node.args, node, f"{node.name}_swizzled")
            for order in orders:
                order.replace_all_uses_with(order.args[0])
                graph.erase_node(order)
            node.replace_all_uses_with(new)
            for part in parts:
                part.meta["val"] = new.meta["val"][part.args[1]]
            graph.erase_node(node)
