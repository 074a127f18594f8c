"""Removes gradient scales: each costs a call from Python and a pass over memory."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from libragrad_fx.decide.flow import Facts
from libragrad_fx.graph.notes import Undo, annotate
from libragrad_fx.ops import insert
from libragrad_fx.ops.insert import LEAN, is_scale
from libragrad_fx.ops.product import halved_mul, is_real_product
from libragrad_fx.optimise.views import elements, is_sized, only_moves
from libragrad_fx.optimise.work import Work
from libragrad_fx.types import Kind, OpFacts

_SMALL = 2**16  # up to so many elements, a twin's Python costs more than a pass over memory


def halve(work: Work) -> None:
    """``mul`` and a scale by 1/2 on its result become one twin, ``halved_mul``, if they are large."""
    for scale in list(filter(is_scale, work.graph.nodes)):
        host = halved(scale)
        if host is None:
            continue
        if is_sized(host) and elements(host) <= _SMALL:
            work.no(host, f"it has no more than {_SMALL} elements")
            continue
        host.target = halved_mul
        annotate(host, rule=LEAN, host=host.name)
        scale.replace_all_uses_with(host)
        work.graph.erase_node(scale)


def halved(node: Node) -> Node | None:
    """The real product whose gradient ``node`` halves; ``node`` may be the fused ``halved_mul`` itself."""
    if node.target is halved_mul:
        return node
    if not is_scale(node):
        return None
    host, factor, *_ = node.args
    assert isinstance(host, Node)
    alone = factor == 0.5 and len(host.users) == 1
    return host if alone and is_real_product(host) else None


def merge(work: Work) -> None:
    """cat([s·a, s·b]) becomes s·cat([a, b]): the steps of a scan have many equal scales."""
    for node in [n for n in work.graph.nodes if _is_join(work.facts.get(n.name))]:
        reason = _merge(work.graph, node, work.facts)
        if reason is not None:
            work.no(node, reason)


def _is_join(fact: OpFacts | None) -> bool:
    """Whether an op is linear in one argument, a list of tensors perhaps, and has no constant."""
    return fact is not None and fact.kind is Kind.LINEAR and len(fact.operands) == 1 and not fact.constant


def _merge(graph: Graph, join: Node, facts: Facts) -> str | None:
    joined: Any = join.args[0]
    found = [_scale_above(x, facts) for x in joined] if isinstance(joined, list | tuple) else []
    scales = [s for s in found if s is not None]
    if not scales:
        return None
    if len(scales) < max(2, len(found)):
        return "not all of its operands have a gradient scale of their own"
    if len({s.args[1:] for s in scales}) > 1:
        return "its operands are scaled by different factors"
    with graph.inserting_after(join):
        behind = graph.call_function(insert.scale, (join, *scales[0].args[1:]))
    behind.meta["val"] = join.meta["val"]
    annotate(behind, rule=LEAN, host=join.name, undo=Undo.PASS)
    join.replace_all_uses_with(behind, delete_user_cb=lambda user: user is not behind)
    for scale in dict.fromkeys(scales):
        scale.replace_all_uses_with(scale.args[0])  # type: ignore[arg-type]
        graph.erase_node(scale)
    return None


def _scale_above(node: Any, facts: Facts) -> Node | None:
    """The gradient scale above a value, seen through views and copies, if it has no other reader."""
    while len(node.users) == 1 and not is_scale(node) and only_moves(node, facts):
        node = node.args[0]
    return node if is_scale(node) and len(node.users) == 1 and node.args[1] else None
