"""What ``bench`` counts is what runs; its times are not tested."""

from __future__ import annotations

import torch
from torch import nn

from libragrad_fx.bench import HEAD, Operations, compare, gradient
from libragrad_fx.target import middle, select


def test_operations_and_memory_of_a_chain() -> None:
    """Three linears of 8 on 5 rows; the second side differentiates a third of them."""
    layers = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3))).requires_grad_(False)
    x = torch.randn(5, 8)
    whole, part = compare(
        {
            "whole": gradient(lambda z: select(layers(z), middle)),
            "part": gradient(lambda z: select(layers[2](layers[:2](z.detach()) + z), middle)),
        },
        x,
        rounds=3,
    )
    one = 2 * 5 * 8 * 8
    assert (whole.flops, part.flops) == (6 * one, 4 * one)
    assert (whole.ratio, whole.low, whole.high) == (1, 1, 1)
    assert part.seconds > 0
    tensor = x.numel() * 4 / 2**20
    assert tensor <= whole.peak <= 6 * tensor
    assert part.against(whole).count("|") == HEAD.splitlines()[0].count("|")


def test_operations_of_attention_are_those_of_its_products() -> None:
    """Two products forward; five backward, as the kernel computes the probabilities again."""
    tokens, width = 48, 16
    q, k, v = torch.randn(3, 1, 2, tokens, width, requires_grad=True).unbind(0)
    one = 2 * 2 * tokens * tokens * width
    with Operations() as forward:
        y = nn.functional.scaled_dot_product_attention(q, k, v)
    with Operations() as backward:
        y.sum().backward()
    assert (forward.total, backward.total) == (2 * one, 5 * one)
