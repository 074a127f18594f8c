"""Ops that take places along an axis (``select``, ``slice``): how to read them, and how to insert some."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from libragrad_fx.graph.schema import bind
from libragrad_fx.ops.function import same

aten = torch.ops.aten
SIZE = aten.sym_size.int
_SELECT, _SLICE, _COPY = aten.select.int, aten.slice.Tensor, aten.clone.default


class Taken(NamedTuple):
    """The places of ``x`` that a ``select`` or a ``slice`` takes. end: None for a ``select``."""

    x: Node
    axis: int
    start: Any
    end: Any
    step: Any

    @property
    def alone(self) -> bool:
        """Whether it is one place, known before the model runs."""
        if not isinstance(self.start, int):
            return False
        last = self.start == -1 and self.end == sys.maxsize
        return self.end is None or last or (self.start != -1 and self.end == self.start + 1)


def taken(node: Node) -> Taken | None:
    """The places that a node takes; None if it is neither a ``select`` nor a ``slice``."""
    if node.target is _SELECT:
        x, axis, place = bind(_SELECT, node.args, node.kwargs).values()
        return Taken(x, axis, place, None, 1)
    if node.target is _SLICE:
        x, axis, start, end, step = bind(_SLICE, node.args, node.kwargs).values()
        return Taken(x, axis, start, sys.maxsize if end is None else end, step)
    return None


def is_selection(node: Node) -> bool:
    """Whether a node is a ``select``: one place of an axis, without the axis."""
    return node.target is _SELECT


def take_one(graph: Graph, x: Node, axis: int, place: int) -> tuple[Node, Node]:
    """Nodes for one place of an axis, which keeps size 1: a view, and its copy, so that ``x`` can go."""
    end = sys.maxsize if place == -1 else place + 1
    part = graph.call_function(_SLICE, (x, axis, place, end))
    return part, graph.call_function(_COPY, (part,))


def only_place(graph: Graph, x: Node, axis: Any) -> Node:
    """A node for ``x`` without ``axis``, which has size 1."""
    return graph.call_function(_SELECT, (x, axis, 0))


def whole(
    x: torch.Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> torch.Tensor:
    """``x[:]``; its backward is the identity. A slice's would copy the gradient into a tensor of zeros."""
    return same(x)


whole.aten_op = _SLICE  # type: ignore[attr-defined]


def idle(x: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    """``x``: a dropout that drops nothing returns its argument."""
    return x


idle.aten_op = aten.dropout.default  # type: ignore[attr-defined]
