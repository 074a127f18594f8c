"""A graph in segments is the same function with the same gradients, and keeps less."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.bench import compare, gradient
from libragrad_fx.errors import InputError
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.target import middle, select
from tests.between import fast_first
from tests.models.zoo import build


@functools.cache
def whole(name: str) -> tuple[nn.Module, torch.Tensor, CapturedModule]:
    model, x = build(name)
    return model, x, lg.transform(model, x)


@pytest.mark.parametrize(
    "name", fast_first(["fused_attention", "every_fused_op", "mixture_of_experts", "sampler"], 1)
)
@pytest.mark.parametrize("segments", [None, 1, 5])
def test_same_output_and_gradients_to_the_bit(name: str, segments: int | None) -> None:
    model, x, gm = whole(name)
    parts = lg.checkpointed(gm, segments)
    grads = []
    for module in (gm, parts):
        z = x.clone().requires_grad_()
        y = module(z)
        y.square().sum().backward()
        grads.append([y.detach(), z.grad, *(p.grad for p in model.parameters())])
        model.zero_grad()
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_another_batch_and_less_memory() -> None:
    layers = [nn.TransformerEncoderLayer(16, 2, 64, batch_first=True) for _ in range(6)]
    model, x = nn.Sequential(*layers).eval().requires_grad_(False), torch.randn(2, 9, 16)
    gm = lg.transform(model, x)
    sides = {"whole": gm, "parts": lg.checkpointed(gm)}
    logits = {k: gradient(lambda z, m=m: select(m(z), middle)) for k, m in sides.items()}
    whole, parts = compare(logits, x.repeat(3, *[1] * (x.ndim - 1)), rounds=1)
    assert parts.peak < whole.peak
    assert parts.flops > whole.flops


def test_what_cannot_be_cut_is_refused() -> None:
    model, x = build("fused_attention")
    with pytest.raises(InputError, match="transform or trace"):
        lg.checkpointed(model)  # type: ignore[arg-type]
    gm = lg.transform(model, x)
    for segments in (0, -1, 10**6, "a"):
        with pytest.raises(InputError, match="segments must be from 1 to"):
            lg.checkpointed(gm, segments)  # type: ignore[arg-type]
