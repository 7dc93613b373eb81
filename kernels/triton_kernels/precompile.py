"""Compile the kernels of a graph's operators while Inductor compiles the rest, in its worker processes.

Triton compiles a kernel at its first launch, one after the other, a second each. But the launches are known as soon as the graph is: an
operator is *rehearsed* on fake tensors, with `launch.launch` noting kernels instead of launching them. Workers then compile for the same
argument types and leave the binaries in Triton's cache on disk, where the first launch finds them.

The first launch finds a binary by a hash over sources, options and tools, which has to come out the same in both processes (`Toolchain`,
`launch.hash_in_order`). Nothing depends on it: what was not rehearsed (sizes that are symbolic) or failed is compiled at its first launch,
as ever.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from ctypes.util import find_library
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.nvidia import compiler

from quartet_compile.kernels.triton_kernels import launch

log = logging.getLogger("quartet_compile")

Job = tuple[str, str, tuple[Any, ...], dict[str, Any]]
"""Module and name of a kernel, its arguments with tensors as their dtypes, and its constants and options."""


@dataclass(frozen=True)
class Toolchain:
    """The assembler and the cache folder of a process.

    Inductor chooses another assembler than Triton does by itself: at once in its workers, sooner or later in the process that it runs in.
    Triton remembers the version of the first one that it asked, and a binary's hash contains that version, whatever assembled it.
    """

    ptxas: str
    ptxas_blackwell: str
    version: str
    cache: str

    @staticmethod
    def of_this_process(capability: int, cache: str) -> Toolchain:
        tools = triton.knobs.nvidia
        return Toolchain(tools.ptxas.path, tools.ptxas_blackwell.path, compiler.get_ptxas_version(capability), cache)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Have Triton use it, and remember this version."""
        variables = {
            "TRITON_PTXAS_PATH": self.ptxas, "TRITON_PTXAS_BLACKWELL_PATH": self.ptxas_blackwell, "TRITON_CACHE_DIR": self.cache,
        }  # fmt: skip
        version = mock.patch.object(compiler, "get_ptxas_version", return_value=self.version)
        with mock.patch.dict(os.environ, variables), version:
            yield


def rehearse(operator: Callable[..., Any], arguments: Iterable[Any]) -> list[Job]:
    """The launches of an operator's implementation on fake tensors, whose sizes are numbers."""
    with launch.rehearsal() as launches:
        operator(*arguments)
    return [
        (kernel.fn.__module__, kernel.fn.__name__, tuple(v.dtype if isinstance(v, torch.Tensor) else v for v in values), options)
        for kernel, values, options in launches
    ]


def signature(job: Job) -> tuple[Any, ...]:
    """What Triton tells compilations of a kernel apart by, or more: its types, which integers are 1 or multiples of 16, its constants."""
    module, name, values, options = job
    unspecialized = {p.name for p in _kernel(module, name).params if p.do_not_specialize}
    names = _kernel(module, name).arg_names

    def kind(name: str, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return (value >= 2**31,) if name in unspecialized else (value >= 2**31, value == 1, value % 16 == 0)
        return type(value).__name__ if isinstance(value, float) else value

    return module, name, tuple(kind(*each) for each in zip(names, values, strict=False)), tuple(sorted(options.items()))


def submit(jobs: Iterable[Job], device: torch.device) -> list[Future[None]]:
    """Hand jobs to Inductor's workers, if it has any that are ready. `launch.launch` waits for them before it launches."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    if not AsyncCompile.use_process_pool():
        return []
    pool = AsyncCompile.process_pool()
    index = device.index or 0
    capability = launch.device_target(torch.device("cuda", index)).capability
    here = Toolchain.of_this_process(capability, triton_cache_dir(index))
    futures = [pool.submit(compile_in_worker, job, capability, here) for job in jobs]
    launch.pending.extend(futures)
    return futures


# ---------------------------------------------------------------- in a worker


class _Target:
    """As much of a driver as Triton asks when it compiles: a worker has no GPU of its own."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_in_worker(job: Job, capability: int, toolchain: Toolchain) -> None:
    """Compile one kernel into Triton's cache on disk, as the process would that launches it."""
    module, name, values, options = job
    with toolchain.used(), _driver(_Target(capability)):
        _build_launcher(_kernel(module, name).warmup(*values, grid=(1,), **options))


def _build_launcher(binary: Any) -> None:
    """What launches it: up to Triton 3.6 a module of its own in C, which takes a C compiler and CUDA's driver library."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher") and find_library("cuda"):
        driver.CudaLauncher(binary.src, binary.metadata)


@contextmanager
def _driver(driver: Any) -> Iterator[None]:
    drivers = triton.runtime.driver
    before = drivers._active
    drivers.set_active(driver)
    try:
        yield
    finally:
        drivers._active = before


def _kernel(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)
