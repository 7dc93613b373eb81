"""Adding a call to a graph, with the metadata that partitioner, checkpointing and reports read."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

COPIED_META = ("nn_module_stack", "fwd_nn_module_stack", "stack_trace", "seq_nr", "custom", "autograd_backward", "recompute", "ac_graph_id")
"""What a new node inherits from the one that it replaces; the last two keep activation checkpointing working."""


def add_call(graph: Graph, target: Any, args: tuple[Any, ...], like: Node, name: str, tag: str | None = None, **kwargs: Any) -> Node:
    """A node that computes ``target(*args, **kwargs)`` at the graph's insertion point, with the metadata of `like`.

    tag: its partitioner tag. kwargs: hold no nodes.
    """
    node = graph.create_node("call_function", target, args, kwargs, name=name)
    node.meta.update({key: like.meta[key] for key in COPIED_META if key in like.meta})
    tag = tag or like.meta.get("partitioner_tag")
    if tag is not None:
        node.meta["partitioner_tag"] = tag
    values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
    if target is operator.getitem:
        node.meta["val"] = values[0][values[1]]
    else:
        example: Any = next(v for v in torch.utils._pytree.tree_leaves(like.meta["val"]) if isinstance(v, torch.Tensor))
        with example.fake_mode:
            node.meta["val"] = target(*values, **kwargs)
    return node
