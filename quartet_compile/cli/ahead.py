"""Compiling what the self-tests launch on a GPU in Inductor's worker processes, all kernels at the same time.

Triton compiles a kernel at its first launch, one after the other, for one to five seconds each. But the operators' self-tests are the same
on every device: their calls on the CPU, which come first, tell what will be launched. Nothing depends on it: what no worker compiled is
compiled at its first launch.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from quartet_compile.cli.check import Check
from quartet_compile.kernels import ops

quartet = torch.ops.quartet

NAME = "GPU kernels"

SECONDS = 60
"""How long to wait for the workers to be there."""


class Calls(TorchDispatchMode):
    """Notes the calls of our operators, as long as it is entered: in `made`, each with its arguments, tensors on the device "meta"."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[OpOverload, list[Any]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if op.namespace == "quartet":
            self.made.append((op, [_placed(argument, "meta") for argument in args]))
        return op(*args, **(kwargs or {}))


def _placed(argument: Any, device: Any) -> Any:
    """A tensor of this form on another device; anything else as it is."""
    if not isinstance(argument, torch.Tensor):
        return argument
    return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device=device)


def start_workers() -> None:
    """Have Inductor's workers start: they import PyTorch first."""
    from torch._inductor.async_compile import AsyncCompile

    AsyncCompile.warm_pool()


def compile_ahead(calls: Calls, devices: Sequence[str]) -> Check:
    """Hand the kernels that these calls would launch on these GPUs to the workers; the first launch there waits for them."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    from quartet_compile.kernels.triton_kernels import precompile

    places = [torch.device(device) for device in devices]
    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(places[0].index or 0))  # where workers put them and launches look
    with contextlib.suppress(concurrent.futures.TimeoutError):
        AsyncCompile.wait_pool_ready(SECONDS)
    seen, handed = set[Any](), 0
    for place in places:
        new = {(torch.cuda.get_device_capability(place), key): job for key, job in launches(calls, place).items()}
        handed += len(precompile.submit([job for key, job in new.items() if key not in seen], place))
        seen.update(new)
    if not handed:
        return Check(NAME, "ok", "compiled one by one, at their first launch: Inductor has no workers here")
    return Check(NAME, "ok", f"{handed}, which Inductor's workers compile at the same time")


def launches(calls: Calls, device: torch.device) -> dict[Any, Any]:
    """What the calls would launch on a GPU, each kernel once: signature -> job for `precompile.submit`."""
    from quartet_compile.cli.operators import is_used
    from quartet_compile.kernels.triton_kernels import matmul, matmul_packed, precompile

    # Not among `ON_GPU`, which are for graphs: there Inductor lowers products itself.
    products: dict[OpOverload, Callable[..., Any]] = {
        quartet.matmul.default: matmul, quartet.matmul_swizzled.default: partial(matmul_packed, swizzled=True)
    }  # fmt: skip
    on_gpu, jobs = ops.ON_GPU | products, dict[Any, Any]()
    with FakeTensorMode():
        for op, arguments in calls.made:
            if op in on_gpu and is_used(op.name().removeprefix("quartet::"), device):
                for job in precompile.rehearse(on_gpu[op], [_placed(argument, device) for argument in arguments]):
                    jobs.setdefault(precompile.signature(job), job)
    return jobs
