"""Convolutions with a kernel of one element: a linear over the channels of each pixel.

x [N, I, ...] and a weight [O, I, 1, ...] are matrices [pixels, channels] once the channels stand last (`Operand` with the batch "pixels").
All gradients come from one node, `convolution_backward`, whose three results are replaced one by one.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten


def is_pointwise(node: Node) -> bool:
    """Whether a node is a convolution with a kernel of one element, all channels in one group; or the backward of one."""
    if node.target is aten.convolution.default:
        weight, groups = node.all_input_nodes[1], node.args[8]
    elif node.target is aten.convolution_backward.default:
        weight, groups = node.all_input_nodes[2], node.args[9]
    else:
        return False
    return bool(groups == 1 and all(n == 1 for n in weight.meta["val"].shape[2:]))


def unsupported(convolution: Node) -> str:
    """Why a convolution with a kernel of one element is not a linear of all its pixels, or ""."""
    _, _, _, stride, padding, _, transposed, *_ = convolution.args
    if transposed:
        return "its convolution is a transposed one"
    if any(s != 1 for s in stride) or any(p != 0 for p in padding):  # type: ignore[union-attr]
        return "its convolution has a stride or padding"
    return ""


def gradients(backward: Node) -> dict[int, Node]:
    """The results of a `convolution_backward` that are used: 0 of x, 1 of the weight, 2 of the bias."""
    return {part.args[1]: part for part in backward.users if part.target is operator.getitem}  # type: ignore[misc]


def narrow(backward: Node) -> None:
    """Have a `convolution_backward` compute only what is still used of it; in place."""
    used = gradients(backward)
    arguments: list[Any] = list(backward.args)
    arguments[-1] = [i in used for i in range(3)]
    backward.args = tuple(arguments)
    backward.meta["val"] = tuple(value if i in used else None for i, value in enumerate(backward.meta["val"]))
