"""compute-sanitizer over every kernel: no access outside a tensor, no race in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from every_kernel import MATRICES

SANITIZER = shutil.which("compute-sanitizer")
SUMMARY = {"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "RACECHECK SUMMARY: 0 hazards displayed"}
PLANTED = {"memcheck": "overrun", "racecheck": "race"}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer, a part of the CUDA toolkit"),
]


def checked(tool: str, what: str) -> str:
    """What compute-sanitizer says of `every_kernel`. Every tensor is an allocation of its own there, so that its end is seen."""
    command = [str(SANITIZER), "--tool", tool, sys.executable, str(Path(__file__).with_name("every_kernel.py")), what]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=580, check=False, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    )
    said = done.stdout + done.stderr
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer does not work on this machine")
    return said


@pytest.mark.parametrize("what", MATRICES)
@pytest.mark.parametrize("tool", SUMMARY)
def test_kernels_are_clean(tool: str, what: str) -> None:
    said = checked(tool, what)
    assert "operators were called" in said, said[-2000:]
    assert SUMMARY[tool] in said, said[-2000:]


@pytest.mark.parametrize("tool", SUMMARY)
def test_the_checker_finds_a_planted_error(tool: str) -> None:
    said = checked(tool, PLANTED[tool])
    assert " SUMMARY: " in said
    assert SUMMARY[tool] not in said, said[-2000:]
