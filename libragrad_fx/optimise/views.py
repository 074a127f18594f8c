"""Which nodes are views, and what a chain of views makes of a value."""

from __future__ import annotations

import math
import operator
import re
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from libragrad_fx.decide.flow import Facts
from libragrad_fx.graph.origin import in_example


def only_moves(node: Node, facts: Facts) -> bool:
    """Whether a node's elements are some or all of its operand's, in any order: a view, a copy, getitem."""
    return node.target is operator.getitem or _moves(node, facts) is not None


def _moves(node: Node, facts: Facts) -> str | None:
    fact = facts.get(node.name)
    return None if fact is None else fact.moves


def only_cuts(node: Node, facts: Facts) -> bool:
    """Whether a node is a slice of its operand, or a list of slices: a view with the same strides."""
    if node.target is operator.getitem or _moves(node, facts) != "view":
        return node.target is operator.getitem
    x, made = first(node.args[0]), node.meta["val"]
    parts = made if isinstance(made, list | tuple) else [made]
    return all(str(p.stride()) == str(x.stride()) for p in parts)


def first(value: Any) -> Any:
    """A value, or the first of a list; for a node, its traced value."""
    value = value.meta["val"] if isinstance(value, Node) else value
    return value[0] if isinstance(value, list | tuple) else value


def sizes(node: Node) -> tuple[int, ...]:
    """The shape of a value, with a made-up number for each free size, unlikely to equal any other size. So
    a conclusion drawn from it holds for all sizes, and not only for those of the example."""
    return tuple(map(_number, first(node).shape))


def elements(node: Node) -> int:
    """How many elements a value has in the example."""
    return math.prod(map(in_example, first(node).shape))


def is_sized(node: Node) -> bool:
    """Whether no size of a value depends on data."""
    return all(not isinstance(d, torch.SymInt) or d.node.has_hint() for d in first(node).shape)


def _number(value: Any) -> int:
    if not isinstance(value, torch.SymInt):
        return int(value)
    if not value.node.has_hint():
        raise RuntimeError("this number depends on data")
    expr: Any = value.node.expr
    # multiples of 240, which has many divisors; each symbol (s77) by its own number
    chosen = {s: 240 * (61 + int("0" + re.sub(r"\D", "", s.name)) % 97) for s in expr.free_symbols}
    return int(expr.xreplace(chosen))


def replay(end: Node, product: Node, whole: torch.Tensor, facts: Facts, args: Any = None) -> Any:
    """Apply the views between ``product`` and ``end`` to ``whole`` in place of the product; None if they
    are no views of it. args: replace the arguments of ``end``."""

    def value(n: Node) -> Any:
        if n is product:
            return whole
        if isinstance(n.meta["val"], (int, torch.SymInt)):
            return _number(n.meta["val"])
        if n.op != "call_function":
            raise RuntimeError("this view depends on data")
        if _moves(n, facts) == "copy":
            return value(n.args[0])  # type: ignore[arg-type]
        own = n.args if args is None or n is not end else args
        own, kwargs = map_arg((own, dict(n.kwargs)), value)
        return n.target(*own, **kwargs)  # type: ignore[operator]

    try:
        return value(end)
    except RuntimeError:  # no view of a contiguous tensor, or its sizes depend on data
        return None
