"""A settled graph does the same in fewer ops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from libragrad_fx.programs.settle import settled

aten = torch.ops.aten
CONSTANT = torch.arange(6.0)
CASES: dict[str, tuple[Callable[[torch.Tensor], Any], Counter[Any]]] = {
    "a view of a view": (
        lambda x: x.view(6).view(3, 2).neg(),
        Counter({aten.view.default: 1, aten.neg.default: 1}),
    ),
    "a view back": (lambda x: x.view(6).view(2, 3).neg(), Counter({aten.neg.default: 1})),
    "an unsafe view": (
        lambda x: aten._unsafe_view(x.neg(), (6,)).view(2, 3).abs(),
        Counter({aten.neg.default: 1, aten.abs.default: 1}),
    ),
    "a transpose of a transpose": (lambda x: x.t().t().neg(), Counter({aten.neg.default: 1})),
    "three of them": (lambda x: x.t().t().t().neg(), Counter({aten.t.default: 1, aten.neg.default: 1})),
    "all of an axis": (lambda x: x[:, :3].neg(), Counter({aten.neg.default: 1})),
    "a part of an axis": (lambda x: x[:, :2].neg(), Counter({aten.slice.Tensor: 1, aten.neg.default: 1})),
    "every second place": (
        lambda x: x[:, ::2].neg(),
        Counter({aten.slice.Tensor: 1, aten.neg.default: 1}),
    ),
    "an alias": (lambda x: aten.alias(x).neg(), Counter({aten.neg.default: 1})),
    "an expand to the same shape": (lambda x: x.expand(2, 3).neg(), Counter({aten.neg.default: 1})),
    "a squeeze of several": (lambda x: x.squeeze(1).neg(), Counter({aten.neg.default: 1})),
    "such a squeeze, read out": (lambda x: x.squeeze(1), Counter({aten.alias.default: 1})),
    "a squeeze of one": (
        lambda x: x[None].neg().squeeze(0),
        Counter({aten.unsqueeze.default: 1, aten.neg.default: 1, aten.squeeze.dim: 1}),
    ),
    "twice the same": (lambda x: x.neg() + x.neg(), Counter({aten.neg.default: 1, aten.add.Tensor: 1})),
    "constants": (lambda x: x + CONSTANT.view(2, 3).exp(), Counter({aten.add.Tensor: 1})),
    "a copy of an expanded tensor": (
        lambda x: x + x[:1].expand(2, 3).clone(),
        Counter({aten.slice.Tensor: 1, aten.expand.default: 1, aten.clone.default: 1, aten.add.Tensor: 1}),
    ),
    "read out": (lambda x: x.t().t(), Counter({aten.t.default: 2})),
}  # fmt: skip


def ops(made: torch.fx.GraphModule) -> Counter[Any]:
    return Counter(n.target for n in made.graph.nodes if n.op == "call_function")


@pytest.mark.parametrize("name", CASES)
def test_fewer_ops_and_the_same_result(name: str) -> None:
    f, want = CASES[name]
    x = torch.randn(2, 3)
    made = settled(make_fx(f)(x))
    assert torch.equal(made(x), f(x))
    assert ops(made) == want


def test_what_lies_apart_is_viewed_as_before() -> None:
    """A view of a transposed tensor's view: one view can do what two could."""
    x = torch.randn(4, 6).t()
    f = lambda x: x.view(2, 3, 4).view(6, 4).view(3, 2, 4).neg()  # noqa: E731
    made = settled(make_fx(f)(x))
    assert len([n for n in made.graph.nodes if n.target is aten.view.default]) == 1
    assert torch.equal(made(x), f(x))


def test_a_free_size_is_asked_once() -> None:
    f = lambda x, y: (x.view(x.shape[0], -1).neg(), y.expand(x.shape[0], 5).neg())  # noqa: E731
    made = make_fx(f, tracing_mode="symbolic")(torch.randn(3, 2, 2), torch.randn(3, 5))
    (size,) = made.graph.find_nodes(op="call_function", target=aten.sym_size.int)
    (expand,) = made.graph.find_nodes(op="call_function", target=aten.expand.default)
    with made.graph.inserting_before(expand):
        again = made.graph.call_function(aten.sym_size.int, (expand.args[0], 0))
    again.meta = size.meta
    expand.replace_input_with(size, again)
    asked = lambda g: [str(n.meta["val"]) for n in g.graph.nodes if n.target is aten.sym_size.int]  # noqa: E731
    assert len(asked(made)) == 2
    few = settled(made)
    assert len(asked(few)) == 1
    for batch in (3, 4):
        x, y = torch.randn(batch, 2, 2), torch.randn(batch, 5)
        assert all(map(torch.equal, few(x, y), f(x, y)))


@pytest.mark.parametrize("free", [(), (0,), (1,)], ids=["fixed", "a free batch", "free rows"])
def test_products_with_one_matrix_are_one(free: tuple[int, ...]) -> None:
    """The matrix is cut from a larger one, behind its expansion; the first result keeps its bits."""
    f = lambda x, w: [x @ w.t(), (x @ w.t().expand(x.shape[0], 4, 6)[:, :, 2:5]).neg()]  # noqa: E731
    x, w = torch.randn(7, 3, 4).double().transpose(1, 2).contiguous().mT, torch.randn(6, 4).double()
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = [DimDynamic.DYNAMIC if axis in free else DimDynamic.STATIC for axis in range(3)]
    fakes = mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(sizes)), mode.from_tensor(w)
    with mode:
        made = make_fx(f)(*fakes)
    assert ops(made)[aten.bmm.default] == 2
    few = settled(made, [0])
    assert (ops(few)[aten.bmm.default], ops(few)[aten.mm.default]) == (1, 1)
    found, want = few(x, w), f(x, w)
    assert torch.equal(found[0], want[0])
    torch.testing.assert_close(found[1], want[1], rtol=0, atol=1e-14)


def test_products_with_several_matrices_stay() -> None:
    made = settled(make_fx(lambda x, w: [x @ w])(torch.randn(7, 3, 4), torch.randn(7, 4, 6)))
    assert (ops(made)[aten.bmm.default], ops(made)[aten.mm.default]) == (1, 0)
