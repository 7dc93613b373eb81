"""Every test starts with nothing compiled and the same random state.

Of the processes that `pytest -n` starts each keeps to one thread: threads that share a core wait for each other in loops.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else Inductor starts a process per core, in every process of pytest

import pytest
import torch
from support import DEVICES
from torch._dynamo.utils import counters

pytest_plugins = ["compatibility", "pytester"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the test's models and tensors are made, if it does not say where."""
    torch.set_default_device(request.param)
    yield torch.device(request.param)
    torch.set_default_device(None)


@pytest.fixture
def fresh_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Empty on-disk caches, switched on."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    counters.clear()
    yield
    counters.clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests come first, so that no process is left alone with them."""
    items.sort(key=lambda item: "test_triton_interpreter" not in item.nodeid)
