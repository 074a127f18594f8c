"""Scaled dot-product attention with its probabilities held constant: only v carries gradient.

method: Attention rule. ``dV = P^T dO``. The probabilities P are not saved but recomputed, some query
rows at a time, so memory stays linear in the number of tokens whatever kernel ran forward.
If the kernel returns the log-sum-exp of its rows, a row of P costs one product and one exp: on a CPU in
blocks of heads that fit the cache, on a GPU in one kernel. If the math kernel ran and keys are few (a
window's), P itself is saved in place of q and k.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.nn.attention import SDPBackend

from libragrad_fx.graph.schema import aten_op
from libragrad_fx.kernels import kernel, on_gpu
from libragrad_fx.kernels.attention import FUSED, additive, called, fused, is_fit, value_samples
from libragrad_fx.kernels.blocks import is_small, repeated, rows_of, summed, value_gradient
from libragrad_fx.ops import insert
from libragrad_fx.ops.binding import Log
from libragrad_fx.ops.function import traced, watched
from libragrad_fx.ops.twin import Grads, times_, twin

aten = torch.ops.aten
COUNTED_AS = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        aten._scaled_dot_product_flash_attention_backward,
}  # fmt: skip
"""CPU kernels, and the GPU kernels by which to count their operations: some versions of PyTorch do not."""
_FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
CHUNK = 64  # query rows at a time, of all heads (``_attention``)
_FEW = 256  # up to so many keys, the probabilities are saved


def is_softmax(node: Node) -> bool:
    return aten_op(node) is aten.softmax.int


def probabilities(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, first: int, causal: bool, scale: float
) -> torch.Tensor:  # fmt: skip
    """softmax(scale q kᵀ + mask) for the query rows that start at ``first``; masked-out rows are 0."""
    scores = times_(q @ k.transpose(-2, -1), scale)
    if causal:
        rows = torch.arange(first, first + q.shape[-2], device=q.device)[:, None]
        scores = scores.masked_fill(rows < torch.arange(k.shape[-2], device=q.device), -math.inf)
    if mask is None or scores.numel() == 0:
        return torch.softmax(scores, -1)
    mask = rows_of(mask, slice(first, first + q.shape[-2]))
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    nothing = scores.amax(-1, keepdim=True) == -math.inf
    return torch.softmax(scores, -1).masked_fill(nothing, 0.0)


def _attention(
    needs: frozenset[str], g: torch.Tensor, *, query: torch.Tensor, key: torch.Tensor,
    attn_mask: torch.Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool,
    dropout_p: float,
) -> Grads:  # fmt: skip
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    heads = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    wide = torch.promote_types(query.dtype, torch.float32)
    k = repeated(key, heads).to(wide)
    dv = k.new_zeros((*k.shape[:-1], g.shape[-1]))
    for first in range(0, query.shape[-2], CHUNK):
        rows = slice(first, first + CHUNK)
        p = probabilities(query[..., rows, :].to(wide), k, attn_mask, first, is_causal, scale)
        dv = dv + p.transpose(-2, -1) @ g[..., rows, :].to(wide)
    return {"value": summed(dv, heads)}


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """The flash kernel for a CPU. Returns the output and the log-sum-exp of every row (B, H, N)."""
    return _FLASH(
        query, key, value, dropout_p, is_causal, attn_mask=additive(attn_mask, query), scale=scale
    )


def _by_lse(
    needs: frozenset[str], g: torch.Tensor, *, query: torch.Tensor, key: torch.Tensor,
    attn_mask: torch.Tensor | None, lse: torch.Tensor, is_causal: bool, scale: float | None,
    **_: Any,
) -> Grads:  # fmt: skip
    if watched() or g.is_cuda:
        return {"value": attention_value(g, query, key, attn_mask, lse, is_causal, scale)}
    return {"value": value_gradient(g, query, key, attn_mask, lse, is_causal, scale)}


def written_out(
    g: torch.Tensor, query: torch.Tensor, key: torch.Tensor, attn_mask: torch.Tensor | None,
    lse: torch.Tensor, is_causal: bool, scale: float | None,
) -> Any:  # fmt: skip
    """``attention_value`` in plain ops, for who has only PyTorch's."""
    given: Any = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale}
    whole: Any = {"query": query, "key": key, "enable_gqa": True, "dropout_p": 0.0}
    value: Any = _attention(frozenset(), g, **whole, **given)["value"]
    return value.to(g.dtype)


def _value_shape(g: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *_: Any) -> torch.Tensor:
    if on_gpu(g):  # heads beside each other
        batch, heads, keys = key.shape[:3]
        return g.new_empty((batch, keys, heads, g.shape[-1])).transpose(1, 2)
    return g.new_empty((*key.shape[:3], g.shape[-1]))


attention_value = kernel(
    "attention_value(Tensor g, Tensor query, Tensor key, Tensor? attn_mask, Tensor lse, bool is_causal,"
    " float? scale) -> Tensor",
    written_out, _value_shape, value_samples, cpu=value_gradient,
)  # fmt: skip
"""dV as one op: (B, key heads, keys, features of v)."""


def _math(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """Attention by the math kernel, and its probabilities. PyTorch picks it if a mask requires grad."""
    args = (query, key, value, additive(attn_mask, query), dropout_p, is_causal, None)
    return aten._scaled_dot_product_attention_math.default(*args, scale=scale, enable_gqa=enable_gqa)


def _by_probabilities(needs: frozenset[str], g: torch.Tensor, *, p: torch.Tensor, **_: Any) -> Grads:
    return {"value": p.transpose(-2, -1) @ g.to(p.dtype)}


_SAVES = ("query", "key", "attn_mask")
_sdpa = aten.scaled_dot_product_attention.default
_balanced = twin(_sdpa, _attention, saves=_SAVES)
_balanced_flash = twin(
    _sdpa, _by_lse, forward=_flash, extras=("lse",), saves=(*_SAVES, "lse"),
    compact=("query", "key"),  # q, k and v are views of one projection: copies of q and k free it
    name="scaled_dot_product_attention_flash",
)  # fmt: skip
_balanced_fused = {
    backend: twin(
        _sdpa, _by_lse, forward=fused(backend), extras=("lse",), saves=(*_SAVES, "lse"),
        compact=("query", "key"), name=f"scaled_dot_product_attention_{backend.name.lower()}",
    )
    for backend in FUSED
}  # fmt: skip
_balanced_math = twin(
    _sdpa, _attention, saves=_SAVES, name="scaled_dot_product_attention_math",
    forward=lambda *args, **kwargs: _math(*args, **kwargs)[0],
)  # fmt: skip
_balanced_kept = twin(
    _sdpa, _by_probabilities, saves=("p",), extras=("p",), forward=_math,
    name="scaled_dot_product_attention_kept",
)  # fmt: skip


def scaled_dot_product_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Balanced twin of ``aten.scaled_dot_product_attention``: same kernel, gradient to v alone."""
    query, key = query.detach(), key.detach()
    extra = {"scale": scale, "enable_gqa": enable_gqa}
    named = attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled()
    # PyTorch's own op, with q and k detached, is right everywhere. Ours computes less, but
    # - weights that a dropout has drawn cannot be computed again;
    # - for few keys, and under a compiler, which fuses it better, there is nothing to save (``_is_cheap``);
    # - a GPU has a kernel for what its fused kernels return.
    # PyTorch picks its kernel by which inputs require grad, and kernels differ in bits. Inside a
    # Function none does; if that would change the choice, the kernel is called by name.
    args = (query, key, value, attn_mask, dropout_p, is_causal)
    own = dropout_p > 0 or _is_cheap(query, key) or query.device.type not in ("cpu", "cuda")
    chosen = SDPBackend.MATH if named or own else _chosen(*args, **extra)
    if not own and query.is_cuda:
        if (
            chosen in _balanced_fused
            and on_gpu(query)
            and is_fit(query, key, value)
            and called(chosen, query.device, query.dtype)
        ):
            return _balanced_fused[chosen](*args, **extra)
        own = True
    if own:
        if named:  # PyTorch still sees a mask that requires grad; no gradient reaches it
            attn_mask = insert.scale(attn_mask, 0.0)  # type: ignore[arg-type]
        return _sdpa(query, key, value, attn_mask, dropout_p, is_causal, **extra)
    if chosen == SDPBackend.FLASH_ATTENTION:
        return _balanced_flash(*args, **extra)
    if chosen == SDPBackend.MATH and key.shape[-2] <= _FEW and not enable_gqa:
        return _balanced_kept(*args, **extra)
    return (_balanced_math if named else _balanced)(*args, **extra)


def _is_cheap(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether PyTorch's own backward is cheaper, though it also computes the gradients of q and k; never in
    a graph, which serves other sizes too."""
    if torch.compiler.is_exporting() or traced():
        return False
    return torch.compiler.is_compiling() or is_small(query, key)


def _chosen(query: torch.Tensor, *args: Any, **kwargs: Any) -> SDPBackend | None:
    """The kernel that PyTorch would pick; None unless in plain eager mode or traced, with 4 axes."""
    if query.ndim != 4 or type(query) not in (torch.Tensor, FakeTensor):
        return None
    if traced():  # fake tensors have no choice: see which kernel the op ends in
        with torch.no_grad(), disable_proxy_modes_tracing(), Log() as log:
            _sdpa(query, *args, **kwargs)
        called = {op for op, _ in log.calls}
        kernels = (SDPBackend.FLASH_ATTENTION, _FLASH), *FUSED.items()
        return next((backend for backend, op in kernels if op in called), SDPBackend.MATH)
    if watched():
        return None
    return SDPBackend(torch._fused_sdp_choice(query, *args, **kwargs))


scaled_dot_product_attention.aten_op = _sdpa  # type: ignore[attr-defined]
