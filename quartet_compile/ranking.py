"""`suggest`: which linears cause the loss that NVFP4 costs, and which to leave out.

The model is captured once with a choice at each product (`choices`), and a few batches are run with other choices each time. Half of the
batches rank the linears, the other half measures what leaving out the first ones really does: the figures of a choice come from
batches that had no part in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from statistics import fmean
from typing import Any, get_args

import torch
from torch import Tensor, nn

from quartet_compile.choices import Choosing, Use, kept_bytes, measuring
from quartet_compile.options import split_options
from quartet_compile.passes import compat
from quartet_compile.passes.place import covers
from quartet_compile.suggestion import By, Candidate, Exclusion, Mean, Measure, Suggestion, mean, ratio

SETS = 8
"""How many sets are tried at most, beside the largest one within the budget."""

Loss = Callable[[Any, Any], Any]


def suggest(
    model: nn.Module, batches: Iterable[Any], *, loss: Loss | None = None, by: By = "linear", budget: float = 0.2,
    measure: Measure = "alone", options: Mapping[str, Any] | None = None,
) -> Suggestion:  # fmt: skip
    """Rank the linears of a model by the loss that quantizing them costs, and suggest which to leave out.

        suggestion = quartet.suggest(model, batches)
        print(suggestion)
        torch.compile(model, backend="quartet", options={"quartet.exclude": [*suggestion.exclude]})

    batches: at least four; a tensor or a tuple is passed as positional arguments, a dict as keyword arguments. Half of them rank, the
    others measure the sets. loss: of (model output, batch), one number; by default the output itself, its attribute `loss`, or the first
    element of a tuple. by: what is ranked and left out: each "linear", those of a "kind" in all blocks ("layers.*.mlp.down_proj"), or
    those of a "block" (names up to their first number). budget: the share of the floating point operations in NVFP4 that the suggested
    list may cost. measure: the loss of a linear is that of quantizing it "alone", or what leaving it out takes away while all others are
    quantized ("left out"): the first is less noisy, the second sees how linears act on each other. options: as for torch.compile; what
    they or the model's code leave alone is no candidate.

    It costs n + 2 runs over half of the batches for n linears, kinds or blocks, and at most 11 over the other half. Only the forward
    pass is measured, with the model in evaluation mode: rounding in the backward pass is unbiased noise, which changes a training only
    over many steps. Parameters, buffers, mode, random state and earlier compilations are left as they were.

    Raises TypeError for a model, batch or loss that is none, ValueError for fewer than four batches, for a loss that is not finite, and
    where no linear is quantized; otherwise what the compilation would raise.
    """
    root = getattr(model, "_orig_mod", model)
    if not isinstance(root, nn.Module):
        raise TypeError(f"quartet.suggest takes a module, compiled or not, got {type(model).__name__}")
    for name, value, valid in (("by", by, By), ("measure", measure, Measure)):
        if value not in get_args(valid):
            raise ValueError(f"quartet.suggest: {name} is one of {', '.join(map(repr, get_args(valid)))}, got {value!r}")
    if not 0 < budget <= 1:
        raise ValueError(f"quartet.suggest: budget is a share of the floating point operations, above 0 and at most 1, got {budget!r}")
    given = _listed(batches)
    ours, others = split_options(options)
    compat.inductor_settings(ours.mode, others)  # for its checks
    runs = _Runs(root, Choosing(root, ours), loss or default_loss)
    first, second = given[::2], given[1::2]

    plain = runs.losses(first, frozenset()), runs.losses(second, frozenset())
    quantized = runs.losses(first), runs.losses(second)
    names = runs.names()
    if not names:
        raise ValueError("quartet.suggest: no linear of this model is quantized; print(quartet.explain(model, ...)) tells why")
    gap = mean(_differences([*quantized[0], *quantized[1]], [*plain[0], *plain[1]]))

    def cost(linears: Sequence[str]) -> Mean:
        if measure == "alone":
            return mean(_differences(runs.losses(first, frozenset(linears)), plain[0]))
        return mean(_differences(quantized[0], runs.losses(first, names.difference(linears))))

    def recovered(linears: Sequence[str]) -> Mean:
        parts = _differences(quantized[1], runs.losses(second, names.difference(linears)))
        return ratio(parts, _differences(quantized[1], plain[1]))

    candidates: list[Candidate] = []
    exclusions: list[Exclusion] = []
    if gap.clear and gap.value > 0:
        groups = _groups(runs.in_order(), by)
        candidates = [Candidate(name, linears, cost(linears), *runs.costs(linears)) for name, linears in groups.items()]
        candidates.sort(key=lambda c: c.loss.value, reverse=True)
        for some in _sets(candidates, budget):
            linears = tuple(linear for c in some for linear in c.linears)
            exclusions.append(Exclusion(tuple(c.name for c in some), linears, recovered(linears), *runs.costs(linears)))
    chosen = _choose(exclusions, budget)
    exclude, only, unsaid = runs.globs(chosen.linears, by) if chosen else ((), (), [])
    notes = [*runs.notes(), *_why_no_list(gap, candidates, exclusions, chosen, budget), *unsaid, FORWARD_ONLY]
    return Suggestion(
        by, measure, budget, fmean([*plain[0], *plain[1]]), fmean([*quantized[0], *quantized[1]]), gap,
        tuple(candidates), tuple(exclusions), chosen, exclude, only, ours.exclude, tuple(notes),
    )  # fmt: skip


def default_loss(output: Any, batch: Any) -> Tensor:
    """The output itself, its attribute `loss` or its first element, whichever is a single number."""
    for found in (output, getattr(output, "loss", None), output[0] if isinstance(output, (tuple, list)) and output else None):
        if isinstance(found, Tensor) and found.numel() == 1:
            return found
    what = f"a tensor of shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    raise TypeError(
        f"quartet.suggest: the model's output, {what}, is no loss. Give loss=, a function of (output, batch), or call the model so that it "
        "returns its loss (Hugging Face's do with labels=)."
    )


def _listed(batches: Iterable[Any]) -> list[Any]:
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(f"quartet.suggest takes a list of batches, got {type(batches).__name__}; one batch is no list")
    listed = list(batches)
    for batch in listed:
        if not isinstance(batch, (Tensor, tuple, list, Mapping)):
            raise TypeError(f"quartet.suggest: a batch is a tensor, a tuple or a dict, got {type(batch).__name__}")
    if len(listed) < 4:
        raise ValueError(f"quartet.suggest needs at least 4 batches, two to rank and two to measure sets with, got {len(listed)}")
    return listed


def _differences(some: Sequence[float], others: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(some, others, strict=True)]


# ---------------------------------------------------------------- groups and sets


def kind_of(name: str) -> str:
    """"layers.*.q" for "layers.3.q"."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def block_of(name: str) -> str:
    """"layers.3" for "layers.3.experts.0.up"; the name itself if there is no number in it."""
    parts = name.split(".")
    return ".".join(parts[: next((i + 1 for i, part in enumerate(parts) if part.isdigit()), len(parts))])


def _groups(names: Sequence[str], by: By) -> dict[str, tuple[str, ...]]:
    keys: dict[By, Callable[[str], str]] = {"linear": str, "kind": kind_of, "block": block_of}
    key = keys[by]
    groups: dict[str, tuple[str, ...]] = {}
    for name in names:
        groups[key(name)] = (*groups.get(key(name), ()), name)
    return groups


def _sets(candidates: Sequence[Candidate], budget: float) -> list[list[Candidate]]:
    """The first ones of those that clearly cost loss, more and more: what fits into the budget by its loss for a FLOP, then the others."""
    costly = [c for c in candidates if c.loss.clear and c.loss.value > 0]
    costly.sort(key=lambda c: c.loss.value / c.flops if c.flops else math.inf, reverse=True)
    fitting, beyond, spent = [], [], 0.0
    for candidate in costly:
        if _within(spent + candidate.flops, budget):
            fitting.append(candidate)
            spent += candidate.flops
        else:
            beyond.append(candidate)
    count = min(SETS, len(costly))
    sizes = {math.ceil(len(costly) * (i + 1) / count) for i in range(count)} | ({len(fitting)} - {0})
    return [(fitting + beyond)[:size] for size in sorted(sizes)]


def _within(flops: float, budget: float) -> bool:
    return flops <= budget + 1e-9  # shares are sums of rounded numbers


def _choose(exclusions: Sequence[Exclusion], budget: float) -> Exclusion | None:
    """Of the sets within the budget that clearly recover something, the smallest that is within a standard error of the best."""
    eligible = [e for e in exclusions if _within(e.flops, budget) and e.recovered.clear and e.recovered.value > 0]
    if not eligible:
        return None
    best = max(eligible, key=lambda e: e.recovered.value).recovered
    return next(e for e in eligible if e.recovered.value >= best.value - best.error)


FORWARD_ONLY = "only forward passes are measured: rounding in the backward pass is unbiased noise, which no few batches can rank"


def _why_no_list(
    gap: Mean, candidates: Sequence[Candidate], exclusions: Sequence[Exclusion], chosen: Exclusion | None, budget: float
) -> list[str]:  # fmt: skip
    if chosen is not None:
        return []
    if not gap.clear:
        return ["the gap is not clear of noise, so nothing is ranked; four times as many batches halve its standard error"]
    if gap.value <= 0:
        return ["the loss is lower in NVFP4 on these batches: there is nothing to leave out"]
    if not exclusions:
        return ["no loss of a single one is clear of noise, so nothing is suggested: give more batches, or rank by kind or block"]
    if not any(_within(e.flops, budget) for e in exclusions):
        return [f"nothing that clearly costs loss fits into budget={budget:g}"]
    return ["what the sets within the budget recover is not clear of noise on the other batches, so nothing is suggested"]


# ---------------------------------------------------------------- runs


class _Runs:
    """Runs of a model with chosen linears quantized, and what is known of its linears."""

    def __init__(self, model: nn.Module, choosing: Choosing, loss: Loss) -> None:
        self.model, self.choosing, self.loss = model, choosing, loss
        self.uses: list[Use] = []
        self.batches = 0
        """How many batches `uses` is of."""
        self.dtypes: set[torch.dtype] = set()

    def losses(self, batches: Sequence[Any], quantized: frozenset[str] | None = None) -> list[float]:
        """One for each batch. quantized: the names of the linears that are; without it all are, and what is met is noted in `uses`."""
        self.choosing.quantized = quantized
        with measuring(self.model):
            losses = [self._loss(batch) for batch in batches]
        for loss in losses:
            if not math.isfinite(loss):
                how = "all linears in NVFP4" if quantized is None else f"{', '.join(sorted(quantized)) or 'nothing'} in NVFP4"
                raise ValueError(f"quartet.suggest: the loss of a batch is {loss} with {how}")
        if quantized is None:
            self.uses += self.choosing.uses
            self.batches += len(batches)
        self.choosing.uses.clear()
        return losses

    def _loss(self, batch: Any) -> float:
        if isinstance(batch, Mapping):
            output = self.choosing(**batch)
        else:
            output = self.choosing(*batch) if isinstance(batch, (tuple, list)) else self.choosing(batch)
        loss = self.loss(output, batch)
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self.dtypes.add(loss.dtype)
            return float(loss)
        if isinstance(loss, (int, float)):
            return float(loss)
        what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"quartet.suggest: loss= has to return one number, got {what}")

    def in_order(self) -> list[str]:
        """The linears that may be left out."""
        return list(dict.fromkeys(use.name for use in self.uses if use.rewritten))

    def names(self) -> frozenset[str]:
        return frozenset(self.in_order())

    def costs(self, linears: Sequence[str]) -> tuple[float, int]:
        """(share of the floating point operations in NVFP4, bytes kept in addition for a batch) if these are left out."""
        left_out = frozenset(linears)
        flops = sum(use.flops for use in self.uses if use.name in left_out)
        kept = kept_bytes(self.uses, left_out) - kept_bytes(self.uses, frozenset())
        return flops / max(1, sum(use.flops for use in self.uses if use.rewritten)), kept // self.batches

    def notes(self) -> list[str]:
        coarse = sorted(str(d).removeprefix("torch.") for d in self.dtypes & {torch.bfloat16, torch.float16})
        return [f"the loss is a {' or '.join(coarse)} number, too coarse for small differences: compute it in float32" for _ in coarse[:1]]

    def globs(self, linears: Sequence[str], by: By) -> tuple[tuple[str, ...], tuple[str, ...], list[str]]:
        """(globs for quartet.exclude, globs for set_recipe, why one of them is empty) that reach these linears and no other candidate."""
        chosen = [use for use in self.uses if use.rewritten and use.name in linears]
        others = [use for use in self.uses if use.rewritten and use.name not in linears]
        why = []
        exclude = _reaching([u.name_in_graph for u in chosen], [u.name_in_graph for u in others], [u.name_in_graph for u in chosen], by)
        if not exclude:
            why.append("quartet.exclude cannot single these out: a graph serves several layers, and it sees the names in the graph")
        elif any(use.by_code or use.by_set_recipe for use in chosen):
            exclude = ()
            why.append("quartet.exclude does not reach what the model's code or quartet.set_recipe decided")
        modules = [name for name, _ in self.model.named_modules() if name]
        only = _reaching([u.module for u in chosen], [u.module for u in others], [u.name for u in chosen], by)
        if not only or not all(any(fnmatchcase(module, glob) for module in modules) for glob in only):
            only = ()
            why.append("quartet.set_recipe cannot single these out: another module's forward computes them together with others")
        elif any(use.by_code for use in chosen):
            only = ()
            why.append("quartet.set_recipe does not reach what the model's code decided")
        return exclude, only, why


def _reaching(chosen: Sequence[str], others: Sequence[str], names: Sequence[str], by: By) -> tuple[str, ...]:
    """The shortest list of globs over `names` that covers all of `chosen` and none of `others`; empty if there is none."""
    unique = list(dict.fromkeys(names))
    keys: list[Callable[[str], str]] = [kind_of, str]
    for key in [block_of, *keys] if by == "block" else keys:
        globs = tuple(dict.fromkeys(_glob(name, key, unique, others) for name in unique))
        if all(any(covers(g, name) for g in globs) for name in chosen) and not any(covers(g, name) for g in globs for name in others):
            return globs
    return ()


def _glob(name: str, key: Callable[[str], str], names: Sequence[str], others: Sequence[str]) -> str:
    """key(name) if it stands for several names and covers no other, else the name."""
    glob = key(name)
    return glob if sum(key(n) == glob for n in names) > 1 and not any(covers(glob, other) for other in others) else name
