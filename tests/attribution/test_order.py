"""One network written in several ways has the same maps: tokens in front of samples, einsum."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.attribution import METHODS
from libragrad_fx.errors import InputError

F64 = torch.float64
Tensor = torch.Tensor
LAYERS = ("encoder.layers.0", "encoder.layers.1")


def drawn(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for p in model.double().eval().parameters():
        nn.init.normal_(p, std=0.4)  # no bias is zero
    return model


class Encoder(nn.Module):
    """PyTorch's own, by default with tokens in front of samples. ``ids``: on tokens of a vocabulary."""

    def __init__(self, samples_first: bool, ids: bool) -> None:
        super().__init__()
        self.samples_first, self.ids = samples_first, ids
        self.embed = nn.Embedding(9, 8) if ids else nn.Linear(3, 8)
        self.places = nn.Parameter(torch.empty(5, 1, 8))
        block = nn.TransformerEncoderLayer(8, 2, 12, 0.0, "gelu", batch_first=samples_first)
        self.encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.samples_first:
            return self.head(self.encoder(self.embed(x) + self.places[:, 0])[:, 1])
        return self.head(self.encoder(self.embed(x.transpose(0, 1)) + self.places)[1])


def same(a: lg.Attribution, b: lg.Attribution) -> None:
    for name in ("values", "unplaced", "total", "positional"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(a.expected, b.expected, rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize(("ids", "batch"), [(True, 5), (False, 2), (False, 1)])
def test_tokens_may_stand_in_front_of_samples(ids: bool, batch: int) -> None:
    """Five tokens of five samples: no size tells which axis is which."""
    first, plain = drawn(Encoder(True, ids)), drawn(Encoder(False, ids))
    x = torch.randint(9, (batch, 5)) if ids else torch.randn(batch, 5, 3, dtype=F64)
    sides = [lg.transform(m, x) for m in (first, plain)]
    for method in METHODS:
        a, b = (lg.attribute(m, x, 1, method=method, steps=2, by="block") for m in sides)
        assert b.layers in ((), LAYERS[:1], LAYERS[1:], LAYERS)
        assert b.values.shape == (batch, 5)
        same(a, b)
        for name in a.parts:
            torch.testing.assert_close(a.parts[name], b.parts[name], rtol=1e-10, atol=1e-12)
    assert float(b.positional.abs().min()) > 0
    pairs = [lg.similarity(m, x, x, layer=LAYERS[1]).values for m in sides]
    torch.testing.assert_close(*pairs, rtol=1e-10, atol=1e-12)


class Block(nn.Module):
    """Attention written out in one of several ways. ``narrow``: its stream is narrower than its input."""

    def __init__(self, mix: Callable[[Tensor, Tensor], Tensor], narrow: bool = False) -> None:
        super().__init__()
        self.mix, width = mix, 4 if narrow else 8
        self.down, self.up = (nn.Linear(*s) if narrow else nn.Identity() for s in ((8, 4), (4, 8)))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = self.mix((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1), v)
        return self.up(x + self.out(mixed.transpose(1, 2).flatten(2)))


class Written(nn.Module):
    def __init__(self, mix: Callable[[Tensor, Tensor], Tensor], narrow: bool = False) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(*(Block(mix, narrow) for _ in range(2))), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x)[:, 0])


def by_einsum(a: Tensor, v: Tensor) -> Tensor:
    """Values in an order of their own."""
    return torch.einsum("bhij,jbhd->bhid", a, v.permute(2, 0, 1, 3))


def test_attention_by_einsum_is_attention() -> None:
    x = torch.randn(2, 5, 8, dtype=F64)
    sides = [lg.transform(drawn(Written(mix)), x) for mix in (torch.matmul, by_einsum)]
    for method in (m for m, how in METHODS.items() if how.attention):
        same(*(lg.attribute(m, x, 1, method=method) for m in sides))


def test_attcat_needs_two_blocks() -> None:
    x = torch.randn(2, 5, 8, dtype=F64)
    with pytest.raises(InputError, match="two blocks"):
        lg.attribute(
            lg.transform(drawn(Written(torch.matmul)), x), x, 1, method="attcat", layers=["blocks.1"]
        )


def test_a_stream_of_another_width_is_not_followed() -> None:
    x = torch.randn(2, 5, 8, dtype=F64)
    module = lg.transform(drawn(Written(torch.matmul, narrow=True)), x)
    with pytest.raises(InputError, match="residual stream"):
        lg.attribute(module, x, 1, method="tokentm")
    assert lg.attribute(module, x, 1, method="rollout").values.shape == (2, 5)


class Pooled(nn.Module):
    """Takes the largest of each pair of tokens, an op with two outputs and no constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).unflatten(1, (-1, 2)).max(2).values.mean(1))


def test_an_op_of_several_outputs_may_have_no_constant() -> None:
    x = torch.randn(2, 6, 3, dtype=F64)
    found = lg.attribute(lg.transform(drawn(Pooled()), x), x, 1)
    assert float(found.completeness_error.max()) < 1e-12
