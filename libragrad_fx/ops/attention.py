"""Scaled dot-product attention with its probabilities held constant: only v carries gradient.

method: Attention rule. ``dV = P^T dO``; the probabilities are not kept but recomputed, 64 query
rows at a time, so that memory stays linear in the number of tokens whatever kernel ran forward.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from libragrad_fx.ops.twin import Grads, twin

aten = torch.ops.aten
_CHUNK = 64


def _probabilities(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    first: int,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """softmax(scale q kᵀ + mask) for the query rows that start at ``first``; masked-out rows are 0."""
    scores = (q @ k.transpose(-2, -1)) * scale
    if causal:
        rows = torch.arange(first, first + q.shape[-2], device=q.device)[:, None]
        scores = scores.masked_fill(rows < torch.arange(k.shape[-2], device=q.device), -math.inf)
    if mask is not None:
        whole = mask.ndim < 2 or mask.shape[-2] == 1
        mask = mask if whole else mask[..., first : first + q.shape[-2], :]
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return aten._safe_softmax.default(scores, -1)


def _attention(
    needs: frozenset[str], g: torch.Tensor, *, query: torch.Tensor, key: torch.Tensor,
    attn_mask: torch.Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool,
    dropout_p: float,
) -> Grads:  # fmt: skip
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    heads = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    k = key.repeat_interleave(heads, -3) if heads > 1 else key
    wide = torch.float32 if query.dtype in (torch.float16, torch.bfloat16) else query.dtype
    dv: Any = 0
    for first in range(0, query.shape[-2], _CHUNK):
        rows = slice(first, first + _CHUNK)
        p = _probabilities(
            query[..., rows, :].to(wide), k.to(wide), attn_mask, first, is_causal, scale
        )
        dv = dv + p.transpose(-2, -1) @ g[..., rows, :].to(wide)
    if heads > 1:
        dv = dv.unflatten(-3, (-1, heads)).sum(-3)
    return {"value": dv}


def _same_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Attention by the math kernel: the one PyTorch picks where a mask requires grad."""
    return aten._scaled_dot_product_attention_math.default(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


_SAVES = ("query", "key", "attn_mask")
_sdpa = aten.scaled_dot_product_attention.default
_balanced = twin(_sdpa, _attention, saves=_SAVES)
_balanced_math = twin(
    _sdpa, _attention, saves=_SAVES, name="scaled_dot_product_attention_math", forward=_same_kernel
)


def scaled_dot_product_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Balanced twin of ``aten.scaled_dot_product_attention``: same kernel, gradient to v alone."""
    args = (query, key, value, attn_mask, dropout_p, is_causal)
    extra = {"scale": scale, "enable_gqa": enable_gqa}
    # PyTorch picks its kernel by what requires grad, and kernels differ in bits. Inside a Function
    # nothing does; so where that would change the choice, the kernel is named instead.
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        if dropout_p > 0:
            return _same_kernel(query.detach(), key.detach(), value, attn_mask.detach(),
                                dropout_p, is_causal, **extra)  # fmt: skip
        return _balanced_math(*args, **extra)
    if dropout_p > 0:  # the dropped probabilities cannot be recomputed: prune q and k instead
        return _sdpa(query.detach(), key.detach(), value, attn_mask, dropout_p, is_causal, **extra)
    return _balanced(*args, **extra)


scaled_dot_product_attention.aten_op = _sdpa  # type: ignore[attr-defined]
