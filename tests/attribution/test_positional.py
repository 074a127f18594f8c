"""The share of positions: what tables that are added to tokens contribute, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from tests.attribution.once import vit
from tests.between import fast_first

F64 = torch.float64
Tensor = torch.Tensor


class Tokens(nn.Module):
    """Embedded words, ``how`` they get their positions, and a block."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.embed, self.place = how, nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.bias, self.head = nn.Parameter(torch.randn(8)), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.how == "table":
            x = x + self.place(torch.arange(6))
        elif self.how == "scaled":
            x = x * 2 + 0.5 * self.place.weight[None]
        elif self.how == "one for all":
            x = x + self.bias
        elif self.how == "concatenated":
            x = torch.cat([x, self.place.weight[None].expand(len(x), -1, -1)], 1)
        return self.head(self.block(x).mean(1))


def paid(module: Any, x: Tensor, parameter: Tensor) -> Tensor:
    """Σ p ∂f/∂p of one sample after the other."""
    shares = []
    for one in x.split(1):
        (g,) = torch.autograd.grad(module(one)[:, 1].sum(), parameter)
        shares.append((parameter * g).sum())
    return torch.stack(shares).detach()


@pytest.mark.parametrize("make", fast_first([lg.transform, lg.trace], 1))
@pytest.mark.parametrize("how", fast_first(["table", "scaled"], 1))
def test_tables_of_words(make: Callable[..., Any], how: str) -> None:
    model, ids = Tokens(how).double().eval(), torch.randint(11, (3, 6))
    module = make(model, ids)
    want = paid(module, ids, model.place.weight)
    assert float(want.abs().min()) > 0
    for method in ("input_x_gradient", "fullgrad_plus", "gradcam"):
        torch.testing.assert_close(lg.attribute(module, ids, 1, method=method).positional, want)


@pytest.mark.parametrize("how", fast_first(["none", "one for all", "concatenated"], 1))
def test_what_is_no_table_of_positions(how: str) -> None:
    model, ids = Tokens(how).double().eval(), torch.randint(11, (3, 6))
    assert not bool(lg.attribute(model, ids, 1).positional.any())


def test_positions_of_a_vision_transformer() -> None:
    model = vit()
    x = torch.randn(3, 3, 32, 32, dtype=F64)
    module = lg.transform(model, x)
    got = lg.attribute(module, x, 1).positional
    torch.testing.assert_close(got, paid(module, x, model.pos_embed))
