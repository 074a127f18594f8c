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
from libragrad_fx.ops.activation import softmax_at_zero
from libragrad_fx.ops.twin import bind

Bias = Callable[[Any, Sequence[str], dict[str, Any]], Any]


def _zeroed(name: str, value: Any, live: Sequence[str]) -> Any:
    """``value`` with its live tensors at zero; members of a list are live one by one."""
    if isinstance(value, (list, tuple)):
        return [_zeroed(f"{name}[{i}]", v, live) for i, v in enumerate(value)]
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) and name in live else value


def at_zero(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """The op at zero live operands: right for every op that is affine in them."""
    keyword = {a.name for a in op._schema.arguments if a.kwarg_only}
    values = {k: _zeroed(k, v, live) for k, v in args.items()}
    positional = [v for k, v in values.items() if k not in keyword]
    return op(*positional, **{k: v for k, v in values.items() if k in keyword})


def _saturated(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """clamp and its kin are the identity inside their bounds and a constant outside."""
    x = args["self"]
    y = at_zero(op, (), args)
    return torch.where(y == x, torch.zeros_like(y), y)


def _selected(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """maximum/minimum against a static operand: that operand where it wins, half of it at a tie."""
    static = args["other"] if "self" in live else args["self"]
    moving = args["self"] if "self" in live else args["other"]
    if {"self", "other"} <= set(live):
        return None
    y = at_zero(op, (), args)
    share = torch.where(moving == static, 0.5, (y == static).to(y.dtype))
    return share * static


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
    """The secant of log passes through (1, 0): log(x) = s (x - 1), so its constant is -s."""
    x = args["self"]
    return -torch.where(x == 1, 1.0, torch.log(x) / (x - 1))


def _beta(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """A norm that may update running statistics when called: its beta, without calling it."""
    if args["running_mean"] is not None and not (args.get("training") or args.get("use_input_stats")):
        return at_zero(op, live, args)
    beta, x = args["bias"], args["input"]
    if beta is None or "bias" in live:
        return None
    return beta.view(1, -1, *[1] * (x.ndim - 2)).expand_as(x)


def _none(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """Power functions under Euler's relation have no constant, though 0 ** p may be infinite."""
    return None


BIASES: dict[str, Bias] = {
    "at_zero": at_zero,
    "saturated": _saturated,
    "selected": _selected,
    "entropy": _entropy,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "log": _log,
    "beta": _beta,
    "none": _none,
    "recurrent": recurrent.bias,
}


def bias(name: str, op: Any, live: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Constant of one call, shaped like its output; None where it has none.

    live: schema names of the operands through which the gradient flows.
    """
    with torch.no_grad():
        return BIASES[name](op, live, bind(op, args, kwargs))
