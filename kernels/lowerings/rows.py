"""Moving rows, compiled as pointwise code, so that it is fused with what makes them and with what reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.lowering import lowerings
from torch._inductor.virtualized import V

from quartet_compile.kernels import grouped_ops  # noqa: F401  (registers the operators)
from quartet_compile.kernels.lowerings.common import aten, lowering

quartet = torch.ops.quartet


def _has_rows(x: Any) -> bool:
    return bool(V.graph.sizevars.statically_known_gt(x.get_size()[0], 0))


@lowering(quartet.take_rows.default, when=lambda x, rows: _has_rows(x))
def take_rows(x: Any, rows: Any) -> Any:
    """Row ``rows[i]`` of x, zeros for -1."""
    picked = lowerings[aten.index.Tensor](x, [lowerings[aten.clamp_min.default](rows, 0)])
    there = lowerings[aten.unsqueeze.default](lowerings[aten.ge.Scalar](rows, 0), 1)
    return lowerings[aten.where.self](there, picked, 0)
