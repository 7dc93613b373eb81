"""How fast one linear is in NVFP4, forward and backward, against BF16 and against the ceiling of emulation.

    python benchmarks/linear.py                    three sizes, 16384 tokens: about three minutes on a GPU
    python benchmarks/linear.py --quick            the first size, 8192 tokens: under a minute
    python benchmarks/linear.py --cpu --quick      smoke test

nn.Linear without bias in bfloat16, output and both gradients, compiled with backend="inductor" and backend="quartet". Both, and what is
measured besides, take turns in one run; a measurement is five calls in a row by CUDA events, queued while the GPU is held up, so that
gaps between launches do not count (no CUDA graphs). Medians of 20:
    speed           BF16 time / quartet time: 1 is as fast as BF16
    ceiling         what speed would be if a GPU without FP4 tensor cores did the least that emulation takes, which is run, too: the three
                    products in bfloat16, on quantized numbers, operands laid out as the emulation has them, and before each of them
                    copies of the bytes that its quantizers must move (an element of x and w: 4.5625 forward with bfloat16 operands
                    beside the packed ones, 2.5625 to requantize; of dY: 6, both orientations from one read)
    least ms        the time of that; GEMMs ms: of the products alone
    MiB             most memory at once: inputs, weight, output, gradients, and what is between; quartet's and the ratio to BF16's
Exits with 1 if quartet left the linear in BF16.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from measuring import command_line, device_of, environment, interleaved, progress, table, write_json
from torch import Tensor, nn

import quartet_compile  # noqa: F401  (registers the backend where the package is on the path, but not installed)
from quartet_compile.kernels.value_ops import values_of

SIZES = ((4096, 4096), (4096, 22016), (11008, 4096))
BACKENDS = {"bf16": ("inductor", {}), "quartet": ("quartet", {"quartet.strict": True})}
FORWARD_BYTES, REQUANTIZE_BYTES, GRAD_BYTES = 4.5625, 2.5625, 6.0
HEADER = (
    "in -> out", "tokens", "BF16 ms", "quartet ms", "speed", "ceiling", "of ceiling", "least ms", "GEMMs ms",
    "BF16 MiB", "quartet", "ratio",
)  # fmt: skip


class LeastWork:
    """What emulation cannot do without: the three products, and as much traffic as the quantizers in front of each."""

    def __init__(self, x: Tensor, w: Tensor, dy: Tensor) -> None:
        tokens, inputs, outputs = x.shape[0], x.shape[1], w.shape[0]
        self.bytes = {
            "y": (tokens + outputs) * inputs * FORWARD_BYTES,
            "dx": tokens * outputs * GRAD_BYTES + outputs * inputs * REQUANTIZE_BYTES,
            "dw": tokens * inputs * REQUANTIZE_BYTES,
        }
        x, w, dy = (values_of(*torch.ops.quartet.quantize(t.detach(), "four_over_six")) for t in (x, w, dy))
        xt, wt, dyt = (t.t().contiguous() for t in (x, w, dy))  # both operands are contiguous along the dimension that is summed over
        self.products = {"y": (x, w), "dx": (dy, wt), "dw": (dyt, xt)}
        self.source = torch.ones(int(max(self.bytes.values()) / 4), device=x.device, dtype=torch.bfloat16)
        self.target = torch.empty_like(self.source)

    def gemms(self) -> None:
        for left, right in self.products.values():
            _ = left @ right.t()

    def run(self) -> None:
        for name, (left, right) in self.products.items():
            elements = int(self.bytes[name] / 4)  # two bytes read, two written
            self.target[:elements].copy_(self.source[:elements])
            _ = left @ right.t()


def peak_bytes(call: Callable[[], Any], held: Sequence[Tensor]) -> int | None:
    """Most bytes at once in a call, of which `held` are there before it; None on a CPU."""
    if not held[0].is_cuda:
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + sum(t.nbytes for t in held)


def measure(tokens: int, inputs: int, outputs: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """The figures of one size."""
    torch._dynamo.reset()
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    x, dy = make(tokens, inputs, requires_grad=True), make(tokens, outputs)
    linear = nn.Linear(inputs, outputs, bias=False, device=device, dtype=torch.bfloat16)
    w = linear.weight

    def forward_backward(compiled: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(compiled(x), (x, w), dy)

    calls: dict[str, Callable[[], Any]] = {}
    y, peaks = {}, {}
    for name, (backend, options) in BACKENDS.items():
        progress(f"{inputs} -> {outputs}: compiling with {backend}")
        compiled = torch.compile(linear, backend=backend, options=options, dynamic=False)
        calls[name] = partial(forward_backward, compiled)
        calls[name]()
        y[name] = compiled(x).detach()
        peaks[name] = peak_bytes(calls[name], (x, w, dy))
    rewritten = not torch.equal(y["bf16"], y["quartet"])
    y.clear()

    progress(f"{inputs} -> {outputs}: timing")
    least = LeastWork(x, w, dy)
    calls |= {"least": least.run, "gemms": least.gemms}
    timings = interleaved(calls, device, rounds, calls=5 if device.type == "cuda" else 1)
    bf16, quartet, floor = (timings[name].seconds for name in ("bf16", "quartet", "least"))
    return {
        "in": inputs, "out": outputs, "tokens": tokens, "rewritten": rewritten,
        "bf16_seconds": bf16, "quartet_seconds": quartet, "least_seconds": floor, "gemm_seconds": timings["gemms"].seconds,
        "speed": bf16 / quartet, "ceiling": bf16 / floor, "of_ceiling": floor / quartet,
        "quantizer_bytes": sum(least.bytes.values()), "bf16_peak_bytes": peaks["bf16"], "quartet_peak_bytes": peaks["quartet"],
        "timings": {name: vars(timing) for name, timing in timings.items()},
    }  # fmt: skip


def cells(figure: dict[str, Any]) -> list[str]:
    """A row of the table."""
    bf16, quartet = figure["bf16_peak_bytes"], figure["quartet_peak_bytes"]
    peaks = ["-", "-", "-"] if bf16 is None else [f"{bf16 / 2**20:.0f}", f"{quartet / 2**20:.0f}", f"{quartet / bf16:.2f}"]
    return [
        f"{figure['in']} -> {figure['out']}",
        str(figure["tokens"]),
        f"{figure['bf16_seconds'] * 1e3:.3f}",
        f"{figure['quartet_seconds'] * 1e3:.3f}",
        f"{figure['speed']:.3f}",
        f"{figure['ceiling']:.3f}",
        f"{figure['of_ceiling']:.1%}",
        f"{figure['least_seconds'] * 1e3:.3f}",
        f"{figure['gemm_seconds'] * 1e3:.3f}",
        *peaks,
    ]


def main() -> int:
    parser = command_line(__doc__, cpu=True)
    parser.add_argument("--tokens", type=int, help="default 16384; with --quick 8192")
    arguments = parser.parse_args()
    device = device_of(parser, arguments)
    sizes = ((128, 256),) if arguments.cpu else SIZES[:1] if arguments.quick else SIZES
    tokens = arguments.tokens or (128 if arguments.cpu else 8192 if arguments.quick else 16384)
    rounds = 3 if arguments.cpu else 20
    torch.manual_seed(0)
    figures: list[dict[str, Any]] = []
    for inputs, outputs in sizes:
        figures.append(measure(tokens, inputs, outputs, device, rounds))
        write_json(arguments.json, device, figures)
    print(", ".join(f"{key} {value}" for key, value in environment(device).items()))
    print(table(HEADER, [cells(figure) for figure in figures]))
    left = [f"{figure['in']} -> {figure['out']}" for figure in figures if not figure["rewritten"]]
    if left:
        progress(f"quartet left in BF16: {', '.join(left)}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
