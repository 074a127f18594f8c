"""A row with a ``slope``: an op of any library is balanced without code."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.decide import rulebook
from libragrad_fx.errors import RuleError
from tests.between import Between, X, define, weighed

LIBRARIES = [
    define("slopes_of_tests", "bump", "Tensor x, float w", lambda x, w: x * torch.exp(-x * x / w)),
    define(
        "slopes_of_tests", "ramp", "Tensor x, *, float b=1.", lambda x, b=1.0: (x * b).exp().log1p() / b
    ),
    define("slopes_of_tests", "swap", "Tensor x", lambda x: 1 - x * torch.sigmoid(x)),
    define("others_of_tests", "bump", "Tensor x", lambda x: torch.arctan(x)),
]
OPS, OTHERS = torch.ops.slopes_of_tests, torch.ops.others_of_tests
ROWS = [
    {"op": "slopes_of_tests.bump", "kind": "gated", "stream": ["x"], "at_zero": 0, "slope": 1, "why": "w"},
    {"op": "slopes_of_tests.ramp", "kind": "gated", "stream": ["x"], "slope": 0.5, "why": "w"},
    {"op": "slopes_of_tests.swap", "kind": "gated", "stream": ["x"], "at_zero": 1, "slope": -0.5,
     "why": "w"},
    {"op": "others_of_tests.bump", "kind": "gate_source", "stream": ["x"], "at_zero": 0, "slope": 1,
     "rank": 1, "why": "w"},
]  # fmt: skip
FORMS = {
    "bump": lambda y: OPS.bump(y, 2.0),
    "ramp": lambda y: OPS.ramp(y),
    "ramp of another slope": lambda y: OPS.ramp(y, b=3.0),
    "swap": lambda y: OPS.swap(y),
    "another's bump": lambda y: OTHERS.bump(y),
    "gated by another's bump": lambda y: OPS.bump(y, 2.0) * OTHERS.bump(y),
}


class Named(Between):
    """``Between`` by a name, which a pickle finds."""

    def __init__(self, name: str) -> None:
        super().__init__(abs)
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return FORMS[self.name](self.fc(x))


@pytest.mark.parametrize("name", [
    pytest.param(n, marks=pytest.mark.slow if n == "bump" else ()) for n in FORMS
])  # fmt: skip
def test_an_op_of_another_library_is_balanced_by_its_row(name: str) -> None:
    model = Named(name)
    module = lg.transform(model, X, rules=ROWS)
    for made in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        certificate = lg.verify(model, made, X, weighed)
        assert certificate.ok, certificate


def test_its_gradient_is_the_secant() -> None:
    model = nn.Sequential()
    model.forward = lambda x: OPS.ramp(x, b=2.0)  # type: ignore[method-assign]
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(lg.transform(model, x, rules=ROWS)(x).sum(), x)
    zero = OPS.ramp(torch.zeros((), dtype=torch.float64), b=2.0)
    want = ((OPS.ramp(x, b=2.0) - zero) / x).detach()
    torch.testing.assert_close(g, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [{"vjp": "silu"}, {"stream": [], "factors": ["x"]}, {"slope": "steep"}])
def test_a_slope_is_for_functions_of_one_value(bad: dict[str, Any]) -> None:
    with pytest.raises(RuleError, match="slope"):
        rulebook.load().extended([{**ROWS[0], **bad}])


@pytest.mark.parametrize(
    "bad", [{"moves": "away"}, {"rowwise": {"self": "some"}}, {"rowwise": {"self": "all but axis"}},
            {"rowwise": {"y": "all"}}, {"fresh": 1}, {"fill": "value"}]
)  # fmt: skip
def test_a_bad_key_is_named(bad: dict[str, Any]) -> None:
    row = {"op": "aten.softmax", "kind": "gate_source", "stream": ["self"], "why": "w"}
    with pytest.raises(RuleError):
        rulebook.load().extended([{**row, **bad}])
