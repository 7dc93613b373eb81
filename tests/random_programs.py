"""Random programs for small models, for hypothesis to draw: steps on a tensor [batch, tokens, features], and what they are run on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from linear_forms import FORMS


@dataclass(frozen=True)
class Linear:
    """One linear.

    made: its weight is "plain", the "first" or "second" half of a parameter, "normed" (weight norm) or "merged" (frozen, plus the product
    of an adapter). tied: its parameter is an earlier one, if one has its shape and the weight is not computed. frozen: no gradient for its
    weight. excluded: an option names its parameter, likewise.
    """

    form: str
    out: int
    bias: bool = False
    made: str = "plain"
    tied: bool = False
    frozen: bool = False
    excluded: bool = False


@dataclass(frozen=True)
class Pair:
    """Two linears of the same input: their "sum", the larger of both ("where"), the "first" or the "second" alone, or the sum of the first
    and the second under no_grad ("teacher")."""

    how: str
    first: Linear
    second: Linear


@dataclass(frozen=True)
class Twice:
    """The sum of a linear of x and the same linear of relu(x)."""

    linear: Linear


@dataclass(frozen=True)
class Mixer:
    """A linear over tokens: features are transposed with tokens, before and after. Its `out` is the number of tokens."""

    linear: Linear


@dataclass(frozen=True)
class Adapter:
    """A frozen linear and two narrow ones beside it."""

    base: Linear
    rank: int


@dataclass(frozen=True)
class Experts:
    """A batch of matrices: tokens are dealt out evenly, among fewer experts if need be."""

    count: int
    out: int


@dataclass(frozen=True)
class Groups:
    """Experts of tokens in groups of unlike sizes, in parts of all tokens; `rest` parts belong to nobody, if all linears are rewritten.
    turned: weights are stored [G, O, I]. A program has none where torch has no product of groups: features are not multiples of 8."""

    parts: tuple[int, ...]
    rest: int
    out: int
    turned: bool
    frozen: bool


@dataclass(frozen=True)
class Region:
    """Steps that are computed again in the backward pass ("checkpoint"), or in the context of a recipe ("bf16", "quartet2")."""

    kind: str
    steps: tuple[Any, ...]


WIDTHS = st.sampled_from([64, 80, 128, 70, 135, 24])
FLAGS = st.sampled_from([False, False, True])
LINEARS = st.builds(
    Linear, st.sampled_from(list(FORMS)), WIDTHS, st.booleans(), st.sampled_from(["plain", "plain", "plain", "normed", "merged"]), FLAGS,
    FLAGS, st.sampled_from([False, False, False, True]),
)  # fmt: skip
PAIRS = st.sampled_from(["sum", "where", "first", "second", "teacher"])
STEPS = st.one_of(
    LINEARS,
    st.builds(lambda how, a, b: Pair(how, a, replace(b, out=a.out)), PAIRS, LINEARS, LINEARS),
    st.builds(lambda how, a: Pair(how, replace(a, made="first"), replace(a, made="second", tied=True)), PAIRS, LINEARS),
    st.builds(Twice, LINEARS),
    st.builds(Mixer, LINEARS),
    st.builds(lambda base, rank: Adapter(replace(base, frozen=True), rank), LINEARS, st.sampled_from([8, 64])),
    st.builds(Experts, st.sampled_from([1, 2, 3]), WIDTHS),
    st.builds(Groups, st.lists(st.integers(0, 2), min_size=2, max_size=4).map(tuple), st.integers(0, 1), WIDTHS, st.booleans(), FLAGS),
    st.sampled_from(["relu", "gate", "residual", "attention", "tokens apart", "channels first"]),
)
REGION_KINDS = st.sampled_from(["checkpoint", "checkpoint", "bf16", "quartet2"])
REGIONS = st.builds(Region, REGION_KINDS, st.lists(STEPS, min_size=1, max_size=2).map(tuple))
NESTED = st.builds(Region, REGION_KINDS, st.tuples(REGIONS, STEPS) | st.tuples(STEPS, REGIONS) | st.tuples(REGIONS))
ALL = st.one_of(STEPS, STEPS, STEPS, REGIONS, NESTED, st.just("output"))

PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None), "bfloat16": (torch.bfloat16, None), "float16": (torch.float16, None),
    "autocast to bfloat16": (torch.float32, torch.bfloat16), "autocast to float16": (torch.float32, torch.float16),
}  # fmt: skip
"""(dtype of parameters and input, that of autocast)."""


@dataclass(frozen=True)
class Case:
    """A program, what it is run on, and options. losses_apart: each output has a backward pass of its own. everything: include=["*"]."""

    steps: tuple[Any, ...]
    batch: int
    tokens: int
    features: int
    precision: str
    input_gradient: bool
    losses_apart: bool
    dynamic: bool
    everything: bool
    min_features: int
    recompute: str

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision][0]

    @property
    def dynamic_sizes(self) -> bool:
        """Not where autocast copies an expanded weight: it depends on all other steps whether torch leaves the number of copies dynamic."""
        return self.dynamic and not (self.autocast and "bmm, expanded" in repr(self.steps))

    @property
    def autocast(self) -> torch.dtype | None:
        return PRECISIONS[self.precision][1]


def cases(longest: int, dynamic: st.SearchStrategy[bool] = FLAGS) -> st.SearchStrategy[Case]:
    """Cases of programs with at most so many steps."""
    return st.builds(
        Case, st.lists(ALL, min_size=1, max_size=longest).map(tuple), st.integers(1, 3), st.sampled_from([6, 18, 30, 1, 7, 45]), WIDTHS,
        st.sampled_from(list(PRECISIONS)), st.booleans(), st.booleans(), dynamic, st.booleans(), st.sampled_from([64, 64, 1, 100]),
        st.sampled_from(["none", "none", "weights", "operands"]),
    )  # fmt: skip
