"""What became of every linear, as data and as text."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quartet_compile.kernels.chosen import Choice
from quartet_compile.passes.place import LeftBecause

AUTOTUNED = "autotuned"
"""In an implementation: Inductor measures cuBLAS and templates, and takes the fastest."""


@dataclass(frozen=True)
class LinearReport:
    """One linear.

    name: in the model, or in the graph if no model is known. also: others that the same graph serves, such as the same linear of other
    layers, where blocks are compiled one by one or a graph break lies before them. shape: (T, I, O): tokens, in and out features; tokens
    of this example if dynamic, 0 if they depend on data. recipe: by name, "bf16" if left alone. decided_by: which rule chose it. products:
    those that were rewritten, of "y", "dx", "dw". reason, left_because: why it was left alone, and which class of reason that is.
    saved_before, saved_after: bytes kept for the backward pass for its input, 0 where another linear already keeps the same input;
    checkpointing is not counted here, only in the totals. weight_bytes: the packed weight that is kept on top of the parameter. flops: of
    its products, rewritten or not, 2 T I O each. dtype: of its input. implementation: what multiplies on its device, if rewritten. before:
    the nodes of its products in the unchanged graphs. after: in the rewritten ones, the nodes of its products and then of their quantizers,
    some of which serve other linears, too. in_graph: those of "y", "dx", "dw" that there are, rewritten or not; unknown, thus empty, if
    its form is unsupported. groups: how many weights it has, each for a group of its tokens, where they are multiplied as one product.
    chosen: product -> what Inductor took for it, as far as it is known: of a running model, compiled in this process and autotuned.
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
    dtype: str = ""
    implementation: str = ""
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    in_graph: tuple[str, ...] = ()
    groups: int | None = None
    chosen: dict[str, Choice] = field(default_factory=dict, hash=False)

    @property
    def flops_in_nvfp4(self) -> int:
        """Of those products that were rewritten."""
        return 2 * math.prod(self.shape) * len(self.products) if self.shape else 0

    @property
    def names(self) -> tuple[str, ...]:
        """Of all linears that this one stands for."""
        return self.name, *self.also


@dataclass(frozen=True)
class OtherProduct:
    """A product that belongs to no linear: of two activations, as in attention, or a convolution.

    node: its name in the graph, before and after. operator: such as "aten.bmm.default". module: the one whose code it is in. shape: of its
    (first) result. backward: whether it is in the backward pass.
    """

    node: str
    operator: str
    module: str
    source: str
    shape: tuple[int, ...]
    backward: bool
    flops: int


@dataclass(frozen=True)
class GraphReport:
    """One captured graph.

    linears, others: every product belongs to a linear or is one of the others. products: how many there are, forward and backward, before
    rewriting. flops: of all of them. activations_before, ...: what its forward keeps for its backward, in bytes: activations, and tensors
    made of parameters, before and after rewriting. forward, backward: the rewritten graphs as Python files (`source`); backward is empty in
    inference. forward_before, backward_before: the unchanged ones. compile_id: of torch, "frame/compilation". graph_break: why the graph
    ends before its function does, and where. recompiled: which guard failed, if the frame was compiled before. cached: torch's cache had
    it. superseded: another compilation of the same code was called later, for the same modules; such a graph counts in no total.
    """

    linears: tuple[LinearReport, ...]
    others: tuple[OtherProduct, ...]
    products: int
    flops: int
    activations_before: int
    activations_after: int
    weights_before: int
    weights_after: int
    forward: str
    backward: str
    forward_before: str
    backward_before: str
    compile_id: str = ""
    graph_break: str = ""
    recompiled: str = ""
    cached: bool = False
    superseded: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth knowing about how it came about."""
        notes = (
            (self.graph_break, f"ends at a graph break: {self.graph_break}"),
            (self.recompiled, f"was compiled again, because {self.recompiled}"),
            (self.superseded, "is not counted: another compilation is in its place"),
            (self.cached, "came from torch's cache"),
        )
        return tuple(note for true, note in notes if true)

    @property
    def modules(self) -> int:
        """How many modules of the model it serves, as far as its linears tell."""
        return max((len(linear.names) for linear in self.linears), default=1)


SUFFIXES = (".html", ".json")
"""Of files that `Report.save` writes."""

SOURCES = ("forward_before", "forward", "backward_before", "backward")
"""The fields of a `GraphReport` that are Python files."""


@dataclass(frozen=True)
class Report:
    """All graphs of a model. `print(report)` shows a table; `save("report.html")` writes a page, and `to_dict` and `write_graphs` give the
    rest.

    not_captured: names of nn.Linear modules, and of other parameters with two or more dimensions that are no embedding, that no captured
    graph contained: code that is never called or that Dynamo left to eager PyTorch. unmatched: (option, glob) of the options that matched
    no linear in any graph.
    """

    graphs: tuple[GraphReport, ...]
    not_captured: tuple[str, ...] = ()
    unmatched: tuple[tuple[str, str], ...] = ()

    @property
    def linears(self) -> tuple[LinearReport, ...]:
        """The linears of all graphs that are in use, in order."""
        return tuple(linear for graph in self.current for linear in graph.linears)

    @property
    def current(self) -> tuple[GraphReport, ...]:
        """The graphs that no later compilation took the place of."""
        return tuple(graph for graph in self.graphs if not graph.superseded)

    @property
    def others(self) -> tuple[OtherProduct, ...]:
        """The products of no linear, in order."""
        return tuple(product for graph in self.current for product in graph.others)

    @property
    def convolutions(self) -> tuple[OtherProduct, ...]:
        """Those of the other products that are convolutions: one with a kernel of one element and one group is a linear."""
        return tuple(product for product in self.others if product.operator.startswith("aten.convolution"))

    @property
    def rewritten(self) -> tuple[LinearReport, ...]:
        """Those of which a product was rewritten."""
        return tuple(linear for linear in self.linears if linear.products)

    @property
    def implementations(self) -> dict[str, int]:
        """What multiplies the linears that are rewritten, and how many of them."""
        return dict(Counter(linear.implementation for linear in self.rewritten for _ in linear.names))

    @property
    def flops(self) -> int:
        """Of all products: each graph is run once for each module that it serves. So are bytes counted."""
        return self._total("flops")

    @property
    def flops_in_nvfp4(self) -> int:
        """Of the products that were rewritten."""
        return sum(graph.modules * linear.flops_in_nvfp4 for graph in self.current for linear in graph.linears)

    @property
    def flops_of_others(self) -> int:
        """Of the other products than those of linears: of two activations, as in attention, and convolutions."""
        return sum(graph.modules * product.flops for graph in self.current for product in graph.others)

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
        return sum(graph.modules * getattr(graph, what) for graph in self.current)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the source of the graphs, as plain data."""
        data = dataclasses.asdict(self)
        for graph in data["graphs"]:
            for source in SOURCES:
                del graph[source]
        bytes_kept = ("saved_bytes_before", "saved_bytes_after", "weight_bytes_before", "weight_bytes_after")
        totals = ("flops", "flops_in_nvfp4", "flops_of_others", *bytes_kept)
        return data | {name: getattr(self, name) for name in totals}

    def save(self, path: str | Path) -> Path:
        """Write the report as one file, and return its path: a page for a browser (.html, needs jinja2) or what `to_dict` gives (.json).

        The page contains all it needs and the graphs' sources. Raises ValueError for any other suffix, ModuleNotFoundError without jinja2.
        """
        path = Path(path)
        if path.suffix == ".html":
            from quartet_compile.page import render

            text = render(self)
        elif path.suffix == ".json":
            text = json.dumps(self.to_dict(), indent=1)
        else:
            raise ValueError(f"cannot save a report as {path.name!r}: valid suffixes are {' and '.join(SUFFIXES)}")
        path.write_text(text, encoding="utf-8")
        return path

    def write_graphs(self, folder: str | Path) -> list[Path]:
        """Write all graphs as Python files that can be read and run, and return their paths: graph0_forward_before.py,
        graph0_forward.py, graph0_backward_before.py, graph0_backward.py, ..."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for i, graph in enumerate(self.graphs):
            for name in SOURCES:
                if text := getattr(graph, name):
                    path = folder / f"graph{i}_{name}.py"
                    path.write_text(text)
                    written.append(path)
        return written

    def __str__(self) -> str:
        from quartet_compile.text import text  # which reads the classes of this file

        return text(self)
