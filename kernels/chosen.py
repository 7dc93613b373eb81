"""What Inductor took for each product, of the choices that it had to measure.

A product is lowered to choices, cuBLAS and templates (`lowerings.common.best`). Which one is taken is settled later: a template that what
follows can be fused into may win over a library that was faster alone. A compilation that asks (`heard`) is told when it is over. Who asks
is known to the thread and for the time of the call: nothing is noted of other compilations, nor where torch's caches had the code.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Choice:
    """name: Inductor's, such as "triton_mm_17". tile: rows, columns and depth of a Triton template's tiles; None for cuBLAS. measured:
    among how many choices."""

    name: str
    tile: tuple[int, int, int] | None
    measured: int

    def __str__(self) -> str:
        return "cuBLAS" if self.tile is None else f"Triton tiles of {' x '.join(map(str, self.tile))}"


class _Offer(NamedTuple):
    """A product's node in the graph that Inductor was given, that graph, the name of the product's buffer, and its choices."""

    node: str
    graph: Any
    buffer: str
    choices: Sequence[Any]


_offers: ContextVar[list[_Offer] | None] = ContextVar("quartet_offers", default=None)


@contextmanager
def heard(chosen: dict[str, Choice]) -> Iterator[None]:
    """Have `chosen` filled, at the end, with node -> choice for each product that is compiled meanwhile and had more than one.

    A node that both passes compute, as checkpointing has it, is that of the forward pass. Also a decorator, of what compiles.
    """
    offers: list[_Offer] = []
    token = _offers.set(offers)
    try:
        yield
    finally:
        _offers.reset(token)
    for offer in offers:
        choice = _taken(offer)
        if choice is not None:
            chosen.setdefault(offer.node, choice)


def note(result: Any, choices: Sequence[Any]) -> None:
    """That the node which Inductor lowers now, with this result, has these choices."""
    from torch._inductor.virtualized import V

    offers = _offers.get()
    if offers is not None and len(choices) > 1:
        offers.append(_Offer(V.current_node.name, V.graph, result.get_name(), tuple(choices)))


def _taken(offer: _Offer) -> Choice | None:
    """The choice whose kernel the buffer of this name has by now; None if that is none of them, but something that Inductor made of it."""
    buffer = offer.graph.name_to_buffer[offer.buffer]
    template, library = (getattr(buffer, name, None) for name in ("make_kernel_render", "python_kernel_name"))
    for choice in offer.choices:
        if library == f"extern_kernels.{choice.name}" or (template is not None and getattr(choice, "make_kernel_render", None) is template):
            return Choice(choice.name, _tile(choice), len(offer.choices))
    return None


def _tile(choice: Any) -> tuple[int, int, int] | None:
    """Inductor says (rows, depth, columns), as text."""
    shape = choice.info_dict().get("tile_shape")
    if shape is None:
        return None
    rows, depth, columns = ast.literal_eval(shape)
    return rows, columns, depth
