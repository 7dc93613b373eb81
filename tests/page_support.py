"""Reading a saved page without a browser, and reports that no model of ours makes."""

from __future__ import annotations

import base64
import dataclasses
import json
import zlib
from functools import cached_property
from html.parser import HTMLParser
from typing import Any

from quartet_compile.reports import GraphReport, LinearReport, Report

VOID = {"meta", "link", "input", "br", "img"}


class Element:
    def __init__(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.tag, self.attributes = tag, attributes
        self.children: list[Element | str] = []

    @property
    def text(self) -> str:
        """All that is written inside, white space collapsed."""
        return " ".join(self._raw().split())

    def _raw(self) -> str:
        return "".join(child if isinstance(child, str) else child._raw() for child in self.children)

    def all(self, tag: str | None = None, **attributes: str) -> list[Element]:
        """The elements inside with this tag and these attributes; `_` stands for "-", `class_` for one of the classes."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if (tag is None or child.tag == tag) and all(child._has(key, value) for key, value in attributes.items()):
                    found.append(child)
                found += child.all(tag, **attributes)
        return found

    def one(self, tag: str | None = None, **attributes: str) -> Element:
        (element,) = self.all(tag, **attributes)
        return element

    def _has(self, key: str, value: str) -> bool:
        if key == "class_":
            return value in (self.attributes.get("class") or "").split()
        return self.attributes.get(key.replace("_", "-")) == value


class Page(HTMLParser):
    """A page as a tree of elements. Every tag has to be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self._open = [self.root]
        self.feed(text)
        self.close()
        assert len(self._open) == 1, f"<{self._open[-1].tag}> is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self._open[-1].children.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)

    @cached_property
    def data(self) -> dict[str, Any]:
        """What the scripts read."""
        return json.loads(self.root.one("script", id="data").text)

    def article(self, key: str) -> Element:
        """The details of what has this key in the tree."""
        return self.root.one("article", data_item=str(self.leaf(key).attributes["data-item"]))

    def leaf(self, key: str) -> Element:
        return self.root.one("li", data_key=key)

    def source(self, graph: int, name: str) -> str:
        return zlib.decompress(base64.b64decode(self.root.one("script", data_source=f"{graph}/{name}").text)).decode()


LINEAR = LinearReport(
    "up", "model.py:1", (256, 128, 64), "quartet2", "default", ("y", "dx", "dw"), dtype="bfloat16", saved_before=65536, saved_after=18436,
    weight_bytes=4612, flops=3 * 2 * 256 * 128 * 64, in_graph=("y", "dx", "dw"),
)  # fmt: skip
"""All three products rewritten."""

LEFT = dataclasses.replace(
    LINEAR, recipe="bf16", products=(), reason="asked for bf16", left_because="user", saved_after=65536, weight_bytes=0
)  # fmt: skip

GRAPH = GraphReport((), (), 0, 0, 0, 0, 0, 0, "", "", "", "")


def report_of(*linears: LinearReport, **of_graph: Any) -> Report:
    return Report((dataclasses.replace(GRAPH, linears=linears, **of_graph),))


def large_report(linears: int = 300, lines: int = 10_000) -> Report:
    """Linears of alike blocks in one graph, and so many lines in each source."""
    found = []
    before, after = (["class GraphModule(torch.nn.Module):", "    def forward(self):"] for _ in range(2))
    for i in range(linears):
        block, number = divmod(i, 7)
        name = f"model.layers.{block}.part{number}"
        before.append(f'        mm_{i}: "bf16[256, 64]" = torch.ops.aten.mm.default(view_{i}, permute_{i})')
        after.append(f"        x_{i} = torch.ops.quartet.quantize.default(view_{i}, 'four_over_six')")
        after.append(f'        x_{i}_codes: "u8[256, 64]" = x_{i}[0]')
        after.append(f'        y_{i}: "bf16[256, 64]" = torch.ops.quartet.matmul.default(x_{i}_codes, None, 1.0, torch.bfloat16)')
        for text in (before, after):
            while len(text) < (i + 1) * (lines - 10) // linears:
                text.append(f'        add_{len(text)}: "bf16[256, 64]" = torch.ops.aten.add.Tensor(view_{i}, 1.5);  view_{i} = None')
        found.append(dataclasses.replace(LINEAR, name=name, before=(f"mm_{i}",), after=(f"y_{i}", f"x_{i}")))
    texts = ("\n".join(text + ["        return ()"] * (lines - len(text))) for text in (before, after))
    return report_of(*found, **dict(zip(("forward_before", "forward"), texts, strict=True)))
