"""examples/llama_fsdp.py, as a user starts it: two processes under torchrun train in both precisions, save, and go on from there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")]

EXAMPLE = Path(__file__).parent.parent / "examples" / "llama_fsdp.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


def run(folder: Path, *options: str, launcher: tuple[str, ...] = TORCHRUN) -> subprocess.CompletedProcess[str]:
    """The tiny preset, with compilation caches of its own: what is found in a cache is not rewritten again, and no log tells of it."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, *launcher, str(EXAMPLE), "--steps", str(STEPS), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=1200)
    assert done.returncode == 0, done.stderr
    return done


def losses(done: subprocess.CompletedProcess[str], backend: str) -> dict[int, float]:
    """Step -> the loss that was printed for it."""
    return {int(step): float(loss) for step, loss in re.findall(rf"^{backend} (\d+)/\d+  loss (\S+)", done.stdout, re.MULTILINE)}


@pytest.fixture(scope="module")
def compared(folder: Path) -> subprocess.CompletedProcess[str]:
    return run(folder, "--compare")


def test_both_backends_learn_and_the_table_compares_them(compared: subprocess.CompletedProcess[str]) -> None:
    assert "2 process(es)" in compared.stdout
    bf16, ours = (losses(compared, backend) for backend in ("inductor", "quartet"))
    assert list(bf16) == list(ours) == list(range(1, STEPS + 1))
    for curve in (bf16, ours):
        assert curve[STEPS] < curve[1] - 1.5
    assert all(abs(bf16[step] - ours[step]) < 0.3 for step in bf16)
    header, *rows = compared.stdout.splitlines()[-3:]
    assert header.split()[:3] == ["backend", "loss", "step"]
    assert [row.split()[0] for row in rows] == ["inductor", "quartet"]
    for row, curve in zip(rows, (bf16, ours), strict=True):
        assert float(row.split()[1]) == curve[STEPS]  # the last tenth of the steps is one
        assert float(row.split()[2]) > 0


def test_every_linear_of_a_block_is_rewritten(compared: subprocess.CompletedProcess[str]) -> None:
    """One graph serves all blocks; only rank 0 logs."""
    assert re.findall(r"quartet_compile: (\d+) of (\d+) linears in NVFP4", compared.stderr) == [("7", "7")]
    assert "left:" not in compared.stderr


@pytest.mark.feature("Several processes", "distributed checkpoints")
def test_a_saved_training_goes_on_as_if_it_had_not_stopped(folder: Path, compared: subprocess.CompletedProcess[str]) -> None:
    whole = losses(compared, "quartet")
    saved = run(folder, "--steps", "4", "--save", "saved")
    assert losses(saved, "quartet") == {step: whole[step] for step in range(1, 5)}
    assert losses(run(folder, "--resume", "saved"), "quartet") == {step: whole[step] for step in range(5, STEPS + 1)}
    # The checkpoint is anyone's: of another backend on another number of processes.
    other = losses(run(folder, "--resume", "saved", "--backend", "inductor", "--checkpoint", "full", launcher=()), "inductor")
    assert all(abs(other[step] - whole[step]) < 0.3 for step in range(5, STEPS + 1))
