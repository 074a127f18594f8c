"""``bias(op)``: the constant of an op, computed from the op and never as a remainder.

Most ops are affine in their live operands, given the others: their constant is the value at live = 0.
The few others have a function of their own here, named in their row of ``rules/ops.yaml``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from libragrad_fx.graph.schema import bind, spread
from libragrad_fx.ops import recurrent
from libragrad_fx.ops.activation import ZEROS, softmax_at_zero
from libragrad_fx.ops.loss import of_log_probabilities

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
    """Each element of clamp and its kin is the identity or a constant: the latter where no gradient passes.

    At a bound itself, ops and PyTorch versions differ, so the op's own derivative decides.
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
    return sum(won)  # ``where``: a loser counts 0, even if it is infinite


def _power(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """x ** 0 is the constant 1; any other power goes through Euler's relation and has none."""
    x, exponent = args["self"], torch.as_tensor(args["exponent"], device=args["self"].device)
    return (exponent == 0).to(x.dtype).expand(torch.broadcast_shapes(x.shape, exponent.shape))


def _norm(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """The 0-norm counts nonzeros, so it is all constant. Any other norm is homogeneous: no constant."""
    return _run(op, args) if args.get("ord", args.get("p")) == 0 else None


def _quotient(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """c + a / b: if b is live, a is set to zero in its place: a / b is zero, without a division by zero."""
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
    """The secant of a logarithm goes through (1, 0): log(x) = s (x - 1); its constant is -s.

    Other functions that are infinite at zero likewise have a secant through their own zero.
    """
    x, (zero, slope) = args["self"], ZEROS[op]
    return -zero * torch.where(x == zero, slope, _run(op, args) / (x - zero))


def _euler(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """Homogeneous of degree one in all operands: y = Σ ⟨∂y/∂a, a⟩. Returns the static operands' part."""
    given = {k: v for k, v in args.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    static = {k: v for k, v in given.items() if k not in live}
    if not static:
        return None
    call = _DISTANCES.get(op, lambda values: _run(op, values))

    def at(*values: torch.Tensor) -> torch.Tensor:
        return call({**args, **dict(zip(static, values, strict=True))})

    values = tuple(static.values())
    return torch.func.jvp(at, values, values)[1]


def _euler_of_two(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """As ``_euler``, for degree two: 2 y = Σ ⟨∂y/∂a, a⟩."""
    share = _euler(op, live, args)
    return None if share is None else share / 2


def _cdist(args: dict[str, Any]) -> torch.Tensor:
    """``cdist`` in ops that have forward derivatives."""
    apart = args["x1"].unsqueeze(-2) - args["x2"].unsqueeze(-3)
    return torch.linalg.vector_norm(apart, ord=args["p"], dim=-1)


_DISTANCES: dict[Any, Callable[[dict[str, Any]], torch.Tensor]] = {torch.ops.aten.cdist.default: _cdist}


def _reduced(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """A sum, mean or selection of the elements that an index assigns to each place: the static ones' part.

    Each element goes to one place, so the derivative of the total is its share of that place.
    """
    source, add = _ADDED_BY[op]
    names = [n for n in ("self", source) if n not in live]
    static = [args[n].detach().requires_grad_() for n in names]
    if not static:
        return None
    with torch.enable_grad():
        y = _run(op, {**args, **dict(zip(names, static, strict=True))})
        shares = torch.autograd.grad(y.sum(), static)
    total = torch.zeros_like(args["self"])
    for name, x, share in zip(names, static, shares, strict=True):
        part = torch.where(share == 0, 0.0, share * x.detach())
        total = total + part if name == "self" else add(total, args["dim"], args["index"], part)
    return total


_ADDED_BY: dict[Any, tuple[str, Callable[..., torch.Tensor]]] = {
    torch.ops.aten.scatter_reduce.two: ("src", torch.scatter_add),
    torch.ops.aten.index_reduce.default: ("source", torch.index_add),
}


def _offset(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """A piecewise function of slope one: by how much it shifts x."""
    return _run(op, args) - args["self"]


def _entropy_of_two(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """logaddexp(a, b) = <p, (a, b)> + H(p) with weights p = exp(a - y), exp(b - y). The constant is H(p),
    plus the terms of <p, (a, b)> whose operand is static."""
    power = torch.exp2 if op is torch.ops.aten.logaddexp2.default else torch.exp
    y = _run(op, args)
    parts = {k: power(args[k] - y) * args[k] for k in ("self", "other") if k in live}
    return y - sum(parts.values())


def _entropies(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """As ``_entropy``, for logcumsumexp: of the first element, of the first two, …"""
    x, dim = args["self"], args["dim"]
    weights = torch.exp(x - (x.amax(dim, keepdim=True) if x.ndim else x))
    return _run(op, args) - (weights * x).cumsum(dim) / weights.cumsum(dim)


def _cross_entropy(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """The loss of the held part of the log-probabilities, -logsumexp(x)."""
    x, *rest = args.values()
    held = -torch.logsumexp(x, 1 if x.ndim > 1 else 0, keepdim=True)
    return of_log_probabilities(held.expand_as(x), *rest)


def _shrunk(op: Any, live: Sequence[str], args: dict[str, Any]) -> Any:
    """softshrink shifts x towards zero by lambd, or returns zero."""
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
    "cross_entropy": _cross_entropy,
    "shrunk": _shrunk,
    "euler": _euler,
    "euler_of_two": _euler_of_two,
    "reduced": _reduced,
    "offset": _offset,
    "entropy_of_two": _entropy_of_two,
    "entropies": _entropies,
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
