"""One row's gradient comes back through that row alone: what is said of ops, and whole networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Interpreter, Node
from torch.utils import _pytree as pytree

import libragrad_fx as lg
from libragrad_fx.bench import Operations
from libragrad_fx.decide import rulebook
from libragrad_fx.graph.notes import Undo, note
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.optimise import narrow
from libragrad_fx.optimise.work import Work
from libragrad_fx.rewrite.erase import erase, spell
from libragrad_fx.types import OpFacts
from tests.between import fast_first, fast_of
from tests.optimise.test_lean import assert_same, backward
from tests.samples import Call, call_of, calls

F64 = torch.float64
SDPA = torch.ops.aten.scaled_dot_product_attention.default
ROWS = tuple(rulebook.load().facts.values())


# --- what is said of ops


def as_graph(call: Call) -> tuple[Graph, Node, list[torch.Tensor]]:
    """One call as a graph with its tensors as inputs, traced values beside."""
    graph, fake, tensors = Graph(), FakeTensorMode(allow_non_fake_inputs=True), list[torch.Tensor]()
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    nodes: list[Any] = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            node = graph.placeholder(f"x{i}")
            node.meta["val"] = fake.from_tensor(leaf.detach())
            tensors.append(leaf.detach())
            leaf = node
        nodes.append(leaf)
    args, kwargs = pytree.tree_unflatten(nodes, spec)
    node = graph.call_function(call.op, tuple(args), kwargs)
    value = call.op(*call.args, **call.kwargs)
    node.meta["val"] = pytree.tree_map_only(torch.Tensor, fake.from_tensor, value)
    return graph, node, tensors


def claims(node: Node) -> list[tuple[int, int]]:
    """Rows of a call's result that are said to be made of rows."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return []
    axes = [a for a, n in enumerate(value.shape) if n > 1]
    facts = facts_of(node)
    places = [(a, p) for a in axes for p in (0, -1)]
    return [place for place in places if isinstance(narrow._made_of(node, place, facts), dict)]


def facts_of(node: Node) -> dict[str, OpFacts]:
    fact = rulebook.load().fact(node.target)
    return {} if fact is None else {node.name: fact}


X = torch.randn(3, 4, 5, dtype=F64)
MORE = {
    "aten.matmul": [call_of("matmul", (X, X.mT), {}), call_of("matmul", (X[0].T, X[0]), {})],
    "aten.mean": [call_of("mean", (X, [1], True), {}), call_of("mean", (X, [-1, 0], True), {})],
    "aten.sum": [call_of("sum", (X, [2], True), {})],
    "aten.amax": [call_of("amax", (X, [-2], True), {})],
    "aten.amin": [call_of("amin", (X, [0], True), {})],
}
"""Calls of a form that samples have none of."""


def all_calls(row: OpFacts) -> tuple[Call, ...]:
    return (*calls(row), *MORE.get(row.op, ()))


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.op.removeprefix("aten."))
def test_a_row_is_made_of_rows(row: OpFacts) -> None:
    for call in all_calls(row):
        graph, node, inputs = as_graph(call)
        claimed = claims(node)
        made = [narrow._again(Work(graph, facts_of(node)), node, row, {}) for row in claimed]
        graph.output((node, *made))
        whole, *parts = Interpreter(nn.Module(), graph=graph).run(*inputs)
        for (axis, place), again, part in zip(claimed, made, parts, strict=True):
            assert tuple(again.meta["val"].shape) == part.shape
            want = whole.narrow(axis, place % whole.shape[axis], 1)
            torch.testing.assert_close(part, want, rtol=1e-10, atol=1e-10, equal_nan=True)


MADE_OF_ROWS = {row.op.split(".")[1] for row in ROWS if row.rowwise} - {"_to_copy"}  # samples have none
MADE_OF_ROWS |= {"view", "reshape", "permute", "scaled_dot_product_attention", "gelu", "add"}


@pytest.mark.parametrize("name", sorted(MADE_OF_ROWS))
def test_something_is_said_of(name: str) -> None:
    rows = [row for row in ROWS if row.op.split(".")[1] == name]
    assert any(claims(as_graph(call)[1]) for row in rows for call in all_calls(row))


# --- networks


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "_SMALL", 0)
    monkeypatch.setattr(narrow, "_FEW", 2)


B, N, H, D = 2, 5, 2, 4
C = H * D


class Block(nn.Module):
    """Attention and a gated MLP, with residuals; norms before, or behind as in BERT."""

    def __init__(self, written: bool = False, post: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.written, self.post, self.causal = written, post, causal
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(2 * C, C)
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.RMSNorm(C)
        self.drop = nn.Dropout(0.3)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        q, k, v = self.qkv(x).reshape(-1, n, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        if self.written:
            scores = q @ k.mT / D**0.5
            if self.causal:
                scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
            z = scores.softmax(-1) @ v
        else:
            z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.drop(self.proj(z.transpose(1, 2).flatten(2)))

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.up(x).chunk(2, -1)
        return self.down(self.drop(nn.functional.silu(gate) * value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.post:
            x = self.norm1(x + self.attend(x))
            return self.norm2(x + self.mlp(x))
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Reader(nn.Module):
    """Two blocks, of whose result some tokens are read; or a layer and a block, which is half to trace."""

    def __init__(self, read: Any, *how: bool, first: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(first or Block(*how), Block(*how))
        self.norm, self.head, self.read = nn.LayerNorm(C), nn.Linear(C, 3), read

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.read(self.norm(self.blocks(x))))


def transformed(model: nn.Module, x: torch.Tensor, **kwargs: Any) -> CapturedModule:
    gm = lg.transform(model.double().eval(), x, **kwargs)
    assert spell(erase(gm.lean)) == gm.history.original  # type: ignore[arg-type]
    assert torch.equal(gm(x), model(x))
    assert_same(gm, x)
    return gm


def has_rows(gm: CapturedModule) -> bool:
    assert gm.lean is not None
    return any(note(n).undo is Undo.DROP for n in gm.lean.nodes)


def tokens(n: int = N) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(B, n, C, dtype=F64)


READS = {
    "class token": lambda x: x[:, 0],
    "last token": lambda x: x[:, -1],
    "kept as an axis": lambda x: x[:, -1:],
    "in the middle": lambda x: x[:, 2],
    "first of two": lambda x: x[:, :1],
    "read twice": lambda x: x[:, 0] + x[:, 0].tanh(),
}


FUSED, WRITTEN = {"last token"}, {"class token"}  # in the fast suite


@pytest.mark.parametrize(("post", "trained"), fast_first([(False, True), (True, False)], 1))
@pytest.mark.parametrize(
    ("read", "written"),
    [
        pytest.param(
            read, written, id=f"{read}-{'written' if written else 'fused'}",
            marks=() if read in (FUSED if not written else WRITTEN) else pytest.mark.slow,
        )
        for read in READS
        for written in (False, True)
    ],
)  # fmt: skip
def test_one_token_is_read(read: str, written: bool, post: bool, trained: bool) -> None:
    """And of other batches than the example's as well."""
    model = Reader(READS[read], written, post, first=nn.Linear(C, C)).requires_grad_(trained)
    gm = transformed(model, tokens())
    assert has_rows(gm)
    for x in (tokens()[:1], tokens().repeat(3, 1, 1)):
        assert_same(gm, x)


@pytest.mark.parametrize("written", fast_first([False, True], 1))
@pytest.mark.parametrize("read", fast_of(READS, ["last token", "in the middle"]))
def test_causal(read: str, written: bool) -> None:
    model = Reader(READS[read], written, False, True, first=nn.Linear(C, C))
    gm = transformed(model, tokens())
    assert has_rows(gm)  # of a fused causal attention only the last row sees all keys: the MLP's rows
    attends = [n for n in gm.lean.nodes if getattr(n.target, "aten_op", 0) is SDPA]  # type: ignore[union-attr]
    freely = [n for n in attends if note(n).undo is Undo.DROP]
    assert bool(freely) == (not written and read in ("last token", "kept as an axis"))


class Bare(Block):
    """What is read is where two branches meet, one of which may be a parameter."""

    def __init__(self, attends: bool) -> None:
        super().__init__()
        self.attends, self.head = attends, nn.Linear(C, 3)
        self.position = nn.Parameter(torch.randn(N, C))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.attend(x) if self.attends else self.mlp(x) + self.position
        return self.head(y.select(1, 0))


@pytest.mark.parametrize("attends", [True, False])
def test_it_is_read_where_the_narrow_part_begins(attends: bool) -> None:
    assert has_rows(transformed(Bare(attends), tokens()))


MANY = {
    "two tokens": lambda x: x[:, 0] + x[:, 1],
    "all tokens": lambda x: x[:, 0] + x.mean(1),
    "a part": lambda x: x[:, 1:3].sum(1),
    "by indices": lambda x: x[torch.arange(B), torch.tensor([1, 2])],
}


@pytest.mark.parametrize("read", fast_first(MANY, 1))
def test_more_than_one_token_is_read(read: str) -> None:
    assert not has_rows(transformed(Reader(MANY[read]), tokens()))


def test_one_that_modulates_is_not_one_that_is_read() -> None:
    read = lambda x: x[:, 0] * torch.sigmoid(x[:, 3])  # noqa: E731
    assert has_rows(transformed(Reader(read), tokens()))


class Hidden(Reader):
    def forward(self, x: torch.Tensor) -> Any:
        x = self.norm(self.blocks(x))
        return self.head(x[:, 0]), x


def test_what_is_returned_as_a_whole_has_all_its_rows() -> None:
    gm = lg.transform(Hidden(None).double().eval(), tokens())
    assert not has_rows(gm)
    assert_same(gm, tokens())


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(place=st.integers(-N, N - 1), written=st.booleans(), post=st.booleans(), causal=st.booleans())
def test_any_place(place: int, written: bool, post: bool, causal: bool) -> None:
    model = Reader(lambda x: x[:, place], written, post, causal, first=nn.Linear(C, C))
    assert has_rows(transformed(model, tokens()))


def test_neither_vmap_nor_a_copy_changes_it() -> None:
    model = Reader(READS["class token"])
    gm = transformed(model, tokens())
    f = torch.func.vmap(torch.func.grad(lambda x: gm(x[None]).sum()))
    want = backward(gm, tokens(), full=True)[1][0]
    torch.testing.assert_close(f(tokens()), want, rtol=1e-12, atol=1e-12)


def test_less_is_computed_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network of one block, the backward is a projection to v and what one row needs."""
    n = 64
    model = Reader(READS["class token"]).requires_grad_(False)
    gm = transformed(model, tokens(n))
    monkeypatch.setattr(narrow, "_SMALL", 2**30)
    whole = transformed(model, tokens(n))
    assert not has_rows(whole)
    counts, kept = [], []
    for module in (gm, whole):
        sizes: list[int] = []
        x = tokens(n).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t,  # type: ignore[func-returns-value,misc]
            lambda t: t,
        ):
            y = module(x).sum()
        with Operations() as operations:
            y.backward()
        counts.append(operations.total)
        kept.append(sum(s for s in sizes if s > C * 4 * C))
    assert counts[0] < 0.7 * counts[1]
    assert kept[0] < 0.7 * kept[1]
