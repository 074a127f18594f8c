"""A gated activation and its product as one op: ``act(x) * y``.

Each factor gets half of the gradient g. So x gets ``g * (slope * y / 2)`` and y gets ``g * (act(x) / 2)``.
Both brackets are known in the forward, and only they are saved: in the memory of x and y, if no other op
reads those. As two ops, they save three tensors. If x and y are the halves of one projection, the two
saved tensors lie side by side, and so do the gradients: nothing has to be concatenated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from libragrad_fx.errors import ModeError
from libragrad_fx.ops.function import same, watched
from libragrad_fx.ops.product import halved_mul
from libragrad_fx.ops.twin import spent, times_


class _Once(torch.autograd.Function):
    """Raises on a second derivative: only slope·y/2 and act(x)/2 were saved, not x and y."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return same(x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        raise ModeError(
            "the balanced gradient of a gated activation cannot be differentiated again: only what it"
            " is multiplied with was kept. Call .recompile() on the transformed model before the"
            " forward; then its whole graph runs, which keeps the factors, in more memory."
        )


def _times(kept: torch.Tensor, g: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    if spent():
        return times_(kept, g)
    dx = kept * g
    return _Once.apply(dx, source) if torch.is_grad_enabled() else dx  # type: ignore[no-any-return]


def gated(
    act: Callable[..., Any], at: int, over: bool = False, halves: tuple[int, bool] | None = None
) -> Callable[..., Any]:
    """``act(x) * y`` or ``y * act(x)``, as a function of x and y and of the activation's arguments.

    Args:
        act: twin of an activation with ``f(0) = 0``; it has ``slopes``.
        at: which factor is the activation, 0 or 1; the function takes x and y in that order.
        over: whether it may write over x and y.
        halves: (axis, swapped) if x and y are the halves of one tensor along ``axis``, which the function
            then takes instead of them. swapped: the second factor reads the first half.
    """

    def pair(*given: torch.Tensor) -> Sequence[torch.Tensor]:
        if halves is None:
            return given
        axis, swapped = halves
        return given[0].chunk(2, axis)[:: -1 if swapped else 1]

    class Gated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, args: Any, kwargs: Any, *given: torch.Tensor) -> Any:
            given = tuple(x.detach() for x in given)
            x, y = pair(*given)[:: -1 if at else 1]
            held, slope = act.slopes(x, *args, out=x if over else None, **kwargs)  # type: ignore[attr-defined]
            result = torch.mul(*((y, held) if at else (held, y)))
            slope.mul_(y).mul_(0.5)
            torch.mul(held, 0.5, out=y if over else held)
            source = result.new_empty(0)  # links a second derivative to this node, so that ``_Once`` raises
            kept = given if over else (held, slope) if at else (slope, held)
            ctx.save_for_backward(*kept, source)
            ctx.set_materialize_grads(False)
            return result, source

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor | None, _: Any) -> Any:
            *kept, source = ctx.saved_tensors
            if g is None:
                return None, None, *(None for _ in kept)
            if halves is None:
                return None, None, *(_times(k, g, source) for k in kept)
            axis = halves[0] % g.ndim
            sizes = [2 * n if i == axis else n for i, n in enumerate(g.shape)]
            both = _times(kept[0].unflatten(axis, (2, -1)), g.unsqueeze(axis), source)
            return None, None, both.reshape(sizes)

    def call(*args: Any, **kwargs: Any) -> Any:
        count = 2 if halves is None else 1
        given, rest = args[:count], args[count:]
        if torch.is_grad_enabled() and not watched():
            return Gated.apply(rest, kwargs, *given)[0]
        factors = [*pair(*given)]
        factors[at] = act(factors[at], *rest, **kwargs)
        return halved_mul(*factors)

    call.__name__ = f"gated_{act.__name__}"
    return call
