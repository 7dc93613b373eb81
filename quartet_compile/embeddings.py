"""Which graph inputs are tables of embeddings, in this graph or in another.

A head that is tied to an embedding stays in the model's dtype. Where a graph break lies between them, the head's graph does not contain the
lookup, but it is called with the same tensor. So tables are marked, by an attribute as Dynamo marks static parameters: when a graph is
compiled, so that its cache key is the same the next time; and when it is called, since it may serve several models. Dynamo leaves a
function that breaks the graph in a loop to eager code, and its lookup with it: so the embeddings in modules being called are marked, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from quartet_compile.circumstances import modules_being_called

aten = torch.ops.aten

MARK = "_quartet_embedding"

LOOKUPS: dict[Any, int] = {
    F.embedding: 1, F.embedding_bag: 1, torch.embedding: 0, torch.embedding_bag: 0, aten.embedding: 0, aten.embedding.default: 0,
}  # fmt: skip
"""The functions in Dynamo's graphs that look up rows, and which of their arguments is the table."""


def mark_all(gm: GraphModule, example_inputs: Sequence[Any]) -> list[int]:
    """Mark what is known to be a table when a Dynamo graph is compiled. Returns the indices of its own ones among its inputs."""
    for module in modules_being_called():
        for part in module.modules():
            if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
                mark([part._parameters.get("weight")], [0])
    indices = _tables(gm)
    mark(example_inputs, indices)
    return indices


def _tables(gm: GraphModule) -> list[int]:
    """Indices of the inputs of a Dynamo graph that it looks rows up in, as they are or made into a table without another tensor."""
    found = set()
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in LOOKUPS:
            position = LOOKUPS[node.target]
            table = node.args[position] if len(node.args) > position else node.kwargs["weight"]
            while isinstance(table, Node) and len(table.all_input_nodes) == 1:
                (table,) = table.all_input_nodes
            found.add(table)
    return [index for index, node in enumerate(gm.graph.find_nodes(op="placeholder")) if node in found]


def mark(inputs: Sequence[Any], indices: Sequence[int]) -> None:
    """Remember that these inputs of a graph are tables, for as long as they live."""
    for index in indices:
        if isinstance(inputs[index], torch.Tensor):
            setattr(inputs[index], MARK, True)


def marked(inputs: Sequence[Any]) -> frozenset[int]:
    """Indices of the inputs that are tables of any graph so far."""
    return frozenset(index for index, value in enumerate(inputs) if hasattr(value, MARK))


def marking(compiled: Callable[..., Any], indices: Sequence[int]) -> Callable[..., Any]:
    """A compiled graph that marks its tables whenever it is called."""
    if not indices:
        return compiled

    @functools.wraps(compiled)
    def called(*args: Any) -> Any:
        mark(args, indices)
        return compiled(*args)

    return called
