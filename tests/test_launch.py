"""Launching the binary that an earlier launch found: it gets the same arguments, and what Triton tells apart does not share one."""

from __future__ import annotations

import os
from itertools import product
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from fake_gpu import fake_gpu  # noqa: E402

from quartet_compile.kernels.triton_kernels import launch  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler")


@triton.jit
def scaled_kernel(x, out, factor, n, BLOCK: tl.constexpr, ADD: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) * factor + ADD, mask=i < n)


@triton.jit
def argument_kernel(x):
    pass


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What binaries are run with, on a GPU that is not there: (binary, grid, arguments, what hooks are told and the hooks)."""
    from triton.compiler import CompiledKernel

    seen: list[tuple[Any, tuple[int, ...], tuple[Any, ...], tuple[Any, ...]]] = []

    def load(binary: Any) -> None:
        binary.module = binary.function = 0
        binary._run = lambda *a: seen.append((binary, a[:3], a[9:], a[6:9]))

    monkeypatch.setattr(CompiledKernel, "_init_handles", load)
    monkeypatch.setattr(launch, "_compiled", {})
    with fake_gpu(90):
        yield seen


def run(x: torch.Tensor, n: int, programs: int = 1, **options: Any) -> None:
    launch.launch(scaled_kernel, programs, x, torch.empty_like(x), 2.5, n, **{"ADD": 3, "BLOCK": 64, "num_warps": 2} | options)


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return len(a) == len(b) and all(x is y if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))


def test_later_launches_run_the_same_binary_with_the_same_arguments(launches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, out = torch.zeros(100), torch.zeros(100)
    for _ in range(3):
        launch.launch(scaled_kernel, 2, x, out, 2.5, 100, ADD=3, BLOCK=64, num_warps=2)
        monkeypatch.setattr(type(scaled_kernel), "run", None)  # Triton's own way is needed once
    assert len(launches) == 3
    for binary, grid, arguments, _ in launches:
        assert binary is launches[0][0]
        assert grid == (2, 1, 1)
        assert same(arguments, (x, out, 2.5, 100, 64, 3))


def test_hooks_of_a_profiler_are_told(launches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, x = triton.knobs.runtime, torch.zeros(100)
    run(x, 100)
    run(x, 100)
    monkeypatch.setattr(runtime.launch_enter_hook, "calls", [print])
    run(x, 100)
    assert launches[1][3] == (None, None, None)
    told, *hooks = launches[2][3]
    assert told.get()["name"] == "scaled_kernel"
    assert hooks == [runtime.launch_enter_hook, runtime.launch_exit_hook]
    assert same(launches[1][2][2:], launches[2][2][2:])


def test_what_a_binary_is_made_for_tells_launches_apart(launches: Any) -> None:
    x = torch.zeros(128)
    run(x, 64)
    run(x, 64, num_warps=4)
    run(x, 64, ADD=4)
    run(x, 1)
    run(x, 65)
    run(x[1:], 64)
    run(x.double(), 64)
    assert len({id(binary) for binary, *_ in launches}) == 7
    run(x, 128)
    assert launches[-1][0] is launches[0][0]
    assert launches[-1][2][3] == 128


ARGUMENTS = [
    0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 1, 2**31 - 16, -(2**31), 2**31, 2**31 + 1, 2**40, -(2**40), 2**63 - 1, 2**63, 2**64 - 16,
    True, False, 1.0, 0.5, None,
    torch.zeros(8), torch.zeros(8)[1:], torch.zeros(8)[4:], torch.zeros(8, dtype=torch.int16), torch.zeros(8, dtype=torch.bfloat16),
]  # fmt: skip


def test_kinds_tell_apart_what_triton_does() -> None:
    with fake_gpu(90):
        *_, bind = argument_kernel.create_binder()
        specialized = [repr(bind(x)[1]) for x in ARGUMENTS]
    kinds = [launch.kind_of(x) for x in ARGUMENTS]
    for i, j in product(range(len(ARGUMENTS)), repeat=2):
        assert specialized[i] == specialized[j] or kinds[i] != kinds[j], (ARGUMENTS[i], ARGUMENTS[j])
    assert len(set(kinds)) < len(kinds)
