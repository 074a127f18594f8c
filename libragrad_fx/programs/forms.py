"""Ops in other forms, for what reads a program that has left Python."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from libragrad_fx.kernels import PLAIN
from libragrad_fx.kernels.recurrent import WHOLE
from libragrad_fx.ops.recurrent import in_steps
from libragrad_fx.programs.free import EXACT, RESIZING

Tensor = torch.Tensor
Forms = Mapping[Any, Callable[..., Any]]
aten = torch.ops.aten
_POOLING = "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"


def _convolution_of_gradient(
    g: Tensor, x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, wanted: Any,
) -> Any:  # fmt: skip
    """The gradient of a convolution's input as a convolution, transposed; ONNX has no other op for it."""
    if [*wanted] != [True, False, False]:
        given = stride, padding, dilation, transposed, output_padding, groups, wanted
        return aten.convolution_backward.default(g, x, weight, bias, *given)
    ends = _ends(x.shape[2:], g.shape[2:], weight.shape[2:], stride, padding, dilation)
    ends = [0] * len(ends) if transposed else ends
    how = stride, padding, dilation, not transposed, ends, groups
    return aten.convolution.default(g, weight, None, *how), None, None


def _convolution_of_pooled(
    g: Tensor, x: Tensor, size: Any, stride: Any, padding: Any, ceil: bool, pads: bool, divisor: int | None
) -> Any:
    """The gradient of average pooling, likewise: each element of g goes to a window in equal parts."""
    stride = stride or size
    ends = _ends(x.shape[2:], g.shape[2:], size, stride, padding, (1, 1))
    if min(ends) < 0 or (any(padding) and not pads):  # some windows have fewer elements
        return aten.avg_pool2d_backward.default(g, x, size, stride, padding, ceil, pads, divisor)
    share = g.new_full((x.shape[1], 1, *size), 1 / (divisor or math.prod(size)))
    return aten.convolution.default(g, share, None, stride, padding, (1, 1), True, ends, x.shape[1])


def _ends(inside: Any, outside: Any, size: Any, stride: Any, padding: Any, dilation: Any) -> list[Any]:
    """How many elements of each axis lie behind the last window."""
    each = zip(inside, outside, size, stride, padding, dilation, strict=True)
    return [n - (s * (m - 1) - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in each]


def _diagonal(g: Tensor, sizes: Sequence[Any], offset: int, first: int, second: int) -> Tensor:
    """The gradient of a square's diagonal. PyTorch's own form of it writes in place."""
    if offset or sizes[first] != sizes[second]:
        return aten.diagonal_backward.default(g, sizes, offset, first, second)
    return aten.diag_embed.default(g, 0, first, second)


# --- what resizes: along each axis a product with its weights


def _resized(op: Any, x: Tensor, size: Sequence[int], *how: Any) -> Tensor:
    """A picture x (B, C, ...) of another size."""
    for axis, (before, after) in enumerate(zip(x.shape[2:], size, strict=True)):
        x = _product(x, axis, _weights(op, axis, before, after, len(size), how), transposed=True)
    return x


def _of_resized(op: Any, g: Tensor, size: Sequence[int], shape: Sequence[Any], *how: Any) -> Tensor:
    """The gradient of a picture of that shape, from the gradient g of the resized one."""
    for axis, (before, after) in enumerate(zip(shape[2:], size, strict=True)):
        g = _product(g, axis, _weights(op, axis, before, after, len(size), how), transposed=False)
    return g


def _of_pooled(op: Any, g: Tensor, x: Tensor) -> Tensor:
    """The gradient of x that was pooled to a size."""
    return _of_resized(op, g, g.shape[2:], x.shape)


def _product(x: Tensor, axis: int, weights: Sequence[Any], transposed: bool) -> Tensor:
    made = torch.tensor(weights, dtype=x.dtype, device=x.device)
    return (x.movedim(axis + 2, -1) @ (made.T if transposed else made)).movedim(-1, axis + 2)


def _weights(
    op: Any, axis: int, before: int, after: int, axes: int, how: Sequence[Any]
) -> list[list[float]]:
    """What a resized line (``after`` numbers) is made of (``before``): found by resizing lines with one 1.

    how: the options of the op; the last are scales, one an axis, if it has them
    """
    _, _, *options = op._schema.arguments
    given = dict(zip([o.name for o in options], how, strict=False))
    scales = [name for name in given if "scale" in name]
    given |= {name: None for i, name in enumerate(scales) if i != axis}
    # other axes have size 2: of an antialiased picture of width 1, PyTorch resizes the height wrongly
    old, new = ([n if i == axis else 2 for i in range(axes)] for n in (before, after))
    with _disable_current_modes():  # numbers, which are no part of what is traced
        lines = torch.eye(before, dtype=torch.float64)
        lines = lines.view(before, 1, *(n if i == axis else 1 for i, n in enumerate(old)))
        found = op(lines.expand(before, 1, *old).contiguous(), new, **given).movedim(axis + 2, -1)
        return found.reshape(before, -1, after)[:, 0].T.tolist()  # type: ignore[no-any-return]


def _forms_of(names: Sequence[str], form: Callable[..., Tensor], ending: str = "") -> dict[Any, Any]:
    ops = [(getattr(aten, name + ending).default, getattr(aten, name).default) for name in names]
    return {op: functools.partial(form, forward) for op, forward in ops}


OPS: Forms = {
    **PLAIN,
    **{whole: op for op, whole in WHOLE.items()},
    **_forms_of(RESIZING, _of_resized, "_backward"),
    aten.view.default: aten.reshape.default,
}
"""This package's ops in PyTorch's; in others, those that ``torch.export`` has for a fixed batch only. Forms
may lay out their results otherwise, which a view would not take."""
ONNX: Forms = {
    aten.diagonal_backward.default: _diagonal,
    **{whole: functools.partial(in_steps, op) for op, whole in WHOLE.items()},
    aten.convolution_backward.default: _convolution_of_gradient,
    aten.avg_pool2d_backward.default: _convolution_of_pooled,
    **_forms_of(EXACT, _resized),
    **_forms_of(_POOLING, _resized),
    **_forms_of(_POOLING, _of_pooled, "_backward"),
}
"""Ops that ONNX lacks, in others."""
