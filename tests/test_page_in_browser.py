"""The page in headless Chromium: search, filters, selection, linked lines, light and dark, nothing loaded, no errors.

Skipped without playwright or Chromium; with QUARTET_REQUIRE_BROWSER=1, as in CI, that is a failure.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from page_support import large_report
from test_report import Breaking, Model, tokens

import quartet_compile as quartet
from quartet_compile.reports import Report

pytestmark = pytest.mark.slow

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
]  # fmt: skip

CONTENT = "[document.documentElement.scrollWidth, innerWidth]"


def missing(what: str) -> None:
    if os.environ.get("QUARTET_REQUIRE_BROWSER") == "1":
        pytest.fail(f"QUARTET_REQUIRE_BROWSER=1, but there is no {what}")
    pytest.skip(f"needs {what}")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        missing("playwright: pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        missing("Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages of some reports, by name."""
    folder = tmp_path_factory.mktemp("pages")
    reports: dict[str, Report] = {
        "model": quartet.explain(Model(), tokens(), options={"quartet.exclude": ["x.*", "layers.0.v"]}),
        "broken": quartet.explain(Breaking(), torch.randn(8, 64)),
        "large": large_report(),
    }
    return {name: report.save(folder / f"{name}.html") for name, report in reports.items()}


@pytest.fixture
def visit(chromium: Any, saved: dict[str, Path]) -> Iterator[Callable[..., Any]]:
    """Opens a page; at the end nothing but it was asked for, and nothing went wrong in it."""
    pages, wrong, asked = [], [], []

    def open_page(name: str = "model", key: str = "", width: int = 1280, **context: Any) -> Any:
        page = chromium.new_page(viewport={"width": width, "height": 900}, **context)
        pages.append(page)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: asked.append(request.url.partition("#")[0]))
        page.goto(saved[name].as_uri() + (f"#{quote(key, safe='')}" if key else ""))
        page.wait_for_selector("#after .code, #after:empty", state="attached")
        return page

    yield open_page
    for page in pages:
        page.close()
    assert wrong == []
    assert set(asked) <= {path.as_uri() for path in saved.values()}


def shown_leaves(page: Any) -> list[str]:
    return page.eval_on_selector_all(".leaf", "all => all.filter(e => e.getClientRects().length).map(e => e.dataset.key)")


def selected(page: Any) -> tuple[list[str], str]:
    """(keys of the selected leaves, the title of the details)."""
    keys = page.eval_on_selector_all("[aria-selected=true].leaf", "all => all.map(e => e.dataset.key)")
    return keys, page.inner_text("article:not([hidden]) h2")


def marked(page: Any, side: str, mark: str = "selected") -> list[str]:
    """The nodes of the marked lines of a side."""
    page.wait_for_selector(f"#{side} .code.{mark}", state="attached")
    return page.eval_on_selector_all(f"#{side} .code.{mark}", r"all => all.map(e => e.textContent.trim().split(/\W/)[0])")


ALL = ["layers.0.q", "layers.0.k", "layers.0.v", "layers.0.mix", "layers.0/products", "small", "scaled", "lm_head", "unused"]


def test_the_first_rewritten_linear_is_shown(visit: Callable[..., Any]) -> None:
    page = visit()
    assert shown_leaves(page) == ALL
    assert selected(page) == (["layers.0.q"], "layers.0.q")
    assert page.locator("article:not([hidden]) svg.picture").count() == 1


@pytest.mark.parametrize(
    ("typed", "keys"),
    [
        ("lm_head", ["lm_head"]),  # a name
        ("BELOW 64", ["small"]),  # a reason
        ("quartet.exclude layers", ["layers.0.v"]),  # who decided, and a name
        ("quartet2", ["layers.0.q", "layers.0.k", "layers.0.mix"]),  # a recipe
        ("bmm", ["layers.0/products"]),  # an operator
        ("unsupported", []),
    ],
)
def test_search(visit: Callable[..., Any], typed: str, keys: list[str]) -> None:
    page = visit()
    page.keyboard.press("/")
    page.keyboard.type(typed)
    assert shown_leaves(page) == keys
    assert page.is_visible("#nothing") == (not keys)
    page.keyboard.press("Escape")
    assert shown_leaves(page) == ALL


def test_enter_selects_what_was_found_and_search_unfolds(visit: Callable[..., Any]) -> None:
    page = visit()
    page.click("#fold")
    assert shown_leaves(page) == ["small", "scaled", "lm_head", "unused"]
    page.fill("#search", "mix")
    assert shown_leaves(page) == ["layers.0.mix"]
    page.keyboard.press("Enter")
    assert selected(page) == (["layers.0.mix"], "layers.0.mix")
    assert page.evaluate("location.hash") == "#layers.0.mix"


def test_filters(visit: Callable[..., Any]) -> None:
    page = visit()
    page.click(".filter[data-state=nvfp4]")
    assert page.get_attribute(".filter[data-state=nvfp4]", "aria-pressed") == "false"
    assert shown_leaves(page) == [key for key in ALL if key not in ("layers.0.q", "layers.0.k", "layers.0.mix")]
    assert page.inner_text("#shown") == "6 of 9 entries"
    for state in ("user", "default", "other"):
        page.click(f".filter[data-state={state}]")
    assert shown_leaves(page) == ["unused"]
    page.click(".filter[data-state=user]")
    page.fill("#search", "layers")
    assert shown_leaves(page) == ["layers.0.v"]


def test_a_click_and_the_address_select(visit: Callable[..., Any]) -> None:
    page = visit(key="small")
    assert selected(page) == (["small"], "small")
    page.click(".leaf[data-key='layers.0.k'] .label")
    assert selected(page) == (["layers.0.k"], "layers.0.k")
    assert page.evaluate("location.hash") == "#layers.0.k"
    page.go_back()
    assert selected(page) == (["small"], "small")
    page.evaluate("location.hash = 'unused'")
    page.wait_for_selector(".leaf[data-key=unused][aria-selected=true]")
    assert "in no graph" in page.inner_text(".leaf[data-key=unused]")
    page.evaluate("location.hash = '%'")
    page.evaluate("location.hash = 'nowhere'")
    assert selected(page) == (["unused"], "unused")


@pytest.mark.parametrize("width", [1280, 800])
def test_the_tree_scrolls_to_what_the_address_selects(visit: Callable[..., Any], width: int) -> None:
    page = visit("large", key="model.layers.30.part4", width=width)
    leaf, tree = page.locator(".leaf[aria-selected=true]").bounding_box(), page.locator("#tree").bounding_box()
    assert tree["y"] <= leaf["y"]
    assert leaf["y"] + leaf["height"] <= min(tree["y"] + tree["height"], 900)


def test_keys_move_fold_and_select(visit: Callable[..., Any]) -> None:
    page = visit()
    page.focus("#tree [tabindex='0']")
    focused = "document.activeElement.querySelector('.label').textContent"
    for key, label in [("End", "unused"), ("Home", "layers.0"), ("ArrowRight", "q"), ("ArrowDown", "k"), ("ArrowLeft", "layers.0")]:
        page.keyboard.press(key)
        assert page.evaluate(focused) == label
    page.keyboard.press("ArrowLeft")
    assert shown_leaves(page) == ALL[5:]
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert selected(page) == (["small"], "small")
    page.keyboard.press("ArrowUp")
    page.keyboard.press(" ")
    assert shown_leaves(page) == ALL
    assert page.locator("#tree [tabindex='0']").count() == 1


def test_lines_of_a_linear_are_marked_on_both_sides(visit: Callable[..., Any]) -> None:
    page = visit(key="layers.0.mix")
    assert marked(page, "before") == ["mm_3"]
    assert marked(page, "after") == [f"_0_mix_{part}" for operand in "xw" for part in (operand, *parts(operand))] + ["_0_mix_y"]
    page.click("#tab-backward")
    assert sorted(marked(page, "before")) == ["mm_12", "mm_13"]
    assert {"_0_mix_dx", "_0_mix_dw", "_0_mix_xt", "_0_mix_wt"} <= set(marked(page, "after"))


def parts(operand: str) -> list[str]:
    return [f"{operand}_{part}" for part in ("codes", "scales", "tensor_scale")]


def test_lines_lead_to_their_partners_and_to_the_tree(visit: Callable[..., Any]) -> None:
    page = visit(key="layers.0.q")
    left = {"position": {"x": 60, "y": 5}}
    page.locator("#after .code", has_text="_0_mix_y: ").hover(**left)
    assert marked(page, "before", "hover") == ["mm_3"]
    assert page.eval_on_selector_all("#tree .hover", "all => all.map(e => e.dataset.key)") == ["layers.0.mix"]
    page.locator("#before .code", has_text="mm_2: ").click(**left)
    assert selected(page) == (["layers.0.v"], "layers.0.v")
    assert marked(page, "after") == ["mm_2"]
    assert page.locator("#ribbons path.strong").count() == 1


def test_jumps_show_the_line(visit: Callable[..., Any]) -> None:
    page = visit(key="layers.0.q")
    page.click("article:not([hidden]) .jump:has-text('_0_q_wt')")
    row = page.locator("#after .code", has_text="_0_q_wt = torch")
    row.wait_for(state="attached")
    assert page.get_attribute("#tab-backward", "aria-selected") == "true"
    pane, line = page.locator("#after").bounding_box(), row.bounding_box()
    assert pane["y"] <= line["y"] <= pane["y"] + pane["height"]
    assert page.locator("#sources").bounding_box()["y"] < 900


def test_a_linear_shows_its_own_graph(visit: Callable[..., Any]) -> None:
    page = visit("broken", key="last")
    assert page.input_value("#graph") == "2"
    assert marked(page, "before") == ["addmm"]
    page.evaluate("location.hash = 'layers.2.up'")
    page.wait_for_selector(".leaf[data-key='layers.2.up'][aria-selected=true]")
    assert page.input_value("#graph") == "1"
    assert page.inner_text("article:not([hidden]) h2") == "layers.0.up"
    page.select_option("#graph", "3")
    page.locator("#after").get_by_text("root_y").first.wait_for(state="attached")


def test_sides_scroll_together(visit: Callable[..., Any]) -> None:
    page = visit("large", key="model.layers.20.part0")
    numbers = "side => Math.round((byId(side).scrollTop + byId(side).clientHeight / 3) / 17)"
    page.evaluate("byId('after').scrollTop = 17 * 9000")
    page.wait_for_timeout(300)
    before, after = page.evaluate(numbers, "before"), page.evaluate(numbers, "after")
    assert abs(before - after) < 40, "both files have 10,000 lines for the same linears"
    page.uncheck("#together")
    page.evaluate("byId('after').scrollTop = 0")
    page.wait_for_timeout(300)
    assert page.evaluate(numbers, "before") == before


def test_light_and_dark(visit: Callable[..., Any]) -> None:
    def brightness(page: Any) -> int:
        return page.evaluate("parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")

    light, dark = visit(color_scheme="light"), visit(color_scheme="dark")
    assert brightness(light) > 240
    assert brightness(dark) < 40
    for page in (light, dark):
        page.click("#theme")
    assert brightness(light) < 40
    assert brightness(dark) > 240


@pytest.mark.parametrize("width", [1280, 800, 500])
@pytest.mark.parametrize(("name", "key"), [("model", "layers.0.q"), ("model", "layers.0/products"), ("broken", "last"), ("large", "")])
def test_no_page_is_wider_than_the_window(visit: Callable[..., Any], name: str, key: str, width: int) -> None:
    content, window = visit(name, key, width).evaluate(CONTENT)
    assert content <= window == width


def test_a_large_report_shows_only_what_is_visible(visit: Callable[..., Any]) -> None:
    """300 linears and 10,000 lines a source: lines are text but for those near the visible ones."""
    page = visit("large")
    assert page.inner_text("#size-after") == "· 10,000 lines"
    assert page.locator(".leaf").count() == 300
    assert page.locator("#panes .code").count() < 1000
    page.evaluate("byId('after').scrollTop = 1e9")
    page.wait_for_selector("#after .code[data-line='10000']", state="attached")
    assert page.locator("#panes .code").count() < 1000
    assert len(page.evaluate("byId('after').textContent")) > 400_000, "the browser's own search finds all of it"


def test_it_prints_all_of_the_tree(visit: Callable[..., Any]) -> None:
    page = visit()
    page.click("#fold")
    page.emulate_media(media="print")
    assert shown_leaves(page) == ALL
    assert not page.is_visible("#sources")
    assert page.is_visible("article:not([hidden]) svg.picture")
