"""The page of a report says what the report says, is one file, and links the lines that belong together.

Read here as HTML; `test_page_in_browser` runs its scripts.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from page_support import LEFT, LINEAR, Page, report_of
from test_report import Breaking, Model, tokens
from torch import Tensor, nn

import quartet_compile as quartet
from quartet_compile.kernels.chosen import Choice
from quartet_compile.page.items import items_of, leaves_of
from quartet_compile.page.lines import links_of
from quartet_compile.page.picture import picture_of
from quartet_compile.page.tree import Module, tree_of
from quartet_compile.reports import SOURCES, LinearReport, OtherProduct, Report
from quartet_compile.text import bytes_text


@pytest.fixture(scope="module")
def report() -> Report:
    return quartet.explain(Model(), tokens(), options={"quartet.exclude": ["x.*", "layers.0.v"]})


@pytest.fixture(scope="module")
def broken() -> Report:
    return quartet.explain(Breaking(), torch.randn(8, 64))


@pytest.fixture(scope="module")
def page(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(report, tmp_path_factory.mktemp("page"))


def page_of(report: Report, folder: Path) -> Page:
    return Page(report.save(folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_is_one_file_that_loads_nothing(report: Report, page: Page, tmp_path: Path) -> None:
    for element in page.root.all():
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert (element.attributes.get(name) or "data:").startswith("data:"), element.attributes
    text = report.save(tmp_path / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r"\w+://[^\s\"'`]*", text)) == {"http://www.w3.org/2000/svg"}, "the name of a language, which nothing loads"
    assert "url(" not in text
    assert "@import" not in text
    policy = page.root.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")


def test_the_page_says_all_that_the_printed_report_says(report: Report, page: Page) -> None:
    header = page.root.one("header").text
    first, *_, operations, multiplied, kept = str(report).splitlines()
    numbers = re.findall(r"[\d.]+(?:%| [KMGT]i?B?)?", f"{first} {operations} {kept}")
    assert len(numbers) == 14
    assert multiplied == "multiplied as: emulated on the CPU (3 linears)"
    assert multiplied in header
    for number in numbers:
        assert number in header, number
    assert "3 of 7 linears in NVFP4" in header
    for linear in report.linears:
        article = page.article(linear.name).text
        for said in (linear.name, linear.source, linear.recipe, linear.decided_by, linear.reason, linear.dtype, linear.left_because or ""):
            assert said in article
        assert linear.reason in page.leaf(linear.name).text
        assert [cell.text for cell in page.leaf(linear.name).all("i", class_="in")] == list(linear.products)
    assert report.not_captured == ("unused",)
    assert "in no graph" in page.leaf("unused").text
    notes = page.root.one("section", class_="notes").text
    assert "no product in a captured graph belongs to unused" in notes
    assert "quartet.exclude: x.* matches no linear" in notes


def test_states_are_counted_and_named(page: Page) -> None:
    filters = {str(button.attributes["data-state"]): button.text for button in page.root.all("button", class_="filter")}
    assert filters == {
        "nvfp4": "in NVFP4 3", "default": "left by default 3", "user": "left by the user 1", "missing": "not found 1",
        "other": "other products 6",
    }  # fmt: skip
    (layer,) = [row for row in page.root.all("li", class_="module") if row.all("div", title="layers.0")]
    assert layer.all("span", class_="of")[0].text == "3/4"
    states = {key: page.article(key).one("span", class_="chip").text for key in ("layers.0.q", "layers.0.v", "small", "unused")}
    assert list(states.values()) == ["in NVFP4: y dx dw", "left by the user", "left by default", "not found"]


def test_every_other_product_is_on_the_page(report: Report, page: Page) -> None:
    rows = page.article("layers.0/products").one("tbody").all("tr")
    assert len(rows) == len(report.others) == 6
    for row, product in zip(rows, report.others, strict=True):
        assert all(said in row.text for said in (product.node, product.operator, product.source, str(list(product.shape))))
        assert ("backward" in row.text) == product.backward


def test_graph_breaks_and_modules_that_share_a_graph_are_on_the_page(broken: Report, tmp_path: Path) -> None:
    page = page_of(broken, tmp_path)
    notes = page.root.one("section", class_="notes").text
    assert notes.count("ends at a graph break: Call to `torch._dynamo.graph_break()`") == 2
    keys = [str(leaf.attributes["data-key"]) for leaf in page.root.all("li", class_="leaf")]
    assert sorted(keys) == ["first", "first~2", "last", "layers.0.up", "layers.1.up", "layers.2.up"]
    assert page.leaf("layers.0.up").attributes["data-item"] == page.leaf("layers.2.up").attributes["data-item"]
    assert "layers.1.up, layers.2.up" in page.article("layers.1.up").text
    assert "run for 3 modules" in page.root.one("section", id="sources").text


def test_graphs_that_are_not_in_use_keep_their_sources_but_have_no_linears(tmp_path: Path) -> None:
    old = report_of(LINEAR, superseded=True, forward="old = 1", forward_before="old = 2").graphs[0]
    new = report_of(LINEAR, recompiled="x is longer", forward="new = 1", forward_before="new = 2").graphs[0]
    page = page_of(Report((old, new)), tmp_path)
    assert [leaf.attributes["data-key"] for leaf in page.root.all("li", class_="leaf")] == ["up"]
    assert "graph 0 is not counted: another compilation is in its place" in page.root.one("header").text
    assert "graph 1 was compiled again, because x is longer" in page.root.one("header").text
    assert page.source(0, "forward") == "old = 1"


HOSTILE = "</script><script>document.title='taken'</script><!-- <b>&amp;\" onload='x'"


def test_what_inductor_took_is_on_the_page(tmp_path: Path) -> None:
    chosen = {"y": Choice("mm", None, 20), "dw": Choice("triton_mm_17", (128, 64, 32), 19)}
    page = page_of(report_of(dataclasses.replace(LINEAR, implementation="bfloat16 values, a measured choice", chosen=chosen)), tmp_path)
    facts = {row.one("dt").text: row.one("dd").text for row in page.article(LINEAR.name).all("div") if row.all("dt")}
    assert facts["multiplied as"] == "bfloat16 values, a measured choice"
    assert facts["Inductor took"] == "y: cuBLAS, of 20; dw: Triton tiles of 128 x 64 x 32, of 19"


def test_names_reasons_and_sources_are_text(tmp_path: Path) -> None:
    plain = page_of(report_of(dataclasses.replace(LEFT, name="a"), forward="x", forward_before="x"), tmp_path)
    linear = dataclasses.replace(LEFT, name=f"layers.{HOSTILE}", reason=HOSTILE, source=HOSTILE, decided_by=HOSTILE, also=("<i>",))
    other = OtherProduct(HOSTILE, HOSTILE, "<b>", HOSTILE, (1,), False, 1)
    page = page_of(
        dataclasses.replace(
            report_of(linear, others=(other,), forward=HOSTILE, forward_before=HOSTILE, graph_break=HOSTILE),
            not_captured=(HOSTILE,), unmatched=((HOSTILE, HOSTILE),),
        ),
        tmp_path,
    )  # fmt: skip
    assert len(page.root.all("script")) == len(plain.root.all("script"))
    assert page.root.one("title").text == "quartet: 0 of 2 linears in NVFP4"
    assert page.article(linear.name).one("p", class_="why").text == f"Why: {HOSTILE} [user]"
    assert page.root.one("section", class_="notes").text.count(HOSTILE) == 4
    assert page.data["leaves"][0]["key"] == linear.name
    assert not set("<>&") & set(page.root.one("script", id="data").text), "what could end a script, or begin a comment in one"
    assert page.source(0, "forward") == HOSTILE
    assert page.article("<b>/products").all("td")[0].text == HOSTILE, "a node without a line has its name all the same"


def test_sources_are_those_of_the_report(report: Report, page: Page) -> None:
    for name in SOURCES:
        assert page.source(0, name) == getattr(report.graphs[0], name)


def text_at(report: Report, name: str, line: int) -> str:
    return getattr(report.graphs[0], name).splitlines()[line - 1].strip()


def test_lines_are_those_of_the_nodes(report: Report, page: Page) -> None:
    items = items_of(report)
    for direction, links in page.data["links"][0].items():
        for number, before, after, pairs in links:
            item = items[number]
            names = [re.split(r"\W", text_at(report, direction, line), maxsplit=1)[0] for line in after]
            assert {name for name in names if name in item.after} == {re.sub(r"_(codes|scales|tensor_scale)$", "", name) for name in names}
            assert all(text_at(report, f"{direction}_before", line).startswith(item.before) for line in before)
            for a, b in pairs:
                assert "torch.ops.aten." in text_at(report, f"{direction}_before", a)
                new = "torch.ops.quartet.matmul" if item.state == "nvfp4" else "torch.ops.aten."
                assert new in text_at(report, direction, b)
            products = {"forward": {"y"}, "backward": {"dx", "dw"}}[direction]
            if item.linear is not None:
                assert len(pairs) == len(products & set(item.linear.in_graph))


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_every_line_of_ours_belongs_to_a_linear(report: Report, page: Page, name: str) -> None:
    found = {line for _, _, after, _ in page.data["links"][0][name] for line in after}
    ours = [i for i, line in enumerate(getattr(report.graphs[0], name).splitlines(), 1) if " = torch.ops.quartet." in line]
    assert len(ours) > 6
    assert set(ours) <= found


def test_jumps_lead_to_the_lines_of_nodes(report: Report, page: Page) -> None:
    for linear in report.linears:
        for jump in page.article(linear.name).all("button", class_="jump"):
            node, line = jump.text.split(":")
            assert text_at(report, str(jump.attributes["data-source"]), int(line)).startswith((f"{node}:", f"{node} ="))
        assert len(page.article(linear.name).all("button", class_="jump")) == len(linear.before) + len(linear.after)


# ---------------------------------------------------------------- the picture

BYTES = {"f32": 4, "u8": 1, "f8e4m3fn": 1}


def bytes_of(source: str, node: str) -> int:
    """What a tensor of a graph takes, or a packed one, by the shapes in its source."""
    declared = re.findall(rf'^ +{node}(?:_codes|_scales|_tensor_scale)?: "(\w+)\[([\d, ]*)\]"', source, re.MULTILINE)
    return sum(BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n.strip()) for dtype, shape in declared)


def test_bytes_in_the_picture_are_those_of_the_tensors_in_the_graph() -> None:
    class Two(nn.Module):
        """Sizes that no block of 16 or 128 divides."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(72, 200, bias=False), nn.Linear(200, 88, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    report = quartet.explain(Two(), torch.randn(100, 72))
    graph, linear = report.graphs[0], report.linears[1]
    picture = picture_of(linear)
    assert picture is not None
    drawn = {box.lines[0]: box.lines[-1] for box in picture.boxes}
    nodes = {
        "packed x": (graph.forward, "second_x"), "packed w": (graph.forward, "second_w"), "y = x wᵀ": (graph.forward, "second_y"),
        "packed xᵀ": (graph.backward, "second_xt"), "packed wᵀ": (graph.backward, "second_wt"), "dw = eᵀ x": (graph.backward, "second_dw"),
        "packed e": (graph.backward, "second_dx_e"), "packed eᵀ": (graph.backward, "second_dw_e"),
        "dx = e w": (graph.backward, "second_dx"),
        "e": (graph.backward_before, "tangents_1"),
    }  # fmt: skip
    for name, (source, node) in nodes.items():
        size = bytes_of(source, node) or 100 * 88 * 4  # tangents are declared in the signature
        assert drawn.pop(name) == f"{size / 1024:.1f} KiB", name
    assert drawn == {"x": f"{100 * 200 * 4 / 1024:.1f} KiB", "w": f"{88 * 200 * 4 / 1024:.1f} KiB"}
    rules = {box.lines[0]: box.rule for box in picture.boxes if box.rule}
    assert rules == {
        "packed x": "four_over_six", "packed w": "four_over_six", "packed xᵀ": "ms_eden of the saved", "packed eᵀ": "ms_eden",
        "packed e": "ms_eden", "packed wᵀ": "ms_eden of the saved",
    }  # fmt: skip


def test_groups_are_drawn_with_the_rows_that_they_are_padded_to() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(4, 64, 96).bfloat16())

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return torch._grouped_mm(x * 2, self.experts, offs=ends)

    ends = torch.tensor([10, 30, 60, 100], dtype=torch.int32)
    report = quartet.explain(Experts(), torch.randn(100, 64, requires_grad=True).bfloat16(), ends)
    (linear,), graph = report.linears, report.graphs[0]
    picture = picture_of(linear)
    assert picture is not None
    drawn = {box.lines[0]: box.lines[-1] for box in picture.boxes if box.kind == "packed"}
    stem = linear.after[0].removesuffix("_y")
    nodes = {"x": "x", "w": "w", "xᵀ": "xt", "wᵀ": "wt", "e": "dx_e", "eᵀ": "dw_e"}
    sizes = {f"packed {name}": bytes_of(graph.forward + graph.backward, f"{stem}_{node}") for name, node in nodes.items()}
    assert all(size > 5000 for size in sizes.values())
    assert drawn == {name: bytes_text(size) for name, size in sizes.items()}
    assert {box.lines[0]: box.lines[1] for box in picture.boxes}["w"] == "bf16 [4, 96, 64]"


def labels(linear: LinearReport) -> list[str]:
    picture = picture_of(linear)
    assert picture is not None
    return [" ".join(arrow.label) for arrow in picture.arrows if arrow.label]


def test_the_picture_says_what_is_kept() -> None:
    assert labels(LINEAR) == ["kept 18.0 KiB", "kept 4.5 KiB"]
    assert labels(dataclasses.replace(LINEAR, saved_after=0, weight_bytes=0)) == ["quantized again", "quantized again"]
    assert labels(dataclasses.replace(LINEAR, saved_before=0, saved_after=0)) == ["shared", "kept 4.5 KiB"]
    assert labels(LEFT) == ["kept 64.0 KiB", "parameter"]


@pytest.mark.parametrize(
    ("in_graph", "boxes"),
    [
        (("y",), ["x", "w", "packed x", "packed w", "y = x wᵀ"]),
        (("y", "dw"), ["x", "w", "packed x", "packed w", "y = x wᵀ", "e", "dw = eᵀ x", "packed xᵀ", "packed eᵀ"]),
        (("y", "dx"), ["x", "w", "packed x", "packed w", "y = x wᵀ", "e", "dx = e w", "packed wᵀ", "packed e"]),
    ],
)
def test_the_picture_has_the_products_that_exist(in_graph: tuple[str, ...], boxes: list[str]) -> None:
    picture = picture_of(dataclasses.replace(LINEAR, in_graph=in_graph, products=in_graph))
    assert picture is not None
    assert [box.lines[0] for box in picture.boxes] == boxes


def test_a_gradient_that_is_not_rewritten_reads_the_tensors_themselves() -> None:
    picture = picture_of(dataclasses.replace(LINEAR, products=("y", "dx"), saved_after=65536))
    assert picture is not None
    assert [box.kind for box in picture.boxes if box.kind.startswith("product")] == ["product nvfp4", "product", "product nvfp4"]
    assert [box.lines[0] for box in picture.boxes if box.kind == "packed"] == ["packed x", "packed w", "packed wᵀ", "packed e"]
    assert picture_of(dataclasses.replace(LINEAR, shape=None)) is None


def test_boxes_do_not_touch_and_stay_inside() -> None:
    for linear in (LINEAR, LEFT, dataclasses.replace(LINEAR, products=("y",), in_graph=("y",))):
        picture = picture_of(linear)
        assert picture is not None
        for i, box in enumerate(picture.boxes):
            assert 0 <= box.x <= box.x + box.width <= picture.width
            assert 0 <= box.y <= box.y + box.height <= picture.height
            for other in picture.boxes[:i]:
                apart_x = box.x >= other.x + other.width or other.x >= box.x + box.width
                assert apart_x or box.y >= other.y + other.height or other.y >= box.y + box.height, (box, other)


def test_linears_of_one_form_share_a_picture(tmp_path: Path) -> None:
    page = page_of(report_of(*(dataclasses.replace(LINEAR, name=f"layers.{i}") for i in range(5)), LEFT), tmp_path)
    assert len(page.root.all("svg", class_="picture")) == 2
    assert len(page.root.all("figure")) == 6


def test_products_that_exist_are_in_the_report() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight.requires_grad_(False)
    model[2].requires_grad_(True)
    linears = {linear.name: linear for linear in quartet.explain(model, torch.randn(32, 64), options={"quartet.exclude": "2"}).linears}
    assert [linears[name].in_graph for name in "012"] == [("y", "dw"), ("y", "dx"), ("y", "dx", "dw")]
    assert linears["2"].products == ()
    with torch.no_grad():
        assert {linear.in_graph for linear in quartet.explain(model, torch.randn(32, 64)).linears} == {("y",)}


# ---------------------------------------------------------------- the tree


def outline(*names: str, **changed: LinearReport) -> list[object]:
    """The tree of linears with these names, as nested lists."""
    linears = [dataclasses.replace(changed.get(name.replace(".", "_"), LINEAR), name=name) for name in names]
    items = items_of(report_of(*linears))

    def listed(module: Module) -> list[object]:
        return [[part.label, *listed(part)] if isinstance(part, Module) else part.label for part in module.parts]

    return listed(tree_of(items, leaves_of(items)))


def test_the_tree_follows_the_names() -> None:
    assert outline("up", "a.b.c", "a.b.d", "head") == ["up", ["a.b", "c", "d"], "head"]
    assert outline("layers.10.q", "layers.2.q") == [["layers", ["2", "q"], ["10", "q"]]]
    assert outline("a", "a.b") == ["a", ["a", "b"]]


def test_alike_blocks_are_one_line() -> None:
    names = [f"layers.{i}.q" for i in range(5)]
    assert outline(*names, layers_0_q=LEFT) == [["layers", ["0", "q"], ["1 … 4", *([str(i), "q"] for i in range(1, 5))]]]
    assert outline(*names[:2]) == [["layers", ["0", "q"], ["1", "q"]]]


# ---------------------------------------------------------------- saving


def test_suffixes_choose_the_format(report: Report, tmp_path: Path) -> None:
    path = report.save(tmp_path / "report.json")
    assert json.loads(path.read_text()) == json.loads(json.dumps(report.to_dict()))
    assert report.save(str(tmp_path / "report.html")) == tmp_path / "report.html"
    for name in ("report.txt", "report"):
        with pytest.raises(ValueError, match=r"valid suffixes are \.html and \.json"):
            report.save(tmp_path / name)
        assert not (tmp_path / name).exists()


def test_without_jinja2_the_error_says_what_to_install(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError, match="pip install jinja2"):
        report.save(tmp_path / "report.html")
    report.save(tmp_path / "report.json")


def test_a_report_without_graphs_has_a_page(tmp_path: Path) -> None:
    page = page_of(Report((), not_captured=("a.b",)), tmp_path)
    assert "0 of 0 linears in NVFP4" in page.root.one("header").text
    assert page.leaf("a.b").all("div", class_="row")[0].text == "bin no graph"


def test_every_link_has_its_lines_once(report: Report) -> None:
    items = dict(enumerate(items_of(report)))
    for of_direction in links_of(report.graphs[0], items).values():
        for link in of_direction.values():
            assert len(set(link.after.all)) == len(link.after.all)
            assert set(link.after.nodes.values()) <= set(link.after.all)


@pytest.mark.slow
def test_a_wheel_contains_the_page(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(root)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    folder = root / "quartet_compile" / "page"
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(files) > 12
    assert {str(path.relative_to(root)) for path in files} <= names


