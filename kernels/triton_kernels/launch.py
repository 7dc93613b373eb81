"""Launching kernels, and what a launch depends on besides its arguments: the GPU that the tensors are on, and options that all share."""

import functools
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from quartet_compile.kernels.format import swizzled_numel

log = logging.getLogger("quartet_compile")

EXACT = {"enable_fp_fusion": False}
"""Products and sums are rounded separately, as the reference rounds them; the default of Triton 3.6 contracts them."""

FUSED = {"enable_fp_fusion": True}
"""Products and sums may be rounded once, where near-ties are decided by the order of additions anyway."""


@dataclass(frozen=True)
class Target:
    """What kernels ask of a GPU.

    native: it has FP4 tensor cores and conversions. permuted: rotate with permuted columns (`rotation`).
    """

    capability: int
    native: bool
    permuted: bool
    processors: int

    def forms(self) -> dict[str, bool]:
        """Constants of the kernels that rotate numbers into codes."""
        return {"PERMUTED": self.permuted, "NATIVE": self.native, "EARLY": self.early}

    @property
    def early(self) -> bool:
        """Whether a launch may begin while the one before it ends (`overlap`)."""
        return self.capability >= 90


def target_for(capability: int, processors: int) -> Target:
    """The target of a compute capability, for example 90 for sm_90."""
    return Target(capability, native=capability >= 100, permuted=capability // 10 != 10, processors=processors)


INTERPRETER = Target(capability=0, native=False, permuted=True, processors=1)
"""CPU tensors: only Triton's interpreter accepts them."""


@functools.cache
def device_target(device: torch.device) -> Target:
    """The target of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return target_for(10 * properties.major + properties.minor, properties.multi_processor_count)


def target_of(x: Tensor) -> Target:
    """The GPU that x is on."""
    return device_target(x.device) if x.is_cuda else INTERPRETER


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, which need not be the tensor's."""
    elsewhere = x.is_cuda and _rehearsed.get() is None and torch.cuda.current_device() != x.get_device()
    return torch.cuda.device(x.device) if elsewhere else nullcontext()


def empty_packed(like: Tensor, rows: int, columns: int, with_codes: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Room for a packed matrix: codes [rows, columns/2], or none, scales [rows, columns/16] and the tensor scale []."""
    return (
        torch.empty((rows, columns // 2) if with_codes else (0,), dtype=torch.uint8, device=like.device),
        torch.empty((rows, columns // 16), dtype=torch.float8_e4m3fn, device=like.device),
        torch.empty((), dtype=torch.float32, device=like.device),
    )


def empty_swizzled(scales: Tensor) -> Tensor:
    """Room for scales [rows, groups] in the order of tensor cores."""
    return scales.new_empty((swizzled_numel(*scales.shape),))


def hash_in_order(modules: Iterable[ModuleType]) -> None:
    """Hash the device functions of these modules, by name.

    Up to Triton 3.6 a kernel's hash, by which its binary is found on disk, depends on which other kernels were hashed before it: on what
    is launched first, which differs from process to process.
    """
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) or triton.knobs.runtime.interpret:
        return
    for module in modules:
        for _, function in sorted(vars(module).items()):
            if isinstance(function, triton.JITFunction) and function.fn.__module__ == module.__name__:
                _ = function.cache_key


# ---------------------------------------------------------------- launching

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A kernel, its arguments, and its constants and options."""

pending: list[Future[None]] = []
"""Compilations under way in other processes (`precompile`)."""

_rehearsed: ContextVar[list[Launch] | None] = ContextVar("rehearsed", default=None)
"""The launches of the rehearsal that this thread is in; other threads go on launching."""


@contextmanager
def rehearsal() -> Iterator[list[Launch]]:
    """Launches are noted, not done."""
    launches: list[Launch] = []
    token = _rehearsed.set(launches)
    try:
        yield launches
    finally:
        _rehearsed.reset(token)


_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], Any]] = {}
"""Binaries that were launched, the constants that they take behind the arguments, and the kernels, of which a key has the address."""


def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """``kernel[(programs,)](*arguments, **options)``, at a part of the time on the host from the second such launch on.

    The first argument is a tensor, on the current device. Triton compares all constants that a kernel refers to before each launch of it;
    ours cannot change. What else it looks at to find the binary is in `kind_of`.
    """
    noted = _rehearsed.get()
    if noted is not None:
        noted.append((kernel, arguments, options))
        return
    device = arguments[0].get_device()
    key = (id(kernel), device, *map(kind_of, arguments), *options.items())
    known = _compiled.get(key)
    if known is not None:
        binary, constants, _ = known
        _run(binary, device, programs, arguments + constants)
        return
    if pending:
        _wait()
    binary = kernel[(programs,)](*arguments, **options)
    if binary is not None:  # as from the interpreter
        _compiled[key] = binary, tuple(options[name] for name in kernel.arg_names[len(arguments) :]), kernel


def _run(binary: Any, device: int, programs: int, arguments: tuple[Any, ...]) -> None:
    """``binary[(programs, 1, 1)](*arguments)``, without what Triton gathers for hooks where there are none."""
    runtime = triton.knobs.runtime
    if runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
        binary[programs, 1, 1](*arguments)
    else:
        stream = triton.runtime.driver.active.get_current_stream(device)
        binary.run(programs, 1, 1, stream, binary.function, binary.packed_metadata, None, None, None, *arguments)


def forget_binaries() -> None:
    """Have the next launch of each kind ask Triton again."""
    _compiled.clear()


def kind_of(argument: Any) -> Any:
    """What a binary is specialized on: equal for two arguments only if they take the same binary."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return _kind_of_int(argument) if type(argument) is int else type(argument)


@functools.lru_cache(4096)
def _kind_of_int(n: int) -> tuple[bool, ...]:
    return n == 1, n % 16 == 0, -(2**31) <= n < 2**31, n < 2**63


def _wait() -> None:
    """For kernels that other processes compile; one that they could not is compiled here, where the error is seen."""
    for future in pending:
        error = future.exception()
        if error is not None:
            log.debug("a kernel is compiled at its first launch: %s", error)
    pending.clear()


def is_aligned(x: Tensor) -> bool:
    """Whether x starts at a multiple of 16 bytes; a tensor without memory is taken to."""
    return _rehearsed.get() is not None or x.data_ptr() % 16 == 0
