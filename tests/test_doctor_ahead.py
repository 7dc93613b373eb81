"""`quartet doctor` compiles the kernels of its self-tests on a GPU in workers, while other checks are made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ON_A_GPU

pytest.importorskip("triton")

from fake_gpu import fake_gpu

from quartet_compile.cli import ahead, doctor, operators
from quartet_compile.kernels.triton_kernels import launch

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler")

WITHOUT_KERNELS = {"swizzle", "group_rows", "take_rows", "matmul_values", "observed_call", "show", "largest"}
"""Operators that are torch's own operations on a GPU."""

COMPILED_LATER = {"grouped_matmul", "grouped_outer"} | {name for name in operators.operators() if name.endswith("_observed")}
"""Operators whose kernels are those of others, or are compiled at their first launch."""


@pytest.fixture(scope="module")
def calls() -> ahead.Calls:
    """Of all self-tests on the CPU."""
    noted = ahead.Calls()
    for name in operators.operators():
        assert operators.operator(name, "cpu", noted).status == "ok"
    return noted


def kernels(calls: ahead.Calls, capability: int) -> list[str]:
    with fake_gpu(capability):
        return sorted(name for _, name, _, _ in ahead.launches(calls, torch.device("cuda", 0)).values())


@pytest.mark.parametrize("name", sorted({*operators.operators()} - WITHOUT_KERNELS - COMPILED_LATER))
def test_every_operator_with_kernels_has_its_launches_foretold(name: str) -> None:
    noted = ahead.Calls()
    operators.operator(name, "cpu", noted)
    noted.made = [(op, arguments) for op, arguments in noted.made if op.name() == f"quartet::{name}"]
    assert kernels(noted, 90)


def test_what_a_gpu_never_runs_is_not_compiled_for_it(calls: ahead.Calls) -> None:
    """Packed products take TMA, thus sm_90, and are what `matmul` is from sm_100 on; before that it decodes its operands."""
    assert "packed_product_kernel" not in kernels(calls, 80)
    assert kernels(calls, 90).count("packed_product_kernel") == 2
    assert kernels(calls, 90).count("dequantize_kernel") == 2
    assert kernels(calls, 100).count("packed_product_kernel") == 4
    assert "dequantize_kernel" not in kernels(calls, 100)


def test_gpus_of_one_kind_share_them(calls: ahead.Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.async_compile import AsyncCompile

    from quartet_compile.kernels.triton_kernels import precompile

    monkeypatch.setenv("TRITON_CACHE_DIR", "here")
    submitted: list[int] = []
    monkeypatch.setattr(AsyncCompile, "wait_pool_ready", lambda seconds: None)
    monkeypatch.setattr(precompile, "submit", lambda jobs, device: submitted.append(len(jobs)) or jobs)
    with fake_gpu(90):
        check = ahead.compile_ahead(calls, ["cuda:0", "cuda:1"])
    assert submitted == [len(kernels(calls, 90)), 0]
    assert check.finding.startswith(f"{submitted[0]}, ")


def test_without_workers_it_says_so(calls: ahead.Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "here")
    with fake_gpu(90), torch._inductor.config.patch(compile_threads=1):
        check = ahead.compile_ahead(calls, ["cuda:0"])
    assert (check.status, launch.pending) == ("ok", [])
    assert "Inductor has no workers here" in check.finding


def test_operators_are_tested_on_the_cpu_first_and_everything_on_every_gpu() -> None:
    with fake_gpu(90):
        names = [planned.name for planned in doctor.self_tests([0, 1])]
    tests = [*operators.operators(), "Inductor", "training step"]
    on = {device: [f"{test} on {device}" for test in tests] for device in ("cpu", "cuda:0", "cuda:1")}
    last = len(operators.operators())
    assert names == ["CPU kernels", *on["cpu"][:last], ahead.NAME, *on["cuda:0"], *on["cuda:1"]]


WORKERS = """
import time, torch
from fake_gpu import fake_gpu
from quartet_compile.cli import ahead, operators
from quartet_compile.kernels.triton_kernels import launch

if __name__ == "__main__":
    ahead.start_workers()
    calls = ahead.Calls()
    operators.operator("quantize_values", "cpu", calls)
    with fake_gpu(90):
        print(ahead.compile_ahead(calls, ["cuda:0"]).finding)
        print({future.exception(timeout=240) for future in launch.pending})
"""


@pytest.mark.slow
def test_workers_compile_them(tmp_path: Path) -> None:
    (tmp_path / "workers.py").write_text(WORKERS)
    environment = os.environ | {
        "TORCHINDUCTOR_COMPILE_THREADS": "2", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "workers.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["2, which Inductor's workers compile at the same time", "{None}"], done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*.cubin")) == ["align_scales_kernel.cubin", "round_any_kernel.cubin"]


LAUNCHES = """
import json, torch, triton
from quartet_compile.cli import ahead, operators

if __name__ == "__main__":
    ahead.start_workers()
    calls, compiled, found = ahead.Calls(), [], []
    for name in operators.operators():
        operators.operator(name, "cpu", calls)
    ahead.compile_ahead(calls, ["cuda:0"])
    triton.knobs.compilation.listener = lambda *, src, cache_hit, **rest: (found if cache_hit else compiled).append(src.fn.__name__)
    failed = [name for name in operators.operators() if operators.operator(name, "cuda:0").status != "ok"]
    print(json.dumps({"failed": failed, "compiled": compiled, "found": len(found)}))
"""


@pytest.mark.parametrize("case", [pytest.param("a GPU", marks=ON_A_GPU)])
def test_launches_find_what_workers_compiled(case: str, tmp_path: Path) -> None:
    (tmp_path / "launches.py").write_text(LAUNCHES)
    environment: dict[str, Any] = {
        **os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "8", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "launches.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["failed"] == []
    assert said["compiled"] == []
    assert said["found"] > 20
