"""What Python calls for an op is that op, on every sample of every row that has a binding."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import libragrad_fx as lg
from libragrad_fx import rulebook
from libragrad_fx.ops import binding as module
from libragrad_fx.ops.binding import binding
from libragrad_fx.types import OpFacts
from tests.samples import Call, calls

ROWS = [row for row in rulebook.load().facts.values() if row.registered_by is None]


@pytest.fixture(autouse=True)
def _no_collection() -> Iterator[None]:
    """A sample generator of PyTorch's that ends while tracing would set the grad mode in the trace."""
    gc.disable()
    yield
    gc.enable()


def dispatched(function: Any, call: Call) -> list[Any]:
    """The ops that PyTorch sees, before any is taken apart, when ``function`` is called."""
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def run(*tensors: torch.Tensor) -> Any:
        given = {**dict(enumerate(leaves)), **dict(zip(at, tensors, strict=True))}
        args, kwargs = pytree.tree_unflatten(list(given.values()), spec)
        return function(*args, **kwargs)

    graph = make_fx(run, pre_dispatch=True)(*(leaves[i] for i in at)).graph
    return [n.target for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.op.removeprefix("aten."))
def test_it_dispatches_to_the_op(row: OpFacts) -> None:
    for call in calls(row):
        function = binding(call.op)
        if function is None:
            continue
        if call.op is torch.ops.aten.contiguous.default and call.args[0].is_contiguous():
            assert function(*call.args) is call.args[0]  # and nothing is called
        else:
            assert dispatched(function, call) == [call.op], call


def test_it_would_not_for_those_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    named = [row for row in ROWS if row.op.removeprefix("aten.") in module._OTHERWISE]
    assert len(named) == len(module._OTHERWISE)
    monkeypatch.setattr(module, "_OTHERWISE", set())
    for row in named:
        of = [(binding.__wrapped__(call.op), call) for call in calls(row)]
        assert any(dispatched(function, call) != [call.op] for function, call in of), row.op


def test_most_ops_have_one() -> None:
    have = [any(binding(call.op) for call in calls(row)) for row in ROWS]
    assert sum(have) > 0.8 * len(have)


def test_a_list_with_gaps_is_not_left_to_python() -> None:
    """``z[:, i] = x`` is ``index_put(z, [None, i], x)``, which ``torch.index_put`` does not take."""

    class Reversed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = torch.zeros_like(x)
            z[:, torch.arange(3).flip(0)] = x
            return z[:, 0]

    x = torch.randn(2, 3)
    assert torch.equal(lg.transform(Reversed(), x)(x), x[:, 2])
