"""PyTorch's own Python functions (bindings) in place of the ops that they call.

A captured graph names ops (``aten.add.Tensor``). A call by that name checks its arguments against the
schema with general code; ``torch.add`` parses them with code generated from the schema. That saves some
microseconds a call, and a small network makes hundreds of calls. For each kind of call, ``same_calls``
tests that the binding accepts the arguments and does the same.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from libragrad_fx.graph.notes import annotate
from libragrad_fx.ops.function import watched

aten = torch.ops.aten

_PLACES = (torch, torch._C._nn, torch.Tensor)  # type: ignore[attr-defined]
_PREFIXES = {"special_": torch.special, "linalg_": torch.linalg, "fft_": torch.fft}
_NATIVE = (types.BuiltinFunctionType, types.MethodDescriptorType)
PRODUCTS = {
    aten.linear.default: -1, aten.conv1d.default: 1, aten.conv2d.default: 1,
}  # fmt: skip
"""Ops that multiply by a weight, each with the feature axis of its result (a feature is a weight row's)."""


def _in_place(plain: Callable[..., Any], over: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = args[0] if args else x
        # inputs may have other dtypes and sizes than at capture, and autocast changes dtypes inside
        fits = not isinstance(y, torch.Tensor) or (y.dtype == x.dtype and y.shape == x.shape)
        return (over if fits and not watched() else plain)(x, *args, **kwargs)  # type: ignore[no-any-return]

    call.__name__ = over.__name__
    return call


_IN_PLACE = {
    aten.relu.default: _in_place(torch.relu, torch.relu_),
    aten.leaky_relu.default: _in_place(F.leaky_relu, F.leaky_relu_),
    aten.add.Tensor: _in_place(torch.add, torch.Tensor.add_),
}
"""Ops whose backward does not read the operand that they overwrite. (Not ``hardtanh_``: autograd copies its
operand.) Most networks call them in place themselves."""


def in_place(node: Node) -> Callable[..., Any] | None:
    """The in-place form of a node's op, which writes over its first operand; None if there is none."""
    if node.target is aten.leaky_relu.default and not (len(node.args) < 2 or node.args[1] > 0):  # type: ignore[operator]
        return None  # the backward takes the operand's sign from the result: needs a positive slope
    return _IN_PLACE.get(node.target)  # type: ignore[arg-type]


_tried: dict[Any, bool] = {}


@functools.cache
def binding(op: Any) -> Callable[..., Any] | None:
    """The Python function that PyTorch generated for ``op``; None if there is none."""
    name = op._schema.name.removeprefix("aten::")
    if op.namespace != "aten":
        return None
    found = [getattr(place, name, None) for place in _PLACES]
    for prefix, place in _PREFIXES.items():
        if name.startswith(prefix):
            found.append(getattr(place, name.removeprefix(prefix), None))
    return next((f for f in found if isinstance(f, _NATIVE)), None)


class Log(TorchDispatchMode):
    """Logs the ops that a call ends in; a tensor is logged as (shape, strides, dtype)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, pytree.tree_map_only(torch.Tensor, _layout, (args, kwargs))))
        return func(*args, **(kwargs or {}))


def _layout(x: torch.Tensor) -> Any:
    return tuple(x.shape), x.stride(), x.dtype


def same_calls(op: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether ``function`` and ``op``, called on meta tensors, end in the same ops."""
    calls = []
    for f in (op, function):
        try:
            with torch.no_grad(), Log() as log:
                f(*args, **kwargs)
        except Exception:  # the binding refuses these arguments, or the result depends on data
            return False
        calls.append(log.calls)
    return bool(calls[0] == calls[1])


def mark(graph: Graph) -> None:
    """Mark the nodes of ``graph`` whose op a binding can replace. They have their traced values."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and binding(node.target) is not None:
            annotate(node, bound=_is_bound(node))


def _is_bound(node: Node) -> bool:
    function = binding(node.target)
    assert function is not None
    try:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: _example(n.meta["val"]))
    except (KeyError, TypeError):  # no traced value, or a size that depends on data
        return False
    leaves, spec = pytree.tree_flatten((args, kwargs))
    key = node.target, spec, tuple(map(_kind, leaves))
    if key not in _tried:
        _tried[key] = same_calls(node.target, function, args, kwargs)
    return _tried[key]


def _example(value: Any) -> Any:
    """A concrete stand-in for a traced value: a meta tensor, a number."""
    if isinstance(value, torch.Tensor):
        sizes, strides = ([_example(n) for n in part] for part in (value.shape, value.stride()))
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)):
        return [_example(v) for v in value]
    return int(value.node.hint) if isinstance(value, torch.SymInt) else value  # type: ignore[arg-type]


def _kind(x: Any) -> Any:
    """What decides how an argument is parsed: the dimensions and dtype of a tensor, else the type."""
    return (x.ndim, x.dtype) if isinstance(x, torch.Tensor) else type(x)
