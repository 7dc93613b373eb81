"""The page: a report's items, lines and pictures in the templates, with styles and scripts inlined."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quartet_compile.page.items import STATES, Item, Leaf, items_of, leaves_of
from quartet_compile.page.lines import DIRECTIONS, Link, links_of
from quartet_compile.page.picture import FORWARD_WIDTH, Picture, picture_of
from quartet_compile.page.tree import tree_of
from quartet_compile.reports import SOURCES, LinearReport, Report
from quartet_compile.text import bytes_text, count_text, kinds_of_others

SCRIPTS = ("code.js", "tree.js", "sources.js", "main.js")
STATIC = Path(__file__).parent / "static"


def render(report: Report) -> str:
    """One HTML file that needs no other. Raises ModuleNotFoundError without jinja2."""
    environment = _environment()
    items = items_of(report)
    leaves = leaves_of(items)
    links = [links_of(graph, {n: item for n, item in enumerate(items) if item.graph == i}) for i, graph in enumerate(report.graphs)]
    pictures, picture_numbers = _pictures(items)
    script = "\n".join((STATIC / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return environment.get_template("page.html").render(
        report=report,
        rewritten=sum(len(linear.names) for linear in report.rewritten),
        found=sum(len(linear.names) for linear in report.linears),
        items=items,
        tree=tree_of(items, leaves),
        states=STATES,
        kinds_of_others=kinds_of_others(report),
        counts=Counter(item.state for item in items for _ in (item.products or item.names)),
        links=links,
        directions=DIRECTIONS,
        pictures=pictures,
        picture_numbers=picture_numbers,
        forward_width=FORWARD_WIDTH,
        sources=_sources(report),
        data=_for_script(_data(items, leaves, links)),
        style=(STATIC / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode(),
    )


def _environment() -> Any:
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the HTML page of a report needs jinja2: pip install jinja2", name="jinja2") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"bytes": bytes_text, "count": count_text, "percent": lambda share: f"{share:.1%}"}
    return environment


def _pictures(items: Sequence[Item]) -> tuple[list[Picture], dict[int, int]]:
    """(the pictures, which one shows an item): linears of one form share theirs."""
    numbers: dict[tuple[object, ...], int] = {}
    pictures: list[Picture] = []
    of_item = {}
    for i, item in enumerate(items):
        if item.linear is None or (picture := picture_of(item.linear)) is None:
            continue
        form = _form(item.linear)
        if form not in numbers:
            numbers[form] = len(pictures)
            pictures.append(picture)
        of_item[i] = numbers[form]
    return pictures, of_item


def _form(linear: LinearReport) -> tuple[object, ...]:
    """All that a picture shows."""
    kept = linear.saved_before > 0, linear.saved_after, linear.weight_bytes
    return linear.shape, linear.dtype, linear.recipe, linear.products, linear.in_graph, linear.groups, kept


def _sources(report: Report) -> dict[str, str]:
    """The sources by "graph/field", compressed: they repeat themselves, and a browser can inflate them."""
    texts = {f"{i}/{name}": getattr(graph, name) for i, graph in enumerate(report.graphs) for name in SOURCES}
    return {key: base64.b64encode(zlib.compress(text.encode(), 9)).decode() for key, text in texts.items() if text}


def _data(items: Sequence[Item], leaves: Sequence[Leaf], links: Sequence[dict[str, dict[int, Link]]]) -> dict[str, Any]:
    """What the scripts read. links: by graph and direction, [item, lines before, lines after, pairs of lines]."""
    return {
        "items": [{"state": item.state, "graph": item.graph, "words": item.words} for item in items],
        "leaves": [{"key": leaf.key, "item": leaf.item} for leaf in leaves],
        "links": [
            {direction: [[n, link.before.all, link.after.all, link.pairs] for n, link in of.items()] for direction, of in graph.items()}
            for graph in links
        ],
    }


def _for_script(data: Any) -> str:
    """JSON that can stand in a script element."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
