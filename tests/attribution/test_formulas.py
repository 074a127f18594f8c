"""The formulas by themselves: traceable to one graph, and their signs and ranks as the field has them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import libragrad_fx as lg
from libragrad_fx.attribution import METHODS
from libragrad_fx.attribution.attention import Attention
from libragrad_fx.attribution.formulas import Layer, Taps

F64 = torch.float64
Tensor = torch.Tensor


def taps(layers: int = 3) -> Taps:
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=F64)  # noqa: E731
    attends = [
        Attention(f"b.{i}.attn", draw(2, 2, 5, 5).softmax(-1), draw(2, 2, 5, 5)) for i in range(layers)
    ]
    found = [Layer(f"b.{i}", draw(2, 5, 4), draw(2, 5, 4), (1,)) for i in range(layers)]
    streams, ends = ([draw(2, 5, 4) for _ in found] for _ in range(2))
    return Taps(found, attends, streams, ends, rows=[1, 1], noise=torch.rand(1, 5, 1, dtype=F64))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_one_graph_of_tensor_ops(name: str) -> None:
    """``make_fx`` traces it, and the graph says the same of other tensors."""

    def tensors(t: Taps) -> list[Tensor]:
        layers = [v for x in t.layers for v in (x.value, x.gradient)]
        attends = [v for a in t.attention for v in (a.weights, a.gradient)]
        return [*layers, *attends, *t.streams, *t.ends]

    def of(like: Taps, values: list[Tensor]) -> list[Tensor]:
        given = iter(values)
        layers = [dataclasses.replace(x, value=next(given), gradient=next(given)) for x in like.layers]
        attends = [Attention(a.module, next(given), next(given)) for a in like.attention]
        streams, ends = ([next(given) for _ in like.layers] for _ in range(2))
        same = dataclasses.replace(like, layers=layers, attention=attends, streams=streams, ends=ends)
        return [share for _, share in METHODS[name].terms(same)]

    like = taps()
    graph = make_fx(lambda values: of(like, values))(tensors(like))
    other = [t.flip(0) * 0.5 for t in tensors(like)]
    want = of(like, other)
    assert all(n.op in ("placeholder", "call_function", "output", "get_attr") for n in graph.graph.nodes)
    for a, b in zip(graph(pytree.tree_map(torch.clone, other)), want, strict=True):
        torch.testing.assert_close(a, b)


NO_SHARES = ("random", "gradient", "smoothgrad")
SIGNED = [n for n, m in METHODS.items() if not m.attention and n not in NO_SHARES]


class Votes(nn.Module):
    """Adds up a vote for each patch: what each position is worth is known."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Identity()) for _ in range(2))
        self.embed, self.vote = nn.Conv2d(3, 4, 4, 4, bias=False), nn.Linear(4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.vote(x).sum(1)


@pytest.mark.parametrize("name", SIGNED)
def test_what_speaks_for_the_target_is_positive_and_first(name: str) -> None:
    torch.manual_seed(0)
    model, x = Votes().double().eval(), torch.randn(2, 3, 16, 16, dtype=F64)
    worth = model.vote(model.embed(x).flatten(2).mT)[..., 0].detach().unflatten(1, (4, 4))
    found = lg.attribute(model, x, method=name, steps=4)
    assert torch.equal(found.values.sign(), worth.sign())
    for values, row in zip(worth, found.topk(3), strict=True):
        best = values.flatten().topk(3).indices.tolist()
        assert [i * 4 + j for (i, j), _ in row] == best
    against = lg.attribute(model, x, lambda y: -y[:, 0], method=name, steps=4)
    torch.testing.assert_close(against.values, -found.values)
