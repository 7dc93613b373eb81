"""What the backend tells through torch's logging and its structured trace: in processes of their own, since both are set up at import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.small = nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x):
        return self.small(self.up(x))

torch.compile(Model(), backend="quartet", options={"quartet.exclude": "x.*"})(torch.randn(8, 64)).sum().backward()
"""


def run(folder: Path, **environment: str) -> str:
    (folder / "program.py").write_text(PROGRAM)
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")} | environment
    command = [sys.executable, str(folder / "program.py")]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stderr


@pytest.mark.slow
def test_torch_logs_and_trace_tell_of_every_linear_also_from_the_cache(tmp_path: Path) -> None:
    first = run(tmp_path, TORCH_LOGS="+quartet_compile", TORCH_TRACE=str(tmp_path / "trace"))
    assert "1 of 2 linears in NVFP4" in first
    assert "left: small (program.py:11): min(in, out) = 8 features, below 64 [default (min_features)]" in first
    assert "quartet2: up (program.py:11) [default]" in first
    assert "quartet.exclude: 'x.*' matches no linear of this graph" in first
    before, after = first.split("the joint graph, after:")
    assert "aten.addmm" in before
    assert "quartet.requantize.default" not in before
    assert "quartet.requantize.default" in after
    artifacts = read_trace(tmp_path / "trace")
    assert artifacts["quartet_linears"].splitlines()[0] == "quartet2: up (program.py:11) [default]"
    assert "quartet.requantize" not in artifacts["quartet_joint_before"]
    assert "quartet.requantize" in artifacts["quartet_joint_after"]

    second = run(tmp_path, TORCH_LOGS="quartet_compile", TORCH_TRACE=str(tmp_path / "trace2"))
    assert "1 of 2 linears in NVFP4, from torch's cache" in second
    assert "left: small (program.py:11)" in second
    assert "joint graph" not in second
    assert read_trace(tmp_path / "trace2")["quartet_linears"] == artifacts["quartet_linears"]


def read_trace(folder: Path) -> dict[str, str]:
    """The artifacts of the quartet backend in torch's structured trace: a line of JSON each, then lines behind tabs."""
    found: dict[str, list[str]] = {}
    name = ""
    (log,) = folder.glob("*.log")
    for line in log.read_text().splitlines():
        if line.startswith("\t"):
            found.setdefault(name, []).append(line[1:])
        else:
            name = json.loads(line[line.index("{") :]).get("artifact", {}).get("name", "")
    return {name: "\n".join(lines) for name, lines in found.items() if name.startswith("quartet")}
