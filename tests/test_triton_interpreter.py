"""The Triton kernels without a GPU: their tests, run once more in Triton's interpreter.

That must be on before triton is imported, so each file runs in a process of its own; here, and with ``-m gpu`` on a GPU, the same tests are
collected with a device to run on.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from packaging.version import Version

triton = pytest.importorskip("triton")

LONG = ("triton_forward", "triton_quantizers", "triton_eden_values")
"""Those that take a minute even of the cases that are not slow by themselves."""

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in (*LONG, "measure")]

UNUSABLE = Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4")


@pytest.mark.skipif(UNUSABLE, reason="Triton 3.6 interprets with numpy before 2.4 only: it makes Python numbers of arrays with one element")
@pytest.mark.parametrize("name", ["triton_numbers", "triton_matmul", *SLOW])
def test_kernels_in_the_interpreter(name: str) -> None:
    run_interpreted(name, "not slow and not gpu")


@pytest.mark.slow
@pytest.mark.skipif(UNUSABLE, reason="as above")
@pytest.mark.parametrize("name", LONG)
def test_kernels_in_the_interpreter_slowly(name: str) -> None:
    run_interpreted(name, "slow and not gpu")


def run_interpreted(name: str, marks: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    path = Path(__file__).with_name(f"test_{name}.py")
    command = [sys.executable, "-m", "pytest", str(path), "-m", marks, "-p", "no:xdist", "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=path.parent.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
