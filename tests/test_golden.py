"""The reference reproduces the paper's own code, run on a CPU (tests/golden/README.md): codes, scales, tensor scales and whole layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from quartet_compile.kernels import reference
from quartet_compile.kernels.format import Quantized

GOLDEN = Path(__file__).parent / "golden"
TENSORS = sorted(p.stem for p in GOLDEN.glob("*.npz") if not p.stem.startswith("linear"))
LAYERS = sorted(p.stem for p in GOLDEN.glob("linear_*.npz"))

# The paper's code squares raw float32 errors, which under- or overflow in these files and lose the four-over-six choice.
RAW_ERRORS = ("huge_64x128", "tiny_64x128", "heavy_256x128")

RULES = {
    "rtn": (reference.round_to_nearest, (1, 16)),
    "rtn16x16": (reference.round_to_nearest, (16, 16)),
    "foursix": (reference.four_over_six, (1, 16)),
    "foursix16x16": (reference.four_over_six, (16, 16)),
}


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def as_tensor(array: np.ndarray) -> Tensor:
    """A golden array as float32; uint16 arrays hold bfloat16 bits."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.astype(np.int32) << 16).view(torch.float32)
    return torch.from_numpy(array)


def assert_same_codes(q: Quantized, expected: np.ndarray, x: Tensor) -> None:
    """Equal magnitudes everywhere, equal signs where the golden code is not zero (it stores +0 for all zeros)."""
    ours, golden = q.nibbles()[:, : x.shape[1]], torch.from_numpy(expected)
    assert torch.equal(ours & 7, golden & 7)
    nonzero = (golden & 7) != 0
    assert torch.equal(ours[nonzero] >> 3, golden[nonzero] >> 3)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("rule", RULES)
def test_deterministic_rules_match_the_papers_code_exactly(name: str, rule: str) -> None:
    data = load(name)
    x = as_tensor(data["x"])
    function, tile = RULES[rule]
    options = {"error": "raw"} if "foursix" in rule and name in RAW_ERRORS else {}
    q = function(x, tile=tile, ties="away", tensor_scale="exact", **options)
    assert_same_codes(q, data[f"{rule}_codes"], x)
    assert torch.equal(q.scales.view(torch.uint8), torch.from_numpy(data[f"{rule}_scales_e4m3"]))
    assert q.tensor_scale.item() == data[f"{rule}_global"].item()
    if f"{rule}_dq" in data:
        expected = as_tensor(data[f"{rule}_dq"])
        values = q.dequantize()[:, : x.shape[1]]
        if data["x"].dtype == np.uint16:
            values = values.bfloat16().float()
        assert torch.equal(values, expected)


@pytest.mark.parametrize("name", [n for n in TENSORS if "sr_u" in load(n)])
def test_stochastic_rounding_with_injected_uniforms(name: str) -> None:
    data = load(name)
    x = as_tensor(data["x"])
    q = reference.stochastic_round(x, as_tensor(data["sr_u"]), tensor_scale="exact")
    torch.testing.assert_close(q.dequantize()[:, : x.shape[1]], as_tensor(data["sr_dq"]), rtol=0, atol=0)


def round_scales_independently(corrected: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Stochastic rounding to E4M3 by looking both neighbours up in the sorted list of its numbers, float64."""
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    lo = np.searchsorted(grid, corrected.astype(np.float64), side="right") - 1
    low, high = grid[lo], grid[np.minimum(lo + 1, 126)]
    return np.where(u < (corrected - low) / np.maximum(high - low, 1e-30), high, low)


@pytest.mark.parametrize("name", [n for n in TENSORS if "eden_codes" in load(n)])
def test_ms_eden_in_the_papers_form(name: str) -> None:
    data = load(name)
    x = as_tensor(data["x"])
    rotated = reference.rotate(x, torch.from_numpy(data["eden_signs"])) / 128**0.5
    u = data["eden_u"].reshape(x.shape[0], -1)
    q = reference.ms_eden(rotated, torch.from_numpy(u), form="paper")
    # The float32 rotation differs by ulps between a BLAS and butterflies, so a code at a tie and a scale at its threshold may move.
    assert torch.isclose(q.tensor_scale, torch.tensor(data["eden_global"].item()), rtol=1e-6)
    differs = (q.nibbles() & 7) != (torch.from_numpy(data["eden_codes"]) & 7)
    expected_scales = round_scales_independently(data["eden_scales_corrected_f32"], u)
    moved = differs.unflatten(1, (-1, 16)).any(-1) | (torch.from_numpy(expected_scales) != q.scales.double())
    assert moved.sum() <= 2, f"{int(moved.sum())} of {moved.numel()} groups moved"
    if "eden_dq_rot" in data:
        same = ~moved.repeat_interleave(16, dim=1)
        torch.testing.assert_close(q.dequantize()[same], as_tensor(data["eden_dq_rot"])[same], rtol=1e-5, atol=0)


def emulate_layer(scheme: str, data: dict[str, np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx, dw of one linear under a published recipe, from the reference's rules and the golden randomness."""
    x, w, dy = (as_tensor(data[k]) for k in ("x", "w", "dy"))
    signs = torch.from_numpy(data["signs"])
    exact = {"tensor_scale": "exact"}
    nearest = {**exact, "ties": "away"}

    def rotated(t: Tensor) -> Tensor:
        return reference.rotate(t, signs) / signs.shape[0] ** 0.5

    def eden(t: Tensor) -> Tensor:
        u = torch.from_numpy(data["u_group"])[: t.numel() // 16].view(t.shape[0], -1)
        return reference.ms_eden(rotated(t), u, form="paper").dequantize()

    def sr(t: Tensor) -> Tensor:
        u = torch.from_numpy(data["u_elem"])[: t.numel()].view(t.shape)
        return reference.stochastic_round(t, u, **exact).dequantize()

    if scheme == "quartet2":
        xq, wq = (reference.four_over_six(t, **nearest).dequantize() for t in (x, w))
        return xq @ wq.t(), eden(dy) @ eden(wq.t()).t(), eden(dy.t()) @ eden(xq.t()).t()
    if scheme == "tetrajet2":
        xq, wq = (reference.round_to_nearest(t, **nearest).dequantize() for t in (x, w))
        return xq @ wq.t(), sr(rotated(dy)) @ sr(rotated(wq.t())).t(), sr(rotated(dy.t())) @ sr(rotated(xq.t())).t()
    forward = reference.four_over_six if scheme == "nvidia46" else reference.round_to_nearest
    xq = forward(x, **nearest).dequantize()
    wq = forward(w, tile=(16, 16), **nearest).dequantize()
    wgrad_x = reference.round_to_nearest(rotated(x.t()), **nearest).dequantize()
    return xq @ wq.t(), sr(dy) @ wq, sr(rotated(dy.t())) @ wgrad_x.t()


@pytest.mark.parametrize("name", LAYERS)
def test_whole_layers(name: str) -> None:
    data = load(name)
    for ours, key in zip(emulate_layer(name.split("_")[1], data), ("y", "dx", "dw"), strict=True):
        expected = as_tensor(data[key])
        assert (ours - expected).norm() / expected.norm() < 1e-5, key
