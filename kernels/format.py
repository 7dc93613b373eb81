"""The NVFP4 storage format: what the bytes of a quantized matrix mean.

A matrix is stored as three tensors. ``codes`` hold one E2M1 nibble an element, two to a byte, the even element in the low nibble;
``scales`` hold one E4M3 number for each *group* of 16 elements along the contraction dimension (the last one); ``tensor_scale`` is one
float32. The value of an element is ``code * scale * tensor_scale``. This is the only file that knows the layout: rules (`reference`),
operators (`ops`) and kernels build on it.

Sources: PTX ISA, "Alternate floating point data formats" (e2m1, e4m3) and "Packed formats"; cuBLAS, "1D block scaling factors layout"
for the tiled layout of the scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 16
"""Elements that share one E4M3 scale."""

ROTATION = 128
"""Length of one randomized Hadamard block."""

E2M1_GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the codes 0 to 7; code 8 + i is minus the i-th."""

E2M1_MAX = 6.0
E4M3_MAX = 448.0


def ceil_div(n: int, divisor: int) -> int:
    """n / divisor, rounded up."""
    return -(-n // divisor)


def ceil_to(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `n`; works on symbolic integers too."""
    return (n + multiple - 1) // multiple * multiple


def pack(nibbles: Tensor) -> Tensor:
    """Two nibbles to a byte: uint8 [..., K] with values 0..15 -> uint8 [..., K/2], even elements in the low half."""
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack(codes: Tensor) -> Tensor:
    """The inverse of `pack`: uint8 [..., K/2] -> uint8 [..., K] with values 0..15."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


def decode_e2m1(nibbles: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that nibbles stand for: uint8 [...] -> `dtype` [...]. Exact in every floating dtype of 16 bits and more."""
    signed = [*E2M1_GRID, *(-v for v in E2M1_GRID)]
    return torch.tensor(signed, dtype=dtype, device=nibbles.device)[nibbles.long()]


@dataclass(frozen=True)
class Quantized:
    """A matrix in NVFP4.

    codes: uint8 [M, ceil(K/16)*8], two elements a byte.
    scales: float8_e4m3fn [M, ceil(K/16)], or [ceil(M/16), ceil(K/16)] where one scale serves a tile of 16 x 16 elements.
    tensor_scale: float32 []; NaN where the matrix held a number that is not finite.
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor

    def nibbles(self) -> Tensor:
        """uint8 [M, K], one code an element."""
        return unpack(self.codes)

    def group_scales(self, dtype: torch.dtype) -> Tensor:
        """The scales as numbers, one a row and group: `dtype` [M, K/16], tiles expanded to their rows."""
        scales = self.scales.to(dtype)
        rows = self.codes.shape[0]
        if scales.shape[0] != rows:
            scales = scales.repeat_interleave(GROUP, dim=0)[:rows]
        return scales

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``code * (scale * tensor_scale)``, computed and returned in `dtype`: [M, ceil(K/16)*16]."""
        values = decode_e2m1(self.nibbles(), dtype)
        factors = self.group_scales(dtype) * self.tensor_scale.to(dtype)
        return (values.unflatten(-1, (-1, GROUP)) * factors.unsqueeze(-1)).flatten(-2)

    def dequantize_unscaled(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """``code * scale`` without the tensor scale: at most six significant bits, so exact in bfloat16 and wider."""
        values = decode_e2m1(self.nibbles(), torch.float32)
        return (values.unflatten(-1, (-1, GROUP)) * self.group_scales(torch.float32).unsqueeze(-1)).flatten(-2).to(dtype)


SCALE_TILE_ROWS = 128
SCALE_TILE_GROUPS = 4


def swizzled_numel(rows: int, groups: int) -> int:
    """How many scales of a matrix [rows, groups * 16] there are with their padding."""
    return ceil_to(rows, SCALE_TILE_ROWS) * ceil_to(groups, SCALE_TILE_GROUPS)


def swizzle_scales(scales: Tensor) -> Tensor:
    """Scales in the order that Blackwell's tensor cores read them.

    [M, G] of any one-byte dtype -> flat [ceil(M/128)*128 * ceil(G/4)*4], zero where padded. The scale of row m and group k stands at
    ``((m // 128) * T + k // 4) * 512 + (m % 32) * 16 + (m % 128 // 32) * 4 + k % 4`` with T = ceil(G/4).
    """
    rows, groups = scales.shape
    padded_rows, padded_groups = ceil_to(rows, SCALE_TILE_ROWS), ceil_to(groups, SCALE_TILE_GROUPS)
    raw = scales.view(torch.uint8)
    raw = torch.nn.functional.pad(raw, (0, padded_groups - groups, 0, padded_rows - rows))
    tiles = raw.view(padded_rows // 128, 4, 32, padded_groups // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-1).view(scales.dtype)


def unswizzle_scales(swizzled: Tensor, rows: int, groups: int) -> Tensor:
    """The inverse of `swizzle_scales`: flat -> [rows, groups], padding dropped."""
    padded_rows, padded_groups = ceil_to(rows, SCALE_TILE_ROWS), ceil_to(groups, SCALE_TILE_GROUPS)
    raw = swizzled.view(torch.uint8).view(padded_rows // 128, padded_groups // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return raw.reshape(padded_rows, padded_groups)[:rows, :groups].contiguous().view(swizzled.dtype)
