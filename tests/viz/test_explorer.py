"""The HTML explorer, in a real browser: it opens from disk, answers, and shows the ledger's numbers."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch

import libragrad_fx as lg
from libragrad_fx.viz.explorer import to_data, to_html
from libragrad_fx.viz.graph import SIDES, groups
from libragrad_fx.viz.paint import moved
from tests.viz.test_graph import network

playwright = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


@pytest.fixture(scope="module")
def graph() -> nx.DiGraph:
    model, x = network()
    return lg.gradient_graph(model, x, 1)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        running = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser: Any, graph: nx.DiGraph, tmp_path: Path) -> Iterator[Any]:
    """The explorer of ``network``, opened from disk; whatever it complains of fails the test."""
    complaints: list[str] = []
    path = tmp_path / "g.html"
    path.write_text(to_html(graph), "utf-8")
    opened = browser.new_page(viewport={"width": 1400, "height": 900})
    opened.on("console", lambda m: complaints.append(m.text))
    opened.on("pageerror", lambda e: complaints.append(str(e)))
    opened.on("request", lambda r: r.url.startswith(("file:", "blob:")) or complaints.append(r.url))
    opened.goto(path.as_uri())
    settled(opened, 1)
    yield opened
    assert complaints == []
    opened.close()


def settled(page: Any, layouts: int) -> None:
    page.wait_for_selector(f'body[data-layouts="{layouts}"]', timeout=20_000)


def drawn(page: Any) -> set[str]:
    found = page.locator("#stage .node")
    return {found.nth(i).get_attribute("data-item") for i in range(found.count())}


def test_the_page_knows_the_ledgers_numbers(graph: nx.DiGraph) -> None:
    data = to_data(graph)
    for node in data["nodes"]:
        for side in SIDES:
            assert node[side] == graph.nodes[node["id"]][side]
    assert {(e["from"], e["to"]): e["plain"] for e in data["edges"]} == {
        (a, b): d["plain"] for a, b, d in graph.edges(data=True)
    }
    json.dumps(data, allow_nan=False)


def test_groups_hold_what_their_nodes_sum_up_to(graph: nx.DiGraph) -> None:
    found = groups(graph)
    assert found["1.1 … 4 (× 4)"]["parent"] == "1"
    assert found["1.2"]["parent"] == "1.1 … 4 (× 4)"
    inside = [d for _, d in graph.nodes(data=True) if d["module"].startswith("1.2")]
    assert found["1.2"]["ops"] == len(inside)
    assert found["1.2"]["plain"]["lost"] == pytest.approx(sum(d["plain"]["lost"] for d in inside))


def test_nothing_in_a_name_ends_a_script(graph: nx.DiGraph) -> None:
    hostile = graph.copy()
    hostile.graph["title"] = "</title><script>alert(1)</script>"
    hostile.nodes["silu"]["reason"] = "</script><script>alert(1)</script>"
    assert "<script>alert" not in to_html(hostile)


@needs_browser
def test_it_opens_small(page: Any, graph: nx.DiGraph) -> None:
    assert drawn(page) == {"guard", "linear", "1.0", "1.1 … 4 (× 4)", "1.5", "linear_13", "output"}
    ops = [d for _, d in graph.nodes(data=True) if d["plain"] and d["op"] != "target"]
    assert f"{len(ops)} ops that a gradient passes" in page.inner_text("#details")


@needs_browser
def test_the_scale_says_how_much_a_colour_is(page: Any, graph: nx.DiGraph) -> None:
    """The number below a place of the scale is what a node of that colour loses and creates."""
    ticks = page.locator("#ticks span").all()
    middle = page.locator("#scale").bounding_box()
    at = lambda t: t.bounding_box()["x"] + t.bounding_box()["width"] / 2  # noqa: E731
    places = {(at(t) > middle["x"] + middle["width"] / 2 + 1, t.inner_text()): at(t) for t in ticks}
    zero, ten = places[False, "0"], places[True, "10"]
    said = [*groups(graph).values(), *(d for _, d in graph.nodes(data=True))]
    worst = max(moved(d["plain"]) for d in said) / abs(graph.graph["output"]["plain"])
    depth = (ten - zero) / (middle["width"] / 2)
    assert depth == pytest.approx(math.log1p(10) / math.log1p(100 * worst), abs=0.02)


@needs_browser
def test_a_search_for_what_is_drawn_finds_it(page: Any) -> None:
    """``freeze_scale`` is drawn as two words; arrows walk through what is found."""
    page.fill("#query", "freeze scale")
    assert page.locator("#found button").count() > 1
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.querySelectorAll('#found button')[1] === document.activeElement")
    page.mouse.click(700, 500)
    assert page.locator("#found button").count() == 0


@needs_browser
def test_opening_and_closing(page: Any) -> None:
    before = drawn(page)
    page.dblclick('.node[data-item="1.5"]')
    settled(page, 2)
    inside = {n for n in drawn(page) if n.startswith(("layer_norm", "silu", "add"))}
    assert drawn(page) == before - {"1.5"} | inside | {"linear_11", "linear_12"}
    page.keyboard.press("Enter")
    settled(page, 3)
    assert drawn(page) == before
    page.click("#fold")
    settled(page, 4)
    assert drawn(page) == before - {"1.0", "1.1 … 4 (× 4)", "1.5"} | {"1"}


@needs_browser
def test_the_switch_changes_what_is_drawn(page: Any, graph: nx.DiGraph) -> None:
    label = lambda: page.text_content('.node[data-item="1.0"]')  # noqa: E731
    colour = lambda: page.locator('.node[data-item="1.0"] path').first.evaluate(  # noqa: E731
        "e => getComputedStyle(e).fill"
    )
    plain = label(), colour()
    inside = [d["plain"] for _, d in graph.nodes(data=True) if d["module"].startswith("1.0")]
    lost = 100 * sum(p["lost"] for p in inside) / abs(graph.graph["output"]["plain"])
    said = re.search(r"loses ([\d.]+)", plain[0])
    assert said
    assert float(said[1]) == pytest.approx(lost, rel=5e-3)
    page.click("text=balanced")
    assert "freeze scale, secant" in label()
    assert colour() != plain[1]
    page.keyboard.press("b")
    assert (label(), colour()) == plain


@needs_browser
def test_flow_is_drawn_as_width(page: Any, graph: nx.DiGraph) -> None:
    widths = "es => es.map(e => parseFloat(getComputedStyle(e).strokeWidth))"
    assert set(page.eval_on_selector_all(".edge path", widths)) == {1.0}
    page.click("text=flow")
    assert len(set(page.eval_on_selector_all(".edge path", widths))) > 1
    assert max(page.eval_on_selector_all(".edge path", widths)) == pytest.approx(10.0)


@needs_browser
def test_search_opens_what_it_finds(page: Any, graph: nx.DiGraph) -> None:
    page.keyboard.press("/")
    page.keyboard.type("silu_3")
    assert page.locator("#found button").count() == 1
    page.keyboard.press("Enter")
    settled(page, 2)
    assert "silu_3" in drawn(page)
    text = page.inner_text("#details")
    data = graph.nodes["silu_3"]
    for fact in (data["module"], data["source"], data["rule"], data["reason"], data["shape"]):
        assert fact in text
    box = page.locator('.node[data-item="silu_3"]').bounding_box()
    stage = page.locator("#stage").bounding_box()
    assert abs(box["x"] + box["width"] / 2 - stage["x"] - stage["width"] / 2) < 5
    page.fill("#query", "no such thing")
    assert page.inner_text("#found") == "nothing found"
    page.fill("#query", "silu")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Escape")
    assert page.input_value("#query") == ""


@needs_browser
def test_a_click_shows_the_account(page: Any, graph: nx.DiGraph) -> None:
    page.click('.node[data-item="linear"]')
    text = page.inner_text("#details")
    mass = graph.edges["guard", "linear"]
    for side in SIDES:
        share = 100 * mass[side] / graph.graph["output"][side]
        assert any(
            float(number) == pytest.approx(share, rel=1e-2)
            for number in re.findall(r"(-?[\d.]+)\s%", text)
        )
    page.keyboard.press("Escape")
    assert "Gradient graph" in page.inner_text("#details")


@needs_browser
def test_keys_go_along_the_edges(page: Any) -> None:
    page.click('.node[data-item="linear"]')
    page.keyboard.press("ArrowDown")
    assert page.locator(".chosen").get_attribute("data-item") == "1.0"
    page.keyboard.press("ArrowUp")
    assert page.locator(".chosen").get_attribute("data-item") == "linear"
    page.keyboard.press("d")
    settled(page, 2)
    page.keyboard.press("ArrowRight")
    assert page.locator(".chosen").get_attribute("data-item") == "1.0"


@pytest.mark.slow
@needs_browser
def test_labels_do_not_overlap(page: Any) -> None:
    page.dblclick('.node[data-item="1.0"]')
    settled(page, 2)
    nodes = page.locator("#stage .node")
    boxes = [nodes.nth(i).bounding_box() for i in range(nodes.count())]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            apart = (
                a["x"] + a["width"] <= b["x"] or b["x"] + b["width"] <= a["x"]
                or a["y"] + a["height"] <= b["y"] or b["y"] + b["height"] <= a["y"]
            )  # fmt: skip
            assert apart
    fits = """es => es.every(e => { const box = e.querySelector("path, polygon").getBBox();
      return [...e.querySelectorAll("text")].every(t => t.getBBox().width <= box.width); })"""
    for key in "bb":
        page.keyboard.press(key)
        assert page.eval_on_selector_all("#stage .node", fits)


@needs_browser
@pytest.mark.slow
def test_a_large_model(browser: Any, tmp_path: Path) -> None:
    """Swin-B: opens in under 2 s, a block in under 1, and the file is no more than 5 MB."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("swin_base_patch4_window7_224").eval()
    path = lg.visualize(model, tmp_path / "g.html", (torch.randn(1, 3, 224, 224),), 0)
    assert path.stat().st_size < 5e6
    page = browser.new_page()
    page.goto(path.as_uri())
    page.wait_for_selector('body[data-layouts="1"]', timeout=2_000)
    page.fill("#query", "layers.2.blocks.5")
    page.keyboard.press("Enter")
    page.wait_for_selector('body[data-layouts="2"]', timeout=2_000)
    page.keyboard.press("Enter")
    page.wait_for_selector('body[data-layouts="3"]', timeout=1_000)
    page.close()
