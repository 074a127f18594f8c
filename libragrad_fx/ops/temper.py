"""Softmax that goes back at another temperature: ``dx = s (g - <g, s>)`` with ``s = softmax(x / T)``.

method: GIM. There is no factor 1/T, and the forward is that of T = 1. In fused attention v gets its
gradient by the weights of the forward; q, k and the mask get theirs from scores that are computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from libragrad_fx.errors import ModeError
from libragrad_fx.kernels import register
from libragrad_fx.kernels.blocks import repeated, summed
from libragrad_fx.ops.attention import CHUNK, probabilities, scaled_dot_product_attention
from libragrad_fx.ops.twin import Grads, made_once, twin

aten = torch.ops.aten


def _copy(result: torch.Tensor, *_: Any) -> torch.Tensor:
    return result.clone()


_with_weights = register(
    "with_weights(Tensor result, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal,"
    " float scale, bool enable_gqa) -> Tensor",
    _copy,
)


@made_once
def tempered(op: torch._ops.OpOverload, temperature: float) -> Callable[..., Any]:
    """The twin of an op of ``TEMPERED`` for a temperature."""
    made = TEMPERED[op](temperature, f"at_{temperature!r}".replace(".", "_").replace("-", "_"))
    made.temper, made.aten_op = (op, temperature), op  # type: ignore[attr-defined]
    return made


def _jacobian(s: torch.Tensor, g: torch.Tensor, dim: int) -> torch.Tensor:
    return s * (g - (g * s).sum(dim, keepdim=True))


def _softmax(temperature: float, label: str) -> Callable[..., Any]:
    def vjp(needs: frozenset[str], g: torch.Tensor, *, self: torch.Tensor, dim: int, **_: Any) -> Grads:
        return {
            "self": _jacobian(torch.softmax(self / temperature, dim, dtype=g.dtype), g, dim).to(self.dtype)
        }

    return twin(aten.softmax.int, vjp, saves=("self",), name=f"softmax_{label}")


def _attention(temperature: float, label: str) -> Callable[..., Any]:
    def vjp(needs: frozenset[str], g: torch.Tensor, **saved: Any) -> Grads:
        return {"result": g, **_scores(needs, g, temperature, **saved)}

    saves = ("query", "key", "value", "attn_mask")
    weights = twin(_with_weights, vjp, saves=saves, forward=_copy, name=f"with_weights_{label}")

    def call(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None,
        dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        if dropout_p > 0:
            raise ModeError(
                "weights that a dropout has drawn have no backward at a temperature: call .eval()"
            )
        given: Any = (query, key, value, attn_mask, dropout_p, is_causal)
        result = scaled_dot_product_attention(*given, scale=scale, enable_gqa=enable_gqa)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        mine = (query, key, value.detach(), attn_mask, is_causal, scale, enable_gqa)
        return weights(result, *mine)  # type: ignore[no-any-return]

    call.__name__ = call.__qualname__ = f"scaled_dot_product_attention_{label}"
    return call


def _scores(
    needs: frozenset[str], g: torch.Tensor, temperature: float, *, query: torch.Tensor, key: torch.Tensor,
    value: torch.Tensor, attn_mask: torch.Tensor | None, is_causal: bool, scale: float, enable_gqa: bool,
) -> Grads:  # fmt: skip
    """The gradients of q, k and the mask, some query rows at a time."""
    heads = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    wide = torch.promote_types(query.dtype, torch.float32)
    k, v = (repeated(x, heads).to(wide) for x in (key, value))
    soft = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask / temperature

    def rows() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for first in range(0, query.shape[-2], CHUNK):
            q, do = (x[..., first : first + CHUNK, :].to(wide) for x in (query, g))
            s = probabilities(q, k, soft, first, is_causal, scale / temperature)
            dx = _jacobian(s, do @ v.transpose(-2, -1), -1)
            yield dx, dx.transpose(-2, -1) @ q

    parts, dks = zip(*rows(), strict=True)
    dx, dk = torch.cat(parts, -2), summed(torch.stack(dks).sum(0) * scale, heads)
    grads = {"query": ((dx @ k) * scale).sum_to_size(query.shape), "key": dk.sum_to_size(key.shape)}
    if attn_mask is not None and "attn_mask" in needs:
        grads["attn_mask"] = dx.sum_to_size(attn_mask.shape)
    return grads


TEMPERED: dict[Any, Callable[[float, str], Callable[..., Any]]] = {
    aten.softmax.int: _softmax,
    aten.scaled_dot_product_attention.default: _attention,
}
