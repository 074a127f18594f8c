"""Marks constants, selects and slices that can cost less, and ops that can write in place."""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch.fx import Node

from libragrad_fx.decide.flow import Facts, live
from libragrad_fx.decide.roles import aten_op
from libragrad_fx.graph.alias import is_fresh, is_idle_dropout
from libragrad_fx.graph.notes import annotate, note
from libragrad_fx.ops.binding import PRODUCTS, in_place
from libragrad_fx.ops.insert import LEAN
from libragrad_fx.ops.places import idle, is_selection, taken, whole
from libragrad_fx.optimise.views import elements, is_sized, only_moves
from libragrad_fx.optimise.work import Work

_SMALL = 2**16  # the most elements of a constant that is kept


def dropouts(work: Work) -> None:
    """A dropout that drops nothing is its argument."""
    for node in work.graph.nodes:
        if node.target is idle.aten_op and is_idle_dropout(node):  # type: ignore[attr-defined]
            node.target = idle
            annotate(node, rule=LEAN, host=node.name)


def constants(work: Work) -> None:
    """Mark small values that depend on no input and no parameter (masks, position tables) as ``fixed``."""
    shown = _shown(work)
    for node in work.graph.nodes:
        reason = _not_fixed(node)
        if reason is None and node not in shown:
            annotate(node, fixed=True)
        elif reason:
            work.no(node, reason)


def slices(work: Work) -> None:
    """``x[:]`` is ``x``."""
    for node in work.graph.nodes:
        if _takes_all(node):
            node.target = whole
            annotate(node, rule=LEAN, host=node.name)


def steps(work: Work) -> None:
    """Mark the selects that get a gradient, so that ``execute`` can unbind their axis."""
    alive, shown = live(work.graph, work.facts), _shown(work)
    for node in work.graph.nodes:
        if is_selection(node) and node in alive - shown:
            place = _place(node)
            if place is None:
                work.no(node, "its place, or the size of the axis, differs from call to call")
            else:
                annotate(node, place=place)


def memory(work: Work) -> None:
    """Mark ops that may write over their first operand."""
    for node in work.graph.nodes:
        if _reads_last(node, work.facts):
            annotate(node, over=True)
        elif in_place(node) is not None:
            reason = _is_read_again(node, work.facts)
            if reason is None:
                annotate(node, over=True)
            else:
                work.no(node, reason)


def _shown(work: Work) -> set[Node]:
    """Nodes that may share memory with an output, which the user may write into."""
    shown = set[Node]()
    for node in reversed(work.graph.nodes):
        seen = node in shown and not is_fresh(node, work.facts.get(node.name))
        if node.op == "output" or seen:
            shown.update(node.all_input_nodes)
    return shown


def _not_fixed(node: Node) -> str | None:
    """None if a node is a constant worth keeping; else the reason, "" if it is no constant at all."""
    op, value = node.target, node.meta.get("val")
    if isinstance(op, torch._ops.OpOverload):
        if op._schema.is_mutable or torch.Tag.nondeterministic_seeded in op.tags:
            return ""
    elif op is not operator.getitem:
        return ""
    if not all(note(n).fixed or _is_number(n) for n in node.all_input_nodes):
        return ""
    if not isinstance(value, torch.Tensor):
        return ""
    if not is_sized(node):
        return "a size of it depends on data"
    return None if elements(node) <= _SMALL else f"it has more than {_SMALL} elements"


def _is_number(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def _takes_all(node: Node) -> bool:
    """Whether a slice takes its whole axis. The end for an axis of free size is 2^63 - 1."""
    if (found := taken(node)) is None:
        return False
    x, dim, start, end, step = found
    size = x.meta["val"].shape[dim] if "val" in x.meta else sys.maxsize
    known = size if isinstance(size, int) else sys.maxsize
    return start in (0, None) and step == 1 and isinstance(end, int) and end >= known


def _place(node: Node) -> tuple[int, int, int] | None:
    """(axis, place, size of the axis) of a ``select``; None if the place or the size is not fixed."""
    x, axis, place = node.args
    shape = x.meta["val"].shape  # type: ignore[union-attr]
    count = shape[axis]
    if not (isinstance(place, int) and isinstance(count, int)):
        return None
    return axis % len(shape), place % count, count  # type: ignore[operator]


def _is_read_again(node: Node, facts: Facts) -> str | None:
    """Why ``node`` may not write over its first operand; None if it may."""
    x: Any = node.args[0]
    if len(x.users) > 1 or x in node.args[1:]:
        return "its operand is read by others"
    fact = facts.get(x.name)
    unread = fact is not None and fact.unread and x.target is aten_op(x)  # a twin has its own backward
    if not unread or not is_fresh(x, fact) or note(x).fixed:
        return "its operand is not new memory, or the backward reads it"
    a, b = x.meta["val"], node.meta["val"]
    same = str(a.shape) == str(b.shape) and a.dtype == b.dtype and a.is_floating_point()
    return None if same else "its operand has another shape or dtype"


def _reads_last(node: Node, facts: Facts) -> bool:
    """Whether a node is an activation that may write its slope over its operand: a product, or a view of
    one, with no other reader. No backward reads a product's result."""
    if not hasattr(node.target, "over"):
        return False
    x: Any = node.args[0]
    while len(x.users) == 1 and only_moves(x, facts):
        x = x.args[0]
    return x.target in PRODUCTS and len(x.users) == 1
