"""``bias(op)``: what an op adds on its own, computed from the op and never as a remainder.

For an op that is affine in its live operands, given the others, that is its value at live = 0.
The few ops for which it is not have a function of their own here, named in their row of
``rules/ops.yaml``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from libragrad_fx.ops import recurrent
from libragrad_fx.ops.activation import LOG_SLOPES, softmax_at_zero
from libragrad_fx.ops.twin import bind, spread

Bias = Callable[[Any, Sequence[str], dict[str, Any]], Any]


def _zeroed(name: str, value: Any, live: Sequence[str]) -> Any:
    """``value`` with its live tensors at zero; members of a list are live one by one."""
    if isinstance(value, (list, tuple)):
        return [_zeroed(f"{name}[{i}]", v, live) for i, v in enumerate(value)]
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) and name in live else value


def _run(op: Any, values: dict[str, Any]) -> Any:
    args, kwargs = spread(op, values)
    return op(*args, **kwargs)


def at_zero(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """The op at zero live operands: right for every op that is affine in them."""
    return _run(op, {k: _zeroed(k, v, live) for k, v in args.items()})


def _saturated(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """clamp and its kin are the identity or a constant: the constant, where nothing passes.

    Whether the identity holds at a bound itself differs between ops and PyTorch versions, so the
    op's own derivative is asked.
    """
    with torch.enable_grad():
        x = args["self"].detach().requires_grad_()
        y = _run(op, {**args, "self": x})
        (passes,) = torch.autograd.grad(y.sum(), x)
    return torch.where(passes == 0, y.detach(), 0.0)


def _selected(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """A selection among tensors: its static ones where they win; ties as autograd shares them."""
    given = {k: v for k, v in args.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    if not set(given) - set(live):
        return None
    shape = torch.broadcast_shapes(*(v.shape for v in given.values()))
    wide = {k: v.detach().expand(shape).clone().requires_grad_() for k, v in given.items()}
    static = [v for k, v in wide.items() if k not in live]
    with torch.enable_grad():
        shares = torch.autograd.grad(_run(op, {**args, **wide}).sum(), static)
    won = [torch.where(s == 0, 0.0, s * v.detach()) for s, v in zip(shares, static, strict=True)]
    return sum(won)  # what loses counts nothing, were it infinite


def _power(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """x ** 0 is the constant 1; any other power goes through Euler's relation and has none."""
    x, exponent = args["self"], torch.as_tensor(args["exponent"], device=args["self"].device)
    return (exponent == 0).to(x.dtype).expand(torch.broadcast_shapes(x.shape, exponent.shape))


def _norm(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """The 0-norm counts: it is constant almost everywhere. Any other norm is homogeneous."""
    return _run(op, args) if args.get("ord", args.get("p")) == 0 else None


def _quotient(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """c + a / b: nothing divides by zero; where b is live, so is all of a / b, and a is at zero."""
    return at_zero(op, ["tensor1" if name == "tensor2" else name for name in live], args)


def _entropy(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """logsumexp(x) = <p, x> + H(p) with p = softmax(x): the entropy is its constant."""
    x, dim = args["self"], args["dim"]
    y = torch.logsumexp(x, dim, keepdim=True)
    p = torch.exp(x - y)
    return ((y - x) * p).sum(dim, keepdim=args["keepdim"])


def _softmax(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    return softmax_at_zero(args["self"], args["dim"]).expand_as(args["self"])


def _log_softmax(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    return -torch.logsumexp(args["self"], args["dim"], keepdim=True).expand_as(args["self"])


def _log(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """The secant of a logarithm goes through (1, 0): log(x) = s (x - 1); its constant is -s."""
    x = args["self"]
    return -torch.where(x == 1, LOG_SLOPES[op], _run(op, args) / (x - 1))


def _shrunk(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """softshrink is x shifted towards zero, by lambd; or zero."""
    x, lambd = args["self"], args["lambd"]
    return torch.where(x.abs() > lambd, -lambd * torch.sign(x), 0.0)


def _beta(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """A norm in training mode writes its running statistics when called: call it without them."""
    if args.get("training") or args.get("use_input_stats"):
        args = {**args, "running_mean": None, "running_var": None}
    return at_zero(op, live, args)


def _none(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """Power functions under Euler's relation have no constant, though 0 ** p may be infinite."""
    return None


BIASES: dict[str, Bias] = {
    "at_zero": at_zero,
    "saturated": _saturated,
    "selected": _selected,
    "power": _power,
    "norm": _norm,
    "quotient": _quotient,
    "entropy": _entropy,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "log": _log,
    "shrunk": _shrunk,
    "beta": _beta,
    "none": _none,
    "recurrent": recurrent.bias,
}


def bias(
    name: str, op: Any, live: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Constant of one call, shaped like its output; None where it has none.

    live: schema names of the operands through which the gradient flows.
    """
    with torch.no_grad():
        return BIASES[name](op, live, bind(op, args, kwargs))
