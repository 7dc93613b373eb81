"""Compile `kernels.cpp` with the user's C++ compiler, once for each machine, and load it.

The compiler is the one that Inductor would use (the variable CXX, else g++ or clang++). The library goes to Inductor's cache directory,
under a name keyed by everything that it depends on: sources, compiler, flags and the processor, because ``-march=native`` code from a
shared home directory must not run on an older machine.

The flags are part of the numerics: see the head of `groups.h`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

log = logging.getLogger("quartet_compile")

SOURCE = Path(__file__).with_name("kernels.cpp")
INCLUDED = (SOURCE.with_name("groups.h"), SOURCE.with_name("sums.h"))
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-fast-math", "-fno-math-errno", "-Wno-psabi")

_lock = threading.Lock()

_P, _I64, _U64, _U32, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int
_F32, _F64 = ctypes.c_float, ctypes.c_double
SIGNATURES = {
    "quartet_four_over_six": (_P, _INT, _I64, _I64, _I64, _I64, _P, _P, _P, _INT),
    "quartet_ms_eden": (_P, _INT, _I64, _I64, _I64, _I64, _U64, _U32, _P, _P, _P, _P, _INT),
    "quartet_requantize": (_P, _P, _I64, _I64, _I64, _U64, _U32, _P, _P, _P, _P, _INT),
    "quartet_dequantize": (_P, _P, _I64, _F32, _P, _INT),
    "quartet_largest": (_P, _INT, _I64, _I64, _I64, _I64, _P, _INT),
    "quartet_fresh_sums": (_P, _INT, _P, _I64, _I64, _I64, _I64, _P, _P, _I64, _F64, _INT, _U64, _P, _INT),
    "quartet_saved_sums": (_P, _P, _I64, _F64, _I64, _P, _I64, _P, _P, _I64, _F64, _U64, _P, _INT),
    "quartet_product_sums": (_P, _INT, _I64, _I64, _I64, _P, _INT, _P, _I64, _P, _INT),
}


def find_compiler() -> str | None:
    """The C++ compiler that Inductor would call; None if there is none, or if it is MSVC, which `kernels.cpp` is not written for."""
    if sys.platform == "win32":
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False)


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.platform()}"
    # Only what names the model and its instructions: clock frequency and the like change from call to call.
    kept = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU implementer", "CPU part")
    return platform.machine() + "\n".join(line for line in lines if line.split(":")[0].strip() in kept)


def _flags() -> tuple[str, ...]:
    # Compilers for ARM and POWER spell it -mcpu.
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"
    if sys.platform == "darwin":  # Apple's clang has no OpenMP runtime
        return (*FLAGS, native)
    # A missing OpenMP runtime shall be an error here, not an undefined symbol when the library is loaded.
    return (*FLAGS, native, "-Wl,--no-undefined", "-fopenmp")


def _cache_directory() -> Path:
    """Inductor's cache directory, or where that cannot be written to a new temporary one (and compiling once a process)."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    try:
        directory = Path(cache_dir()) / "quartet"
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK | os.X_OK):
            return directory
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="quartet_"))


def _compile(compiler: str, flags: tuple[str, ...], library: Path) -> None:
    """Write `library`, in one step: processes that compile at the same time do not see each other's unfinished files."""
    descriptor, unfinished = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(descriptor)
    try:
        command = [compiler, *flags, str(SOURCE), "-o", unfinished]
        result = _run(command)
        if result.returncode and "-fopenmp" in flags:
            # A clang without its OpenMP runtime. If the rest compiles the kernels run on one thread; if not, the first error is shown.
            without = [part for part in command if part != "-fopenmp"]
            if not _run(without).returncode:
                log.warning(
                    "quartet: %s cannot compile with -fopenmp, so the CPU kernels run on one thread; install its OpenMP runtime"
                    " (libomp), or set CXX=g++. It said:\n%s",
                    compiler,
                    result.stdout.strip(),
                )
                result.returncode = 0
        if result.returncode:
            raise RuntimeError(
                f"quartet: compiling the CPU kernels failed. Set CXX to a working C++17 compiler (g++ or clang++), or set"
                f" QUARTET_CPU_KERNELS=reference to do without (many times slower).\n$ {shlex.join(command)}\n{result.stdout.strip()}"
            )
        os.chmod(unfinished, 0o755)
        os.replace(unfinished, library)
    finally:
        if os.path.exists(unfinished):
            os.unlink(unfinished)


def build(compiler: str) -> Path:
    """The compiled library, from the cache if it is there."""
    flags = _flags()
    key = hashlib.sha256()
    for part in (compiler, _run([compiler, "--version"]).stdout, *flags, _processor()):
        key.update(part.encode() + b"\0")
    for source in (SOURCE, *INCLUDED):
        key.update(source.read_bytes())
    library = _cache_directory() / f"kernels_{key.hexdigest()[:24]}.so"
    if not library.exists():
        _compile(compiler, flags, library)
    return library


@functools.lru_cache(1)
def _load_once() -> ctypes.CDLL | None:
    compiler = find_compiler()
    if compiler is None:
        log.warning(
            "quartet: no C++ compiler found, so NVFP4 operators on the CPU run as plain PyTorch: a training step is several times"
            " slower, with the same results. Install g++ or clang++ (Debian: apt install g++; conda: conda install gxx) or point CXX"
            " at one; QUARTET_CPU_KERNELS=reference chooses this without the warning."
        )
        return None
    path = build(compiler)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(
            f"quartet: cannot load the compiled CPU kernels {path}: {error}. If the directory is mounted noexec, set"
            f" TORCHINDUCTOR_CACHE_DIR to another; if the file is damaged, delete it."
        ) from error
    for name, arguments in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def load() -> ctypes.CDLL | None:
    """The kernels, compiled at the first call; None, with one warning a process, where there is no compiler."""
    with _lock:
        return _load_once()
