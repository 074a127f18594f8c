"""What a plan, a ledger, a certificate and a program print, a notebook shows, as tables."""

from __future__ import annotations

import dataclasses
import html
import re
from typing import Any

import pytest
import torch
from torch import nn

import libragrad_fx as lg

NET = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)).double().eval()
X = torch.randn(2, 4, dtype=torch.float64)


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    gm = lg.transform(NET, X)
    program = lg.program(NET, X, method="input_x_gradient")
    return {
        "plan": lg.plan(NET, X), "ledger": lg.audit(NET, X, 1), "certificate": lg.verify(NET, gm, X, 1),
        "program": program,
    }  # fmt: skip


def words(text: str) -> list[str]:
    return [w for w in text.split() if set(w) != {"-"}]


@pytest.mark.parametrize("kind", ["plan", "ledger", "certificate", "program"])
def test_a_notebook_shows_the_words_that_print(kind: str, shown: dict[str, Any]) -> None:
    page = shown[kind]._repr_html_()
    plain = html.unescape(re.sub(r"<[^>]+>", " ", page)).replace("\xa0", " ")
    assert words(plain) == words(str(shown[kind]))
    assert ("<table>" in page) is (kind in ("plan", "ledger"))


def test_what_looks_like_a_tag_is_text(shown: dict[str, Any]) -> None:
    plan = dataclasses.replace(shown["plan"], notes=("<script>alert(1)</script>",))
    assert "<script" not in plan._repr_html_()
    assert "note: <script>" in str(plan)


def test_a_program_says_what_it_runs(shown: dict[str, Any]) -> None:
    first, graph = str(shown["program"]).splitlines()
    assert first == "program: input_x_gradient of Sequential, policy libra, mode eager"
    said = r"  \d+ ops for any batch of more than one; values differ from attribute's by \S+$"
    assert re.match(said, graph)
