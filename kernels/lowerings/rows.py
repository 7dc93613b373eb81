"""Moving rows, compiled as pointwise code, so that it is fused with what makes them and with what reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.lowering import lowerings
from torch.fx.experimental.symbolic_shapes import statically_known_true

from quartet_compile.kernels import grouped_ops  # noqa: F401  (registers the operators)
from quartet_compile.kernels.lowerings.common import aten, lowering

quartet = torch.ops.quartet


@lowering(quartet.take_rows.default, when=lambda x, rows: statically_known_true(x.get_size()[0] > 0))
def take_rows(x: Any, rows: Any) -> Any:
    """Row ``rows[i]`` of x, zeros for -1."""
    picked = lowerings[aten.index.Tensor](x, [lowerings[aten.clamp_min.default](rows, 0)])
    there = lowerings[aten.unsqueeze.default](lowerings[aten.ge.Scalar](rows, 0), 1)
    return lowerings[aten.where.self](there, picked, lowerings[aten.full_like.default](picked, 0))
