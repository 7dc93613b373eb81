"""Step 6, on GPUs without FP4 tensor cores: multiply the values of packed matrices instead of the matrices.

Such a GPU multiplies bfloat16 numbers, which hold exactly what NVFP4 codes stand for (`kernels.value_ops`). Where a product's operands are
made in the same graph, their quantizers can write these numbers in the pass in which they have them at hand anyway:

    matmul(quantize(x), quantize(w), bias)                   matmul_values(x', w', bias)  with x' from quantize_with_values(x)
    matmul(quantize_grad(e), requantize(packed w), 1/128)    matmul_values(grad_values(e, 1/128), requantize_values(packed w))
    grouped_matmul, grouped_outer                            aten._grouped_mm of values

The forward quantizers write both where the backward pass reads the packed matrices; all others write values alone. A gradient that two
products read in both orientations is read once. This runs on the forward and the backward graph after the partitioner has split
them: what is saved is settled by then, and it is packed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

from quartet_compile.kernels import grouped_ops, measure_ops, ops, value_ops  # noqa: F401  (register the operators)
from quartet_compile.passes.nodes import add_call
from quartet_compile.passes.pipeline import source_hash

aten, quartet = torch.ops.aten, torch.ops.quartet

QUANTIZERS = (quartet.quantize.default, quartet.quantize_grad.default, quartet.requantize.default)


def multiplies_packed(device: torch.device) -> bool:
    """True for a device whose packed product is native, and for one that emulates in its own way: the CPU."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 10


class EmulationPass(CustomGraphPass):
    """`emulate` as a custom pass of Inductor behind the partitioner."""

    def __init__(self, native: Callable[[torch.device], bool] = multiplies_packed) -> None:
        self.native = native

    def __call__(self, graph: Graph) -> None:
        emulate(graph, self.native)

    def uuid(self) -> Any:
        return "quartet emulation", source_hash(), self.native.__module__, self.native.__qualname__


def emulate(graph: Graph, native: Callable[[torch.device], bool] = multiplies_packed) -> None:
    """Rewrite, in place, the products on devices that are not native, and those of groups on all GPUs, none of which has them for NVFP4."""
    products: list[tuple[Node, Node, Node]] = []
    scales: dict[Node, float] = {}
    for target in (quartet.matmul.default, quartet.grouped_matmul.default, quartet.grouped_outer.default):
        for node in graph.find_nodes(op="call_function", target=target):
            device = node.meta["val"].device
            left, right = _quantizer(node.args[0:3]), _quantizer(node.args[3:6])
            if left is None or right is None or (native(device) and (target is quartet.matmul.default or device.type != "cuda")):
                continue
            if (left.target is quartet.quantize.default) != (right.target is quartet.quantize.default):
                continue  # rotated values stand in an order of their own (`value_ops.product_order`)
            # The factor that undoes two rotations goes into the gradient's values.
            scale = _scale(node)
            gradients = [q for q in (left, right) if q.target is quartet.quantize_grad.default]
            if len(gradients) > 1 or (scale != 1.0 and not gradients) or any(scales.get(q, scale) != scale for q in gradients):
                continue
            scales.update(dict.fromkeys(gradients, scale))
            products.append((node, left, right))
    values = _Values(graph, scales)
    for node, left, right in products:
        with graph.inserting_before(node):
            new = _product_of_values(graph, node, values.of(left), values.of(right))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    _measure_values(graph, values)
    graph.eliminate_dead_code()
    _leave_out_codes(graph)


def _scale(product: Node) -> float:
    arguments: Any = product.args
    return arguments[8 if product.target is quartet.grouped_matmul.default else 7]


def _product_of_values(graph: Graph, product: Node, left: Node, right: Node) -> Node:
    """The product that takes the place of a packed one; of groups, torch's own."""
    arguments: Any = product.args
    name = f"{product.name}_values"
    if product.target is quartet.matmul.default:
        return add_call(graph, quartet.matmul_values.default, (left, right, arguments[6], arguments[8]), product, name)
    ends = arguments[6]
    if product.target is quartet.grouped_outer.default:
        turned = add_call(graph, aten.permute.default, (right, [1, 0]), product, f"{right.name}_t")
    else:
        groups = ends.meta["val"].shape[0]
        rows, columns = right.meta["val"].shape
        across = arguments[7]
        shape, order = ([rows, groups, columns // groups], [1, 2, 0]) if across else ([groups, rows // groups, columns], [0, 2, 1])
        matrices = add_call(graph, aten.view.default, (right, shape), product, f"{right.name}_groups")
        turned = add_call(graph, aten.permute.default, (matrices, order), product, f"{right.name}_groups_t")
    return add_call(graph, aten._grouped_mm.default, (left, turned, ends), product, name)


def _measure_values(graph: Graph, values: _Values) -> None:
    """On observed steps, measure values of rotated operands where they are made, instead of making packed ones for it; in place."""
    for target in (quartet.measure_fresh.default, quartet.measure_saved.default):
        for node in graph.find_nodes(op="call_function", target=target):
            *of, codes, scales, tensor_scale, seeds, index, elements = node.args
            quantizer = _quantizer((codes, scales, tensor_scale))
            if quantizer is None or quantizer not in values.made or quantizer.target is quartet.quantize.default:
                continue
            rule = quantizer.args[3 if target is quartet.measure_fresh.default else 6]
            if rule not in ops.FILL_THE_RANGE:
                continue
            made = values.made[quantizer]
            if target is quartet.measure_fresh.default:
                new = quartet.measure_fresh_values.default, (*of, made, values.scales[quantizer], seeds, index, rule, elements)
            else:
                new = quartet.measure_saved_values.default, (*of, made, seeds, index, rule, elements)
            with graph.inserting_before(node):
                sums = add_call(graph, *new, node, f"{node.name}_values")
            node.replace_all_uses_with(sums)
            graph.erase_node(node)


def _leave_out_codes(graph: Graph) -> None:
    """Make values alone where the packed matrix beside them is not used; in place."""
    for node in graph.find_nodes(op="call_function", target=quartet.quantize_with_values.default):
        if all(user.args[1] == 3 for user in node.users):
            (values,) = node.users
            with graph.inserting_before(node):
                values.replace_all_uses_with(add_call(graph, quartet.quantize_values.default, node.args, node, values.name))
            graph.erase_node(values)
            graph.erase_node(node)


def _quantizer(packed: tuple[Any, ...]) -> Node | None:
    """The quantizer whose three results these are, if it is one of this graph."""
    if not all(isinstance(n, Node) and n.target is operator.getitem and n.args[1] == i for i, n in enumerate(packed)):
        return None
    sources = {n.args[0] for n in packed}
    source = sources.pop()
    return source if not sources and source.target in QUANTIZERS else None


class _Values:
    """Makes the values of packed matrices, once each."""

    def __init__(self, graph: Graph, scales: Mapping[Node, float]) -> None:
        self.graph, self.scales = graph, scales
        self.made: dict[Node, Node] = {}
        self.matrices: dict[Node, Node] = {}
        self.order = {node: i for i, node in enumerate(graph.nodes)}

    def of(self, quantizer: Node) -> Node:
        """The node of the values of what `quantizer` makes."""
        if quantizer not in self.made:
            make: dict[Any, Callable[[Node], None]] = {
                quartet.quantize.default: self.beside,
                quartet.requantize.default: self.instead,
                quartet.quantize_grad.default: self.gradient,
            }
            make[quantizer.target](quantizer)
        return self.made[quantizer]

    def add(self, target: Any, args: tuple[Any, ...], quantizer: Node, name: str = "") -> Node:
        with self.graph.inserting_before(quantizer):
            return add_call(self.graph, target, args, quantizer, f"{quantizer.name}{name}_values")

    def beside(self, quantizer: Node) -> None:
        """Packed for whoever saves it, and values."""
        both = self.add(quartet.quantize_with_values.default, quantizer.args, quantizer, "_and")
        self.made[quantizer] = self.add(operator.getitem, (both, 3), quantizer)
        quantizer.replace_all_uses_with(both)

    def instead(self, quantizer: Node) -> None:
        arguments: Any = quantizer.args
        codes, scales, tensor_scale, columns, seeds, index, rule = arguments
        args = (codes, scales, tensor_scale, columns, self.rotations(seeds), seeds, index, rule)
        self.made[quantizer] = self.add(quartet.requantize_values.default, args, quantizer)

    def rotations(self, seeds: Node) -> Node:
        """The matrices of all rotations of these seeds, made once."""
        if seeds not in self.matrices:
            with self.graph.inserting_after(seeds):
                self.matrices[seeds] = add_call(self.graph, quartet.rotations.default, (seeds,), seeds, "rotations")
        return self.matrices[seeds]

    def gradient(self, quantizer: Node) -> None:
        """Values of a gradient, in both orientations where another product reads the other one."""
        arguments: Any = quantizer.args
        e, seeds, index, rule, transpose = arguments
        scale = self.scales[quantizer]
        other = next((n for n in self.scales if n.args == (e, seeds, n.args[2], rule, not transpose) and self.scales[n] == scale), None)
        if other is None or other in self.made:
            self.made[quantizer] = self.add(
                quartet.grad_values.default, (e, self.rotations(seeds), seeds, index, rule, transpose, scale), quantizer
            )
            return
        first = min(quantizer, other, key=self.order.__getitem__)
        indices = (other.args[2], index) if transpose else (index, other.args[2])
        both = self.add(quartet.grad_values_both.default, (e, self.rotations(seeds), seeds, *indices, rule, scale), first, "_both")
        for n in (quantizer, other):
            part, name = (1, "_transposed") if n.args[4] else (0, "")
            self.made[n] = self.add(operator.getitem, (both, part), first, name)
