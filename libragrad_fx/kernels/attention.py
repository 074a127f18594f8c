"""Attention forward, by the name of the kernel that PyTorch picks on a GPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from libragrad_fx.kernels import TRIALS, some

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


def _trial(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel that PyTorch picks, by its name and as PyTorch calls it: (output, log-sum-exp)."""
    q = some(device, dtype)
    chosen = SDPBackend(torch._fused_sdp_choice(q, q, q))
    if chosen not in FUSED or not q.is_cuda:
        return q, q
    out, lse = fused(chosen)(q, q, q)
    want = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    scores = q.double() @ q.double().mT / math.sqrt(q.shape[-1])
    both = [torch.cat([o.double(), s.double()[..., None]], -1) for o, s in
            ((out, lse), (want, scores.logsumexp(-1)))]  # fmt: skip
    return both[0], both[1]


TRIALS.append(_trial)


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
