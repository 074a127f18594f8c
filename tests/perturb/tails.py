"""What may lie behind a sequence: functions of tokens, for any number of them.

Each takes ``h`` (B, T, C) and, for the places that ``h`` has, rows of tables: ``t`` (T, C) or (B, T, C),
``w`` (T,) or (B, T), ``bias`` (T, T) or (B, T, T). So a function is its own reference on fewer tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

F64 = torch.float64
C, N = 6, 7
"""Channels, and the tokens that the functions may be planned for."""
Tail = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _weights(*shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(shape, generator=draw, dtype=F64)


SQUARE, OUT, KERNEL = _weights(C, C), _weights(C, 3), _weights(C, 1, 3)
MIXED = _weights(N + 2, N + 2)


def head(x: Tensor) -> Tensor:
    """A linear head with its bias: what is as large as the number of tokens does not pass it."""
    return F.linear(x, OUT.T, OUT[0])


# --- layers: tokens in, tokens out


def eager(h: Tensor, t: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return h + ((h @ SQUARE @ h.transpose(1, 2) / 4 + bias).softmax(-1) @ h)


def fused(h: Tensor, t: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    q = h.unflatten(-1, (2, -1)).transpose(1, 2)
    return h + F.scaled_dot_product_attention(q, q, q, bias[..., None, :, :]).transpose(1, 2).flatten(2)


def causal(h: Tensor, t: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return h + F.scaled_dot_product_attention(h, h @ SQUARE, h, is_causal=True)


def masked(h: Tensor, t: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """A row of a mask for all queries, infinite where it hides."""
    hidden = (w < 0)[..., None, :]
    return h + (h @ h.transpose(1, 2)).masked_fill(hidden, -math.inf).softmax(-1) @ h


def talking(h: Tensor, t: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """Heads that mix after the softmax, by einsum."""
    q = h.unflatten(-1, (2, -1))
    weights = torch.einsum("bqhc,bkhc->bhqk", q, q).softmax(-1)
    return h + torch.einsum("bhqk,hg,bkgc->bqgc", weights, SQUARE[:2, :2], q).flatten(2)


def merged(h: Tensor, t: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """Tokens in front of samples, samples and heads joined, tokens and samples joined."""
    samples, tokens = h.shape[:2]
    q = h.transpose(0, 1).reshape(tokens, samples * 2, C // 2).transpose(0, 1)
    y = torch.bmm(torch.bmm(q, q.transpose(1, 2)).softmax(-1), q)
    y = y.transpose(0, 1).reshape(tokens * samples, C) @ SQUARE
    return h + y.view(tokens, samples, C).transpose(0, 1)


def by_hand(h: Tensor, t: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """A softmax without the op."""
    e = (h @ h.transpose(1, 2) / 4).exp()
    return h + e / e.sum(-1, keepdim=True) @ h


def linear_attention(h: Tensor, t: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    q = F.elu(h) + 1
    return h + (q @ (q.transpose(1, 2) @ h)) / (q @ q.sum(1)[..., None])


def crossed(h: Tensor, t: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """Attention between channels, of vectors of length 1 over the tokens (XCiT)."""
    q = F.normalize(h, dim=1)
    return h + ((q.transpose(1, 2) @ q).softmax(-1) @ h.transpose(1, 2)).transpose(1, 2)


def responses(h: Tensor, t: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """Global response normalisation (ConvNeXt V2), over the tokens."""
    size = h.norm(dim=1, keepdim=True)
    return h * (size / size.mean(-1, keepdim=True))


def grouped(h: Tensor, t: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(h.transpose(1, 2), 2).transpose(1, 2)


def excited(h: Tensor, t: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return h * (h.mean(1, keepdim=True) @ SQUARE).sigmoid()


def tables(h: Tensor, t: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """A table of positions inside, and a scale of each token."""
    return (h + t) * w[..., None]


def rotated(h: Tensor, t: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """A table along tokens whose axis comes first, and parts that are joined again."""
    a, b = h.chunk(2, -1)
    return torch.cat([a * t[..., :3], torch.where(w[..., None] > 0, -b, b)], -1)


def pointwise(h: Tensor, t: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return F.conv1d(h.transpose(1, 2), SQUARE[..., None], OUT[:, 0]).transpose(1, 2) + h


def with_class(h: Tensor, t: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """A class token joined in front, which sees the others, and leaves again."""
    x = torch.cat([SQUARE[:1].expand(h.shape[0], 1, -1), h], 1)
    x = x + F.scaled_dot_product_attention(x, x, x)
    front, rest = x.split([1, x.shape[1] - 1], 1)
    return rest + front


LAYERS: Mapping[str, Tail] = {
    f.__name__: f for f in (
        eager, fused, causal, masked, talking, merged, by_hand, linear_attention, crossed, responses,
        grouped, excited, tables, rotated, pointwise, with_class,
    )
}  # fmt: skip


# --- from tokens to an answer

POOLS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(1),
    "max": lambda x: x.max(1)[0],
    "amax": lambda x: x.amax(1),
    "adaptive": lambda x: F.adaptive_avg_pool1d(x.transpose(1, 2), 1).flatten(1),
    "first": lambda x: x[:, 0],
    "last": lambda x: x[:, -1],
    "weighted": lambda x: ((x @ SQUARE[:, :1]).softmax(1) * x).sum(1),
    "class attention": lambda x: ((OUT.T @ x.transpose(1, 2)).softmax(-1) @ x)[:, 1],
    "class token behind": lambda x: F.scaled_dot_product_attention(
        SQUARE[:1].expand(x.shape[0], 1, -1), *[torch.cat([SQUARE[:1].expand(x.shape[0], 1, -1), x], 1)] * 2
    )[:, 0],
    "deviation": lambda x: x.std(1, correction=0),
    "middle": lambda x: x.median(1)[0],
}  # fmt: skip


# --- what must be refused: for each, words of the reason


def convolved(x: Tensor, padding: int = 0) -> Tensor:
    return F.conv1d(x.transpose(1, 2), KERNEL, padding=padding, groups=C).mean(2)


def off_by_one(e: Tensor, x: Tensor) -> Tensor:
    return e / (1 + e.sum(-1, keepdim=True)) @ x



ORDER, NUMBER, ALL = "the order of the tokens", "the number of", "needs all tokens"
REFUSED: Mapping[str, tuple[Callable[..., Any], str]] = {
    "token mixing": (lambda x, *_: (x.transpose(1, 2) @ MIXED[: x.shape[1], :N]).mean(2), ALL),
    "a gate over tokens": (lambda x, *_: (x * (x[..., 0] @ MIXED[:N, :N])[..., None]).mean(1), ALL),
    "a convolution": (lambda x, *_: convolved(x, padding=1), ORDER),
    "a small convolution": (lambda x, *_: x.mean(1) + 1e-12 * convolved(x, padding=1), ORDER),
    "a causal convolution": (lambda x, *_: convolved(F.pad(x, (0, 0, 2, 0))), "one token less"),
    "cumsum": (lambda x, *_: x.cumsum(1).mean(1), ORDER),
    "the last of a cumsum": (lambda x, *_: x.cumsum(1)[:, -1] / N, ORDER),
    "flip": (lambda x, *_: (x * x.flip(1)).mean(1), ORDER),
    "roll": (lambda x, *_: (x * x.roll(1, 1)).mean(1), ORDER),
    "neighbours": (lambda x, *_: (x[:, 1:] * x[:, :-1]).mean(1), "by their places"),
    "every second": (lambda x, *_: x[:, ::2].mean(1), "another order"),
    "some": (lambda x, *_: x[:, 2:4].mean(1), "by their places"),
    "some, by indices": (lambda x, *_: x.index_select(1, torch.tensor([1, 3, 5])).mean(1), ORDER),
    "some, by a list": (lambda x, *_: x[:, [1, 3, 5]].mean(1), ORDER),
    "sorted": (lambda x, *_: x.sort(1)[0][:, :3].mean(1), ORDER),
    "the largest three": (lambda x, *_: x.topk(3, 1)[0].mean(1), NUMBER),
    "three tokens": (
        lambda x, *_: x.gather(1, x[..., :1].topk(3, 1)[1].expand(-1, -1, C)).mean(1), ORDER,
    ),
    "the place of the largest": (lambda x, *_: x.mean(1) + x.argmax(1) / 9, ORDER),
    "a sum": (lambda x, *_: x.sum(1), NUMBER),
    "a sum over a constant": (lambda x, *_: x.sum(1) * (1 / N), NUMBER),
    "a sum over the number": (lambda x, *_: x.sum(1) / x.shape[1], NUMBER),
    "a sum of products": (lambda x, *_: (x.transpose(1, 2) @ x / N).mean(1), NUMBER),
    "linear attention over N": (lambda x, *_: (x @ (x.transpose(1, 2) @ x) / N).mean(1), NUMBER),
    "attention of relu over N": (lambda x, *_: ((x @ x.transpose(1, 2)).relu() @ x / N).mean(1), NUMBER),
    "softmax off by one": (lambda x, *_: off_by_one((x @ x.mT / 4).exp(), x).mean(1), NUMBER),
    "unit length over tokens": (lambda x, *_: F.normalize(x, dim=1).mean(1), NUMBER),
    "length": (lambda x, *_: x.norm(dim=1), NUMBER),
    "variance of n - 1": (lambda x, *_: x.var(1), NUMBER),
    "logsumexp": (lambda x, *_: x.logsumexp(1), NUMBER),
    "product": (lambda x, *_: x.prod(1), NUMBER),
    "a grid": (lambda x, *_: F.avg_pool1d(x[:, :-1].transpose(1, 2), 2).mean(2), "by their places"),
    "rows": (lambda x, *_: F.pad(x, (0, 0, 0, 1)).unflatten(1, (2, 4)).amax((1, 2)), "one token less"),
    "flat": (lambda x, *_: x.flatten(1) @ SQUARE.repeat(N, 1), ALL),
    "a norm over tokens": (lambda x, *_: F.layer_norm(x, (N, C)).mean(1), ALL),
    "four parts": (lambda x, *_: F.adaptive_avg_pool1d(x.transpose(1, 2), 3).mean(2), ORDER),
    "twice the tokens": (lambda x, *_: torch.cat([x, x], 1).mean(1), "with themselves"),
    "repeated": (lambda x, *_: x.repeat(1, 2, 1).mean(1), "one token less"),
    "places by counting": (
        lambda x, *_: (x * torch.ones_like(x[0, :, 0]).cumsum(0)[:, None]).mean(1), ORDER,
    ),
    "a mask added": (lambda x, *_: x.mean(1) + torch.baddbmm(MIXED[:N, :N], x, x.mT).mean(1)[:, :C], ALL),
}  # fmt: skip
