"""A row for a linear op that adds a constant of its own, and rows that do not hold for a literal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import libragrad_fx as lg
from libragrad_fx.decide import rulebook
from libragrad_fx.errors import RuleError, UnknownOpError
from tests.between import Between, X, certified, define

COLUMNS = torch.arange(8).expand(4, 8) // 2
LIBRARY = define("constant_of_tests", "shifted", "Tensor x", lambda x: x * 2 + 1)
shifted = torch.ops.constant_of_tests.shifted
ROW = {"op": "constant_of_tests.shifted", "kind": "linear", "stream": ["x"], "why": "2 x + 1"}


@pytest.mark.parametrize("f", [
    lambda y, p: shifted(y),
    lambda y, p: y * shifted(torch.zeros_like(y)),
    lambda y, p: y + y * shifted(y.new_zeros(8)),
    lambda y, p: torch.cat([shifted(torch.zeros(4, 8).double()), y]) * shifted(y).repeat(2, 1),
])  # fmt: skip
@pytest.mark.parametrize("said", [{}, {"constant": True}])
def test_a_row_for_an_op_that_adds_something(f: Any, said: Any) -> None:
    certified(Between(f), rules=[{**ROW, **said}])


def test_a_row_that_denies_its_constant_is_named() -> None:
    model = Between(lambda y, p: torch.tanh(shifted(y)))
    with pytest.raises(lg.errors.VerificationError, match="shifted"):
        lg.transform(model, X, rules=[{**ROW, "constant": False}])


def test_constant_is_for_linear_rows() -> None:
    book = rulebook.load()
    with pytest.raises(RuleError, match="linear"):
        book.extended([{**ROW, "kind": "homogeneous", "constant": True}])
    with pytest.raises(RuleError, match="bool"):
        book.extended([{**ROW, "constant": 1}])


def test_a_row_may_not_hold_for_a_literal() -> None:
    with pytest.raises(UnknownOpError, match="scatter_reduce"):
        lg.transform(
            Between(lambda y, p: y.new_ones(4, 8).scatter_reduce(1, COLUMNS, y, "prod")), X
        )
    row = {"op": "aten.scatter_reduce", "kind": "homogeneous", "stream": ["src"], "why": "w"}
    with pytest.raises(RuleError, match="reduced"):
        rulebook.load().extended([{**row, "unless": {"reduced": "prod"}}])
