"""Random numbers of the backward pass: Philox4x32-10, counted by position, so that every device draws the same.

The key is a 64-bit seed; the counter tells the place in the operand as the model sees it, before any padding, and the stream. A number
therefore depends on where it is used and on nothing else: not on the tile shape of a kernel, the number of threads or the device.

A call gives four words. They are the draws of four groups: groups k and k + 4 of a block of eight (128 elements), at rows r and r + 8 of a
block of sixteen. Those are the groups that one thread holds behind a tensor core of any GPU before sm_100: it makes one call for four.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), with its constants.
"""

from __future__ import annotations

import torch
from torch import Tensor

STREAM_SIGNS = 0
"""Signs of the randomized Hadamard transform."""
STREAM_GRADIENT = 1
"""Rounding of the gradient operand of a product."""
STREAM_SAVED = 2
"""Rounding of the other operand, requantized from what the forward pass saved."""

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
KEY_STEP_0, KEY_STEP_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
RANK_STEP = 0x9E3779B97F4A7C15
"""Odd constant by which the seeds of neighbouring ranks differ (the 64-bit golden ratio)."""

_M32 = 0xFFFFFFFF


def seed_for_rank(seed: int, rank: int) -> int:
    """Mix a process's rank into a seed, as an unsigned 64-bit number: equal seeds on all ranks still give independent noise."""
    return (seed + rank * RANK_STEP) & 0xFFFFFFFFFFFFFFFF


def _mulhilo(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit numbers held in int64; the signed 64-bit product wraps, its bits are right."""
    product = a * b
    return (product >> 32) & _M32, product & _M32


def philox(seed: int, c0: Tensor, c1: Tensor, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words at counter ``(c0, c1, stream, 0)``, as int64 tensors of the broadcast shape of `c0` and `c1`."""
    c0, c1 = torch.broadcast_tensors(c0.long(), c1.long())
    c2, c3 = torch.full_like(c0, stream), torch.zeros_like(c0)
    k0, k1 = seed & _M32, (seed >> 32) & _M32
    for _ in range(ROUNDS):
        hi0, lo0 = _mulhilo(c0, MULTIPLIER_0)
        hi1, lo1 = _mulhilo(c2, MULTIPLIER_1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + KEY_STEP_0) & _M32, (k1 + KEY_STEP_1) & _M32
    return c0, c1, c2, c3


def uniforms(seed: int, rows: int, groups: int, stream: int, device: torch.device | str = "cpu") -> Tensor:
    """One number in [0, 1) for each group: float32 [rows, groups], multiples of 2^-24."""
    row = torch.arange(rows, device=device).unsqueeze(1)
    group = torch.arange(groups, device=device).unsqueeze(0)
    words = torch.stack(philox(seed, group // 8 * 4 + group % 4, row & ~8, stream))
    mine = (row // 8 % 2) * 2 + group // 4 % 2
    return (words.gather(0, mine.unsqueeze(0))[0] >> 8).float() * 2.0**-24


def rotation_signs(seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The signs of one rotation: float32 [128] of +1 and -1, bit j of the 128 bits at counter (0, 0, 0, 0), a set bit meaning -1."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = torch.stack(philox(seed, zero, zero, STREAM_SIGNS))
    bits = (words.unsqueeze(-1) >> torch.arange(32, device=device)) & 1
    return 1.0 - 2.0 * bits.flatten().float()
