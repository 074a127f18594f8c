"""Where gradients go in a graph as it stands: from a node to its operands, and from what it returns to all.

``roles`` decides what a balanced gradient is to pass, before anything is changed. This reads what autograd
does in a graph, plain, balanced or lean: an edge that an edit stopped, or that a twin does not answer, gets
no gradient, which is a fact here and no tensor of zeros (as JAX's symbolic zeros).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from libragrad_fx.graph.schema import operands, tensor_arguments
from libragrad_fx.ops import insert
from libragrad_fx.ops.insert import is_scale, probed
from libragrad_fx.target import inexact
from libragrad_fx.types import Analysis, Kind, OpFacts, Role

Facts = Mapping[str, OpFacts]
"""By node, the row of its op."""


def is_inexact(node: Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return any(map(inexact, values))


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
    twin = hasattr(node.target, "aten_op") and not hasattr(node.target, "temper")
    if twin and fact is not None and fact.kind is Kind.ATTENTION:
        names = fact.factors  # its twin answers v alone; the other twins answer every operand
    return [(k, n) for k, n in operands(node, names) if n in moving]


def reach(starts: Iterable[Node], sends: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """Everything that is got to from ``starts``, if each node leads to what it ``sends`` to."""
    stack, seen = list(starts), set[Node]()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(sends(node))
    return seen


def reached(starts: Iterable[Node], facts: Facts, moving: set[Node]) -> set[Node]:
    """Everything that a gradient of ``starts`` gets to over nodes of ``moving``."""
    return reach(starts, lambda n: [m for _, m in passes(n, facts.get(n.name), moving)])


def results(graph: Graph) -> list[Node]:
    """The nodes that a graph returns, out of whatever structure."""
    final = next(n for n in reversed(graph.nodes) if n.op == "output")
    structured = lambda n: n.target == "output_structure"  # noqa: E731
    return [m for n in final.all_input_nodes for m in (n.all_input_nodes if structured(n) else [n])]


def live(graph: Graph, facts: Facts) -> set[Node]:
    """Nodes at which a gradient arrives, whether it leads to an input or to a parameter."""
    final = next(n for n in graph.nodes if n.op == "output")
    open_ = {n for n in graph.nodes if not insert.is_end(n)}
    return {final} | reached(set(final.all_input_nodes) & open_, facts, open_)


def signal(graph: Graph, analysis: Analysis) -> dict[Node, tuple[str, ...]]:
    """The nodes at which a gradient arrives that leads to the model's input, in graph order, and to which
    of its operands each sends one."""
    moving: set[Node] = set()
    sent: dict[Node, tuple[str, ...]] = {}
    for node in graph.nodes:
        fact = analysis.facts.get(node.name)
        sent[node] = tuple(k for k, _ in passes(node, fact, moving))
        if node.target is insert.guard or (fact is not None and fact.kind is Kind.EMBEDDING):
            leads = analysis.roles[node.name] is Role.VALUE
        else:
            cut = insert.is_end(node) or (fact is not None and fact.kind is Kind.CUT)
            # a product with zero sends zeros
            leads = bool(sent[node]) and not cut and node.name not in analysis.zeros
        if leads and is_inexact(node):
            moving.add(node)
    arrived = reached(set(results(graph)) & moving, analysis.facts, moving)
    return {n: names for n, names in sent.items() if n in arrived}


def takes_gradient(user: Node, node: Node, alive: set[Node], facts: Facts) -> bool:
    if user not in alive or user.op == "output":
        return user in alive
    return any(n is node for _, n in passes(user, facts.get(user.name), {node}))
