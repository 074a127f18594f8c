"""Normalisers with 1/sigma held constant; centring stays linear (method: LayerNorm rule).

All of them are ``y = w * (x - mean) * rstd + b`` over some axes. With ``u = g * w`` the balanced
gradient is ``dx = rstd * (u - mean(u))``; RMSNorm has no mean. Statistics are accumulated in
float32 for 16-bit inputs, as the forward kernels do. Gradients of ``w`` and ``b`` are autograd's.
"""

from __future__ import annotations

from typing import Any

import torch

from libragrad_fx.ops.twin import Grads, twin

aten = torch.ops.aten
Axes = tuple[int, ...]


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _whiten(
    x: torch.Tensor, axes: Axes, eps: float, centred: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x - mean) * rstd and rstd, over ``axes``."""
    x = _wide(x)
    x = x - x.mean(axes, keepdim=True) if centred else x
    rstd = torch.rsqrt((x * x).mean(axes, keepdim=True) + eps)
    return x * rstd, rstd


def _pull(u: torch.Tensor, rstd: torch.Tensor, axes: Axes, centred: bool = True) -> torch.Tensor:
    return rstd * (u - u.mean(axes, keepdim=True) if centred else u)


def _affine(
    needs: frozenset[str], g: torch.Tensor, hat: torch.Tensor, shape: Axes
) -> dict[str, Any]:
    """Gradients of weight and bias; ``shape`` is theirs, aligned to broadcast with ``g``."""
    return {
        "weight": (g * hat).sum_to_size(shape) if "weight" in needs else None,
        "bias": g.sum_to_size(shape) if "bias" in needs else None,
    }


def _over_last(
    needs: frozenset[str], g: torch.Tensor, *, input: torch.Tensor, weight: torch.Tensor | None,
    normalized_shape: list[int], eps: float | None, centred: bool, **_: Any,
) -> Grads:  # fmt: skip
    axes, g = tuple(range(-len(normalized_shape), 0)), _wide(g)
    eps = torch.finfo(_wide(input).dtype).eps if eps is None else eps
    hat, rstd = _whiten(input, axes, eps, centred)
    u = g if weight is None else g * weight
    return {
        "input": _pull(u, rstd, axes, centred),
        **_affine(needs, g, hat, tuple(normalized_shape)),
    }


def _layer_norm(needs: frozenset[str], g: torch.Tensor, cudnn_enable: bool, **args: Any) -> Grads:
    return _over_last(needs, g, centred=True, **args)


def _rms_norm(needs: frozenset[str], g: torch.Tensor, **args: Any) -> Grads:
    return _over_last(needs, g, centred=False, **args)


def _per_channel(x: torch.Tensor, weight: torch.Tensor | None = None) -> Any:
    """Shape (1, C, 1, ...) that broadcasts over a (N, C, *) input, or a weight viewed so."""
    shape = (1, x.shape[1], *[1] * (x.ndim - 2))
    return shape if weight is None else weight.reshape(shape)


def _over_positions(
    needs: frozenset[str], g: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None,
    view: tuple[int, ...], axes: Axes, eps: float,
) -> Grads:  # fmt: skip
    """Group, instance and batch norm: whiten ``x`` viewed as ``view``, affine per channel."""
    g = _wide(g)
    hat, rstd = _whiten(x.reshape(view), axes, eps)
    u = g if weight is None else g * _per_channel(x, weight)
    affine = _affine(needs, g, hat.reshape(x.shape), _per_channel(x))
    return {
        "input": _pull(u.reshape(view), rstd, axes).reshape(x.shape),
        **{k: None if v is None else v.reshape(-1) for k, v in affine.items()},
    }


def _group_norm(
    needs: frozenset[str], g: torch.Tensor, *, input: torch.Tensor, weight: torch.Tensor | None,
    num_groups: int, eps: float, **_: Any,
) -> Grads:  # fmt: skip
    view = (input.shape[0], num_groups, -1)
    return _over_positions(needs, g, input, weight, view, (2,), eps)


def _instance_norm(
    needs: frozenset[str], g: torch.Tensor, *, input: torch.Tensor, weight: torch.Tensor | None,
    eps: float, **_: Any,
) -> Grads:  # fmt: skip
    view = (*input.shape[:2], -1)  # also where there is one position only
    return _over_positions(needs, g, input, weight, view, (2,), eps)


def _batch_norm(
    needs: frozenset[str], g: torch.Tensor, *, input: torch.Tensor, weight: torch.Tensor | None,
    eps: float, **_: Any,
) -> Grads:  # fmt: skip
    axes = (0, *range(2, input.ndim))
    return _over_positions(needs, g, input, weight, tuple(input.shape), axes, eps)


_SAVES = ("input", "weight")
layer_norm = twin(aten.layer_norm.default, _layer_norm, saves=_SAVES)
rms_norm = twin(aten.rms_norm.default, _rms_norm, saves=_SAVES)
group_norm = twin(aten.group_norm.default, _group_norm, saves=_SAVES)
instance_norm = twin(aten.instance_norm.default, _instance_norm, saves=_SAVES)
batch_norm = twin(aten.batch_norm.default, _batch_norm, saves=_SAVES)
