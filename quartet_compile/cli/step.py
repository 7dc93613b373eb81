"""The last self-test of `quartet doctor`: one compiled training step against the recipe, computed eagerly in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quartet_compile.cli.check import REPORT, Check
from quartet_compile.kernels import philox, reference
from quartet_compile.kernels.format import GROUP, ROTATION, Quantized, ceil_to

TOKENS, INS, OUTS = 48, 96, 80

SUMS = 1e-5
"""Relative error of float32 sums of about a hundred products; it is 1e-7 to 1e-6."""

FLIPS = 1e-2
"""Relative error of a gradient on a GPU, whose rotations add in another order: each code that this moves over a midpoint makes 4e-3. What
the recipe's noise would make, were another seed used or the rounding wrong, is 0.1 and more."""


def training_step(device: str) -> Check:
    """y, dx and dw of a linear with bias, compiled with backend="quartet", and their distance from what the recipe says."""
    name = f"training step on {device}"
    x, w, bias, e = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(_shapes()))
    ours, seeds = compiled_step(x, w, bias, e, torch.device(device))
    expected = recipe_step(x.double(), w.double(), bias.double(), e.double(), seeds)
    errors = [float((o - t).norm() / t.norm()) for o, t in zip(ours, expected, strict=True)]
    on_gpu = torch.device(device).type != "cpu"
    allowed = SUMS, *[FLIPS if on_gpu else SUMS] * 2
    apart = ", ".join(f"{what} {error:.0e}" for what, error in zip(("y", "dx", "dw"), errors, strict=True))
    tolerance = f"{SUMS:.0e}" + (f", of gradients {FLIPS:.0e}" if on_gpu else "")
    found = f"relative distance from the recipe in float64: {apart} (tolerance {tolerance})"
    if all(error <= bound for error, bound in zip(errors, allowed, strict=True)):
        return Check(name, "ok", found)
    return Check(name, "fail", found, f"Training here would not follow the recipe. {REPORT}")


def _shapes() -> tuple[tuple[int, ...], ...]:
    return (TOKENS, INS), (OUTS, INS), (OUTS,), (TOKENS, OUTS)


def compiled_step(x: Tensor, w: Tensor, bias: Tensor, e: Tensor, device: torch.device) -> tuple[list[Tensor], list[int]]:
    """([y, dx, dw] in float64 on the CPU, the seeds of the rotations of dx and dw). The random state is left as it was."""
    model = nn.Linear(INS, OUTS, device=device)
    with torch.no_grad():
        model.weight.copy_(w)
        model.bias.copy_(bias)
    leaf = x.clone().to(device).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="quartet", options={"quartet.strict": True})
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        compiled(leaf).backward(e.to(device))  # compiles
        model.weight.grad = leaf.grad = None
        torch.manual_seed(2026)
        y = compiled(leaf)
        y.backward(e.to(device))
        torch.manual_seed(2026)
        # As Inductor draws the seeds of a step; the forward pass draws nothing.
        limits = torch.iinfo(torch.int64)
        seeds = torch.randint(limits.min, limits.max, (2,), device=device).tolist()
    assert leaf.grad is not None
    assert model.weight.grad is not None
    return [t.detach().double().cpu() for t in (y, leaf.grad, model.weight.grad)], seeds


def recipe_step(x: Tensor, w: Tensor, bias: Tensor, e: Tensor, seeds: list[int]) -> list[Tensor]:
    """[y, dx, dw] of Quartet II by the rules of `reference`, everything in float64."""
    saved_x, saved_w = (reference.four_over_six(t) for t in (x, w))
    y = saved_x.dequantize(torch.float64) @ saved_w.dequantize(torch.float64).t() + bias
    dx = rotated_product(e, saved_w, INS, seeds[0])
    dw = rotated_product(e.t(), saved_x, INS, seeds[1])
    return [y, dx, dw]


def rotated_product(e: Tensor, saved: Quantized, columns: int, seed: int) -> Tensor:
    """e [M, N] times a saved matrix [N, columns], both rotated along N and rounded by MS-EDEN."""
    key = philox.seed_for_rank(seed, 0)
    values = saved.dequantize(torch.float64)[:, :columns]
    sides = []
    for operand, stream in ((e, philox.STREAM_GRADIENT), (values.t(), philox.STREAM_SAVED)):
        rotated = reference.rotate(operand, philox.rotation_signs(key))
        uniforms = philox.uniforms(key, operand.shape[0], ceil_to(operand.shape[1], ROTATION) // GROUP, stream)
        sides.append(reference.ms_eden(rotated, uniforms).dequantize(torch.float64))
    return sides[0] @ sides[1].t() / ROTATION
