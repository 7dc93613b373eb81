"""What several tests need: running a model through the rewritten graphs, and watching which seeds its operators were given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from quartet_compile.capture import GraphCapture
from quartet_compile.kernels import cpu, ops
from quartet_compile.options import split_options

ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_A_GPU)]
"""Values of a parameter: where a test runs."""


def capture(model: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], GraphCapture]:
    """(the compiled model, its capture): our passes and torch's partitioner without Inductor's code generation, which takes seconds.

    options: without their prefix, such as exclude=["a.*"].
    """
    backend = GraphCapture(split_options({f"quartet.{k}": v for k, v in options.items()})[0])
    return torch.compile(model, backend=backend), backend


def graph_code(source: str) -> str:
    """The graph itself of a file that `quartet_compile.source` made."""
    return source[source.index("class GraphModule") : source.index("\n\ndef tensor(")]


@dataclass
class Seeds:
    """The seeds that gradient quantizers received, in order: dgrad reads e as it is, wgrad transposed (unless e comes transposed)."""

    plain: list[int] = field(default_factory=list)
    transposed: list[int] = field(default_factory=list)


@contextmanager
def recorded_seeds() -> Iterator[Seeds]:
    """Watch the seeds that `quartet.quantize_grad` is called with, on the CPU and on GPUs."""
    seen = Seeds()

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def watching(e: torch.Tensor, seeds: torch.Tensor, index: int, rule: str, transpose: bool, rank: int) -> Any:
            (seen.transposed if transpose else seen.plain).append(int(seeds[index]))
            return original(e, seeds, index, rule, transpose, rank)

        return watching

    with pytest.MonkeyPatch.context() as patch:
        for module in (cpu, ops.triton_kernels()) if torch.cuda.is_available() else (cpu,):
            patch.setattr(module, "quantize_grad", watched(module.quantize_grad))
        yield seen


def float64(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def train_step(model: torch.nn.Module, x: torch.Tensor, context: Any = None) -> tuple[torch.Tensor, torch.Tensor, Seeds, Any]:
    """(y, the gradient of y, seeds, report) of one step with a random upstream gradient."""
    compiled, backend = capture(model, min_features=1)
    with recorded_seeds() as seeds:
        with context or nullcontext():
            y = compiled(x)
        e = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), device="cpu").to(y)
        y.backward(e)
    return y, e, seeds, backend.report(model)


def _with_seed(function: Callable[..., Any], seed: int) -> Callable[..., Any]:
    """The function, each element of its argument `seeds` replaced."""
    position = list(inspect.signature(function).parameters).index("seeds")

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args[:position], torch.full_like(args[position], seed), *args[position + 1 :], **kwargs)

    return call


@contextmanager
def one_seed(seed: int = 1234) -> Iterator[None]:
    """All rotations and draws take the same seed, whoever asks for them, on the CPU and on GPUs; ranks still draw differently."""
    drawing = ["quantize_grad", "quantize_grad_both", "requantize"]
    kernels = [(cpu, drawing)]
    if torch.cuda.is_available():
        kernels.append((ops.triton_kernels(), [*drawing, "rotations", "grad_values", "requantize_values"]))
    with pytest.MonkeyPatch.context() as patch:
        for module, names in kernels:
            for name in names:
                patch.setattr(module, name, _with_seed(getattr(module, name), seed))
        yield


def relative_error(ours: np.ndarray | torch.Tensor, expected: np.ndarray | torch.Tensor, *, flips: int = 0) -> float:
    """Frobenius norm of the difference over that of the expected value, in float64.

    flips: how many codes of a matrix product's operands may have been rounded to the other side of a midpoint, by a rotation that adds in
    another order. Each changes one row or one column, so this many of both are left out: those that are furthest apart.
    """
    a, b = (float64(torch.as_tensor(x)) for x in (ours, expected))
    apart = (a - b) ** 2
    for axis in (0, 1) if flips else ():
        furthest = np.argsort(apart.sum(axis=1 - axis))[-flips:]
        apart = np.delete(apart, furthest, axis)
    return float(np.sqrt(apart.sum()) / np.linalg.norm(b))


def off_by_more_than_rounding(ours: torch.Tensor, expected: np.ndarray | torch.Tensor) -> float:
    """Share of elements that differ from the expected value rounded once to the dtype of `ours`."""
    return float((ours.detach().cpu() != torch.as_tensor(expected).cpu().to(ours.dtype)).float().mean())
