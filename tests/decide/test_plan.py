"""A plan can be printed, asked and diffed, and it is the only thing that a rewrite obeys."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import libragrad_fx as lg


class SwiGlu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.up(self.norm(x)).chunk(2, -1)
        return self.down(torch.nn.functional.silu(gate) * value)


X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


def test_a_plan_says_what_where_and_why() -> None:
    made = lg.plan(SwiGlu(), X)
    assert [(e.node, str(e.action), e.rule) for e in made.edits] == [
        ("layer_norm", "freeze_scale", "normaliser/value"),
        ("silu", "secant", "gated/value"),
        ("mul", "scale", "product/values"),
    ]
    assert made.edits[2].factor == 0.5
    assert made.edits[0].module == "norm"
    assert all("test_plan.py:" in e.source for e in made.edits[1:])
    text = str(made)
    assert "3 edits" in text
    for word in ("scale output by 0.5", "product/values", "test_plan.py"):
        assert word in text


def test_json_round_trip() -> None:
    body = json.loads(lg.plan(SwiGlu(), X).to_json())
    assert [e["action"] for e in body["edits"]] == ["freeze_scale", "secant", "scale"]


def test_why() -> None:
    made = lg.plan(SwiGlu(), X)
    assert "product/values" in made.explain("mul")
    assert "no edit: balanced by itself" in made.explain("linear")
    with pytest.raises(KeyError, match="did you mean"):
        made.explain("line")


def test_a_second_policy_over_the_same_facts() -> None:
    """Ali et al.'s keeps activations and products: fewer edits, and the plan names what is left."""
    made = lg.plan(SwiGlu(), X, policy="ali_lrp")
    assert [e.rule for e in made.edits] == ["normaliser/value"]
    assert [f.node for f in made.unbalanced] == ["silu", "mul"]
    certificate = lg.verify(SwiGlu(), lg.transform(SwiGlu(), X, policy="ali_lrp"), X, target=0)
    assert not certificate.ok
    assert certificate.unbalanced == ("silu", "mul")
