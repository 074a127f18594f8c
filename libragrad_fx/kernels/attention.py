"""Attention forward, by the name of the kernel that PyTorch picks on a GPU."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from libragrad_fx.kernels import passes, some

aten = torch.ops.aten
FUSED = {
    SDPBackend.FLASH_ATTENTION: aten._scaled_dot_product_flash_attention.default,
    SDPBackend.EFFICIENT_ATTENTION: aten._scaled_dot_product_efficient_attention.default,
    SDPBackend.CUDNN_ATTENTION: aten._scaled_dot_product_cudnn_attention.default,
}


def fused(backend: SDPBackend) -> Any:
    """The kernel of a GPU, as PyTorch calls it. Returns the output and the log-sum-exp of every row."""
    op = FUSED[backend]

    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None,
        dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        bias = additive(attn_mask, query)
        if backend is SDPBackend.FLASH_ATTENTION:
            out, lse, *_ = op(query, key, value, dropout_p, is_causal, False, scale=scale)
        elif backend is SDPBackend.CUDNN_ATTENTION:
            out, lse, *_ = op(query, key, value, bias, True, dropout_p, is_causal, False, scale=scale)
        else:
            bias = None if bias is None else _aligned(bias, (*query.shape[:3], key.shape[2]))
            out, lse, *_ = op(query, key, value, bias, True, dropout_p, is_causal, scale=scale)
        return out, lse.flatten(2)[..., : query.shape[2]]  # padded, or with an axis of one number

    return forward


@functools.cache
def called(backend: SDPBackend, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel gives by its name what it gives as PyTorch calls it, and its log-sum-exp: tried once
    for a device and a dtype."""

    def trial(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        q = some(device, dtype)
        with sdpa_kernel(backend):
            want = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        out, lse = fused(backend)(q, q, q)
        scores = q.double() @ q.double().mT / math.sqrt(q.shape[-1])
        pairs = (out, lse), (want, scores.logsumexp(-1))
        found, expected = (torch.cat([o.double(), s.double()[..., None]], -1) for o, s in pairs)
        return found, expected

    return passes([trial], device, dtype, f"{backend.name} by its name")


def value_samples(x: torch.Tensor) -> list[tuple[Any, ...]]:
    """Arguments of ``attention_value``: two heads share keys; with and without a mask, causal or not."""
    return [_sampled(x, mask, causal) for mask in (None, x @ x.mT) for causal in (False, True)]


def _sampled(x: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> tuple[Any, ...]:
    given = x.double(), x[:, ::2].double().repeat_interleave(2, 1), None if mask is None else mask.double()
    scores = given[0] @ given[1].mT / math.sqrt(x.shape[-1]) + (0 if given[2] is None else given[2])
    later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
    lse = scores.masked_fill(later, -math.inf).logsumexp(-1) if causal else scores.logsumexp(-1)
    return x, x, x[:, ::2], mask, lse.float(), causal, None


def _aligned(bias: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A bias of all rows, each of which begins at a multiple of 8 elements."""
    if any(n % 8 for n in bias.stride()[:-1]) or bias.stride()[-1:] != (1,):
        bias = torch.nn.functional.pad(bias, (0, -bias.shape[-1] % 8))[..., : bias.shape[-1]]
    return bias.expand(shape)


def additive(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(~mask, -math.inf)


def is_fit(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether PyTorch calls a GPU's kernel with these tensors as they are, and keeps its log-sum-exp: it
    pads features to multiples of 8, and autocast converts what is not of its dtype."""
    dtypes = {query.dtype, key.dtype, value.dtype}
    if torch.is_autocast_enabled("cuda"):
        dtypes.add(torch.get_autocast_dtype("cuda"))
    whole = query.shape[-1] % 8 == value.shape[-1] % 8 == 0
    return value.requires_grad and whole and len(dtypes) == 1
