"""Where gradients go: from a node to its operands, and from what a graph returns to everything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from libragrad_fx.decide.roles import operands, tensor_arguments
from libragrad_fx.ops import insert
from libragrad_fx.ops.insert import is_scale, probed
from libragrad_fx.types import Kind, OpFacts

Facts = Mapping[str, OpFacts]
"""By node, the row of its op."""


def hands_on(node: Node) -> bool:
    """Whether a node's backward is the identity: an input, a probe, a member of a tuple, a scale."""
    return not hasattr(node.target, "aten_op") and (
        not isinstance(node.target, torch._ops.OpOverload) or is_scale(node)
    )


def passes(node: Node, fact: OpFacts | None, moving: set[Node]) -> list[tuple[str, Node]]:
    """The operands to which a node sends a gradient that goes on to the model's input."""
    if (results := pytree.tree_leaves(probed(node))) != [None]:
        return [("", r) for r in results if isinstance(r, Node) and r in moving]
    if hands_on(node):
        return [("", n) for n in node.all_input_nodes if n in moving]
    names = tensor_arguments(node) if fact is None else fact.operands
    if hasattr(node.target, "aten_op") and fact is not None and fact.kind is Kind.ATTENTION:
        names = fact.factors  # its twin answers v alone; the other twins answer every operand
    return [(k, n) for k, n in operands(node, names) if n in moving]


def reach(starts: Iterable[Node], facts: Facts, moving: set[Node]) -> set[Node]:
    """Everything that a gradient of ``starts`` gets to over nodes of ``moving``."""
    stack, seen = list(starts), set[Node]()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(n for _, n in passes(node, facts.get(node.name), moving))
    return seen


def live(graph: Graph, facts: Facts) -> set[Node]:
    """Nodes at which a gradient arrives, whether it leads to an input or to a parameter."""
    final = next(n for n in graph.nodes if n.op == "output")
    open_ = {n for n in graph.nodes if not insert.is_end(n)}
    return {final} | reach(set(final.all_input_nodes) & open_, facts, open_)


def takes_gradient(user: Node, node: Node, alive: set[Node], facts: Facts) -> bool:
    if user not in alive or user.op == "output":
        return user in alive
    return any(n is node for _, n in passes(user, facts.get(user.name), {node}))
