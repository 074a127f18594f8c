"""Back-propagates through a part of a linear layer or convolution.

Only some features of ``y = x Wᵀ + b`` get a gradient. The full product is computed but not recorded by
autograd. Behind the views that lead to the live part, a graft returns that part unchanged; its backward
sends the gradient directly to x, W and b, through the rows of W that made the part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import grad

from libragrad_fx.ops.function import linked, note_tensors, quick, same, wanted

_CONV_INPUT = {1: grad.conv1d_input, 2: grad.conv2d_input}
_CONV_WEIGHT = {1: grad.conv1d_weight, 2: grad.conv2d_weight}


def _like_product(g: torch.Tensor, order: Sequence[Sequence[int]]) -> torch.Tensor:
    """The part's gradient, in the axes of the product. order: see ``graft``."""
    sizes = [math.prod([g.shape[a] for a in axes]) for axes in order]
    return g.permute([a for axes in order for a in axes]).reshape(sizes)


class _Graft(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        part: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
        conv: tuple[Any, ...], order: Sequence[Sequence[int]], rows: slice | Sequence[int],
    ) -> torch.Tensor:  # fmt: skip
        return same(part)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, x, weight, bias, ctx.conv, ctx.order, ctx.rows = inputs
        note_tensors(ctx, inputs)
        _, of_x, of_weight, *_ = ctx.needs_input_grad
        ctx.shapes = (x.shape, weight.shape, None if bias is None else bias.shape)
        ctx.save_for_backward(weight if of_x else None, x if of_weight else None)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        _, of_x, of_weight, of_bias, *_ = wanted(ctx)
        weight, x = ctx.saved_tensors
        g = _like_product(g, ctx.order)
        at = ctx.rows if isinstance(ctx.rows, slice) else torch.tensor(ctx.rows, device=g.device)
        axis = 1 if ctx.conv else g.ndim - 1
        dx = dweight = dbias = None
        if of_x:
            live = weight[at].to(g.dtype)
            dx = _input_gradient(g, live, ctx.shapes[0], ctx.conv)
        if of_weight:
            dweight = g.new_zeros(ctx.shapes[1])
            live_shape = (g.shape[axis], *ctx.shapes[1][1:])
            dweight[at] = _weight_gradient(g, x.to(g.dtype), live_shape, ctx.conv)
        if of_bias:
            dbias = g.new_zeros(ctx.shapes[2])
            dbias[at] = g.sum([a for a in range(g.ndim) if a != axis])
        return None, dx, dweight, dbias, None, None, None


_grafted = quick(_Graft)


def _input_gradient(
    g: torch.Tensor, weight: torch.Tensor, shape: Any, conv: tuple[Any, ...]
) -> torch.Tensor:
    if not conv:
        return g @ weight
    return _CONV_INPUT[weight.ndim - 2](shape, weight, g, *conv)  # type: ignore[operator,no-any-return]


def _weight_gradient(g: torch.Tensor, x: torch.Tensor, shape: Any, conv: tuple[Any, ...]) -> torch.Tensor:
    if not conv:
        return g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    return _CONV_WEIGHT[len(shape) - 2](x, shape, g, *conv)  # type: ignore[operator,no-any-return]


def graft(
    part: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    conv: tuple[Any, ...], order: Sequence[Sequence[int]], rows: slice | Sequence[int],
) -> torch.Tensor:  # fmt: skip
    """``part`` itself; its gradient goes directly to ``x``, ``weight`` and ``bias``.

    Args:
        part: a view of ``linear(x, weight, bias)`` or a convolution, not recorded by autograd.
        conv: stride, padding, dilation and groups; empty for ``linear``.
        order: for each axis of the product, the axes of ``part`` that it was split into.
        rows: the product's features that ``part`` holds, in the order of ``part``.
    """
    return _grafted(part, linked(x), linked(weight), linked(bias), conv, order, rows)  # type: ignore[no-any-return]


class _Carried(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
        return same(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return None, g


_carried = quick(_Carried)


def carried(value: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
    """``value`` itself; its gradient goes to ``path``, of the same shape and dtype."""
    return _carried(value, path)  # type: ignore[no-any-return]
