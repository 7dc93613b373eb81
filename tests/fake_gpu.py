"""Inductor's code for a GPU that is not there: what it generates, and the generated kernels compiled for that GPU.

Torch is told that one CUDA device exists; fake tensors on it are traced and lowered, and nothing is launched.
"""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from offline import SHARED_MEMORY
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config
from torch._inductor.codecache import PyCodeCache
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.virtualized import V
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class _Driver:
    """What Triton asks of a driver when it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def _properties(capability: int) -> Any:
    return types.SimpleNamespace(
        name=f"sm_{capability}", major=capability // 10, minor=capability % 10, multi_processor_count=132, total_memory=80 << 30,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, gcnArchName="",
        shared_memory_per_block=49152, shared_memory_per_block_optin=SHARED_MEMORY[capability],
        shared_memory_per_multiprocessor=SHARED_MEMORY[capability] + 1024, L2_cache_size=50 << 20, clock_rate=1_700_000,
        memory_clock_rate=2_600_000, memory_bus_width=5120,
    )  # fmt: skip


@contextlib.contextmanager
def fake_gpu(capability: int) -> Iterator[None]:
    """One CUDA device of this compute capability, for tracing and compiling."""
    from quartet_compile.kernels.triton_kernels.launch import device_target

    properties = _properties(capability)
    of_cuda: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "synchronize": lambda *_: None,
        "get_device_properties": lambda _=None: properties,
        "get_device_capability": lambda _=None: divmod(capability, 10),
        "get_device_name": lambda _=None: properties.name,
        "is_bf16_supported": lambda *_, **__: True,
    }
    of_interface: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_compute_capability": lambda _=None: capability,
        "get_device_properties": lambda _=None: properties,
    }
    with contextlib.ExitStack() as stack:
        for name, function in of_cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        for name, function in of_interface.items():
            stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(function)))
        for name in ("current_device", "get_device_properties"):
            stack.enter_context(mock.patch.object(CudaInterface.Worker, name, staticmethod(of_interface[name])))
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context"))
        before = triton.runtime.driver._active
        triton.runtime.driver.set_active(_Driver(capability))
        _forget_devices(device_target)
        try:
            yield
        finally:
            triton.runtime.driver._active = before
            _forget_devices(device_target)


def _forget_devices(device_target: Any) -> None:
    """Clear what torch, Triton and the package remember of the device."""
    from torch._inductor import utils
    from torch._inductor.codegen.cuda import cuda_env
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils import _triton

    for module in (utils, cuda_env, _triton):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
    DeviceProperties.create.cache_clear()
    device_target.cache_clear()


@dataclass(frozen=True)
class Generated:
    """A Triton kernel that Inductor generated."""

    name: str
    source: str

    def compiled(self, capability: int) -> Any:
        """The binary for a GPU, with the signature and the first launch options that Inductor gives it."""
        with mock.patch.object(triton_helpers, "set_driver_to_gpu"):
            tuner = getattr(PyCodeCache.load(self.source), self.name)
        launch = tuner.configs[0]
        constants = {**tuner.triton_meta["constants"], **launch.kwargs}
        signature = {name: tuner.triton_meta["signature"].get(name, "constexpr") for name in tuner.fn.arg_names}
        source = ASTSource(tuner.fn, signature, constants, tuner.triton_meta["configs"][0])
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def generate(
    function: Callable[..., Any], inputs: Callable[[], list[torch.Tensor]], passes: Sequence[Callable[[torch.fx.Graph], None]] = (),
    **settings: Any,
) -> tuple[str, list[Generated]]:  # fmt: skip
    """Inductor's program for a function of fake CUDA tensors, and the Triton kernels in it. passes: of its graph. Inside `fake_gpu`."""
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
    with mode:
        examples = inputs()
        traced = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*examples)
        for each in passes:
            each(traced.graph)
    with config.patch(compile_threads=1, **settings):
        graph = GraphLowering(traced, example_inputs=examples, shape_env=environment)
        handlers = V.set_graph_handler(graph), V.set_fake_mode(mode), V.set_extern_kernel_nodes([]), V.set_debug_handler(DebugContext())
        with contextlib.ExitStack() as stack:
            for handler in handlers:
                stack.enter_context(handler)
            stack.enter_context(mock.patch("torch._inductor.async_compile.AsyncCompile.triton", return_value=None))
            graph.run(*examples)
            code: Any = graph.codegen()[0]
    text = code if isinstance(code, str) else code.value
    found = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", text, re.DOTALL)
    return text, [Generated(*each) for each in found]
