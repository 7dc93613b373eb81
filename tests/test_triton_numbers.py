"""What the Triton kernels are made of: roundings, four bytes of a word and random numbers, against `reference` and `philox`."""

from __future__ import annotations

import math

import pytest
import torch
from triton_support import SEEDS, on_devices, seeds_on

from quartet_compile.kernels import philox, reference

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from quartet_compile.kernels.triton_kernels import four_bytes, launch, numbers, random  # noqa: E402


@triton.jit
def _round_kernel(x, uniforms, nibbles, values, nearest, nearest_values, stochastic, n, NATIVE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + at, mask=at < n, other=0.0)
    byte, value, _ = numbers.e2m1_pair(y, tl.zeros((BLOCK,), tl.float32), NATIVE)
    tl.store(nibbles + at, byte.to(tl.uint8), mask=at < n)
    tl.store(values + at, value, mask=at < n)
    bits, value = numbers.e4m3_nearest(tl.abs(y))
    tl.store(nearest + at, bits.to(tl.uint8), mask=at < n)
    tl.store(nearest_values + at, value, mask=at < n)
    u = tl.load(uniforms + at, mask=at < n, other=0.0)
    tl.store(stochastic + at, numbers.e4m3_stochastic(tl.minimum(tl.abs(y), 448.0), u).to(tl.uint8), mask=at < n)


@on_devices
def test_rounding_of_every_float16_and_every_midpoint(device):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    midpoints = torch.cat((grid, (grid[1:] + grid[:-1]) / 2, torch.tensor((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 1e-45, 3e38))))
    midpoints = torch.cat((midpoints, midpoints.nextafter(torch.tensor(0.0)), midpoints.nextafter(torch.tensor(math.inf))))
    x = torch.cat((x[x.isfinite()], midpoints, -midpoints))
    u = torch.randint(0, 2**24, x.shape, generator=torch.Generator().manual_seed(1)).float() * 2.0**-24
    u[::7] = 0
    nibbles, nearest, stochastic = (torch.empty(x.shape, dtype=torch.uint8, device=device) for _ in range(3))
    values, nearest_values = torch.empty_like(x, device=device), torch.empty_like(x, device=device)
    native = launch.target_of(nibbles).native
    _round_kernel[(triton.cdiv(x.numel(), 1024),)](
        x.to(device), u.to(device), nibbles, values, nearest, nearest_values, stochastic, x.numel(), native, 1024
    )
    magnitude = reference.round_e2m1(x.abs())
    expected = torch.copysign(magnitude, x)
    assert torch.equal(values.cpu().view(torch.int32), expected.view(torch.int32))
    codes = torch.searchsorted(torch.tensor((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)), magnitude).to(torch.uint8)
    assert torch.equal(nibbles.cpu(), codes | (x.signbit().to(torch.uint8) << 3))
    expected = reference.round_e4m3(x.abs())
    assert torch.equal(nearest_values.cpu(), expected)
    assert torch.equal(nearest.cpu(), expected.to(torch.float8_e4m3fn).view(torch.uint8))
    expected = reference.round_e4m3_stochastic(x.abs().clamp(max=448), u)
    assert torch.equal(stochastic.cpu(), expected.to(torch.float8_e4m3fn).view(torch.uint8))


@triton.jit(do_not_specialize=["index", "rank"])
def _random_kernel(seeds, index, rank, out, signs, FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    seed = random.seed_of_rank(seeds, index, rank)
    row = tl.arange(0, ROWS)
    at = row[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out + at, random.uniforms_of_groups(seed, FIRST, row, BLOCK, random.STREAM_SAVED))
    j = tl.arange(0, 128)
    tl.store(signs + j, random.rotation_sign_bits(seed, j))


@on_devices
@pytest.mark.parametrize("index", range(len(SEEDS)))
@pytest.mark.parametrize("rank", [0, 1, 7])
def test_random_numbers(device, index, rank):
    out, signs = torch.empty(32, 8, device=device), torch.empty(128, dtype=torch.int32, device=device)
    _random_kernel[(1,)](seeds_on(device), index, rank, out, signs, 96, 32, 2)
    seed = philox.seed_for_rank(SEEDS[index], rank)
    assert torch.equal(out.cpu(), philox.uniforms(seed, 128, 24, philox.STREAM_SAVED)[96:, 16:])
    assert torch.equal(1.0 - 2.0 * signs.cpu().float(), philox.rotation_signs(seed))


@triton.jit
def _four_bytes_kernel(words, limits, nonzero, below, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    word, limit = tl.load(words + at), tl.load(limits + at)
    tl.store(nonzero + at, four_bytes.nonzero_bytes(word))
    tl.store(below + at, four_bytes.any_below(word, limit))


@on_devices
def test_four_bytes_of_a_word_are_four_numbers(device):
    """Random bytes, many of them 0, 1, 127, 128 or 255, against limits in and outside their range, byte by byte."""
    generator = torch.Generator().manual_seed(0)
    bytes_ = torch.randint(0, 256, (4096, 4), generator=generator)
    special = torch.tensor([0, 0, 1, 127, 128, 255])[torch.randint(0, 6, (4096, 4), generator=generator)]
    bytes_ = torch.where(torch.rand(4096, 4, generator=generator) < 0.6, special, bytes_)
    limits = torch.randint(-300, 560, (4096,), generator=generator, dtype=torch.int32)
    limits[:8] = torch.tensor([-(2**30), -1, 0, 1, 255, 256, 257, 2**30])
    words = bytes_.to(torch.uint8).view(torch.int32).flatten()
    nonzero, below = torch.empty_like(words).to(device), torch.empty_like(words).to(device)
    _four_bytes_kernel[(1,)](words.to(device), limits.to(device), nonzero, below, 4096)
    assert torch.equal(nonzero.cpu().view(torch.uint8).reshape(4096, 4), (bytes_ != 0).to(torch.uint8))
    assert torch.equal(below.cpu() != 0, ((bytes_ != 0) & (bytes_ < limits[:, None])).any(1))
