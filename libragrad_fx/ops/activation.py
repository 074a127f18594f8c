"""Secants of unary functions, and the activations that are not elementwise.

A gated activation ``f(x) = x * gate(x)`` keeps its gate constant on the way back (method: Gated
Activation rule), so ``dx = g * gate(x)``. For any unary function the gate is the secant slope
``(f(x) - f(0)) / x``, whose limit at 0 is ``f'(0)``: then ``<f(x), g> = <x, dx> + <f(0), g>``.
Power functions have no finite ``f(0)`` in general; for them Euler's relation gives ``f(x) / x``.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import torch

from libragrad_fx.kernels import on_gpu
from libragrad_fx.kernels.pointwise import gelu_gate
from libragrad_fx.ops.binding import binding
from libragrad_fx.ops.function import eager_or_traced, watched
from libragrad_fx.ops.twin import Grads, spent, times_, twin

aten = torch.ops.aten


def secant_slope(
    x: torch.Tensor, y: torch.Tensor, at_zero: torch.Tensor | float, slope: torch.Tensor | float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """``(y - f(0)) / x`` with its limit ``slope`` where |x| is too small to divide by.

    out: a tensor to write the result into; may be ``x``.
    """
    from_zero = not isinstance(at_zero, torch.Tensor) and at_zero == 0
    if isinstance(slope, float) and from_zero and not x.is_complex():
        ratio = torch.div(y, x, out=out)
        held = torch.nan_to_num if watched() else torch.nan_to_num_  # a tracer wants no side effects
        return held(ratio, slope, math.inf, -math.inf)
    # below sqrt(eps) the difference y - f(0) is rounding; the limit is right to eps there
    tiny = x.abs() < math.sqrt(torch.finfo(x.dtype).eps)
    return torch.where(tiny, slope, (y - at_zero) / torch.where(tiny, 1.0, x))


_made: dict[Any, Callable[..., Any]] = {}
_one_at_a_time = threading.Lock()


def secant(op: torch._ops.OpOverload, slope: float, at_zero: float | None) -> Callable[..., Any]:
    """The twin of a unary op, made from its row (see ``types.Secant``) and cached."""
    key = op, slope, at_zero
    with _one_at_a_time:
        if key not in _made:
            _made[key] = _secant(*key)
            _made[key].secant = key  # type: ignore[attr-defined]
        return _made[key]


def _secant(op: torch._ops.OpOverload, slope: float, at_zero: float | None) -> Callable[..., Any]:
    """The forward computes the slope from input and output, and saves it alone."""
    forward = _with_slope(op, slope, at_zero)
    stream = op._schema.arguments[0].name

    def over(x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach()  # the slope is written into x; without this, saving it would keep x's graph
        return forward(x, *args, out=x, **kwargs)

    def vjp(needs: frozenset[str], g: torch.Tensor, *, slope: torch.Tensor, **_: Any) -> Grads:
        # keep the strides of g: earlier ops mostly want their gradient in that layout
        alike = spent() and slope.stride() == g.stride() and not slope.is_complex()
        return {stream: times_(slope, g) if alike else g * slope.conj()}

    once = at_zero == 0  # otherwise ``secant_slope`` reads x again, so x must not be overwritten
    given: Any = {"forward": forward, "extras": ("slope",), "saves": ("slope",)}
    made = twin(op, vjp, name=_label(op), over=over if once else None, **given)
    if once:
        made.slopes = forward  # type: ignore[attr-defined]
    made.takes_complex = True  # type: ignore[attr-defined]
    return _or_gate(made, op, stream) if once and op in _GATES else made


_GATES = {aten.gelu.default: gelu_gate}
"""Activations whose gate has a formula in x: a GPU computes it again, which costs less than to keep it."""


def _or_gate(made: Any, op: torch._ops.OpOverload, stream: str) -> Callable[..., Any]:
    """``made``; on a GPU a twin that saves x alone."""

    def vjp(needs: frozenset[str], g: torch.Tensor, **saved: Any) -> Grads:
        x = saved.pop(stream)
        return {stream: _GATES[op](g, x, *saved.values())}

    held = twin(op, vjp, saves=(stream,), name=f"{made.__name__}_by_gate")

    def either(made: Callable[..., Any]) -> Any:
        def call(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return (held if eager_or_traced(x) and on_gpu(x) else made)(x, *args, **kwargs)

        return functools.update_wrapper(call, made)  # with the attributes of a twin

    call = either(made)
    call.over = either(made.over)
    return call  # type: ignore[no-any-return]


def _label(op: torch._ops.OpOverload) -> str:
    """A unique name: another library, overload or row may have an op of the same name."""
    name = op._schema.name.split("::")[1]
    same = sum(made[0]._schema.name.split("::")[1] == name for made in _made)
    return name + (f"_{same + 1}" if same else "")


def _with_slope(op: torch._ops.OpOverload, slope: float, at_zero: float | None) -> Callable[..., Any]:
    """A function that returns the result of ``op`` and the slope of its secant."""
    call = binding(op) or op

    def forward(
        x: torch.Tensor, *args: Any, out: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y = call(x, *args, **kwargs)
        zero = call(x.new_zeros(()), *args, **kwargs) if at_zero is None else at_zero
        return y, secant_slope(x, y, zero, slope, out)

    return forward


def _silu(needs: frozenset[str], g: torch.Tensor, *, self: torch.Tensor) -> Grads:
    """g * sigmoid(x), which is the derivative of softplus: one kernel."""
    return {"self": aten.softplus_backward.default(g, self, 1.0, _LINEAR_FROM)}


_LINEAR_FROM = 40.0  # beyond, sigmoid(x) is 1 in every dtype

silu = twin(aten.silu.default, _silu, saves=("self",))
silu.slopes = _with_slope(aten.silu.default, 0.5, 0.0)  # type: ignore[attr-defined]


def _square(needs: frozenset[str], g: torch.Tensor, *, self: torch.Tensor) -> Grads:
    return {"self": self.conj() * g}


def _pow(needs: frozenset[str], g: torch.Tensor, *, self: torch.Tensor, exponent: float) -> Grads:
    """g * x ** (n - 1): computed from ``x``, which another op mostly saves anyway."""
    if exponent == 0:  # a constant
        return {"self": torch.zeros_like(g)}
    slope = self.pow(exponent - 1)
    if self.is_complex():
        return {"self": torch.where(self == 0, 0.0, slope.conj() * g) if exponent < 1 else slope.conj() * g}
    return {"self": times_(slope if exponent >= 1 else slope.masked_fill(self == 0, 0.0), g)}


square = twin(aten.square.default, _square, saves=("self",))
pow = twin(aten.pow.Tensor_Scalar, _pow, saves=("self",))
square.takes_complex = pow.takes_complex = True  # type: ignore[attr-defined]


def _pow_tensor(
    needs: frozenset[str], g: torch.Tensor, *, self: torch.Tensor, exponent: torch.Tensor,
    result: torch.Tensor,
) -> Grads:  # fmt: skip
    # x ** 0 is a constant, as in ``_pow``
    held = torch.where((self == 0) | (exponent == 0), 0.0, result / self)
    grads = {"self": held * g}
    if "exponent" in needs:
        grads["exponent"] = torch.where(self == 0, 0.0, result * torch.log(self)) * g
    return grads


_SAVES = ("self", "exponent", "result")
pow_tensor = twin(aten.pow.Tensor_Tensor, _pow_tensor, saves=_SAVES, name="pow_tensor")


def _exponential(
    needs: frozenset[str], g: torch.Tensor, *, self: float, exponent: torch.Tensor,
    result: torch.Tensor,
) -> Grads:  # fmt: skip
    limit = math.log(self) if self > 0 else 0.0  # other bases have no limit at 0
    return {"exponent": secant_slope(exponent, result, 1.0, limit) * g}


pow_scalar = twin(aten.pow.Scalar, _exponential, saves=("exponent", "result"), name="pow_scalar")


def _cumprod(
    needs: frozenset[str], g: torch.Tensor, *, self: torch.Tensor, result: torch.Tensor, dim: int,
    **_: Any,
) -> Grads:  # fmt: skip
    """Element k is a product of k + 1 factors: 1 / (k + 1) of its gradient to each."""
    share = g / torch.ones_like(g).cumsum(dim)
    return {"self": aten.cumprod_backward.default(share, self.to(g.dtype), dim, result).to(self.dtype)}


def _prod(
    needs: frozenset[str], g: torch.Tensor, *, self: torch.Tensor, dim: int | None = None,
    keepdim: bool = False, **_: Any,
) -> Grads:  # fmt: skip
    """The last element of the cumulative product, whose backward handles zeros."""
    if dim is None:
        flat: Any = _prod(needs, g, self=self.flatten(), dim=0)["self"]
        return {"self": flat.reshape(self.shape)}
    partial = self.cumprod(dim, dtype=g.dtype)
    is_last = torch.ones_like(partial).cumsum(dim) == self.numel() // max(g.numel(), 1)
    g = torch.where(is_last, g if keepdim or not self.ndim else g.unsqueeze(dim), 0.0)
    return _cumprod(needs, g, self=self, result=partial, dim=dim)


cumprod = twin(aten.cumprod.default, _cumprod, saves=("self", "result"))
prod = twin(aten.prod.default, _prod, saves=("self",))
prod_dim = twin(aten.prod.dim_int, _prod, saves=("self",), name="prod_dim")


ZEROS = {
    aten.log.default: (1.0, 1.0),
    aten.log2.default: (1.0, 1 / math.log(2)),
    aten.log10.default: (1.0, 1 / math.log(10)),
    aten.logit.default: (0.5, 4.0),
    aten.lgamma.default: (1.0, -0.5772156649015329),
}
"""Functions that are infinite at zero: (their own zero, their slope there)."""


def _logarithm(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """Secant through the point where a logarithm is zero."""
    zero, slope = ZEROS[op]

    def vjp(
        needs: frozenset[str], g: torch.Tensor, *, self: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> Grads:
        return {"self": secant_slope(self - zero, result, g.new_zeros(()), slope) * g}

    return twin(op, vjp, saves=("self", "result"))


log, log2, log10, logit, lgamma = map(_logarithm, ZEROS)


def softmax_at_zero(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Value of exp(x)/Z at x = 0 with the normaliser Z held at its value: exp(-logsumexp(x))."""
    return torch.exp(-torch.logsumexp(x, dim, keepdim=True))


def _softmax(
    needs: frozenset[str], g: torch.Tensor, *, self: torch.Tensor, result: torch.Tensor, dim: int,
    **_: Any,
) -> Grads:  # fmt: skip
    """A softmax that carries the signal: its denominator is held, its exponential is a secant."""
    zero = softmax_at_zero(self, dim)
    return {"self": secant_slope(self, result, zero, zero) * g}


softmax = twin(aten.softmax.int, _softmax, saves=("self", "result"))


def _log_softmax(needs: frozenset[str], g: torch.Tensor, **_: Any) -> Grads:
    """x - logsumexp(x) with the logsumexp held: the gradient passes through unchanged."""
    return {"self": g}


log_softmax = twin(aten.log_softmax.int, _log_softmax, saves=())


def _glu(needs: frozenset[str], g: torch.Tensor, *, self: torch.Tensor, dim: int) -> Grads:
    """GLU(a, b) = a * sigmoid(b): the sigmoid is a gate and is held."""
    gate = self.chunk(2, dim)[1]
    return {"self": torch.cat([g * torch.sigmoid(gate), torch.zeros_like(g)], dim)}


glu = twin(aten.glu.default, _glu, saves=("self",))
