"""The page stands alone, parses, escapes what it is given; the colours of a map say its sign."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser

import numpy as np
import pytest

from libragrad_fx.viz import heatmap
from libragrad_fx.viz.page import (
    Checked,
    Example,
    Map,
    Page,
    Pair,
    Part,
    Summary,
    Word,
    number,
    percent,
    render,
)  # fmt: skip

_VOID = {"meta", "img", "br"}
_DOT = heatmap.data_uri(heatmap.legend(2))
_PAIR = Pair("Method", (Map("plain", 4.45, 0.125, _DOT), Map("balanced", 1.6e-7, 0.77, _DOT)))
_WORDS = (
    Word("<b>", "#ffffff", "#000000", "+1", True),
    Word("of", "#ffffff", "#000000", "-2", False),
)
_SAID = Pair("Method", (Map("plain", 0.5, 0.25, words=_WORDS),))
_PAGE = Page(
    title="<script>alert(1)</script>",
    lede="a & b",
    asked="asked",
    hero=Example("hero", "", (Pair("Method", (Map("plain", 0.97, None, _DOT),)),), _DOT),
    said="said",
    key=_DOT,
    parts=(
        Part("digits", ("about",), (Example("3", "in truth 8", (_PAIR, _PAIR), _DOT),)),
        Part("texts", (), (Example("is", "", (_SAID,)),)),
        Part("photographs", (), missing="get them & come back"),
    ),
    measured="measured",
    summary=(
        Summary("model", "method", (1.03, 3.1e-7), (0.31, 0.62), 0.24),
        Summary("another", "method", (2.0, 0.0)),
    ),
    reading=(("term", "text"),),
    checked=(
        Checked(
            "model",
            "certificate: <ok>",
            True,
            (("gelu", "blocks.0", "secant", "gated/value", "x < y"),),
            ("a note",),
        ),
    ),
    browser="",
    command="run <this>",
    footer="footer",
)


class _Reader(HTMLParser):
    """Checks that tags nest; gathers text, tag names and what is referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(v) for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self.open else ""


def read(html: str, *beside: str) -> _Reader:
    """beside: the pages that it may link."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    assert "http" not in html.replace("http-equiv", "")
    assert "url(" not in html
    assert "@import" not in html
    assert all(link.startswith("data:image/") for link in reader.links if link not in beside)
    return reader


def test_page_is_self_contained_and_escaped() -> None:
    found = read(render(_PAGE))
    assert "script" not in found.tags
    for text in ("<script>alert(1)</script>", "a & b", "certificate: <ok>", "x < y", "in truth 8", "<b>"):
        assert text in found.text
    for text in ("get them & come back", "run <this>", "no truth is known"):
        assert text in found.text
    for value in (4.45, 0.125, 1.6e-7, 0.77, 0.97, 0.5, 0.25, 1.03, 3.1e-7, 0.31, 0.62, 0.24, 2.0, 0.0):
        assert percent(value) in found.text
    assert found.tags.count("img") == 2 + 1 + 5
    assert found.text.count("of red") == 4 + 1  # nothing is said where no truth is known


def test_the_page_in_the_browser_is_linked_once_it_is_there() -> None:
    found = read(render(dataclasses.replace(_PAGE, browser="demo-browser.html")), "demo-browser.html")
    assert "demo-browser.html" in found.links
    assert "run <this>" not in found.text


def test_a_failed_certificate_is_said_to_have_failed() -> None:
    failed = dataclasses.replace(_PAGE.checked[0], certified=False)
    assert "not balanced" in read(render(dataclasses.replace(_PAGE, checked=(failed,)))).text


def test_percentages_have_no_exponent() -> None:
    said = [percent(v).replace("\N{NO-BREAK SPACE}", " ") for v in (4.453, 1.0, 0.0312, 0.97, 1.6e-7, 0.0)]
    assert said == ["445 %", "100 %", "3.1 %", "97 %", "0.00002 %", "0 %"]


def test_numbers_of_any_size() -> None:
    said = [number(v) for v in (0.0, 0.5, 12.345, 0.0123, 1.2e-7, -3e-12)]
    assert said == ["0.00", "0.50", "12.35", "0.012", "1.2·10⁻⁷", "-3.0·10⁻¹²"]


def test_zero_is_neutral_and_signs_are_opposite() -> None:
    zero, plus, minus = heatmap.colours(np.array([0.0, 1.0, -1.0]), 1.0)[:, :3]
    assert zero.min() > 0.95
    assert plus[0] > 2 * plus[2]
    assert minus[2] > 2 * minus[0]
    assert heatmap.shared_scale(np.zeros((2, 2))) == 1
    assert heatmap.shared_scale(np.full((2, 2), -3.0), np.ones((2, 2))) == pytest.approx(3)


def test_overlay_keeps_the_image_where_nothing_is_said() -> None:
    image = np.random.default_rng(0).random((8, 8, 3))
    drawn = heatmap.overlay(image, np.zeros((2, 2)), 1.0)
    assert drawn.shape == image.shape
    assert np.ptp(drawn, axis=2).max() < 0.01  # grey
    grey = image @ np.array([0.299, 0.587, 0.114])
    assert np.corrcoef(drawn.mean(2).ravel(), grey.ravel())[0, 1] > 0.99
