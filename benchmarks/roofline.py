"""How fast a linear should be in native NVFP4, forward and backward, against BF16: a roofline model, not a measurement.

    python benchmarks/roofline.py            the sizes of the paper's figure on three GPUs
    python benchmarks/roofline.py --quick    its smallest and largest size

Needs no GPU, but Triton on Linux with the compiler and disassembler that it brings. A launch takes the longest of three times:
    bytes           that its algorithm moves through DRAM, at a fraction of the bandwidth
    instructions    that its threads issue, at a fraction of what the schedulers can; read off the machine code of the very kernels,
                    compiled for the GPU's architecture (`sass` tells how)
    tensor          tensor-core operations, at a fraction of the dense peak
and a linear the sum of its launches (`native_path` lists them). BF16 is the three products alone.
    no issue        speedup if instructions were free: what better code for the same launches could reach
    FP4 needed      the fraction of the FP4 peak that the products must reach for the goal, all other launches as they are
"""

from __future__ import annotations

import importlib.util
import linecache
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpus import GPUS, Gpu
from measuring import command_line, environment, progress, table, write_json

if TYPE_CHECKING:
    from native_path import Compiled
    from roofline_model import Reached
    from sass import Count

TOKENS = 16 * 2048
MODELS = {
    size: ((3 * width, width), (width, width), (2 * hidden, width), (width, hidden))
    for size, width, hidden in (("800M", 2048, 5632), ("3B", 3072, 8192), ("7B", 4096, 11008), ("22B", 6144, 16384))
}
"""(out, in) of the linears whose times the paper adds up: q, k and v as one, attention's output, gate and up as one, down."""

PAPER = {"800M": 3.12, "3B": 3.64, "7B": 3.89, "22B": 4.19}
"""Forward and backward, measured on an RTX 5090 (arXiv 2601.22813, linear speedups; shapes from its code, test/bench_linear.py)."""

GOALS = {"RTX 5090": PAPER, "B200": dict.fromkeys(PAPER, 3.0)}

FRACTIONS = {
    "tensor": "tensor-core peaks", "bf16": "the BF16 peak, by BF16 products", "bandwidth": "DRAM bandwidth", "issue": "issue slots",
}  # fmt: skip

SPEED_HEADER = (
    "GPU", "linears", "BF16 ms", "NVFP4 ms", "products", "quantizers", "speedup", "no issue", "paper", "goal", "FP4 needed",
)  # fmt: skip
KERNEL_HEADER = ("GPU", "kernel", "calls", "instr/elem", "bytes us", "instr us", "tensor us", "bound", "note")


# ---------------------------------------------------------------- figures


def speedup(size: str, kernels: Mapping[str, Compiled], gpu: Gpu, reached: Reached) -> dict[str, Any]:
    """The figures of one of the paper's sizes: its linears one after the other. Seconds."""
    from native_path import PRODUCT
    from roofline_model import BOUNDS, added, bf16_seconds, by_kernel, nvfp4_costs

    costs = [cost for o, i in MODELS[size] for cost in nvfp4_costs(kernels, TOKENS, i, o, gpu, reached)]
    bf16 = sum(bf16_seconds(TOKENS, i, o, gpu, reached) for o, i in MODELS[size])
    seconds = {name: sum(cost.seconds for cost in launches) for name, launches in by_kernel(costs).items()}
    sums = {name: added(launches) for name, launches in by_kernel(costs).items()}
    total = sum(seconds.values())
    quantizers = total - seconds[PRODUCT]
    goal = GOALS.get(gpu.name, {}).get(size)
    left = None if goal is None else bf16 / goal - quantizers
    return {
        "gpu": gpu.name, "size": size, "bf16_seconds": bf16, "nvfp4_seconds": total,
        "product_seconds": seconds[PRODUCT], "quantizer_seconds": quantizers,
        "speedup": bf16 / total,
        "speedup_without_issue_bound": bf16 / sum(max(cost.bytes, cost.tensor) for cost in costs),
        "paper": PAPER[size] if gpu.name == "RTX 5090" else None, "goal": goal,
        "fp4_fraction_needed": None if left is None or left <= 0 else sums[PRODUCT].tensor * reached.tensor / left,
        "kernels": {
            name: {"seconds": seconds[name], "bound": cost.bound, **{bound: getattr(cost, bound) for bound in BOUNDS}}
            for name, cost in sums.items()
        },
    }  # fmt: skip


# ---------------------------------------------------------------- tables


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def speed_cells(figure: Mapping[str, Any]) -> list[str]:
    needed = figure["fp4_fraction_needed"]
    return [
        figure["gpu"],
        figure["size"],
        *(f"{figure[key] * 1e3:.2f}" for key in ("bf16_seconds", "nvfp4_seconds", "product_seconds", "quantizer_seconds")),
        *(_or_dash(figure[key]) for key in ("speedup", "speedup_without_issue_bound", "paper", "goal")),
        "-" if figure["goal"] is None else f"{needed:.0%}" if needed is not None and needed <= 1 else "> 100%",
    ]


def kernel_note(count: Count) -> str:
    """The three most frequent instructions, and what was not followed."""
    from sass import LOOP

    most = ", ".join(f"{opcode} {n / count.issued.total():.0%}" for opcode, n in count.opcodes().most_common(3))
    return f"{most}; loop of {count.inner} counted once" if count.inner >= LOOP else most


def kernel_rows(kernels: Mapping[str, Compiled], gpu: Gpu, reached: Reached) -> list[list[str]]:
    """One row a kernel, its launches in a linear of 4096 to 4096 features together."""
    from roofline_model import BOUNDS, added, by_kernel, nvfp4_costs

    rows = []
    for name, launches in by_kernel(nvfp4_costs(kernels, TOKENS, 4096, 4096, gpu, reached)).items():
        cost = added(launches)
        note = kernel_note(kernels[name].count) if name in kernels else "by Inductor: bytes alone"
        times = (f"{getattr(cost, bound) * 1e6:.0f}" for bound in BOUNDS)
        rows.append([gpu.name, name, str(len(launches)), f"{cost.issued:.1f}", *times, cost.bound, note])
    return rows


def hot_lines(name: str, count: Count) -> list[str]:
    """The three lines of the source that most instructions of a kernel come from."""
    import quartet_compile.kernels.triton_kernels as package

    folder = Path(package.__file__).parent
    lines = []
    for line, n in count.sources().most_common(3):
        text = "no line told" if line is None else f"{line[0]}:{line[1]}  {linecache.getline(str(folder / line[0]), line[1]).strip()}"
        lines.append(f"  {name:<20} {n / count.issued.total():4.0%}  {text}"[:130])
    return lines


def issue_bound(kernels: Mapping[str, Compiled], gpu: Gpu, reached: Reached) -> list[str]:
    """For the kernels that instructions bound, where these come from."""
    from roofline_model import added, by_kernel, nvfp4_costs

    costs = by_kernel(nvfp4_costs(kernels, TOKENS, 4096, 4096, gpu, reached))
    names = [name for name, launches in costs.items() if added(launches).bound == "instructions"]
    return [line for name in names for line in hot_lines(name, kernels[name].count)]


def shortfalls(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where a goal is missed: the kernels that take most time beyond the products at the assumed fraction of the FP4 peak."""
    from native_path import PRODUCT

    lines = []
    for figure in figures:
        if figure["goal"] is None or figure["speedup"] >= figure["goal"]:
            continue
        costs = figure["kernels"]
        excess = {name: cost["seconds"] - (cost["tensor"] if name == PRODUCT else 0) for name, cost in costs.items()}
        worst = sorted(excess, key=lambda name: -excess[name])[:3]
        told = ", ".join(f"{name} +{excess[name] * 1e3:.2f} ms ({costs[name]['bound']})" for name in worst)
        late = (figure["nvfp4_seconds"] - figure["bf16_seconds"] / figure["goal"]) * 1e3
        lines += [f"  {figure['gpu']} {figure['size']}: {figure['speedup']:.2f} of {figure['goal']:.2f}, {late:.2f} ms late", f"    {told}"]
    return lines


def assumptions(reached: Reached) -> list[str]:
    """What the tables stand on."""
    return [
        *(
            f"  {gpu.name}: {gpu.processors} SMs at {gpu.clock / 1e9:.3f} GHz, {gpu.bandwidth / 1e12:.3f} TB/s; dense peaks "
            f"{gpu.bf16 / 1e12:.4g} (BF16) and {gpu.fp4 / 1e12:.4g} (FP4) TFLOP/s; BF16 products reach {reached.in_bf16(gpu):.0%}"
            for gpu in GPUS
        ),
        f"  FP4 products and rotations reach {reached.tensor:.0%} of tensor-core peaks; all kernels {reached.bandwidth:.0%} of bandwidth "
        f"and {reached.issue:.0%} of issue slots.",
        f"  {TOKENS} tokens; launches one after the other; nothing shared between linears.",
        "  Instructions: the longest path, predicated-off ones included; left out are slow paths of divisions, groups quantized again, and",
        "  what one warp issues for all (tcgen05.mma).",
        "  Not modelled: latency, launches, L2 and shared memory, strided reads, units slower than issue (conversions, MUFU, shuffles).",
        "  The FP4 product's fraction is unproven: it has not been run. The paper's figures were measured, with the authors' kernels.",
    ]


def report(kernels: Mapping[int, Mapping[str, Compiled]], figures: Sequence[Mapping[str, Any]], reached: Reached) -> str:
    """All tables."""
    rows = [row for gpu in GPUS for row in kernel_rows(kernels[gpu.capability], gpu, reached)]
    first = {gpu.capability: gpu for gpu in reversed(GPUS)}
    hot = [line for c, gpu in sorted(first.items()) for line in (f"sm_{c}:", *issue_bound(kernels[c], gpu, reached))]
    missed = shortfalls(figures) or ["  none"]
    return "\n".join([
        ", ".join(f"{key} {value}" for key, value in environment(None).items()),
        table(SPEED_HEADER, [speed_cells(figure) for figure in figures], left=2),
        "\nGoals that are missed:", *missed,
        f"\nKernels of one linear, {TOKENS} x 4096 -> 4096 (instr/elem: a thread's, of the operand; the product's, of y):",
        table(KERNEL_HEADER, rows, left=2),
        "\nWhere the instructions come from, for the kernels that they bound:", *hot,
        "\nAssumptions:", *assumptions(reached),
    ])  # fmt: skip


def main() -> int:
    parser = command_line(__doc__, cpu=False)
    fractions = parser.add_argument_group("fractions reached")
    for name, what in FRACTIONS.items():
        fractions.add_argument(f"--{name}", type=float, help=f"of {what}", metavar="F")
    arguments = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        parser.exit(2, f"{parser.prog}: Triton is missing; its compiler and disassembler are needed, a GPU is not\n")
    from native_path import read
    from roofline_model import Reached
    from sass import ToolError, tool

    reached = Reached(**{name: f for name in FRACTIONS if (f := getattr(arguments, name)) is not None})
    kernels = {}
    try:
        tool("ptxas"), tool("nvdisasm")
        for capability in sorted({gpu.capability for gpu in GPUS}):
            progress(f"compiling for sm_{capability}")
            kernels[capability] = read(capability)
    except ToolError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    sizes = ("800M", "22B") if arguments.quick else tuple(MODELS)
    figures = [speedup(size, kernels[gpu.capability], gpu, reached) for gpu in GPUS for size in sizes]
    write_json(arguments.json, None, figures)
    print(report(kernels, figures, reached))
    return 0


if __name__ == "__main__":
    sys.exit(main())
