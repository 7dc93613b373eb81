"""How fast each quantizer is, against what memory allows.

    python benchmarks/quantizers.py                        three shapes: about two minutes on a GPU
    python benchmarks/quantizers.py --quick                16384x4096 only: under a minute
    python benchmarks/quantizers.py --shapes 8192x4096     other shapes, rows x columns
    python benchmarks/quantizers.py --cpu --quick          smoke test

For bfloat16 matrices, one row an operator:
    us        median GPU time of a call by CUDA events, L2 cache flushed before each, operators in turn, launch overhead hidden
    B/elem    bytes that must move for an element of the matrix: inputs read once and outputs written once
    GB/s      these bytes in that time
    of copy   GB/s against those of a copy of the same matrix in the same run
    x copy    time against that of the copy
Exits with 1 if an operator fails. One without an implementation on the device is noted and skipped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from measuring import command_line, device_of, environment, interleaved, progress, table, write_json
from torch import Tensor

from quartet_compile.kernels import ops, value_ops  # noqa: F401  (they register torch.ops.quartet)

quartet = torch.ops.quartet

SHAPES = ("16384x4096", "4096x4096", "8192x11008")
HEADER = ("shape", "operator", "us", "B/elem", "GB/s", "of copy", "x copy", "note")
FORWARD, BACKWARD, UNDO = "four_over_six", "ms_eden", 1 / 128


class Operator(NamedTuple):
    """What is measured: a call, and the tensors it reads."""

    call: Callable[[], Tensor | Sequence[Tensor]]
    reads: Sequence[Tensor]


def operators(x: Tensor) -> dict[str, Operator]:
    """All rows of the table for one matrix; the first is the copy that the others are compared with."""
    columns = x.shape[1]
    seeds = torch.randint(-(2**63), 2**63 - 1, (2,)).to(x.device)
    rotations = quartet.rotations(seeds)
    packed = quartet.quantize(x, FORWARD)
    target = torch.empty_like(x)

    def grad_values(transpose: bool) -> Tensor:
        return quartet.grad_values(x, rotations, seeds, 0, BACKWARD, transpose, UNDO)

    def dequantize() -> Tensor:
        if not x.is_cuda:
            raise NotImplementedError("on a GPU only")
        from quartet_compile.kernels.triton_kernels.dequantize import dequantize

        return dequantize(*packed, packed[2], 0, False)

    return {
        "copy": Operator(lambda: target.copy_(x), [x]),
        "quantize": Operator(lambda: quartet.quantize(x, FORWARD), [x]),
        "quantize_with_values": Operator(lambda: quartet.quantize_with_values(x, FORWARD), [x]),
        "quantize_values": Operator(lambda: quartet.quantize_values(x, FORWARD), [x]),
        "quantize_grad row": Operator(lambda: quartet.quantize_grad(x, seeds, 0, BACKWARD, False), [x]),
        "quantize_grad transposed": Operator(lambda: quartet.quantize_grad(x, seeds, 0, BACKWARD, True), [x]),
        "quantize_grad_both": Operator(lambda: quartet.quantize_grad_both(x, seeds, 0, 1, BACKWARD), [x]),
        "grad_values row": Operator(lambda: grad_values(False), [x]),
        "grad_values transposed": Operator(lambda: grad_values(True), [x]),
        "grad_values both": Operator(lambda: quartet.grad_values_both(x, rotations, seeds, 0, 1, BACKWARD, UNDO), [x]),
        "requantize": Operator(lambda: quartet.requantize(*packed, columns, seeds, 0, BACKWARD), packed),
        "requantize_values": Operator(lambda: quartet.requantize_values(*packed, columns, rotations, seeds, 0, BACKWARD), packed),
        "dequantize": Operator(dequantize, packed),
    }


def tensors(result: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [result] if isinstance(result, Tensor) else result


def measure(rows: int, columns: int, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """The figures of all operators for one shape."""
    x = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    figures: dict[str, dict[str, Any]] = {}
    calls = {}
    for name, operator in operators(x).items():
        figure = figures[name] = {"shape": [rows, columns], "operator": name, "seconds": None, "note": "", "failed": False}
        progress(f"{rows}x{columns} {name}")
        try:
            written = tensors(operator.call())
            if device.type == "cuda":
                torch.cuda.synchronize()
        except (AttributeError, NotImplementedError) as error:
            figure["note"] = f"missing: {error}"
        except Exception as error:
            figure |= {"note": f"{type(error).__name__}: {error}", "failed": True}
        else:
            figure["bytes"] = sum(tensor.nbytes for tensor in (*operator.reads, *written))
            calls[name] = operator.call
    timings = interleaved(calls, device, rounds)
    copy = figures["copy"]["bytes"] / timings["copy"].seconds
    for name, timing in timings.items():
        figure = figures[name]
        rate = figure["bytes"] / timing.seconds
        figure |= {
            "seconds": timing.seconds, "seconds_p20": timing.low, "seconds_p80": timing.high,
            "bytes_per_element": figure["bytes"] / x.numel(), "bytes_per_second": rate,
            "of_copy": rate / copy, "time_against_copy": timing.seconds / timings["copy"].seconds,
        }  # fmt: skip
    return list(figures.values())


def cells(figure: dict[str, Any]) -> list[str]:
    """A row of the table."""
    names = ["x".join(map(str, figure["shape"])), figure["operator"]]
    if figure["seconds"] is None:
        return [*names, "-", "-", "-", "-", "-", " ".join(figure["note"].split())[:54]]
    return [
        *names,
        f"{figure['seconds'] * 1e6:.1f}",
        f"{figure['bytes_per_element']:.4f}",
        f"{figure['bytes_per_second'] / 1e9:.4g}",
        f"{figure['of_copy']:.1%}",
        f"{figure['time_against_copy']:.2f}",
        "",
    ]


def main() -> int:
    parser = command_line(__doc__, cpu=True)
    parser.add_argument("--shapes", nargs="+", metavar="MxK", help=f"default {' '.join(SHAPES)}")
    arguments = parser.parse_args()
    device = device_of(parser, arguments)
    default = ("256x384",) if arguments.cpu else SHAPES[:1] if arguments.quick else SHAPES
    rounds = 3 if arguments.cpu else 50 if arguments.quick else 100
    torch.manual_seed(0)
    figures: list[dict[str, Any]] = []
    for shape in arguments.shapes or default:
        rows, columns = map(int, shape.split("x"))
        figures += measure(rows, columns, device, rounds)
        write_json(arguments.json, device, figures)
    print(", ".join(f"{key} {value}" for key, value in environment(device).items()))
    print(table(HEADER, [cells(figure) for figure in figures], left=2))
    return 1 if any(figure["failed"] for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
