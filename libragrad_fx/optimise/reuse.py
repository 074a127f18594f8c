"""Less work for what is known beforehand, and no new memory where the old is not read again."""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch.fx import Graph, Node

from libragrad_fx.decide.flow import live
from libragrad_fx.graph.alias import is_fresh
from libragrad_fx.graph.notes import annotate, note
from libragrad_fx.graph.schema import bind
from libragrad_fx.ops.binding import PRODUCTS
from libragrad_fx.ops.insert import LEAN
from libragrad_fx.optimise.execute import IN_PLACE
from libragrad_fx.optimise.graft import idle, whole
from libragrad_fx.optimise.views import only_moves
from libragrad_fx.optimise.work import Work

aten = torch.ops.aten
_SMALL = 2**16  # elements of a constant that is kept
_UNREAD = {
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.batch_norm.default,
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor,
}  # fmt: skip
"""Ops that make new memory, which their backward does not read."""


def dropouts(work: Work) -> None:
    """A dropout that drops nothing is its argument."""
    for node in work.graph.nodes:
        if node.target is aten.dropout.default and (node.args[1] == 0 or not node.args[2]):
            node.target = idle
            annotate(node, rule=LEAN, host=node.name)


def constants(work: Work) -> None:
    """Mark what need not be computed at every call: small values that depend on no input and no
    parameter (masks, tables of positions)."""
    shown = _shown(work.graph)
    for node in work.graph.nodes:
        reason = _moves(node)
        if reason is None and node not in shown:
            annotate(node, fixed=True)
        elif reason:
            work.no(node, reason)


def slices(work: Work) -> None:
    """``x[:]`` is ``x``."""
    for node in work.graph.nodes:
        if node.target is aten.slice.Tensor and _takes_all(node):
            node.target = whole
            annotate(node, rule=LEAN, host=node.name)


def steps(work: Work) -> None:
    """Mark what is taken from an axis place by place and gets a gradient: it is unbound together."""
    alive, shown = live(work.graph, work.facts), _shown(work.graph)
    for node in work.graph.nodes:
        if node.target is aten.select.int and node in alive - shown:
            place = _place(node)
            if place is None:
                work.no(node, "its place, or the size of the axis, differs from call to call")
            else:
                annotate(node, place=place)


def memory(work: Work) -> None:
    """Mark what may be computed in the memory of its first operand."""
    for node in work.graph.nodes:
        if _reads_last(node):
            annotate(node, over=True)
        elif node.target in IN_PLACE:
            reason = _is_read_again(node)
            if reason is None:
                annotate(node, over=True)
            else:
                work.no(node, reason)


def _shown(graph: Graph) -> set[Node]:
    """What may lie in memory that the user gets, who may write to it."""
    shown = set[Node]()
    for node in reversed(graph.nodes):
        if node.op == "output" or (node in shown and not is_fresh(node)):
            shown.update(node.all_input_nodes)
    return shown


def _moves(node: Node) -> str | None:
    """Why a node is no constant that is worth keeping: "" where that needs no words; None if it is one."""
    op, value = node.target, node.meta.get("val")
    if isinstance(op, torch._ops.OpOverload):
        if op._schema.is_mutable or torch.Tag.nondeterministic_seeded in op.tags:
            return ""
    elif op is not operator.getitem:
        return ""
    if not all(note(n).fixed for n in node.all_input_nodes) or not isinstance(value, torch.Tensor):
        return ""
    if any(not isinstance(n, int) for n in value.shape):
        return "its size differs from call to call"
    return None if value.numel() <= _SMALL else f"it has more than {_SMALL} elements"


def _takes_all(node: Node) -> bool:
    """Whether a slice keeps its axis as it is. An axis that may have another size ends at 2^63 - 1."""
    x, dim, start, end, step = bind(node.target, node.args, node.kwargs).values()  # type: ignore[arg-type]
    size = x.meta["val"].shape[dim] if "val" in x.meta else sys.maxsize
    known = size if isinstance(size, int) else sys.maxsize
    return (
        start in (0, None)
        and step == 1
        and (end is None or (isinstance(end, int) and end >= known))
    )


def _place(node: Node) -> tuple[int, int, int] | None:
    """Along which axis a ``select`` takes which place of how many, where these numbers are fixed."""
    x, axis, place = node.args
    shape = x.meta["val"].shape  # type: ignore[union-attr]
    count = shape[axis]
    if not (isinstance(place, int) and isinstance(count, int)):
        return None
    return axis % len(shape), place % count, count  # type: ignore[operator]


def _is_read_again(node: Node) -> str | None:
    """Why ``node`` may not write over its first operand; None where it may."""
    x: Any = node.args[0]
    if len(x.users) > 1 or x in node.args[1:]:
        return "its operand is read by others"
    if x.target not in _UNREAD or note(x).fixed:
        return "its operand is not new memory, or the backward reads it"
    if node.target is aten.leaky_relu.default and not (len(node.args) < 2 or node.args[1] > 0):  # type: ignore[operator]
        return "its slope is not positive"
    a, b = x.meta["val"], node.meta["val"]
    same = str(a.shape) == str(b.shape) and a.dtype == b.dtype and a.is_floating_point()
    return None if same else "its operand has another shape or dtype"


def _reads_last(node: Node) -> bool:
    """Whether an activation alone reads its operand, a product or a view of one: new memory that no
    backward keeps, where it may leave its slope."""
    if not hasattr(node.target, "over"):
        return False
    x: Any = node.args[0]
    while len(x.users) == 1 and only_moves(x):
        x = x.args[0]
    return x.target in PRODUCTS and len(x.users) == 1
