"""A report as text for a terminal: one line for all layers that are alike."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from quartet_compile.reports import AUTOTUNED, LinearReport, Report

HEADER = ("linear", "source", "T x I -> O", "recipe", "decided by", "rewritten", "input saved")


def text(report: Report) -> str:
    """What `print(report)` shows."""
    rewritten, found = (sum(len(linear.names) for linear in some) for some in (report.rewritten, report.linears))
    lines = [f"quartet: {rewritten} of {found} linears in NVFP4, {len(report.current)} graph(s)"]
    alike = _alike(report.linears)
    if alike:
        lines += ["", *_table([HEADER, *((brief(names), *_row(linear)) for linear, names in alike)])]
    for linear, names in alike:
        if not linear.products:
            lines.append(f"  left: {brief(names)}: {linear.reason} [{linear.left_because}]")
    modules = dict.fromkeys(product.module for product in report.convolutions if not product.backward)
    lines += [f"  no linear: {brief(names)}: a convolution, which stays in the model's dtype" for names in _families(modules)]
    lines += [f"  not found: no product in a captured graph belongs to {brief(names)}" for names in _families(report.not_captured)]
    lines += [f"  {option}: {glob!r} matches no linear" for option, glob in report.unmatched]
    lines += [f"  graph {i} {note}" for i, graph in enumerate(report.graphs) for note in graph.notes]
    lines.append("")
    if report.flops:
        parts = report.flops_in_nvfp4, report.flops - report.flops_in_nvfp4 - report.flops_of_others, report.flops_of_others
        ours, left, others = (part / report.flops for part in parts)
        lines.append(
            f"floating point operations of products: {count_text(report.flops)}, {ours:.1%} in NVFP4, "
            f"{left:.1%} of linears left" + (f", {others:.1%} of {kinds_of_others(report)}" if report.others else "")
        )
    lines += [f"multiplied as: {how} ({_count(count, 'linear')})" for how, count in report.implementations.items()]
    lines += _chosen(report)
    lines.append(
        f"kept for the backward pass: activations {bytes_text(report.saved_bytes_before)} -> {bytes_text(report.saved_bytes_after)}, "
        f"weights beside the parameters {bytes_text(report.weight_bytes_before)} -> {bytes_text(report.weight_bytes_after)}"
    )
    return "\n".join(lines)


def _chosen(report: Report) -> list[str]:
    """What Inductor took where it could choose: a line for each choice with the products that it is for, and one for what is not known."""
    by_choice: dict[str, dict[tuple[str, str], list[str]]] = {}
    unknown: Counter[bool] = Counter()
    for graph in report.current:
        for linear in graph.linears:
            if AUTOTUNED not in linear.implementation:
                continue
            unknown[graph.cached] += len(linear.names) * (len(linear.products) - len(linear.chosen))
            for choice in dict.fromkeys(map(str, linear.chosen.values())):
                kinds = " ".join(kind for kind in linear.products if kind in linear.chosen and str(linear.chosen[kind]) == choice)
                family = re.sub(r"\d+", "#", linear.name), kinds
                by_choice.setdefault(choice, {}).setdefault(family, []).extend(linear.names)
    lines = []
    for choice, families in sorted(by_choice.items()):
        parts = (f"{brief([*dict.fromkeys(names)])} ({kinds})" for (_, kinds), names in families.items())
        lines.append(f"  Inductor took {choice} for {', '.join(parts)}")
    reasons = {True: "their code came from torch's cache", False: "nothing was measured in this process"}
    return lines + [f"  what Inductor takes is not known of {unknown[c]} products: {why}" for c, why in reasons.items() if unknown[c]]


def kinds_of_others(report: Report) -> str:
    """How many products belong to no linear, in words."""
    convolutions = len(report.convolutions)
    of_activations = len(report.others) - convolutions
    counts = ((of_activations, "other product", " (attention)"), (convolutions, "convolution", ""))
    return " and ".join(_count(count, what) + gloss for count, what, gloss in counts if count)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def brief(names: Sequence[str]) -> str:
    """Names that differ in numbers as one, "layers.0-11.q" or "layers.0-11.up[0-3]", if all combinations are there; others by the first."""
    if len(set(names)) == 1:
        return names[0] if len(names) == 1 else f"{names[0]} ({len(names)} times)"
    parts = [re.split(r"(\d+)", name) for name in names]
    if len({tuple(part[::2]) for part in parts}) == 1:
        columns = [sorted({int(n) for n in column}) for column in zip(*(part[1::2] for part in parts), strict=True)]
        whole = all(column == list(range(column[0], column[-1] + 1)) for column in columns)
        if whole and math.prod(map(len, columns)) == len(names) == len(set(names)):
            shown = list(parts[0])
            for i, column in enumerate(columns):
                if len(column) > 1:
                    shown[2 * i + 1] = f"{column[0]}-{column[-1]}"
            return "".join(shown)
    return f"{names[0]} (and {len(names) - 1} more)"


def _families(names: Iterable[str]) -> list[list[str]]:
    """Names that are the same but for their numbers, together."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    return list(families.values())


def _alike(linears: Sequence[LinearReport]) -> list[tuple[LinearReport, list[str]]]:
    """(the first, all names) of the linears of which nothing but the number in their names differs."""
    families: dict[tuple[str, ...], tuple[LinearReport, list[str]]] = {}
    for linear in linears:
        key = re.sub(r"\d+", "#", linear.name), *_row(linear), linear.reason
        families.setdefault(key, (linear, []))[1].extend(linear.names)
    return list(families.values())


def _row(linear: LinearReport) -> tuple[str, ...]:
    """What stands behind its name."""
    shape = "" if linear.shape is None else f"{linear.shape[0]} x {linear.shape[1]} -> {linear.shape[2]}"
    saved = ""
    if linear.saved_before or linear.saved_after:
        saved = f"{bytes_text(linear.saved_before)} -> {bytes_text(linear.saved_after)}"
    elif "dw" in linear.in_graph:
        saved = "shared"
    return linear.source, shape, linear.recipe, linear.decided_by, " ".join(linear.products) or "-", saved


def bytes_text(n: int) -> str:
    """4608 -> "4.5 KiB"."""
    return f"{n} B" if n < 1024 else f"{n / 1024:.1f} KiB" if n < 1024**2 else f"{n / 1024**2:.1f} MiB"


def count_text(n: int) -> str:
    """23200000 -> "23.2 M"."""
    steps = min(4, (len(str(n)) - 1) // 3)
    return f"{n / 1000**steps:.3g}{('', ' K', ' M', ' G', ' T')[steps]}"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
