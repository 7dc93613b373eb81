"""Step 7, on GPUs: have the Triton kernels behind the operators of a graph compiled while Inductor compiles the rest of it."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

from quartet_compile.kernels import ops

log = logging.getLogger("quartet_compile")


class PrecompilePass(CustomGraphPass):
    """Changes nothing in the graph. Behind the passes that settle which operators a device runs."""

    def __call__(self, graph: Graph) -> None:
        calls = {_signature(node): node for node in graph.nodes if node.op == "call_function" and node.target in ops.ON_GPU}
        on_gpu = [node for node in calls.values() if _device(node).type == "cuda" and _is_static(node)]
        if on_gpu:
            jobs = submit(on_gpu)
            log.debug("compiling %d kernels in Inductor's workers", jobs)

    def uuid(self) -> Any:
        return "quartet precompile"


def submit(nodes: list[Node]) -> int:
    """Compile what these calls launch, each kernel once; how many kernels that is."""
    from quartet_compile.kernels.triton_kernels import precompile

    by_device: dict[torch.device, dict[Any, Any]] = {}
    for node in nodes:
        values = torch.fx.node.map_arg(tuple(node.args), lambda n: n.meta["val"])
        example: Any = next(v for v in values if isinstance(v, torch.Tensor))
        with example.fake_mode:
            target: Any = node.target
            for job in precompile.rehearse(ops.ON_GPU[target], values):
                by_device.setdefault(example.device, {}).setdefault(precompile.signature(job), job)
    for device, jobs in by_device.items():
        precompile.submit(jobs.values(), device)
    return sum(map(len, by_device.values()))


def _device(node: Node) -> torch.device:
    return next(v for v in torch.utils._pytree.tree_leaves(node.meta["val"]) if isinstance(v, torch.Tensor)).device


def _is_static(node: Node) -> bool:
    """Whether all sizes are numbers: a rehearsal would specialize symbolic ones."""
    values = [n.meta["val"] for n in node.all_input_nodes]
    return all(isinstance(n, int) for v in values if isinstance(v, torch.Tensor) for n in (*v.shape, *v.stride())) and not any(
        isinstance(v, torch.SymInt) for v in values
    )


def _signature(node: Node) -> Any:
    """Calls that are alike launch alike: arguments that are not tensors, and the tensors' types, shapes and strides."""

    def kind(argument: Any) -> Any:
        value = argument.meta["val"] if isinstance(argument, Node) else argument
        return (value.dtype, str(value.shape), str(value.stride())) if isinstance(value, torch.Tensor) else str(value)

    return node.target, tuple(map(kind, node.args))
