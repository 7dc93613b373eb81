"""The roofline model of a linear: for each launch the longest of three times, for a linear their sum.

A launch needs DRAM for the bytes that its algorithm moves, the schedulers for the instructions that its threads issue, and the tensor
cores. Each resource is taken to give a fraction of its peak. Times are in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from gpus import Gpu
from native_path import PRODUCT, Compiled, Pass, quantizers

BOUNDS = ("bytes", "instructions", "tensor")


@dataclass(frozen=True)
class Reached:
    """Fractions of the peaks that kernels are taken to reach.

    tensor: in FP4 and BF16 alike. bf16: of BF16 products; None: as measured (`Gpu.cublas`) if that is known, else `tensor`.
    """

    bandwidth: float = 0.9
    issue: float = 0.8
    tensor: float = 0.75
    bf16: float | None = None

    def in_bf16(self, gpu: Gpu) -> float:
        """For the BF16 products of a library."""
        return next(fraction for fraction in (self.bf16, gpu.cublas, self.tensor) if fraction is not None)


@dataclass(frozen=True)
class Cost:
    """Seconds that a launch needs of each resource. issued: instructions of threads, for an element."""

    name: str
    bytes: float
    instructions: float
    tensor: float
    issued: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.bytes, self.instructions, self.tensor)

    @property
    def bound(self) -> str:
        return max(BOUNDS, key=lambda name: getattr(self, name))


def _issued(launch: Pass, kernels: Mapping[str, Compiled], elements: int, gpu: Gpu) -> int:
    """Instructions of all threads of a launch; 0 for a kernel that is not ours."""
    if launch.tile is None:
        return 0
    kernel = kernels[launch.case]
    tiles = -(-elements // launch.tile(kernel.case.constants))
    if launch.programs is None:
        return kernel.threads * tiles * (kernel.count.once + kernel.count.body)
    if not kernel.count.body:
        raise ValueError(f"{launch.case}: its programs are said to loop over tiles, but no loop was found")
    programs = min(tiles, launch.programs * gpu.processors)
    return kernel.threads * (programs * kernel.count.once + tiles * kernel.count.body)


def pass_cost(launch: Pass, kernels: Mapping[str, Compiled], elements: int, gpu: Gpu, reached: Reached) -> Cost:
    """A launch over so many elements."""
    issued = _issued(launch, kernels, elements, gpu)
    return Cost(
        launch.case,
        bytes=elements * launch.bytes / (reached.bandwidth * gpu.bandwidth),
        instructions=issued / (reached.issue * gpu.issue_rate),
        tensor=elements * launch.flops / (reached.tensor * gpu.bf16),
        issued=issued / elements,
    )


def product_cost(kernel: Compiled, m: int, n: int, k: int, gpu: Gpu, reached: Reached) -> Cost:
    """The FP4 product of [m, k] and [n, k], bfloat16 out. `issued` is for an element of the output."""
    tile = kernel.case.constants
    tiles = -(-m // tile["BLOCK_M"]) * -(-n // tile["BLOCK_N"])
    issued = kernel.threads * tiles * (kernel.count.once + kernel.count.body * -(-k // tile["BLOCK_K"]))
    return Cost(
        PRODUCT,
        bytes=((m + n) * k * 0.5625 + 2 * m * n) / (reached.bandwidth * gpu.bandwidth),
        instructions=issued / (reached.issue * gpu.issue_rate),
        tensor=2 * m * n * k / (reached.tensor * gpu.fp4),
        issued=issued / (m * n),
    )


def bf16_cost(m: int, n: int, k: int, gpu: Gpu, reached: Reached) -> Cost:
    """The same product in bfloat16, by a library whose instructions do not bound it."""
    moved = 2 * ((m + n) * k + m * n) / (reached.bandwidth * gpu.bandwidth)
    return Cost("bf16", bytes=moved, instructions=0.0, tensor=2 * m * n * k / (reached.in_bf16(gpu) * gpu.bf16))


def products(tokens: int, inputs: int, outputs: int) -> tuple[tuple[int, int, int], ...]:
    """M, N and K of y, dx and dw."""
    return (tokens, outputs, inputs), (tokens, inputs, outputs), (outputs, inputs, tokens)


def bf16_seconds(tokens: int, inputs: int, outputs: int, gpu: Gpu, reached: Reached) -> float:
    """One linear, forward and backward."""
    return sum(bf16_cost(*shape, gpu, reached).seconds for shape in products(tokens, inputs, outputs))


def nvfp4_costs(
    kernels: Mapping[str, Compiled], tokens: int, inputs: int, outputs: int, gpu: Gpu, reached: Reached
) -> list[Cost]:
    """Every launch of one linear, forward and backward."""
    elements = {"x": tokens * inputs, "w": outputs * inputs, "e": tokens * outputs}
    costs = []
    for operand, launches in quantizers(gpu.capability):
        costs += [pass_cost(launch, kernels, elements[operand], gpu, reached) for launch in launches]
    return costs + [product_cost(kernels[PRODUCT], *shape, gpu, reached) for shape in products(tokens, inputs, outputs)]


def by_kernel(costs: Iterable[Cost]) -> dict[str, list[Cost]]:
    """Kernel -> its launches, in order of their first ones."""
    found: dict[str, list[Cost]] = {}
    for cost in costs:
        found.setdefault(cost.name, []).append(cost)
    return found


def added(costs: Sequence[Cost]) -> Cost:
    """Launches of one kernel as one: times add up, resource by resource; `issued` is the first one's."""
    return replace(costs[0], **{bound: sum(getattr(cost, bound) for cost in costs) for bound in BOUNDS})
