"""Data parallel training of two GPUs over NCCL: the same numbers as one process that plays both ranks in turn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed_support import KINDS, RANKS, check_that_two_ranks_average_the_gradients_of_each

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs")]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_average_the_gradients_of_each(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_two_ranks_average_the_gradients_of_each(kind, "cuda", tmp_path, monkeypatch)
