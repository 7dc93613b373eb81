"""What became of every linear, as data and as text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartet_compile.passes.place import LeftBecause


@dataclass(frozen=True)
class LinearReport:
    """One linear.

    name: in the model, or in the graph if no model is known. also: others that the same graph serves, such as the same linear of other
    layers, where blocks are compiled one by one or a graph break lies before them. shape: (T, I, O): tokens, in and out features; tokens
    of this example if dynamic, 0 if they depend on data. recipe: by name, "bf16" if left alone. decided_by: which rule chose it. products:
    those that were rewritten, of "y", "dx", "dw". reason, left_because: why it was left alone, and which class of reason that is.
    saved_before, saved_after: bytes kept for the backward pass for its input, 0 where another linear already keeps the same input;
    checkpointing is not counted here, only in the totals. weight_bytes: the packed weight that is kept on top of the parameter. flops: of
    its products, rewritten or not, 2 T I O each.
    """

    name: str
    source: str
    shape: tuple[int, int, int] | None
    recipe: str
    decided_by: str
    products: tuple[str, ...] = ()
    reason: str = ""
    left_because: LeftBecause | None = None
    saved_before: int = 0
    saved_after: int = 0
    weight_bytes: int = 0
    also: tuple[str, ...] = ()
    flops: int = 0

    @property
    def flops_in_nvfp4(self) -> int:
        """Of those products that were rewritten."""
        return 2 * math.prod(self.shape) * len(self.products) if self.shape else 0

    @property
    def names(self) -> tuple[str, ...]:
        """Of all linears that this one stands for."""
        return self.name, *self.also


@dataclass(frozen=True)
class GraphReport:
    """One captured graph: its linears, what its forward keeps for its backward in bytes (activations, and tensors made of parameters),
    before and after rewriting, both rewritten graphs as Python source (backward is empty in inference), and the floating point operations
    of all products in both, those of no linear included."""

    linears: tuple[LinearReport, ...]
    activations_before: int
    activations_after: int
    weights_before: int
    weights_after: int
    forward: str
    backward: str
    flops: int

    @property
    def modules(self) -> int:
        """How many modules of the model it serves, as far as its linears tell."""
        return max((len(linear.names) for linear in self.linears), default=1)


@dataclass(frozen=True)
class Report:
    """All graphs of a model. `print(report)` shows a table; `to_dict` and `write_graphs` give the rest.

    not_captured: names of nn.Linear modules, and of other parameters with two or more dimensions that are no embedding, that no captured
    graph contained: code that is never called or that Dynamo left to eager PyTorch. unmatched: (option, glob) of the options that matched
    no linear in any graph.
    """

    graphs: tuple[GraphReport, ...]
    not_captured: tuple[str, ...] = ()
    unmatched: tuple[tuple[str, str], ...] = ()

    @property
    def linears(self) -> tuple[LinearReport, ...]:
        """The linears of all graphs, in order."""
        return tuple(linear for graph in self.graphs for linear in graph.linears)

    @property
    def rewritten(self) -> tuple[LinearReport, ...]:
        """Those of which a product was rewritten."""
        return tuple(linear for linear in self.linears if linear.products)

    @property
    def flops(self) -> int:
        """Of all products: each graph is run once for each module that it serves. So are bytes counted."""
        return self._total("flops")

    @property
    def flops_in_nvfp4(self) -> int:
        """Of the products that were rewritten."""
        return sum(graph.modules * linear.flops_in_nvfp4 for graph in self.graphs for linear in graph.linears)

    @property
    def flops_of_others(self) -> int:
        """Of the other products than those of linears: of two activations, as in attention, or in a form that is not rewritten."""
        return self.flops - sum(graph.modules * linear.flops for graph in self.graphs for linear in graph.linears)

    @property
    def saved_bytes_before(self) -> int:
        """Bytes of activations that the unchanged graphs keep for the backward pass."""
        return self._total("activations_before")

    @property
    def saved_bytes_after(self) -> int:
        """Bytes of activations that the rewritten graphs keep for the backward pass; packed weights are not among them."""
        return self._total("activations_after")

    @property
    def weight_bytes_before(self) -> int:
        """Bytes of tensors made from parameters, such as their casts under autocast, that the unchanged graphs keep beside them."""
        return self._total("weights_before")

    @property
    def weight_bytes_after(self) -> int:
        """The same for the rewritten graphs: mostly packed weights."""
        return self._total("weights_after")

    def _total(self, what: str) -> int:
        return sum(graph.modules * getattr(graph, what) for graph in self.graphs)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the source of the graphs, as plain data."""
        data = dataclasses.asdict(self)
        for graph in data["graphs"]:
            del graph["forward"], graph["backward"]
        bytes_kept = ("saved_bytes_before", "saved_bytes_after", "weight_bytes_before", "weight_bytes_after")
        totals = ("flops", "flops_in_nvfp4", "flops_of_others", *bytes_kept)
        return data | {name: getattr(self, name) for name in totals}

    def write_graphs(self, folder: str | Path) -> list[Path]:
        """Write the rewritten graphs as readable Python, graph0_forward.py, graph0_backward.py, ..., and return their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for i, graph in enumerate(self.graphs):
            for name, source in (("forward", graph.forward), ("backward", graph.backward)):
                if source:
                    path = folder / f"graph{i}_{name}.py"
                    path.write_text(source)
                    written.append(path)
        return written

    def __str__(self) -> str:
        rewritten, found = (sum(len(linear.names) for linear in some) for some in (self.rewritten, self.linears))
        lines = [f"quartet: {rewritten} of {found} linears in NVFP4, {len(self.graphs)} graph(s)", ""]
        header = ("linear", "source", "T x I -> O", "recipe", "decided by", "rewritten", "input saved")
        lines += _table([header, *(_row(linear) for linear in self.linears)])
        for linear in self.linears:
            if not linear.products:
                lines.append(f"  left: {linear.name}: {linear.reason} [{linear.left_because}]")
        lines += [f"  not found: no product in a captured graph belongs to {name}" for name in self.not_captured]
        lines += [f"  {option}: {glob!r} matches no linear" for option, glob in self.unmatched]
        lines.append("")
        if self.flops:
            ours, others = self.flops_in_nvfp4 / self.flops, self.flops_of_others / self.flops
            lines.append(
                f"floating point operations of products: {_scaled(self.flops)}, {ours:.1%} in NVFP4, "
                f"{1 - ours - others:.1%} of linears left, {others:.1%} of others (attention)"
            )
        lines.append(
            f"kept for the backward pass: activations {_bytes(self.saved_bytes_before)} -> {_bytes(self.saved_bytes_after)}, "
            f"weights beside the parameters {_bytes(self.weight_bytes_before)} -> {_bytes(self.weight_bytes_after)}"
        )
        return "\n".join(lines)


def _row(linear: LinearReport) -> tuple[str, ...]:
    shape = "" if linear.shape is None else f"{linear.shape[0]} x {linear.shape[1]} -> {linear.shape[2]}"
    saved = ""
    if linear.saved_before or linear.saved_after:
        saved = f"{_bytes(linear.saved_before)} -> {_bytes(linear.saved_after)}"
    elif "dw" in linear.products:
        saved = "shared"
    name = f"{linear.name} (and {len(linear.also)} more)" if linear.also else linear.name
    return name, linear.source, shape, linear.recipe, linear.decided_by, " ".join(linear.products) or "-", saved


def _bytes(n: int) -> str:
    return f"{n} B" if n < 1024 else f"{n / 1024:.1f} KiB" if n < 1024**2 else f"{n / 1024**2:.1f} MiB"


def _scaled(n: int) -> str:
    steps = min(4, (len(str(n)) - 1) // 3)
    return f"{n / 1000**steps:.3g}{('', ' K', ' M', ' G', ' T')[steps]}"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
