"""Sizes that are free, by request or as the length of tokens: one graph for all, or an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

import libragrad_fx as lg
from libragrad_fx.errors import GuardError, InputError
from tests.between import fast_first

Tensor = torch.Tensor


class Tokens(nn.Module):
    """(B, L) ids, and which of them count, to (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(20, 8), nn.LayerNorm(8)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)
        self.double()

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.norm(self.embed(ids))
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        seen = None if mask is None else mask[:, None, None].bool()
        y = F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2)
        return self.head(F.gelu(x + y).mean(1))


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.conv(x)).mean((2, 3)))


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(6, 3).double()

    def forward(self, parts: dict[str, Any]) -> Tensor:
        both = torch.cat([parts["a"], *parts["b"]], 1)
        return torch.tanh(self.net(both)).mean(1)


def ids(rows: int, length: int) -> Tensor:
    return torch.arange(rows * length).view(rows, length) % 20


def parts(rows: int, length: int) -> dict[str, Any]:
    a = torch.linspace(-1, 1, rows * length * 6, dtype=torch.float64).view(rows, length, 6)
    return {"a": a, "b": [a * 2, a[:, :4] - 1]}


MODELS: dict[str, Any] = {
    "tokens": (Tokens, lambda n: {"ids": ids(2, n)}, {"ids": {1: "length"}}),
    "tokens and mask": (
        Tokens, lambda n: {"ids": ids(3, n), "mask": (ids(3, n) % 5 > 0).long()},
        {"ids": {1: "length"}, "mask": {-1: "length"}},
    ),
    "picture": (
        Picture, lambda n: (torch.ones(2, 3, n, 2 * n).double().cumsum(-1) / 9,),
        {"x": {2: Dim("height"), 3: Dim("width")}},
    ),
    "containers": (
        Several, lambda n: (parts(2, n),), {"parts": {"a": {1: "n"}, "b": [{1: "n"}, None]}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_for_all_sizes(name: str) -> None:
    make, inputs, free = MODELS[name]
    model = make()
    module = lg.transform(model, inputs(8), dynamic=free)
    for n in (8, 5, 13, 20):
        certificate = lg.verify(model, module, inputs(n), lambda y: y[0, 0])
        assert certificate.ok, certificate
    assert module.origin.variants == []


def test_without_it_each_size_has_a_graph_of_its_own() -> None:
    model, inputs, _ = Picture(), MODELS["picture"][1], None
    module = lg.transform(model, inputs(8))
    for n in (5, 13, 5):
        module(*inputs(n))
    assert len(module.origin.variants) == 2


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.rnn = nn.Embedding(20, 8), nn.GRU(8, 6, batch_first=True)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.rnn(self.embed(ids))[0][:, -1]


class Positions(Tokens):
    """Learned positions for at most 9 tokens, made into a mask as libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(9, 8).double()

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        n = ids.shape[1]
        x = self.norm(self.embed(ids) + self.places(torch.arange(n)))
        before = torch.full((n, n), float("-inf"), dtype=x.dtype).triu(1)
        if mask is not None:
            before = before + (1 - mask[:, None].to(x.dtype)) * -1e9
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(F.gelu(F.scaled_dot_product_attention(q, k, v, before)))[:, -1]


class TwoTexts(Tokens):
    """Of two lengths."""

    def forward(self, ids: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(ids) * torch.sigmoid(super().forward(other))


TOKENS: dict[str, Any] = {
    "tokens": (Tokens, lambda n: {"ids": ids(2, n)}),
    "tokens and mask": (Tokens, lambda n: {"ids": ids(3, n), "mask": (ids(3, n) % 5 > 0).long()}),
    "tokens and a mask of bools": (Tokens, lambda n: {"ids": ids(3, n), "mask": ids(3, n) % 5 > 0}),
    "one sample": (Tokens, lambda n: {"ids": ids(1, n)}),
    "positions": (Positions, lambda n: {"ids": ids(2, n), "mask": (ids(2, n) < 19).long()}),
    "two texts": (TwoTexts, lambda n: {"ids": ids(2, n), "other": ids(2, n + 1)}),
    "two texts as long": (TwoTexts, lambda n: {"ids": ids(2, n), "other": ids(2, n)}),
}


@pytest.mark.parametrize("name", fast_first(TOKENS, 3))
def test_one_graph_for_all_lengths_of_tokens(name: str) -> None:
    make, inputs = TOKENS[name]
    model = make()
    module = lg.transform(model, inputs(8))
    for n in (8, 5, 7, 2):
        certificate = lg.verify(model, module, inputs(n), lambda y: y[0, 0])
        assert certificate.ok, certificate
    assert module.origin.variants == []


class Loop(Tokens):
    """Python looks at the length."""

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(ids, mask)
        for _ in range(ids.shape[1] // 4):
            y = torch.tanh(y)
        return y


class Windows(Tokens):
    """Attention in windows of 4, and none where the text is shorter."""

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        if ids.shape[1] % 4 or ids.shape[1] < 8:
            return super().forward(ids)
        return super().forward(ids.reshape(-1, 4)).view(ids.shape[0], -1, 3).mean(1)


class Flat(nn.Module):
    """As many columns as it has weights for; no text."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, 4), nn.Linear(32, 3)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.head(self.embed(ids).flatten(1)))


class Remembered(Tokens):
    """A table of positions that is made anew for a longer text only."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.zeros(0, 8)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        n = ids.shape[1]
        if len(self.table) < n:
            self.table = torch.arange(n * 8, dtype=torch.float64).view(n, 8).cos()
        return self.head(F.gelu(self.embed(ids) + self.table[:n])).mean(1)


@pytest.mark.parametrize("make", fast_first([Windows, Loop, Recurrent, Remembered], 1))
def test_where_python_looks_at_the_length(make: Any) -> None:
    model = make()
    module = lg.transform(model, ids(2, 8))
    for n in (8, 5, 12, 16, 5, 1):
        assert torch.equal(module(ids(2, n)), model(ids(2, n)))
        assert lg.verify(model, module, ids(2, n), lambda y: y[0, 0]).ok


def test_a_length_that_the_model_fixes() -> None:
    module = lg.transform(Flat(), ids(2, 8))
    assert module(ids(3, 8)).shape == (3, 3)
    with pytest.raises(GuardError, match="ids was captured with shape"):
        module(ids(2, 7))


def test_a_length_that_is_traced_wrong_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here: what depends on the length is read from a place that no trace sees."""

    class Hidden(Tokens):
        def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
            from torch.fx.experimental.symbolic_shapes import optimization_hint

            return super().forward(ids) * optimization_hint(ids.shape[1])

    model = Hidden()
    module = lg.transform(model, ids(2, 8))
    for n in (8, 5, 12):
        assert torch.equal(module(ids(2, n)), model(ids(2, n)))


def test_bounds_are_kept() -> None:
    module = lg.transform(Tokens(), ids(2, 8), dynamic={"ids": {1: Dim("length", min=4, max=12)}})
    module.origin = None  # as after a conversion: nothing can be captured again
    assert module(ids(2, 12)).shape == (2, 3)
    with pytest.raises(GuardError, match="12"):
        module(ids(2, 13))


@pytest.mark.parametrize(("free", "said"), [
    ({"words": {1: "n"}}, "takes no words; it takes ids, mask"),
    ({"ids": {2: "n"}}, "no axis 2"),
    ({"ids": {"length": 1}}, "no axis 'length'"),
    ({"ids": "length"}, "axes of a tensor by number"),
    ({"mask": {1: "n"}}, "mask is NoneType"),
    ({1: "n"}, "takes no 1"),
    (5, "got 5"),
])  # fmt: skip
def test_what_does_not_fit_is_said(free: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        lg.transform(Tokens(), ids(2, 8), dynamic=free)


def test_a_size_that_the_model_fixes() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 3))
    with pytest.raises(InputError, match=r"input.shape\[1\] \(n\) cannot be free"):
        lg.transform(model, torch.randn(2, 3, 4), dynamic={"input": {1: "n"}})
