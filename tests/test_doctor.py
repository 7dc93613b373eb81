"""`quartet doctor` says what is the matter with a machine and what to do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ON_A_GPU
from torch._inductor import config

from quartet_compile.cli import doctor, gpus, machine, operators, output
from quartet_compile.cli.check import Check, Planned
from quartet_compile.cli.main import main


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def doctor_without(module: str, *options: str) -> tuple[int, dict[str, dict[str, str]], str]:
    """(exit status, checks by name, stderr) of a process in which a module cannot be imported."""
    code = f"import sys; sys.modules[{module!r}] = None\nfrom quartet_compile.cli.main import main"
    done = python(f"{code}\nsys.exit(main({['doctor', '--json', *options]!r}))")
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)["checks"]}, done.stderr


# ---------------------------------------------------------------- machines


def test_a_machine_without_gpu_is_ready(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(gpus, "driver", lambda: gpus.Driver([]))
    assert main(["doctor", "--no-self-test", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in said["checks"]}
    assert said["failed"] == 0
    assert checks["GPUs"]["finding"].startswith("none: NVFP4 is emulated on the CPU, with the same numbers")
    assert checks["torch"]["finding"].startswith(torch.__version__)


def test_without_triton_a_cpu_is_ready() -> None:
    status, checks, stderr = doctor_without("triton", "--no-self-test")
    assert status == (1 if torch.cuda.is_available() else 0), stderr
    if not torch.cuda.is_available():
        assert checks["triton"] == {"name": "triton", "status": "ok", "finding": "not installed: needed only on GPUs", "advice": ""}


@pytest.mark.slow
def test_without_triton_a_cpu_passes_all_self_tests() -> None:
    _, checks, stderr = doctor_without("triton")
    on_cpu = {name: check for name, check in checks.items() if name.endswith(" on cpu")}
    assert len(on_cpu) == len(operators.operators()) + 2
    assert {check["status"] for check in on_cpu.values()} == {"ok"}, stderr


def test_inductor_is_tried_where_the_user_will_train() -> None:
    for on_gpus, devices in (([], ["cpu"]), ([0, 1], ["cuda:0", "cuda:1"])):
        names = [planned.name for planned in doctor.self_tests(on_gpus)]
        for tried in ("Inductor", "training step"):
            assert [name for name in names if name.startswith(f"{tried} on ")] == [f"{tried} on {device}" for device in devices]
        for device in ("cpu", *devices):
            assert all(f"{name} on {device}" in names for name in operators.operators())


def test_without_triton_a_gpu_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    from fake_gpu import fake_gpu

    with fake_gpu(90):
        assert gpus.usable() == [0]
        monkeypatch.setitem(sys.modules, "triton", None)
        check = machine.triton(gpu=True)
        assert gpus.usable() == []
    assert check.status == "fail"
    assert "every kernel on a GPU needs it" in check.finding
    assert check.advice.startswith("pip install triton")


def test_what_is_said_of_an_h100_with_and_without_triton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fake_gpu import fake_gpu

    said = []
    with fake_gpu(90):
        for status in (0, 1):
            assert main(["doctor", "--no-self-test", "--json"]) == status
            said.append({check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]})
            on_gpus = {planned.name.rpartition(" ")[2] for planned in doctor.self_tests(gpus.usable()) if " on " in planned.name}
            assert on_gpus == ({"cpu", "cuda:0"} if status == 0 else {"cpu"})
            monkeypatch.setitem(sys.modules, "triton", None)
    present, missing = said
    assert {check["status"] for name, check in missing.items() if name != "triton"} == {"ok"}
    assert (present["triton"]["status"], missing["triton"]["status"]) == ("ok", "fail")
    assert present["GPU 0"] == missing["GPU 0"]
    assert "NVFP4 is emulated" in present["GPU 0"]["finding"]


def test_without_torch_it_says_so() -> None:
    status, checks, _ = doctor_without("torch")
    assert status == 1
    assert list(checks) == ["python", "environment", "torch"]
    assert checks["torch"]["status"] == "fail"
    assert "pytorch.org" in checks["torch"]["advice"]


def test_without_torch_the_package_can_be_imported_and_the_first_use_says_what_is_missing() -> None:
    done = python("import sys; sys.modules['torch'] = None\nimport quartet_compile as quartet\nprint('here')\nquartet.explain")
    assert (done.returncode, done.stdout) == (1, "here\n")
    assert "ModuleNotFoundError: import of torch halted" in done.stderr


@pytest.mark.parametrize(
    ("capability", "status", "said"),
    [
        (70, "fail", "sm_70, 80 GiB: the kernels need sm_80 or newer"),
        (80, "ok", "sm_80, 80 GiB: no FP4 tensor cores, so NVFP4 is emulated, with the same numbers"),
        (90, "ok", "sm_90, 80 GiB: no FP4 tensor cores, so NVFP4 is emulated, with the same numbers"),
        (100, "ok", "sm_100, 80 GiB: FP4 tensor cores, so NVFP4 is native"),
        (120, "ok", "sm_120, 80 GiB: FP4 tensor cores, so NVFP4 is native"),
    ],
)
def test_gpus_are_native_emulated_or_too_old(capability: int, status: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fake_gpu

    monkeypatch.setitem(fake_gpu.SHARED_MEMORY, 70, 98304)
    monkeypatch.setattr(gpus, "driver", lambda: gpus.Driver(["a GPU"]))
    with fake_gpu.fake_gpu(capability):
        check, summary, usable = gpus.gpu(0), gpus.summary(), gpus.usable()
    assert check.status == status
    assert said in check.finding
    assert summary == Check("GPUs", "ok", "1")
    assert usable == ([0] if status == "ok" else [])


@pytest.mark.parametrize(
    ("cuda", "hidden", "driver", "status", "said"),
    [
        (None, None, gpus.Driver(["NVIDIA H100"], "550"), "warn", "NVIDIA H100, but this PyTorch is built without CUDA"),
        ("13.0", None, gpus.Driver([]), "warn", "none, but this PyTorch is built for CUDA 13.0"),
        ("13.0", "", gpus.Driver(["NVIDIA H100"], "550"), "warn", "none is visible: CUDA_VISIBLE_DEVICES=''"),
        ("13.0", None, gpus.Driver(["NVIDIA H100"], "450"), "fail", "NVIDIA H100, but CUDA does not start: the driver is too old"),
        ("13.0", None, gpus.Driver([], problem="nvidia-smi: no driver"), "fail", "CUDA does not start: nvidia-smi: no driver"),
    ],
)
def test_gpus_that_pytorch_does_not_see(
    cuda: str | None, hidden: str | None, driver: gpus.Driver, status: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init() -> None:
        raise RuntimeError("the driver is too old\nand more")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(gpus, "driver", lambda: driver)
    check = gpus.summary()
    assert (check.status, said in check.finding) == (status, True), check.finding
    assert check.advice


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'NVIDIA H100, 550.54'; echo 'NVIDIA H100, 550.54'", gpus.Driver(["NVIDIA H100"] * 2, "550.54")),
        ("echo 'cannot  talk to' ; echo the driver; exit 9", gpus.Driver([], problem="nvidia-smi: cannot talk to the driver")),
    ],
)
def test_what_nvidia_smi_says(script: str, expected: gpus.Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpus, "PROC", tmp_path / "none")
    assert gpus.driver() == expected


@pytest.mark.parametrize(
    ("torch_wants", "installed", "gpu", "status"),
    [
        (["jinja2", 'triton==3.6.0; platform_system == "Linux"'], "3.6.0", True, "ok"),
        (["jinja2", 'triton==3.6.0; platform_system == "Linux"'], "3.9.0", True, "warn"),
        (["jinja2", 'triton==3.6.0; platform_system == "Linux"'], "3.9.0", False, "ok"),
        (["jinja2"], "3.9.0", False, "ok"),
        (["jinja2"], "3.5.1", True, "fail"),
    ],
)
def test_triton_is_the_one_that_pytorch_goes_with(
    torch_wants: list[str], installed: str, gpu: bool, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(machine.metadata, "requires", lambda name: torch_wants)
    monkeypatch.setattr(triton, "__version__", installed)
    check = machine.triton(gpu)
    assert check.status == status, check.finding
    assert bool(check.advice) == (status != "ok")


@pytest.mark.parametrize(("number", "status"), [("2.10.1", "fail"), ("2.11.0", "ok"), ("2.14.1+cpu", "ok"), ("2.15.0.dev2026", "warn")])
def test_the_version_of_pytorch(number: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", number)
    assert machine.torch_works().status == status


def test_the_backend_is_found_by_name_and_is_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.backend().status == "ok"
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: print)
    assert machine.backend().status == "fail"
    monkeypatch.setattr(torch._dynamo, "list_backends", lambda: ["inductor"])
    assert "not installed" in machine.backend().finding


def test_inductor_compiles_and_is_not_switched_off() -> None:
    assert machine.inductor("cpu") == Check("Inductor on cpu", "ok", "compiles")
    with torch._dynamo.config.patch(disable=True):
        check = machine.inductor("cpu")
    assert check.status == "fail"
    assert check.advice


def test_no_compiler() -> None:
    with config.patch({"cpp.cxx": (None, "/nonexistent/g++")}):
        check = machine.compiler()
    assert check.status == "fail"
    assert "apt install g++" in check.advice


def test_the_kernels_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARTET_CPU_KERNELS", "reference")
    assert machine.cpu_kernels().status == "warn"
    monkeypatch.setenv("QUARTET_CPU_KERNELS", "refernce")
    assert machine.cpu_kernels().status == "fail"


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    check = machine.inductor_cache()
    assert check.status == "fail"
    assert "TORCHINDUCTOR_CACHE_DIR" in check.advice
    assert machine.cache("Triton's cache", str(tmp_path / "new")).status == "ok"


def test_variables_that_switch_things_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("QUARTET_OPTIONS", "quartet.strict=True")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "which torch sets by itself")
    check = machine.environment()
    assert check.status == "ok"
    assert "QUARTET_OPTIONS=quartet.strict=True" in check.finding
    assert "CACHE_DIR" not in check.finding
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    check = machine.environment()
    assert (check.status, check.advice) == ("warn", "Unset TORCHDYNAMO_DISABLE: torch.compile does nothing while it is set.")


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine.PACKAGES, "no-such-package", ("nothing", "demo"))
    check = machine.package("no-such-package")
    assert check == Check("no-such-package", "ok", 'not installed, for nothing: pip install "quartet-compile[demo]"')


def test_a_check_that_raises_is_a_failure_with_advice() -> None:
    def look() -> Check:
        raise OSError("out of order\nand more")

    assert Planned("a", look, "Repair it.").run() == Check("a", "fail", "OSError: out of order", "Repair it.")


def test_a_gpu_that_cannot_be_asked_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("CUDA is out of order")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    checks = {planned.name: planned.run() for planned in doctor.looking()}
    assert checks["GPUs"].finding == "RuntimeError: CUDA is out of order"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    monkeypatch.setattr(torch.cuda, "get_device_capability", broken)
    checks = {planned.name: planned.run() for planned in doctor.looking()}
    assert checks["GPU 0"].finding == "RuntimeError: CUDA is out of order"
    assert gpus.usable() == []


# ---------------------------------------------------------------- output

SOME = [Check("short", "ok", "fine"), Check("a longer one", "fail", "broken [x]", "Repair it.")]


def test_plain_text_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_checks(SOME)
    assert capsys.readouterr().out.splitlines() == [
        "ok    short         fine",
        "fail  a longer one  broken [x]",
        "                    -> Repair it.",
    ]


def test_a_table_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    output.print_checks(SOME)
    out = capsys.readouterr().out
    assert re.search(r"│.*fail.*│ a longer one │ broken \[x\]", out)
    assert "-> Repair it." in out


def test_failures_are_the_exit_status(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda self_test: SOME)
    assert main(["doctor"]) == 1
    assert "1 ok, 0 warn, 1 fail: something has to be done first" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "examine", lambda self_test: SOME[:1])
    assert main(["doctor"]) == 0


@pytest.mark.parametrize("case", [pytest.param("a GPU", marks=ON_A_GPU)])
def test_a_gpu_is_ready(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it, for real."""
    status = main(["doctor", "--json"])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert status == 0, [check for check in checks.values() if check["status"] == "fail"]
    native = torch.cuda.get_device_capability(0) >= (10, 0)
    assert torch.cuda.get_device_name(0) in checks["GPU 0"]["finding"]
    assert ("NVFP4 is native" if native else "NVFP4 is emulated") in checks["GPU 0"]["finding"]
    assert {f"{name} on cuda:0" for name in operators.operators()} | {"training step on cuda:0"} <= set(checks)
