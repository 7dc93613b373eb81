"""The benchmarks run: tables and JSON of the smoke tests on the CPU, and a clear end where there is no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import spread

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
OPERATORS = [
    "copy", "quantize", "quantize_with_values", "quantize_values", "quantize_grad row", "quantize_grad transposed", "quantize_grad_both",
    "grad_values row", "grad_values transposed", "grad_values both", "requantize", "requantize_values", "dequantize",
]  # fmt: skip


def run(script: str, *options: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return subprocess.run([sys.executable, str(BENCHMARKS / script), *options], capture_output=True, text=True, env=environment)


def smoke_test(script: str, tmp_path: Path, *options: str) -> tuple[list[str], list[dict]]:
    """(lines of the table, rows of the JSON)"""
    file = tmp_path / "figures.json"
    done = run(script, "--cpu", "--quick", "--json", str(file), *options)
    assert done.returncode == 0, done.stderr
    first, *table = done.stdout.splitlines()
    assert first.startswith("device CPU")
    assert max(map(len, table)) <= 130
    content = json.loads(file.read_text())
    assert set(content) == {"environment", "rows"}
    assert set(content["environment"]) == {"device", "torch", "triton"}
    return table, content["rows"]


def test_quantizers(tmp_path):
    table, rows = smoke_test("quantizers.py", tmp_path)
    assert [row["operator"] for row in rows] == OPERATORS
    for line, row in zip(table[1:], rows, strict=True):
        assert row["operator"] in line
    *measured, dequantize = rows
    assert dequantize["seconds"] is None
    assert table[-1].endswith("on a GPU only")
    for row in measured:
        assert row["seconds"] > 0
        assert row["of_copy"] == pytest.approx(row["bytes_per_second"] / rows[0]["bytes_per_second"])
    bytes_per_element = [round(row["bytes_per_element"], 2) for row in measured]
    assert bytes_per_element == [4, 2.56, 4.56, 4, 2.56, 2.56, 3.13, 4, 4, 6, 1.13, 2.56]


def test_linear(tmp_path):
    table, rows = smoke_test("linear.py", tmp_path)
    assert len(table) == 2
    (row,) = rows
    assert table[1].startswith(f"{row['in']} -> {row['out']}")
    assert row["rewritten"]
    assert row["speed"] == pytest.approx(row["bf16_seconds"] / row["quartet_seconds"])
    assert row["ceiling"] == pytest.approx(row["bf16_seconds"] / row["least_seconds"])
    x, w, dy = 128 * 128, 256 * 128, 128 * 256
    assert row["quantizer_bytes"] == (x + w) * (4.5625 + 2.5625) + dy * 6
    assert row["bf16_peak_bytes"] is row["quartet_peak_bytes"] is None
    assert set(row["timings"]) == {"bf16", "quartet", "least", "gemms"}


@pytest.mark.parametrize("script", ["quantizers.py", "linear.py", "train_step.py", "observe_step.py"])
def test_without_a_gpu_one_line_says_so(script):
    done = run(script, "--quick")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}: no CUDA GPU")


@pytest.mark.slow
def test_training_steps():
    """A small model on the CPU: every row, with ratios against BF16's."""
    code = """
import sys
from argparse import Namespace
import torch, train_step
from gpt_model import GPTConfig
case = train_step.Case(GPTConfig(vocab=64, context=32, layers=1, heads=2, dim=64, hidden=128), batch=2)
arguments = Namespace(dtype="autocast", mode=None, recompute=["operands"], profile=False)
rows, kernels = train_step.measure("small", case, torch.device("cpu"), 1, 1, arguments)
assert kernels == []
for row in rows:
    print(*train_step.cells(row), sep="|")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    bf16, *others = [line.split("|") for line in done.stdout.splitlines()]
    assert [row[2] for row in (bf16, *others)] == ["inductor", "quartet, operands again"]
    assert bf16[4] == bf16[8] == ""
    for row in others:
        assert float(row[4]) == pytest.approx(float(row[3]) / float(bf16[3]), rel=0.05)
        assert float(row[8]) == pytest.approx(float(bf16[5]) / float(row[5]), rel=0.05)


@pytest.mark.slow
def test_observed_steps(tmp_path):
    table, rows = smoke_test("observe_step.py", tmp_path)
    (row,) = rows
    assert row["records"] == 5 + 8, "the first of two linears needs no dx"
    assert row["ratio"] == pytest.approx(row["observed_seconds"] / row["plain_seconds"])
    assert f"{row['ratio']:.2f}" in table[1].split()


# ---------------------------------------------------------------- two processes against one


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042)])
def test_quantiles_of_students_distribution(freedom, t):
    """Against the tables in textbooks, two-sided, 5%."""
    assert spread.quantile(0.95, freedom) == pytest.approx(t, abs=5e-4)


def test_runs_of_the_same_kind_lie_inside_the_bound_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(spread, "COVERAGE", 0.9)
    draws = np.random.default_rng(0).normal(3.0, 0.01, size=(2000, 9, 10))
    inside = [spread.judge(runs[:6], runs[6:], {"all": slice(None)})[0]["inside"] for runs in draws]
    assert np.mean(inside) == pytest.approx(0.9, abs=0.02)  # three standard errors


def test_a_curve_that_lies_apart_at_its_end_is_outside_there():
    one = np.random.default_rng(0).normal(3.0, 0.01, size=(6, 200))
    two = np.random.default_rng(1).normal(3.0, 0.01, size=(3, 200))
    two[:, -20:] += 0.02
    first, last = spread.judge(one, two, {"first": slice(20), "last": slice(-20, None)})
    assert first["inside"]
    assert not last["inside"]
    assert last["deviation"] == pytest.approx(0.02, abs=0.005)


def test_without_two_gpus_one_line_says_so():
    done = run("fsdp_curve.py")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("fsdp_curve.py: fewer than 2 CUDA GPUs")


@pytest.mark.slow
def test_fsdp_curve(tmp_path):
    table, rows = smoke_test("fsdp_curve.py", tmp_path, "--sharded-runs", "1")
    assert [(row["backend"], row["processes"]) for row in rows] == [(b, n) for b in ("inductor", "quartet") for n in (1, 2)]
    assert sum(line.endswith("inside") for line in table) == 4
    curves = {(row["backend"], row["processes"]): list(row["curves"].values()) for row in rows}
    assert {key: len(runs) for key, runs in curves.items()} == {key: 4 if key[1] == 1 else 1 for key in curves}
    for runs in curves.values():
        for curve in runs:
            assert curve[-1] < curve[0] - 1.5
    # The same parameters, batches and, forward, codes: the first loss is that of all runs of a backend.
    for backend in ("inductor", "quartet"):
        first = [curve[0] for n in (1, 2) for curve in curves[backend, n]]
        assert first == pytest.approx([first[0]] * 5, rel=1e-6)
    # Without noise runs differ by rounding, with it by far more, each from every other.
    last = {backend: [curve[-1] for n in (1, 2) for curve in curves[backend, n]] for backend in ("inductor", "quartet")}
    assert max(last["inductor"]) - min(last["inductor"]) < 1e-4
    assert len(set(last["quartet"])) == 5


@pytest.mark.slow
def test_sharded_steps(tmp_path):
    """Every way on one process: those of NVFP4 against BF16 with the same checkpointing and resharding."""
    table, rows = smoke_test("sharded_step.py", tmp_path)
    assert len(table) == 1 + len(rows) == 14
    base = {(row["checkpoint"], row["reshard"]): row["seconds"] for row in reversed(rows) if row["backend"] == "inductor"}
    assert len(base) == 4
    for row in rows:
        assert row["speed"] == pytest.approx(base[row["checkpoint"], row["reshard"]] / row["seconds"])
        assert 0 < row["host_seconds"] <= row["seconds"]
        assert row["held_bytes"] is row["peak_bytes"] is None
