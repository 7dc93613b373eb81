"""Step 5, on GPUs with FP4 tensor cores: products read their scales in the order that these want.

    matmul(*quantize(x), *quantize(w), bias)   becomes   matmul_swizzled(codes, swizzle(scales), tensor_scale, ..., bias)

behind the partitioner, so that what is saved are the scales row by row, which the backward pass reads. Each matrix is swizzled once.
"""

from __future__ import annotations

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


def reads_swizzled_scales(device: torch.device) -> bool:
    """True for a CUDA device with FP4 tensor cores."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10


class SwizzlePass(CustomGraphPass):
    """`swizzle` as a custom pass of Inductor behind the partitioner."""

    def __init__(self, wanted: Callable[[torch.device], bool] = reads_swizzled_scales) -> None:
        self.wanted = wanted

    def __call__(self, graph: Graph) -> None:
        swizzle(graph, self.wanted)

    def uuid(self) -> Any:
        return "quartet swizzle", source_hash(), self.wanted.__module__, self.wanted.__qualname__


def swizzle(graph: Graph, wanted: Callable[[torch.device], bool] = reads_swizzled_scales) -> None:
    """Rewrite, in place, the products on devices that want it."""
    swizzled: dict[Node, Node] = {}
    for node in graph.find_nodes(op="call_function", target=quartet.matmul.default):
        arguments: list[Any] = list(node.args)
        # Rows of codes are read by TMA, which wants them in multiples of 16 bytes.
        if not wanted(node.meta["val"].device) or not statically_known_true(arguments[0].meta["val"].shape[1] % 16 == 0):
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
