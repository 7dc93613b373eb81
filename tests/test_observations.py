"""Numerics while training, as they are read: lines of JSON, a table, plots, and errors that say what to do."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from observe_support import ALL, FIRST, mlp, observed, uses

import quartet_compile as quartet


def test_lines_of_json_come_back_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "n.jsonl"
    compiled, observer = observed(mlp(), every=2, file=file)
    for _ in range(3):
        compiled(torch.randn(8, 64)).sum().backward()
    assert len(file.read_text().splitlines()) == 13, "the call before the last one is written, the last one not yet"
    observer.remove()
    lines = file.read_text().splitlines()
    assert len(lines) == 26
    for line in lines:
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = quartet.read_observations(file)
    assert list(again) == list(observer)
    assert again.table() == str(observer)
    assert {r.call for r in again.of("0", product="dw", operand="")} == {0, 2}


@pytest.mark.slow
def test_what_is_left_at_the_end_of_the_process_is_written(tmp_path: Path) -> None:
    code = (
        "import torch, quartet_compile as quartet; from test_observe import Heard, mlp\n"
        "model = torch.compile(mlp(), backend=Heard()); quartet.observe(model)\n"
        "model(torch.randn(8, 64)).sum().backward()"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    assert uses(quartet.read_observations(tmp_path / "numerics.jsonl")) == {"0": FIRST, "2": ALL}


def observation(**fields: Any) -> quartet.Observation:
    base = {
        "call": 0, "rank": 0, "linear": "a", "product": "y", "operand": "x", "rule": "four_over_six", "error": 7.5e-3, "gain": 1.0,
        "cosine": 0.9962, "saturated": 0.02, "underflowed": 0.05, "amax": 3.0, "elements": 4096,
    }  # fmt: skip
    return quartet.Observation(**(base | fields))


def test_a_table_has_one_line_a_linear_and_the_worst_of_all_ranks() -> None:
    result = {"operand": "", "rule": "", "saturated": None, "underflowed": None}
    records = quartet.Observations([
        observation(), observation(rank=1, error=8.5e-3, amax=4.0),
        observation(product="dw", cosine=0.98, gain=1.01, **result), observation(product="dw", rank=1, cosine=0.97, gain=0.99, **result),
        observation(linear="b", underflowed=0.25), observation(linear="b", product="dx", operand="w", saturated=0.04),
        observation(call=1),
    ])  # fmt: skip
    first, _, header, a, b, *_ = records.table().splitlines()
    assert first == "quartet: call 0, 2 linears, the worst of 2 ranks"
    titles = re.split(r" {2,}", header)
    cells = [dict(zip(titles, line.split(), strict=True)) for line in (a, b)]
    assert cells[0] == dict.fromkeys(titles, "-") | {
        "linear": "a", "y:x": "8.50", "cos dw": "0.9700", "gain dw": "0.9900", "sat%": "2.00", "zero%": "5.00", "max x": "4"
    }  # fmt: skip
    assert cells[1] == dict.fromkeys(titles, "-") | {
        "linear": "b", "y:x": "7.50", "dx:w": "7.50", "sat%": "4.00", "zero%": "25.00", "max x": "3"
    }  # fmt: skip
    assert records.table(call=1).splitlines()[0] == "quartet: call 1, 1 linear"
    assert "b" not in [line.split(" ")[0] for line in records.table("a").splitlines()]
    assert quartet.Observations().table() == "quartet: no observations"
    assert records.table("a", call=7) == "quartet: nothing observed of 'a' in call 7; it was in calls 0, 1"
    assert records.table("z") == "quartet: nothing observed of 'z' in call 0; linears are a, b"
    assert repr(records) == "<Observations of 2 linears in 2 calls: 7 records>"


def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = [observation(call=call, error=e) for call, e in ((0, 1e-2), (100, math.nan), (200, None))]
    quartet.Observations(records).plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing observed of linears that match 'z'"):
        quartet.Observations(records).plot(tmp_path / "plot.png", "z")


def test_files_that_hold_something_else_are_told_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "n.jsonl"
    for line in ("print()", '{"call": 0}', "[1]"):
        path.write_text(f"{observation().to_json()}\n{line}\n")
        with pytest.raises(ValueError, match=rf"n.jsonl, line 2, is not what quartet.observe writes: {re.escape(repr(line))}"):
            quartet.read_observations(path)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RuntimeError, match="pip install matplotlib"):
        quartet.Observations([observation()]).plot(tmp_path / "plot.png")


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="no part of Sequential is compiled"):
        quartet.observe(mlp())
    with pytest.raises(TypeError, match=r"takes what torch.compile returned"):
        quartet.observe(print)
    for options in ({"every": 0}, {"every": 1.5}, {"every": None}, {"elements": -1}, {"elements": True}):
        with pytest.raises(ValueError, match=next(iter(options))):
            quartet.observe(torch.compile(mlp(), backend="quartet"), **options)
    _, observer = observed(mlp())
    with pytest.raises(TypeError, match="call the module as before"):
        observer(torch.randn(8, 64))


def test_a_model_without_linears_in_nvfp4_is_told(caplog: pytest.LogCaptureFixture) -> None:
    compiled = torch.compile(mlp(), backend="eager")
    observer = quartet.observe(compiled, every=2, file=None)
    assert "has not been called in training mode" in str(observer)
    for _ in range(3):
        compiled(torch.randn(8, 64)).sum().backward()
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "observe" in r.getMessage()]
    said = 'no linear in NVFP4 ran in it; is the model compiled with backend="quartet"?'
    assert lines == [f"quartet.observe: call 0 was to be observed, but {said}"]
    assert "nothing observed in 3 calls" in str(observer)
