"""dV of attention on a CPU, in blocks of heads and query rows that stay in the cache."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from libragrad_fx.kernels.attention import additive

aten = torch.ops.aten
_FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_ROWS = 256  # the fewest query rows at a time
_CACHED = 2**18  # elements of a block of P, a thread: 1 MiB of float32
_CHEAP = 2**21  # below so many multiplications in a product, and
_SMALL = 2**16  # so many elements of k, one kernel for all three gradients costs less


def value_gradient(
    g: torch.Tensor, query: torch.Tensor, key: torch.Tensor, attn_mask: torch.Tensor | None,
    lse: torch.Tensor, is_causal: bool, scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """dV, from P = exp(scale q kᵀ + mask - lse); in place, because P is the largest tensor."""
    heads = query.shape[1] // key.shape[1]
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    wide = lse.dtype
    if attn_mask is not None:  # a row with nothing to attend to: P is 0
        lse = lse.masked_fill(lse == -math.inf, math.inf)
    keys = repeated(key, heads)
    if is_small(query, key) and g.shape[-1] == key.shape[-1]:
        # v and the output count for the gradients of q and k alone, which nobody reads
        v, output, bias = keys, g, additive(attn_mask, query)
        given = g, query, keys, v, output, lse, 0.0, is_causal
        dv = _FLASH_BACKWARD(*given, attn_mask=bias, scale=scale)[2]
        return summed(dv, heads).contiguous()  # as tracers are told
    mask, keys = additive(attn_mask, lse), keys.to(wide)
    offsets = -lse[..., None]
    dv = torch.zeros((*keys.shape[:3], g.shape[-1]), dtype=wide, device=g.device)
    for part, rows in _blocks(query.shape, keys.shape[2]):
        seen = slice(0, rows.stop if is_causal else None)
        here = (*part, rows)
        offset, q, do = (t[here].to(wide).flatten(0, 1) for t in (offsets, query, g))
        k = keys[(*part, seen)].flatten(0, 1)
        p = torch.baddbmm(offset, q, k.transpose(1, 2), alpha=scale)
        if mask is not None:
            p.unflatten(0, dv[part].shape[:2]).add_(_mask_of(mask, part, rows))
        if is_causal:
            p[:, :, rows.start :].masked_fill_(_later(p[0, :, rows.start :]), -math.inf)
        dv[part].view(len(q), *dv.shape[2:])[:, seen].baddbmm_(p.exp_().transpose(1, 2), do)
    return summed(dv, heads).to(g.dtype)


def is_small(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether PyTorch's own backward costs less, though it computes the gradients of q and k too."""
    return query.numel() * key.shape[-2] < _CHEAP and key.numel() < _SMALL


def repeated(x: torch.Tensor, times: int) -> torch.Tensor:
    """Keys or values, once for each head of a group of queries."""
    return x.repeat_interleave(times, -3) if times > 1 else x


def summed(x: torch.Tensor, times: int) -> torch.Tensor:
    """The transpose of ``repeated``."""
    return x.unflatten(-3, (-1, times)).sum(-3) if times > 1 else x


def rows_of(mask: torch.Tensor, rows: slice) -> torch.Tensor:
    """The mask's part for these query rows; a mask that all rows share is returned whole."""
    return mask if mask.ndim < 2 or mask.shape[-2] == 1 else mask[..., rows, :]


def _blocks(shape: torch.Size, keys: int) -> Iterator[tuple[tuple[slice, slice], slice]]:
    """Blocks whose probabilities are computed at once: ((samples, heads), query rows).

    A block has all heads of several samples, or some heads of one: so it is dense in a dense tensor.
    """
    samples, heads, queries = shape[:3]
    room = torch.get_num_threads() * _CACHED // max(keys, 1)  # rows
    few = min(max(_ROWS, room // max(heads, 1)), queries)
    fit = max(room // max(few, 1), 1)
    some, of = max(fit // max(heads, 1), 1), min(fit, max(heads, 1))
    for sample, head, row in itertools.product(
        range(0, samples, some), range(0, heads, of), range(0, queries, max(few, 1))
    ):
        part = slice(sample, sample + some), slice(head, head + of)
        yield part, slice(row, min(row + few, queries))


def _mask_of(mask: torch.Tensor, part: tuple[slice, slice], rows: slice) -> torch.Tensor:
    mask = mask[(None,) * (4 - mask.ndim)]
    samples, heads = (p if n > 1 else slice(None) for p, n in zip(part, mask.shape, strict=False))
    return rows_of(mask, rows)[samples, heads]


def _later(block: torch.Tensor) -> torch.Tensor:
    """The causal mask of a block of scores whose first row and first column are the same token."""
    return torch.ones_like(block, dtype=torch.bool).triu_(1)
