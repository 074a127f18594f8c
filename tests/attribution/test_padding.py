"""A padded text in a batch is explained as it is alone, by each method that draws nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.attribution import METHODS

Tensor = torch.Tensor
WIDE, HEADS, VOCABULARY = 12, 2, 20
LENGTHS = (4, 7, 9)
DRAWN = {"random", "smoothgrad"}  # one draw for all of a batch, of its shape


class Block(nn.Module):
    """Attention behind a mask, and an MLP, on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDE), nn.LayerNorm(WIDE)
        self.qkv, self.out = nn.Linear(WIDE, 3 * WIDE), nn.Linear(WIDE, WIDE)
        self.mlp = nn.Sequential(nn.Linear(WIDE, 2 * WIDE), nn.GELU(), nn.Linear(2 * WIDE, WIDE))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Text(nn.Module):
    """Reads each text's mean, or its last token. ``kept``: 1 at the tokens, 0 at the padding."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.tokens = nn.Embedding(VOCABULARY, WIDE)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDE, 5)

    def forward(self, ids: Tensor, kept: Tensor) -> Tensor:
        n = ids.shape[1]
        mask = (kept[:, None, None] > 0) & torch.ones(n, n, dtype=torch.bool, device=ids.device)
        if self.causal:  # each token sees itself, so that no row is empty
            mask = mask.tril() | torch.eye(n, dtype=torch.bool, device=ids.device)
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


def last(kept: Tensor) -> Sequence[tuple[int, int]]:
    return [(int(row.nonzero().max()), 3) for row in kept]


def mean(kept: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda y: (y[..., 3] * kept).sum(1) / kept.sum(1)


def one_place(kept: Tensor) -> tuple[int, int]:
    (place,) = {place for place, _ in last(kept)}
    return place, 3


def first(kept: Tensor) -> tuple[int, int]:
    return 0, 3


def padded(texts: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
    longest = max(map(len, texts))

    def wide(t: Tensor) -> Tensor:
        rest = longest - len(t)
        return nn.functional.pad(t, (rest, 0) if side == "left" else (0, rest))

    return torch.stack([*map(wide, texts)]), torch.stack([wide(torch.ones_like(t)) for t in texts])


CASES = [
    ("libra", False, "right", mean), ("libra", False, "right", first), ("libra", True, "left", one_place),
    ("libra", True, "right", last), ("plain", False, "right", first), ("plain", True, "left", one_place),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "causal", "side", "target"), CASES)
def test_a_batch_of_texts_is_each_text(
    policy: str, causal: bool, side: str, target: Callable[[Tensor], Any]
) -> None:
    torch.manual_seed(3)
    model = Text(causal).double().eval()
    texts = [torch.randint(VOCABULARY, (n,)) for n in LENGTHS]
    ids, kept = padded(texts, side)
    gm = lg.transform(model, (ids, kept)) if policy == "libra" else lg.trace(model, (ids, kept))
    compared = 0
    for method in METHODS.keys() - DRAWN:
        options = {"steps": 3} if METHODS[method].path else {}
        if METHODS[method].row and target is mean:
            continue  # attention is followed to one token
        batch = lg.attribute(gm, (ids, kept), target(kept), method=method, **options)
        for i, text in enumerate(texts):
            given = padded([text], side)
            alone = lg.attribute(gm, given, target(given[1]), method=method, **options)
            here = kept[i].bool()
            scale = float(alone.values.abs().max())
            apart = float((batch.values[i][here] - alone.values[0]).abs().max())
            assert apart < 1e-9 * max(scale, 1e-3), (method, i)
            assert torch.all(batch.values[i][~here] == 0), (method, i)
            assert float((batch.total[i] - alone.total[0]).abs()) < 1e-9, (method, i)
        compared += 1
    assert compared >= 12
