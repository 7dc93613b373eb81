"""Step 2: give equal operands one node, so that they are quantized once.

q, k and v read the same activation, gate and up too; but each linear reads it through views and casts of its own. Here every operand is
replaced by the first one that is equal to it. So are the matrices of a tensor that is one matrix over and over, as experts read that are
computed for all tokens. Inductor would merge equal quantizers only in training graphs, and too late for the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from quartet_compile.passes.operand import Operand
from quartet_compile.passes.provenance import LAYOUT_OPS
from quartet_compile.passes.site import Site, Unsupported

aten = torch.ops.aten


def share(linears: Sequence[Site | Unsupported]) -> list[Site | Unsupported]:
    """The linears with their operands x and w made canonical: equal tensors are the same node. Changes nothing in the graph."""
    first: dict[Any, Node] = {}
    return [
        replace(s, x=_canonical_operand(s.x, first), w=_canonical_operand(s.w, first)) if isinstance(s, Site) else s for s in linears
    ]


def _canonical_operand(o: Operand, first: dict[Any, Node]) -> Operand:
    return _of_one(replace(o, base=_canonical(o.base, first)))


def _of_one(o: Operand) -> Operand:
    """A matrix of a batch that is an expanded matrix, as that matrix."""
    while isinstance(o.batch, int) and o.base.target is aten.expand.default:
        (source,) = o.base.all_input_nodes[:1]
        *leading, rows, columns = source.meta["val"].shape
        if o.base.meta["val"].shape[1:] != (rows, columns) or leading not in ([], [1]):
            break
        o = replace(o, base=source, batch=0 if leading else None)
    return o


def _canonical(node: Node, first: dict[Any, Node]) -> Node:
    """The first node that does the same views and casts to the same tensor."""
    if node.op != "call_function" or node.target not in LAYOUT_OPS:
        return node
    args = map_arg(node.args, lambda n: _canonical(n, first))
    kwargs = map_arg(node.kwargs, lambda n: _canonical(n, first))
    return first.setdefault((node.target, str(args), str(kwargs)), node)
