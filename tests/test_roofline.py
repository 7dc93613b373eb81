"""The roofline model: times worked out by hand from round numbers, and the tables of the benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import sass
from gpus import GPUS, Gpu
from native_path import Compiled, Pass
from offline import Case
from roofline_model import Cost, Reached, added, bf16_cost, pass_cost, product_cost, products

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "roofline.py"

# ---------------------------------------------------------------- the model

ROUND = Gpu("round numbers", 100, processors=10, clock=1e9, bandwidth=1e12, bf16=1e13, fp4=4e13)
PEAK = Reached(bandwidth=1.0, issue=1.0, tensor=1.0)


def kernel(constants: dict[str, int], once: int, body: int) -> Compiled:
    return Compiled(Case(None, {}, constants, {"num_warps": 4}), sass.Count(once, body))


def one(constants: dict[str, int], once: int, body: int) -> dict[str, Compiled]:
    return {"a pass": kernel(constants, once, body)}


def a_pass(**changes) -> Pass:
    return Pass(**({"case": "a pass", "tile": lambda c: c["BLOCK"], "bytes": 4.0, "flops": 256.0} | changes))


def test_issue_rate():
    assert ROUND.issue_rate == 1.28e12  # 10 SMs, 4 warps of 32 threads a cycle, 10^9 cycles


def test_a_launch_takes_the_longest_of_three_times():
    # 4096 elements in 16 tiles of 256, by 16 programs of 128 threads that issue 100 instructions each: 204800, or 50 an element.
    cost = pass_cost(a_pass(), one({"BLOCK": 256}, 100, 0), 4096, ROUND, PEAK)
    assert cost.issued == 50
    assert cost.bytes == pytest.approx(1.6384e-8)  # 16384 bytes
    assert cost.instructions == pytest.approx(1.6e-7)
    assert cost.tensor == pytest.approx(1.048576e-7)  # 2^20 operations
    assert (cost.bound, cost.seconds) == ("instructions", cost.instructions)
    cost = pass_cost(a_pass(bytes=200.0), one({"BLOCK": 256}, 100, 0), 4096, ROUND, PEAK)
    assert (cost.bound, cost.seconds) == ("bytes", pytest.approx(8.192e-7))
    cost = pass_cost(a_pass(), one({"BLOCK": 256}, 50, 0), 4096, ROUND, PEAK)
    assert (cost.bound, cost.seconds) == ("tensor", pytest.approx(1.048576e-7))


def test_programs_that_loop_start_once():
    # 16 tiles, but 10 programs: 128 threads * (10 * 100 + 16 * 50).
    cost = pass_cost(a_pass(programs=1), one({"BLOCK": 256}, 100, 50), 4096, ROUND, PEAK)
    assert cost.instructions == pytest.approx(230400 / 1.28e12)
    with pytest.raises(ValueError, match="no loop was found"):
        pass_cost(a_pass(programs=1), one({"BLOCK": 256}, 100, 0), 4096, ROUND, PEAK)


def test_of_other_code_only_the_bytes_are_known():
    cost = pass_cost(a_pass(tile=None), {}, 4096, ROUND, PEAK)
    assert (cost.bytes, cost.instructions, cost.issued) == (pytest.approx(1.6384e-8), 0, 0)


def test_fractions_of_peaks():
    cost = pass_cost(a_pass(), one({"BLOCK": 256}, 100, 0), 4096, ROUND, Reached(bandwidth=0.5, issue=0.8, tensor=0.25))
    assert (cost.bytes, cost.instructions, cost.tensor) == pytest.approx((3.2768e-8, 2.0e-7, 4.194304e-7))


def test_products():
    tile = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 128}
    # 2 * 4 tiles of 128 threads, 200 + 4 * 50 instructions each; operands 512 * 512 * 0.5625, output 65536 * 2 bytes; 2^26 operations.
    cost = product_cost(kernel(tile, 200, 50), 256, 256, 512, ROUND, PEAK)
    assert cost.instructions == pytest.approx(409600 / 1.28e12)
    assert cost.bytes == pytest.approx(278528 / 1e12)
    assert cost.tensor == pytest.approx(67108864 / 4e13)
    bf16 = bf16_cost(256, 256, 512, ROUND, PEAK)
    assert (bf16.bytes, bf16.instructions, bf16.tensor) == pytest.approx((655360 / 1e12, 0.0, 67108864 / 1e13))
    assert products(tokens=5, inputs=3, outputs=2) == ((5, 2, 3), (5, 3, 2), (2, 3, 5))


def test_fraction_of_bf16():
    geforce = next(gpu for gpu in GPUS if gpu.name == "RTX 5090")
    assert Reached(tensor=0.7).in_bf16(ROUND) == 0.7
    assert Reached(tensor=0.7).in_bf16(geforce) == 1.1  # measured
    assert Reached(tensor=0.7, bf16=0.9).in_bf16(geforce) == 0.9


def test_launches_add_up():
    assert added([Cost("a", 1.0, 2.0, 3.0, 7.0), Cost("a", 4.0, 0.0, 1.0, 9.0)]) == Cost("a", 5.0, 2.0, 4.0, 7.0)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_peaks_are_whole_rates_an_sm(gpu):
    """Dense rates an SM and cycle: 512, 1024 or 8192 BF16 operations, 4 or 8 times as many in FP4."""
    bf16 = gpu.bf16 / (gpu.processors * gpu.clock)
    assert min(abs(bf16 / rate - 1) for rate in (512, 1024, 8192)) < 0.005
    assert gpu.fp4 / gpu.bf16 == pytest.approx(8 if gpu.name == "RTX 5090" else 4, rel=1e-3)


# ---------------------------------------------------------------- the benchmark


def run(*options: str, **environment: str) -> subprocess.CompletedProcess:
    known = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, env=known | environment)


@pytest.mark.slow
def test_the_tables_print(tmp_path):
    file = tmp_path / "figures.json"
    done = run("--quick", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 160
    first, header, *rows = done.stdout.splitlines()
    assert first.startswith("device none (a model: nothing was measured)")
    assert header.split()[:2] == ["GPU", "linears"]
    figures = json.loads(file.read_text())["rows"]
    assert [(f["gpu"], f["size"]) for f in figures] == [(gpu.name, size) for gpu in GPUS for size in ("800M", "22B")]
    for row, figure in zip(rows, figures, strict=False):
        assert row.startswith(f"{figure['gpu']} ")
        assert figure["speedup"] == pytest.approx(figure["bf16_seconds"] / figure["nvfp4_seconds"])
        assert figure["nvfp4_seconds"] == pytest.approx(sum(cost["seconds"] for cost in figure["kernels"].values()))
        assert figure["speedup"] <= figure["speedup_without_issue_bound"] * (1 + 1e-12)
    assert [f["paper"] for f in figures if f["paper"]] == [3.12, 4.19]
    # Three products in BF16 over the four linears of the 800M model: 6 * 32768 * (6144 + 2048 + 11264 + 5632) * 2048 operations.
    b200 = figures[0]
    assert b200["bf16_seconds"] == pytest.approx(6 * 32768 * (6144 + 2048 + 11264 + 5632) * 2048 / (0.75 * 2.25e15))
    for title in ("Goals that are missed:", "Kernels of one linear", "Where the instructions come from", "Assumptions:"):
        assert title in done.stdout


def test_without_a_disassembler_one_line_says_so(tmp_path):
    folder = tmp_path / "triton"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import triton.knobs as k\ndef missing(self, *_): raise RuntimeError('Cannot find nvdisasm')\n"
        "type(vars(k.nvidia_knobs)['nvdisasm']).__get__ = missing\n"
    )
    done = run("--quick", PYTHONPATH=str(folder))
    assert done.returncode == 2
    assert done.stdout == ""
    assert "comes with Triton on Linux, is missing" in done.stderr.splitlines()[-1]
