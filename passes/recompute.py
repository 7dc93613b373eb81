"""Step 5: which packed operands the backward pass makes again instead of finding them saved.

The forward quantizers draw nothing, so quantizing the same tensor again gives the same codes. That costs a read of the tensor and saves
0.5625 bytes an element between the passes. It pays where the tensor itself needs no memory of its own:

    weights     a parameter is there in any case
    operands    weights, and activations that pointwise code makes from tensors that the backward pass reads in any case: the output
                of SwiGLU from its two inputs, that of a norm from its input and its statistics, that of attention as it is

The choice is told to the partitioner in the way in which activation checkpointing tells its own, on the quantizer and on the pointwise code
before it. What checkpointing has decided of that code is left alone; a product that it keeps is one more tensor to start from. That a
product is kept says nothing of its quantizers, which are ours.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from quartet_compile.passes.match import backward_nodes
from quartet_compile.passes.provenance import LAYOUT_OPS, dynamo_input_index

CHOICES = ("none", "weights", "operands")

quartet = torch.ops.quartet


def recompute(graph: Graph, parameters: Mapping[int, str], choice: str) -> frozenset[Node]:
    """Mark forward quantizers of a rewritten joint graph, and the code before them, as to be computed again. Returns the quantizers."""
    marked: set[Node] = set()
    if choice == "none":
        return frozenset()
    backward = backward_nodes(graph)
    free = {node for node in graph.find_nodes(op="placeholder") if dynamo_input_index(node) in parameters}
    if choice == "operands":
        free |= _read_in_backward(graph, backward) | _kept_by_checkpointing(graph, backward)
    for quantizer in graph.find_nodes(op="call_function", target=quartet.quantize.default):
        parts = list(quantizer.users)
        if not any(user in backward for part in parts for user in part.users):
            continue  # nothing of it is saved
        again = _path_from(free, quantizer.all_input_nodes[0])
        if again is not None:
            for node in (quantizer, *parts):
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            for node in again:
                node.meta.setdefault("recompute", CheckpointPolicy.MUST_RECOMPUTE)
            marked.add(quantizer)
    return frozenset(marked)


def _read_in_backward(graph: Graph, backward: set[Node]) -> set[Node]:
    """The tensors of the forward pass whose numbers the backward pass reads.

    A view is read where its base is. Of what is only compared with something, as ReLU's backward does, the answer is kept instead.
    """
    read: set[Node] = set()
    for node in reversed(graph.nodes):
        if any(user in read if _is_view(user) else user in backward and _computes_numbers(user) for user in node.users):
            read.add(node)
    return read - backward


def _kept_by_checkpointing(graph: Graph, backward: set[Node]) -> set[Node]:
    """What selective checkpointing keeps for its users in the forward pass, which run again."""
    keep = (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)
    return {node for node in graph.nodes if node.meta.get("recompute") in keep} - backward


def _is_view(node: Node) -> bool:
    return getattr(node.target, "is_view", False)


def _computes_numbers(node: Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.dtype != torch.bool


def _path_from(free: set[Node], node: Node) -> list[Node] | None:
    """The nodes that make `node` from free tensors, pointwise or by moving them; None if something else is needed."""
    path: dict[Node, None] = {}
    waiting = [node]
    while waiting:
        n = waiting.pop()
        if n in free or n in path:
            continue
        if n.op != "call_function" or not (n.target in LAYOUT_OPS or torch.Tag.pointwise in getattr(n.target, "tags", ())):
            return None
        path[n] = None
        waiting.extend(n.all_input_nodes)
    return list(path)
