"""A rewrite does what its plan says, and erasing it gives the trace back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.capture.examples import example_call
from libragrad_fx.capture.export import capture
from libragrad_fx.capture.normal import normalize
from libragrad_fx.errors import VerificationError
from libragrad_fx.rewrite.edits import rewrite
from libragrad_fx.rewrite.erase import erase, first_difference, require_same_graph, spell
from tests.decide.test_plan import SwiGlu, X


def test_nothing_to_do_leaves_the_code_unchanged() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    assert lg.transform(model, X).code == lg.trace(model, X).code


def test_erasing_gives_the_trace_back() -> None:
    gm, plain = lg.transform(SwiGlu(), X), lg.trace(SwiGlu(), X)
    assert spell(erase(gm.graph)) == spell(erase(plain.graph)) == gm.history.original


def test_a_tampered_graph_is_noticed() -> None:
    model = SwiGlu()
    trace = normalize(model, capture(model, *example_call(model, X)))
    gm = rewrite(trace, None)
    require_same_graph(gm, trace)
    victim = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.silu.default)
    victim.target = torch.ops.aten.gelu.default
    assert "gelu" in str(first_difference(erase(gm.graph), spell(trace.graph)))
    with pytest.raises(VerificationError, match="gelu"):
        require_same_graph(gm, trace)
