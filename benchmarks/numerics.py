"""The quantizers' acceptance numbers, measured and printed beside the expected ones.

    python benchmarks/numerics.py            8.4 million elements, up to 256 draws: about two minutes on two cores
    python benchmarks/numerics.py --quick    1 million elements, up to 16 draws

First table: mean squared error and lost gain (1 - <q, x> / <x, x>) of every rule on N(0, 1) in float64. The expected figures come from a
float64 model of the paper's code. Second table: dW of one linear with T = 512, I = O = 256, quantized backward against the exact gradient
at the quantized point, ||mean of B draws - G||^2 / ||G||^2: it must fall as 1/B, which is what an unbiased backward pass means.
Exits with 1 if a figure is out of tolerance (MSE 1%, gain 4 standard errors and 1e-4 for the rounding of the listed value, dW 5%).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from quartet_compile.kernels import ops, philox, reference  # noqa: F401  (ops registers torch.ops.quartet)
from quartet_compile.kernels.format import Quantized

quartet = torch.ops.quartet


def rotated(x: Tensor) -> Tensor:
    """x under an orthogonal randomized Hadamard transform."""
    return reference.rotate(x, philox.rotation_signs(11)) / 128**0.5


def group_uniforms(x: Tensor) -> Tensor:
    return torch.rand(x.shape[0], x.shape[1] // 16, dtype=x.dtype)


# name, rule, expected MSE x 1e-3, expected 1 - gain
RULES: list[tuple[str, Callable[[Tensor], Quantized], float, float]] = [
    ("RTN 1x16", lambda x: reference.round_to_nearest(x), 9.045, 0.0046),
    ("4/6 1x16", lambda x: reference.four_over_six(x), 7.562, 0.0034),
    ("RTN 16x16", lambda x: reference.round_to_nearest(x, tile=(16, 16)), 12.436, 0.0091),
    ("4/6 16x16", lambda x: reference.four_over_six(x, tile=(16, 16)), 12.424, 0.0089),
    ("SR (17/16)", lambda x: reference.stochastic_round(x, torch.rand_like(x)), 23.549, 0.0),
    ("RHT + SR", lambda x: reference.stochastic_round(rotated(x), torch.rand_like(x)), 23.52, 0.0),
    ("MS-EDEN, paper's form", lambda x: reference.ms_eden(rotated(x), group_uniforms(x), form="paper"), 9.739, 0.00057),
    ("MS-EDEN, post hoc (quartet2)", lambda x: reference.ms_eden(rotated(x), group_uniforms(x)), 9.328, 0.0),
]
ROTATED = ("RHT + SR", "MS-EDEN, paper's form", "MS-EDEN, post hoc (quartet2)")

DRAWS = {1: 1.90e-2, 4: 4.75e-3, 16: 1.19e-3, 64: 2.97e-4, 256: 7.4e-5}


def rules_table(elements: int) -> bool:
    """Print MSE and lost gain of every rule; True if all are within tolerance."""
    print(f"{elements:,} elements of N(0, 1) in float64")
    x = torch.randn(elements // 1024, 1024, dtype=torch.float64)
    print(f"{'rule':30s} {'MSE x1e-3':>10s} {'expected':>9s} {'1 - gain':>10s} {'expected':>9s}")
    fine = True
    for name, rule, expected_mse, expected_gain in RULES:
        target = rotated(x) if name in ROTATED else x
        q = rule(x).dequantize(torch.float64)
        mse = float(((q - target) ** 2).mean() * 1e3)
        gain = float((q * target).mean() / (target * target).mean())
        # the error of <q, x> is that of independent roundings; the listed gains are rounded to the last digit shown
        tolerance = 4 * (mse * 1e-3 / elements) ** 0.5 + (2e-4 if name.startswith("MS-EDEN, post") else 1e-4)
        ok = abs(mse / expected_mse - 1) < 0.01 and abs(1 - gain - expected_gain) < tolerance
        fine &= ok
        print(f"{name:30s} {mse:10.3f} {expected_mse:9.3f} {1 - gain:10.5f} {expected_gain:9.5f}   {'ok' if ok else 'OUT OF TOLERANCE'}")
    return fine


def gradient_table(largest: int) -> bool:
    """Print how the mean of B quantized weight gradients approaches the gradient at the quantized point; True if within tolerance."""
    tokens, features = 512, 256
    x, e = torch.randn(tokens, features), torch.randn(tokens, features)
    packed = quartet.quantize(x, "four_over_six")
    exact = e.double().t() @ Quantized(*packed).dequantize(torch.float64)
    print(f"\n{'draws':>6s} {'||mean - G||^2 / ||G||^2':>25s} {'expected':>9s}   (dW, T = {tokens}, I = O = {features}, quartet2)")
    fine, total, done = True, torch.zeros_like(exact), 0
    for draws, expected in DRAWS.items():
        if draws > largest:
            break
        while done < draws:
            seeds = torch.randint(-(2**63), 2**63 - 1, (1,))
            left = quartet.quantize_grad(e, seeds, 0, "ms_eden", True)
            right = quartet.requantize(*packed, features, seeds, 0, "ms_eden")
            total += quartet.matmul(*left, *right, None, 1 / 128, torch.float32)
            done += 1
        error = float((total / done - exact).norm() ** 2 / exact.norm() ** 2)
        ok = abs(error / expected - 1) < 0.05
        fine &= ok
        print(f"{draws:6d} {error:25.3e} {expected:9.2e}   {'ok' if ok else 'OUT OF TOLERANCE'}")
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute's worth")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    fine = rules_table(2**20 if arguments.quick else 2**23)
    fine &= gradient_table(16 if arguments.quick else 256)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
