"""Building the C++ kernels: compilers that are present, absent or broken, and the cache of what was built."""

from __future__ import annotations

import logging
import os
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_cpu_kernels import COMPILER, _no_override, check_all, needs_compiler, normal  # noqa: F401  (_no_override: a fixture)

from quartet_compile.kernels import cpu, reference_ops
from quartet_compile.kernels.cpu import build


@pytest.fixture
def fresh_build() -> Iterator[None]:
    """The state of a process that has not loaded the kernels, restored afterwards."""
    build._load_once.cache_clear()
    yield
    build._load_once.cache_clear()


def _script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


posix = pytest.mark.skipif(os.name != "posix", reason="uses a shell script as the compiler")


def test_no_compiler_is_found_where_there_is_none() -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "/nonexistent/g++")}):
        assert build.find_compiler() is None


@pytest.mark.usefixtures("fresh_build")
def test_without_a_compiler_the_reference_runs_and_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    x = normal(37, 70)
    with caplog.at_level(logging.WARNING, logger="quartet_compile"):
        check_all(x)
        a = cpu.quantize(x, "four_over_six")
        expected = reference_ops.matmul(*a, *a, None, 1.0, torch.float32)
        assert torch.equal(cpu.matmul(*a, *a, None, 1.0, torch.float32), expected)
    assert [record.name for record in caplog.records] == ["quartet_compile"]
    message = caplog.records[0].getMessage()
    assert "no C++ compiler" in message
    assert "slower" in message
    assert "CXX" in message


@pytest.mark.usefixtures("fresh_build")
def test_the_reference_can_be_chosen_without_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse() -> str:
        raise AssertionError("looked for a compiler")

    monkeypatch.setattr(build, "find_compiler", refuse)
    monkeypatch.setenv("QUARTET_CPU_KERNELS", "reference")
    check_all(normal(20, 40))
    assert not caplog.records
    monkeypatch.setenv("QUARTET_CPU_KERNELS", "fast")
    with pytest.raises(ValueError, match="QUARTET_CPU_KERNELS"):
        cpu.quantize(normal(20, 40), "four_over_six")


@posix
@pytest.mark.usefixtures("fresh_build")
def test_a_compiler_that_fails_is_an_error_with_its_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = _script(tmp_path / "broken", 'echo "kernels.cpp:1: the compiler is on fire" >&2; exit 1')
    monkeypatch.setattr(build, "find_compiler", lambda: broken)
    monkeypatch.setattr(build, "_cache_directory", lambda: tmp_path)
    for _ in range(2):  # not remembered as "no compiler"
        with pytest.raises(RuntimeError, match="the compiler is on fire") as error:
            cpu.quantize(normal(20, 40), "four_over_six")
    assert broken in str(error.value)
    assert "CXX" in str(error.value)
    assert not list(tmp_path.glob("*.so")), "unfinished files are left behind"


@posix
@needs_compiler
@pytest.mark.usefixtures("fresh_build")
def test_a_compiler_without_openmp_gives_one_thread_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    assert COMPILER is not None
    body = f'for a in "$@"; do [ "$a" = -fopenmp ] && echo "no libomp" && exit 1; done; exec {shutil.which(COMPILER)} "$@"'
    script = _script(tmp_path / "without_openmp", body)
    monkeypatch.setattr(build, "find_compiler", lambda: script)
    monkeypatch.setattr(build, "_cache_directory", lambda: tmp_path)
    with caplog.at_level(logging.WARNING, logger="quartet_compile"):
        check_all(normal(130, 257))
    if "-fopenmp" in build._flags():
        assert "no libomp" in caplog.text


@needs_compiler
def test_processes_that_compile_at_once_do_not_collide_and_the_next_reads_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert COMPILER is not None
    monkeypatch.setattr(build, "_cache_directory", lambda: tmp_path)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(build.build, [COMPILER, COMPILER])
    assert first == second
    assert list(tmp_path.iterdir()) == [first]
    written = first.stat().st_mtime_ns
    assert build.build(COMPILER) == first
    assert first.stat().st_mtime_ns == written


def test_the_cache_key_covers_flags_and_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "_cache_directory", lambda: tmp_path)
    monkeypatch.setattr(build, "_compile", lambda compiler, flags, library: library.touch())
    compiler = COMPILER or "true"
    names = {build.build(compiler)}
    with monkeypatch.context() as other:
        other.setattr(build, "_processor", lambda: "another processor")
        names.add(build.build(compiler))
    with monkeypatch.context() as other:
        other.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
        names.add(build.build(compiler))
    assert len(names) == 3
