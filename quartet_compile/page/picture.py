"""The data flow of one linear as boxes and arrows: operands, quantizers with their rules, products, and what the forward pass keeps.

Activations run along the top and weights along the bottom, forward on the left and backward on the right; what is kept crosses the middle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from quartet_compile.account import packed_bytes
from quartet_compile.kernels.format import ROTATION, ceil_to
from quartet_compile.kernels.grouped_ops import padded_rows
from quartet_compile.passes.recipe import Cell, Product
from quartet_compile.recipes import RECIPES
from quartet_compile.reports import LinearReport
from quartet_compile.text import bytes_text

SHORT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""Dtypes, as in the sources."""

HEIGHT = 314
FORWARD_WIDTH, WIDTH = 306, 876
TOP, BOTTOM = 58, 268
"""The lanes of activations and of weights; gradients run between them."""
MIDDLE = (TOP + BOTTOM) // 2
E_TOP, E_BOTTOM = TOP + 70, BOTTOM - 70


@dataclass(frozen=True)
class Box:
    """x, y: its upper left corner. kind: tensor, packed or product, with " nvfp4" for a product of packed operands. rule: of the quantizer
    that makes it. lines: the first is its name."""

    x: int
    y: int
    width: int
    height: int
    kind: str
    lines: tuple[str, ...]
    rule: str = ""

    @property
    def left(self) -> tuple[int, int]:
        return self.x, self.y + self.height // 2

    @property
    def right(self) -> tuple[int, int]:
        return self.x + self.width, self.y + self.height // 2

    @property
    def top(self) -> tuple[int, int]:
        return self.x + self.width // 2, self.y

    @property
    def bottom(self) -> tuple[int, int]:
        return self.x + self.width // 2, self.y + self.height


@dataclass(frozen=True)
class Arrow:
    """path: of SVG. head: where it points. down: its direction there: 0 to the right, 1 down, -1 up. kind: kept, again or ""."""

    path: str
    head: tuple[int, int]
    down: int = 0
    kind: str = ""
    label: tuple[str, ...] = ()
    at: tuple[int, int] = (0, 0)


@dataclass
class Picture:
    """notes: what its numbers are, below it. title: for those who do not see it."""

    title: str
    width: int
    height: int
    boxes: list[Box] = field(default_factory=list)
    arrows: list[Arrow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, box: Box) -> Box:
        self.boxes.append(box)
        return box

    def across(self, start: tuple[int, int], end: tuple[int, int], kind: str = "", label: tuple[str, ...] = ()) -> None:
        """From left to right; a label stands where what is kept crosses from one pass to the other."""
        (x, y), (to_x, to_y) = start, end
        bend = max(x, to_x - 60)
        middle = (bend + to_x) // 2
        path = f"M{x} {y} H{bend} C{middle} {y} {middle} {to_y} {to_x - 6} {to_y}"
        self.arrows.append(Arrow(path, end, 0, kind, label, (FORWARD_WIDTH + 44, y)))

    def down(self, start: tuple[int, int], end: tuple[int, int]) -> None:
        """Upwards, if the end is above."""
        sign = 1 if end[1] > start[1] else -1
        middle = (start[1] + end[1]) // 2
        self.arrows.append(Arrow(f"M{start[0]} {start[1]} C{start[0]} {middle} {end[0]} {middle} {end[0]} {end[1] - 6 * sign}", end, sign))


def picture_of(linear: LinearReport) -> Picture | None:
    """None where the form of a linear is not known."""
    if linear.shape is None:
        return None
    return _Drawing(linear, linear.shape).draw()


class _Drawing:
    """What the parts of one picture have in common. rows, outs: tokens and out features as the quantizers see them, groups padded."""

    def __init__(self, linear: LinearReport, shape: tuple[int, int, int]) -> None:
        self.linear, (self.tokens, self.ins, self.outs) = linear, shape
        self.rows = self.tokens if linear.groups is None else padded_rows(self.tokens, linear.groups)
        self.packed_outs = self.outs if linear.groups is None else linear.groups * ceil_to(self.outs, ROTATION)
        self.recipe = RECIPES.get(linear.recipe)
        self.backward = any(name in linear.in_graph for name in ("dx", "dw"))
        done = ", ".join(linear.products) or "no product"
        width = WIDTH if self.backward else FORWARD_WIDTH
        self.picture = Picture(f"Data flow: {done} in NVFP4", width, HEIGHT)

    def draw(self) -> Picture:
        shape_w = [self.outs, self.ins] if self.linear.groups is None else [self.linear.groups, self.outs, self.ins]
        x = self._tensor(12, TOP, "x", [self.tokens, self.ins])
        w = self._tensor(12, BOTTOM, "w", shape_w)
        left, right = x, w
        if "y" in self.linear.products:
            left = self._packed(154, TOP, "x", [self.rows, self.ins], self._cell("forward").left)
            right = self._packed(154, BOTTOM, "w", [self.packed_outs, self.ins], self._cell("forward").right)
            self.picture.across(x.right, left.left)
            self.picture.across(w.right, right.left)
        y = self._product(154, MIDDLE, "y", "x", "wᵀ", [self.tokens, self.outs])
        self.picture.down(left.bottom, y.top)
        self.picture.down(right.top, y.bottom)
        if self.backward:
            e = self._tensor(404, MIDDLE, "e", [self.tokens, self.outs])
            if "dw" in self.linear.in_graph:
                self._gradient("dw", e, x, left, [self.outs, self.ins])
            if "dx" in self.linear.in_graph:
                self._gradient("dx", e, w, right, [self.tokens, self.ins])
        self._notes()
        return self.picture

    def _gradient(self, name: str, e: Box, tensor: Box, packed: Box, shape: list[int]) -> None:
        """dw = eᵀ x above, dx = e w below."""
        wgrad = name == "dw"
        lane, e_lane = (TOP, E_TOP) if wgrad else (BOTTOM, E_BOTTOM)
        product = self._product(732, (lane + e_lane) // 2, name, "eᵀ" if wgrad else "e", "x" if wgrad else "w", shape)
        kind, label = self._kept(name)
        if name not in self.linear.products:
            start = tensor.right
            if packed is not tensor:  # around its quantizer
                start = tensor.top if wgrad else tensor.bottom
                self._around(start, product, kind, label, wgrad)
            else:
                self.picture.across(start, (product.left[0], product.left[1] + (-12 if wgrad else 12)), kind, label)
            self.picture.across(e.right, (product.left[0], product.left[1] + (12 if wgrad else -12)))
            return
        cells = self._cell("wgrad" if wgrad else "dgrad")
        if wgrad:
            other_shape, own_shape = [self.ins, ceil_to(self.rows, ROTATION)], [self.outs, ceil_to(self.rows, ROTATION)]
        else:  # the gradient meets the columns of one group at a time
            other_shape, own_shape = [self.ins, ceil_to(self.packed_outs, ROTATION)], [self.rows, ceil_to(self.outs, ROTATION)]
        other = self._packed(546, lane, "xᵀ" if wgrad else "wᵀ", other_shape, cells.right)
        own = self._packed(546, e_lane, "eᵀ" if wgrad else "e", own_shape, cells.left)
        self.picture.across(packed.right, other.left, kind, label)
        self.picture.across(e.right, own.left)
        self.picture.across(other.right, (product.left[0], product.left[1] + (-12 if wgrad else 12)))
        self.picture.across(own.right, (product.left[0], product.left[1] + (12 if wgrad else -12)))

    def _around(self, start: tuple[int, int], product: Box, kind: str, label: tuple[str, ...], above: bool) -> None:
        (x, y), end = start, product.top if above else product.bottom
        lane = 22 if above else HEIGHT - 6
        path = f"M{x} {y} V{lane} H{end[0]} V{end[1] - (6 if above else -6)}"
        self.picture.arrows.append(Arrow(path, end, 1 if above else -1, kind, label, (FORWARD_WIDTH + 44, lane)))

    def _kept(self, name: str) -> tuple[str, tuple[str, ...]]:
        """How the second operand of a gradient reaches the backward pass: (kind of arrow, label)."""
        linear = self.linear
        if name == "dx":
            if linear.weight_bytes:
                return "kept", ("kept", bytes_text(linear.weight_bytes))
            return ("again", ("quantized", "again")) if "dx" in linear.products else ("", ("parameter",))
        if linear.saved_after:
            return "kept", ("kept", bytes_text(linear.saved_after))
        if linear.saved_before:
            return "again", ("quantized", "again")
        return "kept", ("shared",)

    def _tensor(self, x: int, lane: int, name: str, shape: Sequence[int]) -> Box:
        return self.picture.add(Box(x, lane - 28, 116, 56, "tensor", (name, *self._size(shape))))

    def _packed(self, x: int, lane: int, name: str, shape: list[int], cell: Cell) -> Box:
        lines = f"packed {name}", _shape(shape), bytes_text(packed_bytes(*shape))
        return self.picture.add(Box(x, lane - 31, 138 if x < FORWARD_WIDTH else 150, 62, "packed", lines, str(cell)))

    def _product(self, x: int, middle: int, name: str, left: str, right: str, shape: Sequence[int]) -> Box:
        if self.linear.groups is not None and name == "dw":
            shape = [self.linear.groups, *shape]
        kind = "product nvfp4" if name in self.linear.products else "product"
        return self.picture.add(Box(x, middle - 29, 138, 58, kind, (f"{name} = {left} {right}", *self._size(shape))))

    def _size(self, shape: Sequence[int]) -> tuple[str, str]:
        """Of a tensor in the dtype of the linear."""
        dtype = getattr(torch, self.linear.dtype)
        return f"{SHORT.get(dtype, self.linear.dtype)} {_shape(shape)}", bytes_text(math.prod(shape) * dtype.itemsize)

    def _cell(self, product: str) -> Product:
        """The rules of a product; "quantized" for a recipe that this process does not know."""
        unknown = Product(Cell("quantized"), Cell("quantized", from_saved=product != "forward"))
        return (getattr(self.recipe, product) if self.recipe is not None else None) or unknown

    def _notes(self) -> None:
        note = self.picture.notes.append
        linear = self.linear
        if linear.products:
            note("In colour: packed operands, under the rule that packs them, and their products. The rest is in the model's own dtype.")
        if {"dx", "dw"} & set(linear.products):
            note(f"The backward pass sums over blocks of {ROTATION} that it rotates: its packed operands are padded to whole blocks.")
        if linear.groups is not None and linear.products:
            note(f"{linear.groups} groups of tokens: rows of each are padded to whole blocks of {ROTATION}.")
        if linear.products and self.recipe is None:
            note(f"The recipe {linear.recipe!r} is not known here, so its rules are not shown.")
        if "dw" in linear.in_graph and not linear.saved_before:
            note("Another linear reads the same input: what is kept of it is counted there.")
        missing = [name for name in ("dx", "dw") if name not in linear.in_graph]
        if self.backward and missing:
            note(f"No {missing[0]}: the graph does not ask for this gradient.")
        if not self.backward:
            note("No backward pass: nothing is kept.")


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"
