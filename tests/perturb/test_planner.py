"""A plan runs on any of the tokens as the same code runs on a sequence of these; what cannot is refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from libragrad_fx.decide import rulebook
from libragrad_fx.graph.schema import aten_op
from libragrad_fx.perturb import planner, shorter
from libragrad_fx.perturb.kept import Ends, Kept, shapes_of
from libragrad_fx.perturb.shorter import Plan, Refused, Whole
from tests.between import fast_first
from tests.perturb import tails
from tests.perturb.tails import F64, LAYERS, POOLS, REFUSED, C, N, Tail, head

BATCH = 5  # no other axis is as long
FACTS = rulebook.load().fact
NONE = Ends(0, 0)


@dataclasses.dataclass(frozen=True)
class Made:
    """A function as a graph, and the plan of its first argument's tokens."""

    tail: Callable[..., Tensor]
    interpreter: Interpreter
    start: Node
    ends: Ends

    def whole(self, *inputs: Tensor) -> Whole:
        values: dict[Node, Any] = {}
        shapes = {}
        self.interpreter.run(*inputs)
        for node, value in self.interpreter.env.items():
            values[node], shapes[node] = value, shapes_of(value)
        mine = {*shorter.behind(self.start)}
        return Whole({n: v for n, v in values.items() if n not in mine}, shapes)

    def plan(self, *inputs: Tensor) -> Plan:
        form = lambda n: ["batch" if s == BATCH else str(s) for s in n.meta["val"].shape]  # noqa: E731
        facts = lambda n: FACTS(aten_op(n))  # noqa: E731
        whole, axes = self.whole(*inputs), {1: self.ends}
        return planner.plan(self.interpreter, self.start, axes, N, whole, facts, form)

    def on(self, plan: Plan, at: Tensor, *inputs: Tensor) -> Tensor:
        return shorter.run(self.interpreter, plan, self.whole(*inputs), Kept(at, N))


def inputs(ends: Ends = NONE, seed: int = 0) -> tuple[Tensor, ...]:
    """h, t, w, bias"""
    draw = torch.Generator().manual_seed(seed)
    n = ends.front + N + ends.behind
    return tuple(
        torch.randn(s, generator=draw, dtype=F64) for s in ((BATCH, n, C), (n, C), (n,), (n, n))
    )


def made(tail: Callable[..., Tensor], ends: Ends = NONE, dtype: torch.dtype = F64) -> Made:
    body = make_fx(tail, pre_dispatch=True)(*(t.to(dtype) for t in inputs(ends)))
    start = next(n for n in body.graph.nodes if n.op == "placeholder")
    run = Interpreter(body, garbage_collect_values=False)
    run.extra_traceback = False
    return Made(tail, run, start, ends)


def by_hand(of: Made, at: Tensor, *inputs: Tensor) -> Tensor:
    """The function on these tokens, with their rows of the tables."""
    h, t, w, bias = inputs
    places = Kept(at, N).places(of.ends)
    h = h.take_along_dim(places[..., None], 1)
    return of.tail(h, t[places], w[places], torch.stack([bias[p][:, p] for p in places]))


def composed(layers: Sequence[Tail], pool: str) -> Callable[..., Tensor]:
    def tail(h: Tensor, t: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        for layer in layers:
            h = layer(h, t, w, bias)
        return head(POOLS[pool](h))

    return tail


def subsets(draw: st.DataObject) -> Tensor:
    """(B, K): of each sample other tokens, in rising order."""
    keep = draw.draw(st.integers(1, N))
    one = st.permutations(range(N)).map(lambda p: sorted(p[:keep]))
    return torch.tensor(draw.draw(st.lists(one, min_size=BATCH, max_size=BATCH)))


@given(
    names=st.lists(st.sampled_from([*LAYERS]), min_size=1, max_size=3), pool=st.sampled_from([*POOLS]),
    front=st.integers(0, 2), behind=st.integers(0, 1), draw=st.data(),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_a_shorter_sequence_is_that_of_the_code_itself(
    names: list[str], pool: str, front: int, behind: int, draw: st.DataObject
) -> None:
    """Planned on one batch and run on another. A token that is read by its place, and may go, is named."""
    of = made(composed([LAYERS[n] for n in names], pool), Ends(front, behind))
    reads = {"first": front, "last": behind}
    if not reads.get(pool, 1):
        with pytest.raises(Refused, match="by their places") as refused:
            of.plan(*inputs(of.ends))
        assert refused.value.place == (0 if pool == "first" else N - 1)
        return
    plan = of.plan(*inputs(of.ends))
    given, at = inputs(of.ends, seed=1), subsets(draw)
    want = by_hand(of, at, *given)  # nan of a token that the mask leaves nothing to attend to
    torch.testing.assert_close(of.on(plan, at, *given), want, rtol=1e-10, atol=1e-10, equal_nan=True)
    everything = torch.arange(N).expand(BATCH, -1)
    torch.testing.assert_close(of.on(plan, everything, *given), of.tail(*given), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [*LAYERS])
def test_tokens_are_returned_where_the_model_returns_them(name: str) -> None:
    of = made(LAYERS[name], Ends(1, 1))
    plan = of.plan(*inputs(of.ends))
    assert plan.returned == {1: Ends(1, 1)}
    given = inputs(of.ends, seed=2)
    at = torch.stack([torch.randperm(N)[:3].sort().values for _ in range(BATCH)])
    torch.testing.assert_close(of.on(plan, at, *given), by_hand(of, at, *given), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", fast_first(REFUSED, 12))
def test_what_needs_all_tokens_is_refused(name: str) -> None:
    tail, why = REFUSED[name]
    of = made(lambda h, *tables: head(tail(h, *tables)))
    with pytest.raises(Refused, match=re.escape(why)):
        of.plan(*inputs())


@pytest.mark.parametrize("dtype", fast_first([torch.bfloat16, torch.float16], 1))
def test_every_precision_tells_what_needs_all_tokens(dtype: torch.dtype, monkeypatch: Any) -> None:
    for name in ("SQUARE", "OUT", "KERNEL", "MIXED"):
        monkeypatch.setattr(tails, name, getattr(tails, name).to(dtype))
    for name, layer in LAYERS.items():
        of = made(composed([layer], "weighted"), Ends(1, 0), dtype)
        assert of.plan(*(t.to(dtype) for t in inputs(of.ends))).returned == {}, name
    for name in ("cumsum", "flip", "a convolution", "a sum over the number", "attention of relu over N"):
        of = made(lambda h, *tables, name=name: head(REFUSED[name][0](h, *tables)), dtype=dtype)
        with pytest.raises(Refused, match="depends on"):
            of.plan(*(t.to(dtype) for t in inputs()))


def test_memory_that_runs_out_is_no_refusal(monkeypatch: Any) -> None:
    of = made(composed([LAYERS["eager"]], "mean"))
    full = torch.OutOfMemoryError("full")
    monkeypatch.setattr(planner._Planner, "step", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(torch.OutOfMemoryError):
        of.plan(*inputs())
