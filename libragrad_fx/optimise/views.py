"""What a graph's nodes pass on: where gradients arrive, and what views make of a value."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from libragrad_fx.types import OpFacts

aten = torch.ops.aten
Facts = Mapping[str, OpFacts]
VIEWS = {
    "reshape", "view", "_unsafe_view", "permute", "transpose", "t", "mT", "unbind", "chunk", "split",
    "split_with_sizes", "tensor_split", "slice", "select", "narrow", "unsqueeze", "squeeze", "flatten",
    "unflatten", "movedim", "moveaxis", "swapaxes", "swapdims",
}  # fmt: skip
COPIES = {aten.contiguous.default, aten.clone.default}


def only_moves(node: Node) -> bool:
    """Whether a node's elements are those of its operand in another order, or some of them."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target in COPIES or (
            node.target._opname in VIEWS and node.target is not aten.view.dtype
        )
    return node.target is operator.getitem


def first(value: Any) -> Any:
    """A value, or the first of several; of a node what it computes."""
    value = value.meta["val"] if isinstance(value, Node) else value
    return value[0] if isinstance(value, list | tuple) else value


def sizes(node: Node) -> tuple[int, ...]:
    """The shape of a value, with a number for each free size that is unlikely to be another size as well:
    what views do for these numbers they do for all, and not for those of the example alone."""
    return tuple(map(_number, first(node).shape))


def elements(node: Node) -> int:
    """How many elements a value has in the example."""
    return math.prod(map(in_example, first(node).shape))


def in_example(size: Any) -> int:
    return int(size.node.hint if isinstance(size, torch.SymInt) else size)  # type: ignore[arg-type]


def is_sized(node: Node) -> bool:
    """Whether no size of a value is decided by data."""
    return all(not isinstance(d, torch.SymInt) or d.node.has_hint() for d in first(node).shape)


def _number(value: Any) -> int:
    if not isinstance(value, torch.SymInt):
        return int(value)
    if not value.node.has_hint():
        raise RuntimeError("data decides this number")
    expr: Any = value.node.expr
    # 240 has many divisors; symbols are named by numbers: s77
    chosen = {s: 240 * (61 + int("0" + re.sub(r"\D", "", s.name)) % 97) for s in expr.free_symbols}
    return int(expr.xreplace(chosen))


def replay(end: Node, product: Node, whole: torch.Tensor, args: Any = None) -> Any:
    """The views that lead from a product to ``end``, on another tensor; ``args``: other ones of ``end``."""

    def value(n: Node) -> Any:
        if n is product:
            return whole
        if isinstance(n.meta["val"], (int, torch.SymInt)):
            return _number(n.meta["val"])
        if n.op != "call_function":
            raise RuntimeError("data decides this view")
        if n.target in COPIES:
            return value(n.args[0])  # type: ignore[arg-type]
        own = n.args if args is None or n is not end else args
        own, kwargs = map_arg((own, dict(n.kwargs)), value)
        return n.target(*own, **kwargs)  # type: ignore[operator]

    try:
        return value(end)
    except RuntimeError:  # on a contiguous tensor it is no view; or data decides its sizes
        return None
