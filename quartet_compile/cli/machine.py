"""What `quartet doctor` looks at beside GPUs and numbers: versions, the backend, the compiler, caches, the environment, packages."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from quartet_compile.cli.check import Check

PYTHONS = (3, 10), (3, 13)
TORCHES = (2, 11), (2, 14)
"""First and last version that is tested."""

TRITON = (3, 6)
"""The first version that the kernels compile with."""

PACKAGES = {
    "rich": ("tables and progress bars on a terminal", "cli"),
    "matplotlib": ("plots of `quartet demo`", "demo"),
    "tokenizers": ("text as tokens in `quartet demo`", "demo"),
    "jinja2": ("the page of a report, and Inductor's own Triton templates", None),
}
"""Optional package -> (what it is for, the extra that installs it; None: torch requires it itself)."""

VARIABLES = ("CXX", "CUDA_VISIBLE_DEVICES", "TORCH_LOGS", "TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")
PREFIXES = ("QUARTET_", "TORCHINDUCTOR_", "TRITON_")

HARMFUL = {
    "TORCH_COMPILE_DISABLE": "torch.compile does nothing while it is set",
    "TORCHDYNAMO_DISABLE": "torch.compile does nothing while it is set",
    "TRITON_INTERPRET": "Triton kernels run in a slow interpreter while it is set, and some of them wrongly",
}
"""Variables that switch off what this package is for, if they are set to anything but 0."""

SLOW = "operators on the CPU run as plain PyTorch, several times slower, with the same results"


def version(text: str) -> tuple[int, int]:
    """The first two numbers of a version: "2.13.0+cpu" -> (2, 13)."""
    numbers = re.findall(r"\d+", text)
    return int(numbers[0]), int(numbers[1])


def dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))


def python() -> Check:
    here, (first, last) = sys.version_info[:2], PYTHONS
    found = f"{sys.version.split()[0]}, {sys.executable}"
    if here < first:
        return Check("python", "fail", found, f"Use Python {dotted(first)} to {dotted(last)}.")
    if here > last:
        return Check("python", "warn", f"{found}: newer than {dotted(last)}, the last one tested", f"If it fails, use {dotted(last)}.")
    return Check("python", "ok", found)


def torch_works() -> Check:
    """PyTorch can be imported, this package with it, and its version is a tested one."""
    (first, last), name = TORCHES, "torch"
    reinstall = "Install PyTorch again, in a version from 2.11 on: https://pytorch.org/get-started/locally"
    if (error := importable("quartet_compile.backend")) is not None:
        try:
            installed = f"torch {metadata.version('torch')}"
        except metadata.PackageNotFoundError:
            installed = "torch is not installed"
        return Check(name, "fail", f"{installed}: {type(error).__name__}: {error}", reinstall)
    import torch

    found = f"{torch.__version__}, {build_of(torch)}"
    if torch.version.hip or getattr(torch.version, "xpu", None):
        return Check(name, "warn", f"{found}: only CPUs and NVIDIA GPUs are supported", "On an NVIDIA GPU, install a build for CUDA.")
    if version(torch.__version__) < first:
        return Check(name, "fail", f"{found}: older than {dotted(first)}", f'pip install --upgrade "torch>={dotted(first)}"')
    if version(torch.__version__) > last:
        return Check(name, "warn", f"{found}: newer than {dotted(last)}, the last one tested", f"If it fails, install {dotted(last)}.")
    return Check(name, "ok", found)


def build_of(torch: Any) -> str:
    for platform, number in (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip)):
        if number:
            return f"built for {platform} {number}"
    return "built without CUDA"


def triton(gpu: bool) -> Check:
    """Triton is there where a GPU needs it, new enough, and the one that this build of PyTorch asks for. gpu: whether torch sees a GPU."""
    error = importable("triton")
    if error is not None:
        if not gpu:
            if isinstance(error, ModuleNotFoundError):
                return Check("triton", "ok", "not installed: needed only on GPUs")
            return Check("triton", "warn", f"cannot be imported: {type(error).__name__}: {error}", "Only GPUs need it: uninstall it")
        needed = pinned_triton()
        return Check(
            "triton", "fail", f"cannot be imported, and every kernel on a GPU needs it: {error}", f"pip install {needed or 'triton'}"
        )
    import triton

    found, needed = triton.__version__, pinned_triton()
    if version(found) < TRITON:
        wanted = needed or f"triton>={dotted(TRITON)}"
        return Check("triton", "fail" if gpu else "warn", f"{found}: the kernels need {dotted(TRITON)}", f'pip install "{wanted}"')
    if gpu and needed and needed != f"triton=={found.partition('+')[0]}":
        return Check("triton", "warn", f"{found}, but this PyTorch goes with {needed}", f"pip install {needed}")
    return Check("triton", "ok", f"{found}, the one that this PyTorch goes with" if needed else found)


def importable(name: str) -> Exception | None:
    """Why a module cannot be imported; None if it can."""
    try:
        importlib.import_module(name)
    except Exception as error:
        return error
    return None


def pinned_triton() -> str | None:
    """The requirement on Triton in the metadata of the installed PyTorch, such as "triton==3.6.0"; builds without CUDA have none."""
    try:
        wanted = metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        return None
    return next((r.partition(";")[0].strip().replace(" ", "") for r in wanted if re.match(r"triton\b", r)), None)


def backend() -> Check:
    """torch.compile finds the backend by its name alone."""
    import torch

    from quartet_compile.backend import quartet

    name = "backend"
    if "quartet" not in torch._dynamo.list_backends():
        return Check(
            name, "fail", "torch.compile does not know backend=\"quartet\": the package is on the path, but not installed",
            "pip install quartet-compile (from a clone: pip install -e .)",
        )  # fmt: skip
    found = torch._dynamo.lookup_backend("quartet")
    if found is not quartet:
        return Check(name, "fail", f'backend="quartet" is {found!r}, not this package\'s', "Uninstall the other package of that name.")
    import quartet_compile

    return Check(name, "ok", f'backend="quartet" of quartet-compile {quartet_compile.__version__}')


def compiler() -> Check:
    from quartet_compile.kernels.cpu import build

    command = build.find_compiler()
    if command is None:
        return Check(
            "C++ compiler", "fail", "none found: Inductor needs one on the CPU, Triton on a GPU, and our CPU kernels are C++",
            "Install g++ or clang++ (Debian: apt install g++; conda: conda install gxx) or point CXX at one.",
        )  # fmt: skip
    said = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()
    return Check("C++ compiler", "ok", said[0] if said else command)


def cpu_kernels() -> Check:
    """The C++ kernels compile and load."""
    name = "CPU kernels"
    choice = os.environ.get("QUARTET_CPU_KERNELS", "")
    if choice not in ("", "reference"):
        return Check(name, "fail", f"QUARTET_CPU_KERNELS is {choice!r}; it can be 'reference' or unset", "Unset QUARTET_CPU_KERNELS.")
    if choice:
        return Check(name, "warn", f"switched off by QUARTET_CPU_KERNELS: {SLOW}", "Unset QUARTET_CPU_KERNELS.")
    from quartet_compile.kernels.cpu import build

    library = build.load()
    if library is None:
        return Check(name, "warn", f"no C++ compiler: {SLOW}", "Install g++ or clang++.")
    return Check(name, "ok", library._name)


def inductor(device: str) -> Check:
    """Inductor, without this package, compiles a function for a device, and it computes what it should."""
    import torch

    def function(x: torch.Tensor) -> torch.Tensor:
        return (x * 2 + 1).relu().sum() if torch.compiler.is_compiling() else -x.sum()

    name, x = f"Inductor on {device}", torch.arange(8.0, device=device)
    torch._dynamo.reset()
    y = torch.compile(function)(x).item()
    if y == -28:
        return Check(name, "fail", "torch.compile runs the function as it is", "Does a variable or a setting of Dynamo's switch it off?")
    if y != 64:
        return Check(name, "fail", f"computes {y} instead of 64", "Install PyTorch again.")
    return Check(name, "ok", "compiles")


def cache(name: str, directory: str) -> Check:
    """Compiled code can be kept."""
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        variable = "TRITON_CACHE_DIR" if "Triton" in name else "TORCHINDUCTOR_CACHE_DIR"
        return Check(name, "fail", f"cannot be written to: {error}", f"Point {variable} at a folder of yours.")
    return Check(name, "ok", directory)


def inductor_cache() -> Check:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache("Inductor's cache", os.environ.get("TORCHINDUCTOR_CACHE_DIR") or cache_dir())


def triton_cache() -> Check:
    """Where Triton keeps binaries; Inductor puts it into its own directory while it compiles, other launches do not."""
    return cache("Triton's cache", os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache"))


def environment() -> Check:
    names = [name for name in sorted(os.environ) if name in VARIABLES or name.startswith(PREFIXES)]
    found = {name: os.environ[name] for name in names if not name.endswith("_CACHE_DIR")}  # which have checks of their own
    text = " ".join(f"{name}={value}" for name, value in found.items()) or "nothing that changes what is compiled"
    harmful = [f"Unset {name}: {why}." for name, why in HARMFUL.items() if found.get(name, "0") not in ("0", "")]
    return Check("environment", "warn" if harmful else "ok", text, " ".join(harmful))


def package(name: str) -> Check:
    use, extra = PACKAGES[name]
    try:
        return Check(name, "ok", f"{metadata.version(name)}, for {use}")
    except metadata.PackageNotFoundError:
        wanted = name if extra is None else f'"quartet-compile[{extra}]"'
        return Check(name, "ok", f"not installed, for {use}: pip install {wanted}")
