"""What Python calls for an op is that op, on every sample of every row; what it is not, is not bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import libragrad_fx as lg
from libragrad_fx.decide import rulebook
from libragrad_fx.graph.notes import note
from libragrad_fx.ops.binding import binding, same_calls
from libragrad_fx.types import OpFacts
from tests.rows.test_law import same_bits
from tests.samples import Call, calls

ROWS = [row for row in rulebook.load().facts.values() if row.registered_by is None]
aten = torch.ops.aten


def on_meta(call: Call) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), (call.args, call.kwargs))


def is_bound(call: Call) -> bool:
    function = binding(call.op)
    return function is not None and same_calls(call.op, function, *on_meta(call))


def outcome(function: Any, call: Call) -> list[Any]:
    torch.manual_seed(0)
    return pytree.tree_leaves(function(*call.args, **call.kwargs))


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.op.removeprefix("aten."))
def test_it_gives_the_same_bits(row: OpFacts) -> None:
    for call in filter(is_bound, calls(row)):
        ours, theirs = outcome(binding(call.op), call), outcome(call.op, call)
        assert len(ours) == len(theirs)
        assert all(map(same_bits, ours, theirs)), call


def test_most_ops_have_one() -> None:
    have = [any(map(is_bound, calls(row))) for row in ROWS]
    assert sum(have) > 0.8 * len(have)


X, AT = torch.randn(2, 3), torch.tensor([2, 0, 1])


@pytest.mark.parametrize(
    ("op", "args", "kwargs"),
    [
        (aten.index_put.default, (X, [None, AT], X), {}),  # Python takes no list with gaps
        (aten.to.dtype_layout, (X,), {"dtype": torch.float64, "layout": torch.strided}),
        (aten.narrow.Tensor, (X, 1, torch.tensor(0), 2), {}),  # whether it fits, data decides
        (aten.add.Tensor, (), {"self": X, "other": X}),  # there it is called input
    ],
)
def test_what_python_does_not_take_is_not_bound(op: Any, args: Any, kwargs: Any) -> None:
    assert not is_bound(Call(op, args, kwargs))


def test_a_list_with_gaps_is_left_to_the_op() -> None:
    """``z[:, i] = x`` is ``index_put(z, [None, i], x)``."""

    class Reversed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = torch.zeros_like(x)
            z[:, torch.arange(3).flip(0)] = x
            return z[:, 0] + x.sum(1)

    gm = lg.transform(Reversed(), X)
    assert torch.equal(gm(X), X[:, 2] + X.sum(1))
    marked = {str(n.target): note(n).bound for n in gm.lean.nodes}
    assert marked["aten.index_put.default"] is False
    assert marked["aten.sum.dim_IntList"] is True
