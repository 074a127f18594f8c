"""Normalisers with 1/sigma held constant; centring stays linear (method: LayerNorm rule).

All of them are ``y = w * (x - mean) * rstd + b`` over some axes. With ``u = g * w`` the balanced
gradient is ``dx = rstd * (u - mean(u))``; RMSNorm has no mean. Statistics are accumulated in
float32 for 16-bit inputs, as the forward kernels do. Gradients of ``w`` and ``b`` are autograd's.
If those are not wanted, a LayerNorm, RMSNorm or GroupNorm saves only ``rstd`` and ``w``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch._prims_common import suggest_memory_format

from libragrad_fx.kernels import on_gpu
from libragrad_fx.kernels.pointwise import norm_gradient, wide
from libragrad_fx.ops.function import eager_or_traced
from libragrad_fx.ops.twin import Grads, minus_, times_, twin

aten = torch.ops.aten
Axes = tuple[int, ...]
_ALONE = frozenset({"input"})
_WIDEST = 16384  # features that one program of a GPU sums


def _weighted(g: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """g * w in a new contiguous tensor of at least float32."""
    u = wide(g).contiguous()
    if u is not g:  # already a new tensor
        return u if weight is None else times_(u, weight)
    return u.clone() if weight is None else u * weight


def _pull(u: torch.Tensor, rstd: torch.Tensor, axes: Axes) -> torch.Tensor:
    """rstd * (u - mean(u)), in place in u. The mean is a sum, which costs a third of ``mean`` for small u;
    the subtraction's ``alpha`` divides it."""
    count = math.prod([u.shape[a] for a in axes])
    return times_(minus_(u, u.sum(axes, keepdim=True), 1 / max(count, 1)), rstd)


def _of_input(
    g: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor, axes: Axes, centred: bool
) -> torch.Tensor:
    """The gradient of the input of a norm over the last axes."""
    if axes == (-1,) and g.shape[-1] <= _WIDEST and eager_or_traced(g) and on_gpu(g):
        return norm_gradient(g, weight, rstd, centred)
    u = _weighted(g, weight)
    return _pull(u, rstd, axes) if centred else times_(u, rstd)


def _affine(
    needs: frozenset[str], g: torch.Tensor, hat: Callable[[], torch.Tensor], shape: Axes
) -> dict[str, Any]:
    """Gradients of weight and bias; ``shape`` is theirs, aligned to broadcast with ``g``."""
    grads: dict[str, Any] = {}
    if "weight" in needs:
        grads["weight"] = (wide(g) * hat()).sum_to_size(shape)
    if "bias" in needs:
        grads["bias"] = wide(g).sum_to_size(shape)
    return grads


# --- over the last axes


def _native_layer_norm(
    input: torch.Tensor, normalized_shape: list[int], weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, eps: float = 1e-5, cudnn_enable: bool = True,
) -> Any:  # fmt: skip
    """The kernel that ``layer_norm`` calls. Returns the output, the mean, 1/sigma."""
    return torch.native_layer_norm(input, normalized_shape, weight, bias, eps)


def _layer_norm(
    needs: frozenset[str], g: torch.Tensor, *, input: torch.Tensor | None, weight: torch.Tensor | None,
    mean: torch.Tensor | None, rstd: torch.Tensor, normalized_shape: list[int], **_: Any,
) -> Grads:  # fmt: skip
    axes = tuple(range(-len(normalized_shape), 0))
    hat = lambda: (wide(input) - mean) * rstd  # type: ignore  # noqa: E731
    grads = {} if needs == _ALONE else _affine(needs, g, hat, tuple(normalized_shape))
    if "input" in needs:
        grads["input"] = _of_input(g, weight, rstd, axes, centred=True)
    return grads


def _rms_norm_kept(
    input: torch.Tensor, normalized_shape: list[int], weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The output and 1/sigma: one more pass over the input, which then need not be saved."""
    x, axes = wide(input), tuple(range(-len(normalized_shape), 0))
    norm = torch.linalg.vector_norm(x, dim=axes, keepdim=True)
    floor = torch.finfo(x.dtype).eps if eps is None else eps
    rstd = torch.rsqrt(norm * norm / math.prod(normalized_shape) + floor)
    return torch.rms_norm(input, normalized_shape, weight, eps), rstd


def _rms_norm(
    needs: frozenset[str], g: torch.Tensor, *, input: torch.Tensor | None, weight: torch.Tensor | None,
    rstd: torch.Tensor, normalized_shape: list[int], **_: Any,
) -> Grads:  # fmt: skip
    hat = lambda: wide(input) * rstd  # type: ignore  # noqa: E731
    grads = {} if needs == _ALONE else _affine(needs, g, hat, tuple(normalized_shape))
    if "input" in needs:
        grads["input"] = _of_input(g, weight, rstd, tuple(range(-len(normalized_shape), 0)), centred=False)
    return grads


# --- over positions


def _per_channel(x: torch.Tensor, weight: torch.Tensor | None = None) -> Any:
    """Shape (1, C, 1, ...) that broadcasts over a (N, C, *) input, or a weight viewed so."""
    shape = (1, x.shape[1], *[1] * (x.ndim - 2))
    return shape if weight is None else weight.reshape(shape)


def _split(x: torch.Tensor, groups: int | None) -> torch.Tensor:
    """(N, groups, C / groups, *): a view in any memory format, so a gradient keeps its layout."""
    if groups is None:
        return x
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])


def _axes(ndim: int, groups: int | None) -> Axes:
    """The axes of ``_split`` over which statistics are taken; without groups, per channel."""
    return (0, *range(2, ndim)) if groups is None else tuple(range(2, ndim + 1))


def _whitened(
    needs: frozenset[str], g: torch.Tensor, x: torch.Tensor | None, weight: torch.Tensor | None,
    groups: int | None, mean: torch.Tensor | None, rstd: torch.Tensor,
) -> Grads:  # fmt: skip
    """Group, instance and batch norm; ``mean`` and ``rstd`` broadcast with ``_split`` of the input."""
    hat = lambda: ((wide(_split(x, groups)) - mean) * rstd).reshape(g.shape)  # type: ignore  # noqa: E731
    affine = {} if needs == _ALONE else _affine(needs, g, hat, _per_channel(g))
    grads = {name: grad.reshape(-1) for name, grad in affine.items()}
    if "input" in needs:
        u = wide(g)
        if weight is not None:
            u = u * _per_channel(g, weight)
        elif u is g:
            u = u.clone()
        pulled = _pull(_split(u, groups), rstd, _axes(g.ndim, groups))
        grads["input"] = pulled.reshape(g.shape)
    return grads


def _over_positions(
    needs: frozenset[str], g: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None,
    groups: int | None, eps: float,
) -> Grads:  # fmt: skip
    axes = _axes(x.ndim, groups)
    var, mean = torch.var_mean(wide(_split(x, groups)), axes, correction=0, keepdim=True)
    return _whitened(needs, g, x, weight, groups, mean, torch.rsqrt(var + eps))


def _native_group_norm(
    input: torch.Tensor, num_groups: int, weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, eps: float = 1e-5, cudnn_enabled: bool = True,
) -> Any:  # fmt: skip
    """The kernel that ``group_norm`` calls. Returns the output, the mean and 1/sigma (N, groups)."""
    on_cpu = input.device.type == "cpu"
    x = input.contiguous(
        memory_format=suggest_memory_format(input)
        if on_cpu and not input.is_contiguous()
        else torch.contiguous_format
    )
    w = None if weight is None else weight.contiguous()
    b = None if bias is None else bias.contiguous()
    batch, channels, *positions = input.shape
    return torch.native_group_norm(x, w, b, batch, channels, math.prod(positions), num_groups, eps)


def _group_norm(
    needs: frozenset[str], g: torch.Tensor, *, input: torch.Tensor | None, weight: torch.Tensor | None,
    mean: torch.Tensor | None, rstd: torch.Tensor, num_groups: int, **_: Any,
) -> Grads:  # fmt: skip
    by_group = (g.shape[0], num_groups, *[1] * (g.ndim - 1))
    means = None if mean is None else mean.reshape(by_group)
    return _whitened(needs, g, input, weight, num_groups, means, rstd.reshape(by_group))


def _instance_norm(
    needs: frozenset[str], g: torch.Tensor, *, input: torch.Tensor, weight: torch.Tensor | None,
    eps: float, **_: Any,
) -> Grads:  # fmt: skip
    return _over_positions(needs, g, input, weight, input.shape[1], eps)


def _batch_norm(
    needs: frozenset[str], g: torch.Tensor, *, input: torch.Tensor, weight: torch.Tensor | None,
    eps: float, **_: Any,
) -> Grads:  # fmt: skip
    return _over_positions(needs, g, input, weight, None, eps)


layer_norm = twin(
    aten.layer_norm.default, _layer_norm, forward=_native_layer_norm, extras=("mean", "rstd"),
    saves=("weight", "rstd", "mean", "input"), if_params=("mean", "input"),
)  # fmt: skip
rms_norm = twin(
    aten.rms_norm.default, _rms_norm, forward=_rms_norm_kept, extras=("rstd",),
    saves=("weight", "rstd", "input"), if_params=("input",),
)  # fmt: skip
_SAVES = ("input", "weight")
group_norm = twin(
    aten.group_norm.default, _group_norm, forward=_native_group_norm, extras=("mean", "rstd"),
    saves=("weight", "rstd", "mean", "input"), if_params=("mean", "input"),
)  # fmt: skip
instance_norm = twin(aten.instance_norm.default, _instance_norm, saves=_SAVES)
batch_norm = twin(aten.batch_norm.default, _batch_norm, saves=_SAVES)


# --- sgn, and standard deviations


def _sgn(needs: frozenset[str], g: torch.Tensor, *, self: torch.Tensor) -> Grads:
    """z / |z| with |z| held."""
    size = self.abs()
    return {"self": torch.where(size == 0, 0.0, g / size)}


def _moments(op: torch._ops.OpOverload, degree: int) -> Callable[..., Any]:
    """Twin of ``var_mean`` or ``std_mean``, whose first output is homogeneous of ``degree``."""

    def vjp(
        needs: frozenset[str], g: Any, *, self: torch.Tensor, dim: list[int] | None,
        correction: float | None, keepdim: bool, **_: Any,
    ) -> Grads:  # fmt: skip
        axes = tuple(dim) if dim else tuple(range(self.ndim))
        count = math.prod(self.shape[a] for a in axes)
        free = count - (1 if correction is None else correction)
        scale, mean = (_back(t, axes, keepdim, self) for t in g)
        grad = torch.zeros_like(self) if mean is None else (mean / count).expand_as(self)
        if scale is not None:
            centred = self - self.mean(axes, keepdim=True)
            if degree == 1:
                std = (centred * centred).sum(axes, keepdim=True).div(free).sqrt()
                scale = torch.where(std == 0, 0.0, scale / std)
            grad = grad + centred / free * scale
        return {"self": grad}

    return twin(op, vjp, saves=("self",))


def _back(g: torch.Tensor | None, axes: Axes, keepdim: bool, x: torch.Tensor) -> Any:
    """The gradient of a sum over ``axes``, in a shape that broadcasts with what was summed."""
    if g is None or keepdim:
        return g
    gone = {a % max(x.ndim, 1) for a in axes}
    return g.reshape([1 if i in gone else n for i, n in enumerate(x.shape)])


sgn = twin(aten.sgn.default, _sgn, saves=("self",))
var_mean = _moments(aten.var_mean.correction, 2)
std_mean = _moments(aten.std_mean.correction, 1)
sgn.takes_complex = True  # type: ignore[attr-defined]
