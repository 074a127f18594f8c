"""Softmax at a temperature: the forward's bits, and the gradients of ``T softmax(x / T)`` by autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from libragrad_fx.errors import ModeError
from libragrad_fx.module.pickling import graph_of, spelled
from libragrad_fx.ops.temper import tempered

aten = torch.ops.aten
SOFTMAX, ATTENTION = aten.softmax.int, aten.scaled_dot_product_attention.default


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    seed = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=dtype, generator=seed).requires_grad_()


def held(x: Tensor, other: Tensor) -> Tensor:
    """The value of the one, the gradient of the other."""
    return x.detach() + other - other.detach()


def by_formula(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, t: float, causal: bool, scale: float | None
) -> Tensor:
    heads = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    x = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if causal:
        x = x + torch.full_like(x, -math.inf).triu(1)
    if mask is not None:
        x = x.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else x + mask
    return held(x.softmax(-1), t * (x / t).softmax(-1)) @ v


def assert_same(found: Tensor, wanted: Tensor, leaves: list[Tensor]) -> None:
    weights = torch.arange(found.numel(), dtype=torch.float64).view_as(found).cos()
    grads = [torch.autograd.grad((y * weights).sum(), leaves) for y in (found, wanted)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("t", [0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("dim", [-1, 1])
def test_softmax(t: float, dim: int) -> None:
    x = draw(2, 5, 7)
    y = tempered(SOFTMAX, t)(x, dim)
    assert torch.equal(y, x.softmax(dim))
    assert_same(y, held(x.softmax(dim), t * (x / t).softmax(dim)), [x])


def test_softmax_in_another_dtype() -> None:
    x = draw(2, 7, dtype=torch.bfloat16)
    y = tempered(SOFTMAX, 2.0)(x, -1, dtype=torch.float32)
    assert torch.equal(y, x.softmax(-1, dtype=torch.float32))
    (g,) = torch.autograd.grad(y[:, 0].sum(), x)
    assert g.dtype is torch.bfloat16


KEEP = torch.ones(70, 70, dtype=torch.bool).tril()
MASKS: dict[str, Any] = {
    "none": {},
    "causal": {"is_causal": True},
    "a scale": {"scale": 0.3},
    "places": {"attn_mask": KEEP},
    "live": {"attn_mask": draw(2, 1, 70, 70)},
    "live, a row for all": {"attn_mask": draw(4, 1, 70)},
    "groups of heads": {"enable_gqa": True},
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("t", [1.0, 2.0])
def test_attention(name: str, t: float) -> None:
    """More query rows than are taken at a time."""
    given, few = MASKS[name], 2 if "groups" in name else 4
    q, k, v = draw(2, 4, 70, 8), draw(2, few, 70, 8), draw(2, few, 70, 6)
    mask = given.get("attn_mask")
    y = tempered(ATTENTION, t)(q, k, v, **given)
    assert torch.equal(y, F.scaled_dot_product_attention(q, k, v, **given))
    wanted = by_formula(q, k, v, mask, t, given.get("is_causal", False), given.get("scale"))
    leaves = [q, k, v, *([mask] if mask is not None and mask.requires_grad else [])]
    assert_same(y, wanted, leaves)


def test_at_one_it_is_autograd() -> None:
    q, k, v = (draw(1, 2, 5, 4 + i)[..., :4] for i in range(3))
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    assert_same(tempered(ATTENTION, 1.0)(q, k, v), F.scaled_dot_product_attention(q, k, v), [q, k, v])


def test_without_a_gradient_it_is_the_op() -> None:
    q, k, v = (draw(1, 2, 5, 4) for _ in range(3))
    with torch.no_grad():
        assert torch.equal(tempered(ATTENTION, 2.0)(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_dropped_weights_are_refused() -> None:
    q, k, v = (draw(1, 2, 5, 4) for _ in range(3))
    with pytest.raises(ModeError, match="dropout"):
        tempered(ATTENTION, 2.0)(q, k, v, None, 0.1)


@pytest.mark.parametrize("op", [SOFTMAX, ATTENTION], ids=str)
def test_one_twin_a_temperature_and_it_is_spelled(op: Any) -> None:
    assert tempered(op, 2.0) is tempered(op, 2.0) is not tempered(op, 3.0)
    graph = torch.fx.Graph()
    graph.output(graph.call_function(tempered(op, 0.5), tuple(graph.placeholder(n) for n in "qkv")))
    again = graph_of(spelled(graph))
    assert [n.target for n in again.nodes if n.op == "call_function"] == [tempered(op, 0.5)]


def test_vmap_and_compile_see_the_same() -> None:
    q, k, v = (draw(3, 2, 5, 4) for _ in range(3))
    fn = tempered(ATTENTION, 2.0)

    def grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.func.grad(lambda q: fn(q, k, v).square().sum())(q)

    whole = grad(q, k, v)
    torch.testing.assert_close(torch.func.vmap(grad)(q, k, v), whole)
    compiled = torch.compile(
        lambda q, k, v: fn(q, k, v).square().sum(), backend="aot_eager", fullgraph=True
    )
    (found,) = torch.autograd.grad(compiled(q, k, v), q)
    torch.testing.assert_close(found, whole)
