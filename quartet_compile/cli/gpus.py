"""The GPUs of this machine: those that the driver knows, those that PyTorch sees, and what NVFP4 is on each."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from quartet_compile.cli.check import Check
from quartet_compile.cli.machine import importable

PROC = Path("/proc/driver/nvidia/gpus")
OLDEST = (8, 0)
"""The first compute capability that the kernels are written for."""

NATIVE = (10, 0)
"""The first one with FP4 tensor cores."""

CUDA_BUILDS = "pip install torch --index-url https://download.pytorch.org/whl/cu130 (https://pytorch.org/get-started/locally lists others)"


class Driver(NamedTuple):
    """What the NVIDIA driver says without PyTorch: names of its GPUs, its version, and what is wrong with it; empty where there is none."""

    names: list[str]
    version: str = ""
    problem: str = ""


def driver() -> Driver:
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (subprocess.TimeoutExpired, OSError) as error:
            return Driver(in_proc(), problem=f"nvidia-smi: {error}")
        if done.returncode:
            return Driver(in_proc(), problem=f"nvidia-smi: {' '.join((done.stdout + done.stderr).split())}")
        rows = [line.rpartition(", ") for line in done.stdout.splitlines() if ", " in line]
        return Driver([name for name, _, _ in rows], rows[0][2] if rows else "")
    return Driver(in_proc())


def in_proc() -> list[str]:
    """Names of the GPUs that the driver shows in /proc."""
    names = []
    for each in sorted(PROC.iterdir()) if PROC.is_dir() else ():
        lines = (each / "information").read_text().splitlines()
        names.append(next((line.partition(":")[2].strip() for line in lines if line.startswith("Model:")), each.name))
    return names


def visible() -> int:
    """How many GPUs PyTorch sees; none where asking raises, which `summary` then reports."""
    try:
        return count()
    except Exception:
        return 0


def count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def usable() -> list[int]:
    """The GPUs that kernels can run on: new enough, and Triton is there. `gpu` and `machine.triton` tell of the others."""
    return [] if importable("triton") else [index for index in range(visible()) if new_enough(index)]


def new_enough(index: int) -> bool:
    import torch

    try:
        return torch.cuda.get_device_capability(index) >= OLDEST
    except Exception:
        return False  # as `gpu` will report


def summary() -> Check:
    """Does PyTorch see the GPUs that are there?"""
    import torch

    known = driver()
    there, seen, named = known.names, count(), ", ".join(dict.fromkeys(known.names))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen:
        text = f"{seen} of {len(there)}, by CUDA_VISIBLE_DEVICES" if hidden is not None and len(there) > seen else str(seen)
        return Check("GPUs", "ok", text)
    if torch.version.cuda is None:
        if there:
            return Check("GPUs", "warn", f"{named}, but this PyTorch is built without CUDA and cannot use it", CUDA_BUILDS)
        return Check("GPUs", "ok", "none: NVFP4 is emulated on the CPU, with the same numbers and no gain in speed")
    if hidden is not None:
        return Check("GPUs", "warn", f"none is visible: CUDA_VISIBLE_DEVICES={hidden!r}", "Unset it, or name GPUs that are there.")
    if there or known.problem:
        why = known.problem or cuda_error()
        advice = f"The driver may be too old for CUDA {torch.version.cuda}: update it, or install a PyTorch built for an older CUDA."
        return Check("GPUs", "fail", f"{named or 'an NVIDIA GPU'}, but CUDA does not start: {why}", advice)
    return Check(
        "GPUs", "warn", f"none, but this PyTorch is built for CUDA {torch.version.cuda}: NVFP4 is emulated on the CPU",
        "Fine without a GPU. If there is one: is its driver installed (nvidia-smi), is the container given it (docker run --gpus all)?",
    )  # fmt: skip


def cuda_error() -> str:
    """What CUDA says when it is started."""
    import torch

    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).strip().splitlines()[0]
    return "torch.cuda.is_available() is false"


def gpu(index: int) -> Check:
    """One GPU: what it is, and what NVFP4 is on it."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    capability = properties.major, properties.minor
    known = driver()
    name, memory = f"GPU {index}", f"{properties.total_memory / 1024**3:.0f} GiB"
    found = f"{properties.name}, sm_{capability[0]}{capability[1]}, {memory}" + (f", driver {known.version}" if known.version else "")
    if capability < OLDEST:
        return Check(name, "fail", f"{found}: the kernels need sm_{OLDEST[0]}{OLDEST[1]} or newer", "Use a newer GPU, or the CPU.")
    if capability < NATIVE:
        return Check(name, "ok", f"{found}: no FP4 tensor cores, so NVFP4 is emulated, with the same numbers and no gain in speed")
    return Check(name, "ok", f"{found}: FP4 tensor cores, so NVFP4 is native. The native kernels were never run before: see the self-test")
