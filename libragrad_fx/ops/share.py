"""A sum of products shares what it sends back among its terms: LRP-γ, z⁺ and the z-box rule.

The op is ``y_j = z_j + b_j``, where z_j is the sum of the terms ``c_ij = x_i w_ij``. The constant b keeps
its own share, ``b_j g_j``, as under autograd. The rest, ``z_j g_j``, is divided among the x_i of z_j, in
proportion to

γ:   ``c + γ c'``, where ``c'`` is c if it has the sign of ``z_j``, and else 0
z⁺:  ``c'``, as if γ were infinite ("dissent suppression 100%" in LibraGrad's code)
box: ``x_i w - l_i max(w, 0) - h_i min(w, 0)``, where x is known to lie between l and h

The gradient of x_i is what it gets from all j, divided by x_i. Weights and constants get autograd's
gradient. Half precision is computed in float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from libragrad_fx.graph.schema import place_of, signature
from libragrad_fx.ops.twin import Grads, made_once, twin
from libragrad_fx.types import Share

Run = Callable[[Mapping[str, Any]], torch.Tensor]
"""The op of its arguments by name."""
Terms = Callable[..., torch.Tensor]
"""``terms(x, change)`` is the op of x and of its weight, changed by ``change``, without its constant."""


def shared(op: torch._ops.OpOverload, *share: Any) -> Callable[..., Any]:
    """The twin of a sum of products that shares as the fields of a ``types.Share`` say; one for each."""
    return _shared(op, Share(*share))


@made_once
def _shared(op: torch._ops.OpOverload, share: Share) -> Callable[..., Any]:
    names, keyword, _ = signature(op)
    tensors = [a.name for a in op._schema.arguments if "Tensor" in str(a.type)]

    def run(values: Mapping[str, Any]) -> torch.Tensor:
        positional = [values[n] for n in names if n not in keyword]
        return op(*positional, **{n: values[n] for n in keyword})  # type: ignore[no-any-return]

    def vjp(needs: frozenset[str], g: torch.Tensor, **saved: Any) -> Grads:
        return _vjp(run, share, needs, g, saved)

    made = twin(op, vjp, saves=tensors, name=_label(op, share))
    made.share = (op, *share)  # type: ignore[attr-defined]
    return made


def _label(op: torch._ops.OpOverload, share: Share) -> str:
    """A name that is the same in every process."""
    text = "_".join(map(str, (op, *share)))
    return re.sub(r"\W+", "_", text.replace("-", "m").replace(".", "p"))


def _vjp(run: Run, share: Share, needs: frozenset[str], g: torch.Tensor, saved: Mapping[str, Any]) -> Grads:
    wide = torch.promote_types(g.dtype, torch.float32)
    values, g = _each(saved, lambda _, t: t.to(wide)), g.to(wide)

    def terms(
        x: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor] = lambda w: w
    ) -> torch.Tensor:
        def part(name: str, t: torch.Tensor) -> torch.Tensor:
            if name == share.value:
                return x
            if name == share.weight:
                return change(t)
            return torch.zeros_like(t) if name in share.offsets else t

        return run(_each(values, part))

    grads = _of_others(run, values, needs - {share.value}, g)
    name, index = place_of(share.value)
    if name in needs:
        x = _member(values, share.value)
        dx = _in_box(terms, x, g, share) if share.box else _conforming(terms, x, g, share.gamma)
        if index is not None:
            grads[name][index] = dx
        else:
            grads[name] = dx
    return _each(grads, lambda name, t: t.to(_member(saved, name).dtype))


def _each(values: Mapping[str, Any], change: Callable[[str, torch.Tensor], Any]) -> dict[str, Any]:
    """Values by name, every tensor of real numbers changed; a member of a list is called ``name[i]``."""

    def changed(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [changed(f"{name}[{i}]", v) for i, v in enumerate(value)]
        real = isinstance(value, torch.Tensor) and value.is_floating_point()
        return change(name, value) if real else value

    return {name: changed(name, value) for name, value in values.items()}


def _member(values: Mapping[str, Any], name: str) -> Any:
    name, index = place_of(name)
    return values[name] if index is None else values[name][index]


def _of_others(
    run: Run, values: Mapping[str, Any], names: frozenset[str], g: torch.Tensor
) -> dict[str, Any]:
    """Autograd's gradients of weights and constants."""
    if not names:
        return {}
    return _at(lambda some: run({**values, **some}), {k: values[k] for k in names})[1](g)  # type: ignore[no-any-return]


def _at(f: Callable[[Any], torch.Tensor], x: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """The value of a linear function, and its transpose."""
    y, pull, *_ = torch.func.vjp(f, x)
    return y, lambda g: pull(g)[0]


def _conforming(terms: Terms, x: torch.Tensor, g: torch.Tensor, gamma: float | None) -> torch.Tensor:
    """γ, and z⁺ where it is None.

    ``c'`` is half of ``c + sign(z) |c|``, so the size of its sum is ``(|z| + Σ|c|) / 2``, and the divisor
    is at least half of |z|. Where z is 0 there is nothing to share.
    """
    all_, more = (0.0, 1.0) if gamma is None else (1 / (1 + gamma), gamma / (1 + gamma))
    z, back = _at(terms, x)
    sizes, sizes_back = _at(lambda a: terms(a, torch.abs), x.abs())
    total = all_ * z.abs() + more * (sizes + z.abs()) / 2
    each = g * (z.abs() / torch.where(z == 0, 1.0, total))
    return (all_ + more / 2) * back(each) + more / 2 * x.sign() * sizes_back(each * z.sign())


def _in_box(terms: Terms, x: torch.Tensor, g: torch.Tensor, share: Share) -> torch.Tensor:
    """z-box: an element gets ``(x - l) max(w, 0) + (x - h) min(w, 0)``, whose addends are not negative.

    Where all of them are 0 nothing is shared, and an element that is 0 can carry nothing: the ledger tells
    what is lost.
    """
    assert share.box is not None
    below, above = (x - _along(share.axis, numbers, x) for numbers in share.box)
    up, up_back = _at(lambda d: terms(d, lambda w: w.clamp(min=0)), below)
    down, down_back = _at(lambda d: terms(d, lambda w: w.clamp(max=0)), above)
    each = g * _ratio(terms(x), up + down)
    return _ratio(below * up_back(each) + above * down_back(each), x)


def _along(axis: int, numbers: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    """One number, or one for each place along a negative axis of ``x``."""
    return x.new_tensor(numbers).reshape(-1, *[1] * (-1 - axis))


def _ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a / b``, and 0 where that is no finite number."""
    found = a / torch.where(b == 0, 1.0, b)
    return torch.where((b != 0) & found.isfinite(), found, 0.0)
