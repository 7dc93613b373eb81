"""Every test starts with nothing compiled and the same random state. Tests run side by side: each process keeps to one or two threads."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else Inductor starts a process per core, in every process of pytest

import pytest
import torch

pytest_plugins = ["compatibility", "pytester"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
