"""The deterministic rules, four-over-six and nearest, in one pass over the matrix; also the bfloat16 values that the codes stand for.

Dividing by the tensor scale g, a power of two, moves the exponent of a group's scale and nothing else, as long as the scale is a normal
E4M3 number. Codes and values then need no g: the first pass, over the matrix, writes them, and of each group scale a byte with its exponent
relative to the largest magnitude of its *block* of groups, which it writes too. The second pass reads a byte a group and all the blocks'
magnitudes, hence knows g, and writes E4M3. It quantizes again, by the reference's steps (`forward_groups.round_groups`), where that
reasoning does not hold: the 256 groups around a scale near or in E4M3's subnormal range, and everything if g is near an end of float32 or a
number is not finite.

The first pass has two forms: `forward_words` for whole groups of bfloat16, `forward_groups` for everything else.

Bytes an element of a bfloat16 matrix: 2 read, 0.5 written for codes, 2 for values, 0.0625 for scales; the second
pass, 0.125, mostly meets the L2 cache.

The choice between four and six is the reference's, too. The first pass computes errors in a unit n of the group's, a quarter of the binade
of its maximum, instead of g: the same float32 numbers but for underflow, that is but for squares below 2^-113 n^2 (2^-126 g^2; a normal
scale makes g at most 2^6.5 n). A sum of 16 takes four additions, and a term below 2^-25 of the other one is lost in an addition: sums
from 2^-13 n^2 on are the same in both units. If both sums are smaller, each candidate is within 2^-6.5 n of each element; both candidates
are multiples of n / 32, hence equal, and so are both sums in either unit: six is chosen.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet_compile.kernels.format import E2M1_MAX, GROUP, ceil_div, ceil_to
from quartet_compile.kernels.reference import SCALE_CEILING
from quartet_compile.kernels.triton_kernels.forward_groups import load_groups, round_any_kernel, round_groups, store_codes_and_values
from quartet_compile.kernels.triton_kernels.forward_words import origin_of, round_words_kernel
from quartet_compile.kernels.triton_kernels.four_bytes import ONES, any_below, nonzero_bytes
from quartet_compile.kernels.triton_kernels.launch import EXACT, empty_packed, is_aligned, launch, on_device_of, target_of
from quartet_compile.kernels.triton_kernels.numbers import INTERPRET, bits_of, tensor_scale
from quartet_compile.kernels.triton_kernels.overlap import wait_for_first

_E2M1_MAX = tl.constexpr(E2M1_MAX)
_SMALLEST_G = tl.constexpr(2.0**-90)
_LARGEST_G = tl.constexpr(2.0**100)
_SCALE_OF_ZEROS = tl.constexpr(0x38)
"""The E4M3 byte of 1."""
_SMALLEST_SCALE = tl.constexpr(13)
"""E4M3 byte of 1.625 * 2^-6: if four's scale is not below it, neither is six's below 2^-6, the smallest normal number."""

_AT_A_TIME = tl.constexpr(256 if INTERPRET else 64)
"""Groups that are quantized again together: few, so that this rare path does not claim the registers, which the interpreter has not."""

BLOCK = 256
"""Groups of a program of the first pass, and of a magnitude that it writes."""
WORDS_OPTIONS, ANY_OPTIONS, ALIGN_OPTIONS = {"num_warps": 4}, {"num_warps": 8, "maxnreg": 168}, {"num_warps": 8, "maxnreg": 128}
"""Launch options of both forms of the first pass and of the second one. Left alone, Triton 3.8 takes 64 registers and spills; two programs
of the second one fit on a multiprocessor."""
CHUNK = 8192
"""Groups that a program of the second pass looks at together."""
ALIGNING = 2
"""Programs of the second pass on a multiprocessor."""
REPAIRED = 256
"""Groups that the second pass quantizes again if it must one of them: at most a block, at least 1/32 of a chunk."""
WIDTH = 8192
"""Magnitudes that the second pass reads together."""


# ---------------------------------------------------------------- second pass


@triton.jit
def _quantize_again(
    x, codes, scales, values, g, finite, first, groups, columns, groups_per_row,
    FOUR: tl.constexpr, CODES: tl.constexpr, VALUES: tl.constexpr, RAGGED: tl.constexpr, NATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Groups first, first + 1, ... by `round_groups`, with their values."""
    i = tl.arange(0, BLOCK)
    byte, bits, s = round_groups(load_groups(x, first, groups, columns, groups_per_row, RAGGED, BLOCK), g, FOUR, NATIVE)
    byte = tl.where(finite, byte, 0)
    tl.store(scales + first + i, tl.where(finite, bits, 0).to(tl.uint8), mask=first + i < groups)
    store_codes_and_values(codes, values, first, groups, byte, tl.where(finite, s * g, float("nan")), CODES, VALUES, BLOCK)


@triton.jit
def _load_chunk(scales, chunk, offset, groups, FOURS: tl.constexpr, CHUNK: tl.constexpr):
    """Words of provisional scales, four each; of the last word as many as there are. FOURS: that is four."""
    first = tl.cast(chunk, tl.int64) * CHUNK
    if FOURS:
        word = tl.load((scales + first).to(tl.pointer_type(tl.int32)) + offset, mask=first + offset * 4 < groups, other=0)
    else:
        word = tl.zeros(offset.shape, tl.int32)
        for k in tl.static_range(4):
            at = first + offset * 4 + k
            word |= tl.load(scales + at, mask=at < groups, other=0).to(tl.int32) << (8 * k)
    return word


@triton.jit
def _store_chunk(word, scales, chunk, offset, present, groups, FOURS: tl.constexpr, CHUNK: tl.constexpr):
    first = tl.cast(chunk, tl.int64) * CHUNK
    if FOURS:
        tl.store((scales + first).to(tl.pointer_type(tl.int32)) + offset, word, mask=(first + offset * 4 < groups) & present)
    else:
        for k in tl.static_range(4):
            at = first + offset * 4 + k
            tl.store(scales + at, (word >> (8 * k)).to(tl.uint8), mask=(at < groups) & present)


@triton.jit
def _load_magnitudes(peaks, i, present):
    """Magnitude bits of blocks; those of a bfloat16 matrix are stored as their upper halves."""
    bits = tl.load(peaks + i, mask=present, other=0).to(tl.int32)
    return bits << 16 if peaks.dtype.element_ty == tl.int16 else bits


@triton.jit
def _origins(peaks, chunk, row, blocks, CHUNK: tl.constexpr, BLOCK: tl.constexpr, REPAIRED: tl.constexpr):
    """What the provisional scales of each run of REPAIRED groups count from."""
    block = chunk * (CHUNK // BLOCK) + row // (BLOCK // REPAIRED)
    return origin_of(_load_magnitudes(peaks, block, block < blocks))


@triton.jit
def align_scales_kernel(
    x, codes, scales, values, peaks, out_tensor_scale, groups, columns, groups_per_row,
    CEILING: tl.constexpr, FOUR: tl.constexpr, CODES: tl.constexpr, VALUES: tl.constexpr, RAGGED: tl.constexpr, NATIVE: tl.constexpr,
    EARLY: tl.constexpr, FOURS: tl.constexpr,
    BLOCK: tl.constexpr, REPAIRED: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Provisional scales -> E4M3 in place, and the tensor scale; groups whose codes may depend on g are quantized again.

    Any number of programs, each reads all of `peaks`, WIDTH at a time. values: int16. Four scales are a word: they have one origin, and
    where each is a normal number, adding what brings them to E4M3 carries nothing from one to the next.
    """
    tl.static_assert(BLOCK % REPAIRED == 0)
    wait_for_first(EARLY)
    row = tl.arange(0, CHUNK // REPAIRED)
    offset = row[:, None] * (REPAIRED // 4) + tl.arange(0, REPAIRED // 4)[None, :]
    start = tl.program_id(0)
    blocks = tl.cdiv(groups, BLOCK)
    following = _load_chunk(scales, start, offset, groups, FOURS, CHUNK)  # always a turn ahead, as are their origins
    following_origins = _origins(peaks, start, row, blocks, CHUNK, BLOCK, REPAIRED)
    whole = blocks // 16 * 16  # as many as can be loaded four at a time
    rest = whole + tl.arange(0, 16)
    largest = tl.zeros((WIDTH,), tl.int32) + tl.max(_load_magnitudes(peaks, rest, rest < blocks), 0)
    for first_peak in range(0, whole, WIDTH):
        i = first_peak + tl.arange(0, WIDTH)
        largest = tl.maximum(largest, _load_magnitudes(peaks, i, i < whole))
    g, finite = tensor_scale(tl.max(largest, 0), CEILING, _E2M1_MAX)
    if start == 0:
        tl.store(out_tensor_scale, tl.where(finite, g, float("nan")))
    everything = ((g < _SMALLEST_G) | (g > _LARGEST_G) | (finite == 0)).to(tl.int32)
    g_origin = ((bits_of(g) >> 23) - 7) * 8
    for chunk in range(start, tl.cdiv(groups, CHUNK), tl.num_programs(0)):
        provisional, added = following, following_origins - g_origin
        following = _load_chunk(scales, chunk + tl.num_programs(0), offset, groups, FOURS, CHUNK)
        following_origins = _origins(peaks, chunk + tl.num_programs(0), row, blocks, CHUNK, BLOCK, REPAIRED)
        limit = -added + _SMALLEST_SCALE
        small = any_below(provisional, limit[:, None]) != 0
        again = tl.max(small.to(tl.int32), 1) | everything
        nonzero = nonzero_bytes(provisional)
        word = provisional + nonzero * added[:, None] + (ONES - nonzero) * _SCALE_OF_ZEROS
        _store_chunk(word, scales, chunk, offset, (again == 0)[:, None], groups, FOURS, CHUNK)
        marked = tl.sum(again.to(tl.int64) << row, 0)
        if marked != 0:
            first = tl.cast(chunk, tl.int64) * CHUNK
            for r in range(CHUNK // REPAIRED):
                if (marked >> r) & 1:
                    for part in range(REPAIRED // _AT_A_TIME):
                        _quantize_again(
                            x, codes, scales, values, g, finite, first + r * REPAIRED + part * _AT_A_TIME, groups, columns, groups_per_row,
                            FOUR, CODES, VALUES, RAGGED, NATIVE, _AT_A_TIME,
                        )  # fmt: skip


# ---------------------------------------------------------------- launches


def _quantize(x: Tensor, rule: str, with_codes: bool, with_values: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and values are empty where not asked for."""
    if rule not in ("four_over_six", "nearest"):
        raise ValueError(f"no deterministic rule {rule!r}")
    x = x.contiguous()
    rows, columns = x.shape
    codes, scales, g = empty_packed(x, rows, ceil_to(columns, GROUP), with_codes)
    values = torch.empty((rows, ceil_to(columns, GROUP)) if with_values else (0,), dtype=torch.bfloat16, device=x.device)
    groups = scales.numel()
    if groups == 0:
        return codes, scales, g.fill_(1.0), values
    target = target_of(x)
    raw_scales, raw_values = scales.view(torch.uint8), values.view(torch.int16)
    in_words = x.dtype == torch.bfloat16 and columns % GROUP == 0 and is_aligned(x)
    blocks = ceil_div(groups, BLOCK)
    peaks = torch.empty(blocks, dtype=torch.int16 if in_words else torch.int32, device=x.device)
    forms = {"FOUR": rule == "four_over_six", "CODES": with_codes, "VALUES": with_values, "EARLY": target.early, "BLOCK": BLOCK}
    shape = (groups, columns, scales.shape[1])
    shape_forms = {"RAGGED": columns % GROUP != 0, "NATIVE": target.native}
    with on_device_of(x):
        if in_words:
            words = (x.view(torch.int32), codes.view(torch.int32), raw_scales, values.view(torch.int32))
            native = target.native and not with_values
            forms_of_words = {**forms, "NATIVE": native, "XORSIGN": target.capability > 80}
            launch(round_words_kernel, blocks, *words, peaks, groups, **forms_of_words, **WORDS_OPTIONS, **EXACT)
        else:
            forms |= shape_forms
            launch(round_any_kernel, blocks, x, codes, raw_scales, raw_values, peaks, *shape, **forms, **ANY_OPTIONS, **EXACT)
        launch(
            align_scales_kernel, min(ceil_div(groups, CHUNK), ALIGNING * target.processors),
            x, codes, raw_scales, raw_values, peaks, g, *shape,
            CEILING=SCALE_CEILING[rule], FOURS=groups % 4 == 0, REPAIRED=REPAIRED, CHUNK=CHUNK, WIDTH=WIDTH,
            **forms | shape_forms, **ALIGN_OPTIONS, **EXACT, launch_pdl=target.early,
        )  # fmt: skip
    return codes, scales, g, values


def quantize(x: Tensor, rule: str) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the rows of x [M, K], "four_over_six" or "nearest": packed [M, ceil(K/16)*16]. ValueError for any other rule."""
    return _quantize(x, rule, True, False)[:3]


def quantize_with_values(x: Tensor, rule: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `quantize` returns, and the values bfloat16 [M, ceil(K/16)*16] that it stands for."""
    return _quantize(x, rule, True, True)


def quantize_values(x: Tensor, rule: str) -> Tensor:
    """The values alone: bfloat16 [M, ceil(K/16)*16]."""
    return _quantize(x, rule, False, True)[3]
