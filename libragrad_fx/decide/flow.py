"""Where autograd's gradients go in a graph: from a node to its operands, and from the outputs to all nodes.

``roles`` decides which operands a balanced gradient should reach, before anything is changed. This file
reads a graph as it is, plain, balanced or lean. An edge that an edit stopped, or that a twin's backward
leaves out, gets no gradient: a known fact here, not a tensor of zeros (as JAX's symbolic zeros).
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


def is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_complex()


def hands_on(node: Node) -> bool:
    """Whether a node sends its gradient on as it is, or scaled: a guard, a probe, getitem, a scale."""
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
        names = fact.factors  # its twin sends a gradient to v alone; others, to every operand
    return [(k, n) for k, n in operands(node, names) if n in moving]


def reach(starts: Iterable[Node], sends: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """All nodes that can be reached from ``starts`` by following ``sends``."""
    stack, seen = list(starts), set[Node]()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(sends(node))
    return seen


def reached(starts: Iterable[Node], facts: Facts, moving: set[Node]) -> set[Node]:
    """All nodes that a gradient from ``starts`` reaches through nodes of ``moving``."""
    return reach(starts, lambda n: [m for _, m in passes(n, facts.get(n.name), moving)])


def results(graph: Graph) -> list[Node]:
    """The nodes that a graph returns, taken out of their structure."""
    final = next(n for n in reversed(graph.nodes) if n.op == "output")
    structured = lambda n: n.target == "output_structure"  # noqa: E731
    return [m for n in final.all_input_nodes for m in (n.all_input_nodes if structured(n) else [n])]


def live(graph: Graph, facts: Facts) -> set[Node]:
    """Nodes at which a gradient arrives, whether it leads to an input or to a parameter."""
    final = next(n for n in graph.nodes if n.op == "output")
    open_ = {n for n in graph.nodes if not insert.is_end(n)}
    return {final} | reached(set(final.all_input_nodes) & open_, facts, open_)


def signal(graph: Graph, analysis: Analysis) -> dict[Node, tuple[str, ...]]:
    """In graph order, the nodes on a gradient path from an output to the model's input, and the operands to
    which each sends its gradient."""
    moving: set[Node] = set()
    sent: dict[Node, tuple[str, ...]] = {}
    for node in graph.nodes:
        fact = analysis.facts.get(node.name)
        sent[node] = tuple(k for k, _ in passes(node, fact, moving))
        if node.target is insert.guard or (fact is not None and fact.kind is Kind.EMBEDDING):
            leads = analysis.roles[node.name] is Role.VALUE
        else:
            cut = insert.is_end(node) or (fact is not None and fact.kind is Kind.CUT)
            # a product with a constant zero sends zeros
            leads = bool(sent[node]) and not cut and node.name not in analysis.zeros
        if leads and is_inexact(node):
            moving.add(node)
    arrived = reached(set(results(graph)) & moving, analysis.facts, moving)
    return {n: names for n, names in sent.items() if n in arrived}


def takes_gradient(user: Node, node: Node, alive: set[Node], facts: Facts) -> bool:
    """Whether ``user``, a reader of ``node``, sends it a gradient."""
    if user not in alive or user.op == "output":
        return user in alive
    return any(n is node for _, n in passes(user, facts.get(user.name), {node}))
