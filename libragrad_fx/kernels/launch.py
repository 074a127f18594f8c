"""The Triton kernels and how they are launched. Sums are in float32, whatever the tensors are."""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attention_value(
    Q, K, LSE, G, V, MASK, queries, keys, heads, group, scale, size, size_v,
    qb, qh, qn, kb, kh, kn, lb, lh, gb, gh, gn, vb, vh, vn, mb, mh, mq, mk,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, BOOL: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """dV of one block of keys: over all heads that share them, over all queries."""
    first = tl.program_id(0) * COLS
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    n, d, e = first + tl.arange(0, COLS), tl.arange(0, D), tl.arange(0, E)
    here = (n < keys)[:, None] & (d < size)[None, :]
    k = tl.load(K + b * kb + h * kh + n[:, None] * kn + d[None, :], mask=here, other=0.0)
    total = tl.zeros((COLS, E), tl.float32)
    start = 0
    if CAUSAL:
        start = first // ROWS * ROWS
    for i in range(group):
        head = h * group + i
        for row in range(start, queries, ROWS):
            m = row + tl.arange(0, ROWS)
            inside = m < queries
            q = tl.load(
                Q + b * qb + head * qh + m[:, None] * qn + d[None, :],
                mask=inside[:, None] & (d < size)[None, :], other=0.0,
            )  # fmt: skip
            lse = tl.load(LSE + b * lb + head * lh + m, mask=inside, other=float("inf"))
            lse = tl.where(lse == float("-inf"), float("inf"), lse)  # nothing to attend to: P is 0
            s = tl.dot(k, tl.trans(q), input_precision=DOT) * scale
            if BIAS or BOOL:
                at = MASK + b * mb + head * mh + m[None, :] * mq + n[:, None] * mk
                mask = tl.load(at, mask=inside[None, :] & (n < keys)[:, None], other=0)
                if BIAS:
                    s += mask.to(tl.float32)
            p = tl.exp2((s - lse[None, :]) * _LOG2E)
            if BOOL:
                p = tl.where(mask != 0, p, 0.0)
            if CAUSAL:
                p = tl.where(m[None, :] >= n[:, None], p, 0.0)
            g = tl.load(
                G + b * gb + head * gh + m[:, None] * gn + e[None, :],
                mask=inside[:, None] & (e < size_v)[None, :], other=0.0,
            )  # fmt: skip
            total += tl.dot(p.to(g.dtype), g, input_precision=DOT)
    at = V + b * vb + h * vh + n[:, None] * vn + e[None, :]
    tl.store(at, total.to(V.dtype.element_ty), mask=(n < keys)[:, None] & (e < size_v)[None, :])


def attention_value(
    g: Tensor, query: Tensor, key: Tensor, mask: Tensor | None, lse: Tensor, causal: bool,
    scale: float | None,
) -> Tensor:  # fmt: skip
    batch, heads, queries, size = query.shape
    shared, keys, size_v = key.shape[1], key.shape[2], g.shape[3]
    # heads beside each other, as the projection behind it wants them
    value = g.new_empty((batch, keys, shared, size_v)).transpose(1, 2)
    q, k, g = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, g))
    bias = None if mask is None else mask.expand(batch, heads, queries, keys)
    d, e = (max(16, triton.next_power_of_2(n)) for n in (size, size_v))
    rows, cols, warps, stages = _blocks(queries, max(d, e), q.element_size())
    named: Any = {"CAUSAL": causal, "BIAS": bias is not None and bias.dtype != torch.bool,
                  "BOOL": bias is not None and bias.dtype == torch.bool,
                  "DOT": "tf32x3" if q.dtype == torch.float32 else "tf32"}  # fmt: skip
    with torch.cuda.device_of(g):
        _attention_value[triton.cdiv(keys, cols), batch * shared](
            q, k, lse, g, value, g if bias is None else bias, queries, keys, shared, heads // shared,
            1 / math.sqrt(size) if scale is None else scale, size, size_v,
            *q.stride()[:3], *k.stride()[:3], *lse.stride()[:2], *g.stride()[:3], *value.stride()[:3],
            *((0,) * 4 if bias is None else bias.stride()),
            ROWS=rows, COLS=cols, D=d, E=e, num_warps=warps, num_stages=stages, **named,
        )  # fmt: skip
    return value


def _blocks(queries: int, size: int, width: int) -> tuple[int, int, int, int]:
    """Queries and keys of a block, warps, stages of its pipeline. The tiles fit the shared memory of small
    GPUs (99 KiB)."""
    if width == 4 and size > 64:
        return 16, 16 if size > 128 else 32, 4, 2
    if width == 4 or size > 128:
        return 32, 64, 4, 2
    if size > 64:
        return 64, 64, 4, 2
    return (64, 128, 4, 3) if queries > 1024 else (32, 128, 4, 4)


@triton.jit
def _norm_gradient(
    G, W, R, X, count, size, stride,
    CENTRED: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    here = (row < count)[:, None] & (col < size)[None, :]
    u = tl.load(G + row[:, None] * stride + col[None, :], mask=here, other=0.0).to(tl.float32)
    if WEIGHTED:
        u *= tl.load(W + col, mask=col < size, other=0.0).to(tl.float32)[None, :]
    if CENTRED:
        u -= (tl.sum(u, 1) / size)[:, None]
    u *= tl.load(R + row, mask=row < count, other=0.0).to(tl.float32)[:, None]
    tl.store(X + row[:, None] * size + col[None, :], u.to(X.dtype.element_ty), mask=here)


def norm_gradient(g: Tensor, weight: Tensor | None, rstd: Tensor, centred: bool) -> Tensor:
    size = g.shape[-1]
    try:
        rows = g.view(-1, size)  # a row may lie apart from the next
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
    except RuntimeError:
        rows = g.reshape(-1, size).contiguous()
    x = g.new_empty(g.shape)
    cols = triton.next_power_of_2(size)
    some = max(1, min(16, 2048 // cols))
    with torch.cuda.device_of(g):
        _norm_gradient[triton.cdiv(len(rows), some),](
            rows, rows if weight is None else weight.contiguous(), rstd.contiguous(), x, len(rows), size,
            rows.stride(0), CENTRED=centred, WEIGHTED=weight is not None, ROWS=some, COLS=cols,
            num_warps=4 if cols < 4096 else 8,
        )  # fmt: skip
    return x


@triton.jit
def _gelu_gate(G, X, Y, count, TANH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < count, other=0.0).to(tl.float32)
    g = tl.load(G + at, mask=at < count, other=0.0).to(tl.float32)
    if TANH:  # (1 + tanh(z)) / 2 is the logistic function of 2z
        gate = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        gate = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    tl.store(Y + at, (g * gate).to(Y.dtype.element_ty), mask=at < count)


def gelu_gate(g: Tensor, x: Tensor, approximate: str) -> Tensor:
    y = torch.empty_like(x)
    dense = y.stride() == x.stride() == g.stride()
    if not dense:
        g, x, y = g.contiguous(), x.contiguous(), y.contiguous()
    count, block = x.numel(), 1024
    with torch.cuda.device_of(g):
        _gelu_gate[triton.cdiv(count, block),](
            g, x, y, count, TANH=approximate == "tanh", BLOCK=block, num_warps=4
        )
    return y
