"""Compiling kernels ahead of their first launch: what a rehearsal finds, and that a worker compiles it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from fake_gpu import fake_gpu
from triton_support import Calls

import quartet_compile.backend
import quartet_compile.kernels.value_ops  # noqa: F401  (registers the operators)
from quartet_compile import passes
from quartet_compile.kernels import ops
from quartet_compile.kernels.triton_kernels import launch, precompile

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler")

quartet = torch.ops.quartet


def jobs_of(op: Any, *shapes_and_rest: Any, dtype: torch.dtype = torch.bfloat16) -> list[precompile.Job]:
    """What a call launches, on a GPU that is not there. Tuples are shapes of tensors."""
    with fake_gpu(90), FakeTensorMode():
        arguments = [torch.empty(a, dtype=dtype, device="cuda") if isinstance(a, tuple) else a for a in shapes_and_rest]
        return precompile.rehearse(ops.ON_GPU[op], arguments)


def test_a_rehearsal_notes_the_launches_of_an_operator() -> None:
    jobs = jobs_of(quartet.quantize_with_values.default, (256, 512), "four_over_six")
    assert [name for _, name, _, _ in jobs] == ["round_words_kernel", "align_scales_kernel"]
    module, _, types, options = jobs[0]
    assert module == "quartet_compile.kernels.triton_kernels.forward_words"
    assert types[:4] == (torch.int32, torch.int32, torch.uint8, torch.int32)  # x, codes, scales, values
    assert options["VALUES"] is True
    assert options["num_warps"] == 4


def test_other_threads_launch_during_a_rehearsal() -> None:
    launched: list[int] = []
    with launch.rehearsal() as noted:
        launch.launch(Calls(lambda x: launched.append(0)), 1, torch.zeros(1))
        thread = threading.Thread(target=launch.launch, args=(Calls(lambda x: launched.append(1)), 1, torch.zeros(1)))
        thread.start()
        thread.join()
    assert launched == [1]
    assert len(noted) == 1


def test_float32_is_another_kernel() -> None:
    jobs = jobs_of(quartet.quantize_with_values.default, (256, 512), "four_over_six", dtype=torch.float32)
    assert jobs[0][1] == "round_any_kernel"


def test_launches_that_share_a_binary_have_one_signature() -> None:
    few, many, odd = (
        jobs_of(quartet.quantize_with_values.default, shape, "four_over_six") for shape in ((256, 512), (512, 1024), (7, 48))
    )
    assert [*map(precompile.signature, few)] == [*map(precompile.signature, many)]
    assert precompile.signature(few[0]) != precompile.signature(odd[0])  # 21 groups: no multiple of 16


@pytest.mark.parametrize("dynamic", [False, True])
def test_symbolic_sizes_are_left_to_the_first_launch(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They must not be turned into numbers: that would compile the graph anew for each of them."""
    found: list[int] = []
    monkeypatch.setattr(passes.precompile, "submit", lambda nodes: found.append(len(nodes)) or 0)
    monkeypatch.setattr(passes.precompile, "_device", lambda node: torch.device("cuda"))
    model = torch.compile(torch.nn.Linear(128, 128), backend="quartet", dynamic=dynamic)
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):  # a pass does not run where a cache answers
        model(torch.randn(64, 128))
    assert found == ([1] if dynamic else [2])  # the weight alone, or the input, too


def test_a_worker_fills_the_cache_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    job = jobs_of(quartet.quantize_with_values.default, (256, 512), "four_over_six")[0]
    precompile.compile_in_worker(job, 90, precompile.Toolchain.of_this_process(90, str(tmp_path)))
    assert [path.name for path in tmp_path.rglob("*.cubin")] == ["round_words_kernel.cubin"]


def jobs_of_a_step() -> list[precompile.Job]:
    """The launches of every operator that a training step calls on a GPU without FP4 tensor cores."""
    with fake_gpu(90), FakeTensorMode():
        x = torch.empty(256, 512, dtype=torch.bfloat16, device="cuda")
        seeds = torch.empty(4, dtype=torch.int64, device="cuda")
        packed, rotations = quartet.quantize(x, "four_over_six"), quartet.rotations(seeds)
        calls = (
            (quartet.quantize_with_values, x, "four_over_six"),
            (quartet.quantize_values, x, "four_over_six"),
            (quartet.rotations, seeds),
            (quartet.grad_values_both, x, rotations, seeds, 0, 1, "ms_eden", 1.0),
            (quartet.requantize_values, *packed, 512, rotations, seeds, 0, "ms_eden"),
        )
        return [job for op, *arguments in calls for job in precompile.rehearse(ops.ON_GPU[op.default], arguments)]


PARENT = '''
import os, time, torch, triton
from triton.backends.nvidia.compiler import get_ptxas_version
from test_precompile import jobs_of_a_step
from fake_gpu import fake_gpu
from torch._inductor.async_compile import AsyncCompile
from quartet_compile.kernels.triton_kernels import precompile

def change_assembler():
    """As Inductor does at some time: Triton has read the version of another one by then, and remembers it."""
    tools = triton.knobs.nvidia
    get_ptxas_version(90)
    with open("ptxas", "w") as script:
        print(f"""#!/bin/sh
    [ "$1" = --version ] && echo another one
    exec {tools.ptxas_blackwell.path} "$@"
    """, file=script)
    os.chmod("ptxas", 0o755)
    os.environ["TRITON_PTXAS_PATH"] = os.environ["TRITON_PTXAS_BLACKWELL_PATH"] = os.path.abspath("ptxas")

if __name__ == "__main__":
    change_assembler()
    jobs = jobs_of_a_step()
    for _ in range(240):
        if AsyncCompile.use_process_pool():
            break
        time.sleep(0.5)
    with fake_gpu(90):
        futures = precompile.submit(jobs, torch.device("cuda", 0))
        print(len(futures), "submitted", {future.exception(timeout=240) for future in futures})
        triton.knobs.compilation.listener = lambda *, src, cache_hit, **rest: print(src.fn.__name__, "found" if cache_hit else "compiled")
        for module, name, values, options in reversed(jobs):
            precompile._kernel(module, name).warmup(*values, grid=(1,), **options)
'''


@pytest.mark.slow
def test_a_launch_finds_what_a_worker_compiled(tmp_path: Path) -> None:
    """Whatever the order of launches: up to Triton 3.6 it could change what a binary is found by."""
    (tmp_path / "parent.py").write_text(PARENT)
    paths = os.pathsep.join(sys.path)  # with the folders that pytest added
    environment = os.environ | {
        "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "2", "TRITON_INTERPRET": "0",
    }  # fmt: skip
    command = [sys.executable, str(tmp_path / "parent.py")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    submitted, *kernels = done.stdout.splitlines()
    assert submitted == "9 submitted {None}"
    assert len(kernels) == 9
    assert all(line.endswith("_kernel found") for line in kernels), kernels


def test_a_failure_leaves_the_kernel_to_its_first_launch(caplog: pytest.LogCaptureFixture) -> None:
    from concurrent.futures import Future

    future: Future[None] = Future()
    future.set_exception(RuntimeError("no such GPU"))
    launch.pending.append(future)
    calls: list[Any] = []
    with caplog.at_level("DEBUG", "quartet_compile"):
        launch.launch(Calls(lambda *args, **options: calls.append((args, options))), 3, x := torch.zeros(1), BLOCK=1)
    assert calls == [((x,), {"BLOCK": 1})]
    assert "no such GPU" in caplog.text
    assert not launch.pending
