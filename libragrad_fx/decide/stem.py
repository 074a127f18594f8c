"""Where a graph still holds the model's input: moved, shifted or scaled, and nothing more."""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping

from torch.fx import Graph, Node

from libragrad_fx.decide.flow import Facts
from libragrad_fx.graph.schema import is_elementwise, operands
from libragrad_fx.ops import insert
from libragrad_fx.types import Kind, Role


def holds_input(
    graph: Graph, facts: Facts, affine: Container[str], roles: Mapping[str, Role], computed: Container[str]
) -> frozenset[str]:
    """The nodes whose value is the input after linear ops, and products with a constant element by element.

    affine:   nodes that are linear in this call
    computed: paths of arguments that are no input of the model: another graph computed them
    """
    found: set[Node] = set()
    for node in graph.nodes:
        if node.target is insert.guard:
            holds = roles[node.name] is Role.VALUE and str(node.args[1]) not in computed
        elif node.target is operator.getitem:
            holds = node.args[0] in found
        else:
            holds = _keeps(node, facts, affine, roles, found)
        if holds:
            found.add(node)
    return frozenset(n.name for n in found)


def _keeps(
    node: Node, facts: Facts, affine: Container[str], roles: Mapping[str, Role], found: set[Node]
) -> bool:
    """Whether a node reads of the signal only what holds the input, and only moves, adds or scales that."""
    fact = facts.get(node.name)
    if fact is None:
        return False
    live = [(k, n) for k, n in operands(node, fact.operands) if roles[n.name] >= Role.GATE]
    carried = [x for x in operands(node, (*fact.stream, *fact.factors)) if x in live]
    if not live or live != carried or not all(n in found for _, n in live):
        return False
    scales = fact.kind is Kind.PRODUCT and is_elementwise(node) and len(live) == 1
    return scales or node.name in affine
