"""Which ops write in place, share memory with their operands, or are made of other ops."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from libragrad_fx.graph.schema import aten_op, bind
from libragrad_fx.types import OpFacts


def functional(op: Any) -> torch._ops.OpOverload | None:
    """The functional op of an in-place op (``add`` of ``add_``); None if ``op`` is not in place."""
    if not isinstance(op, torch._ops.OpOverload) or not op._schema.is_mutable:
        return None
    space, _, name = op._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, space), name[:-1], None) if name.endswith("_") else None
    plain = getattr(packet, op._overloadname, None)
    names = [a.name for a in op._schema.arguments]
    same = plain is not None and [a.name for a in plain._schema.arguments] == names
    return plain if same else None


def is_fresh(node: Node, fact: OpFacts | None) -> bool:
    """Whether an op's result shares no memory with its operands. fact: the row of the op."""
    op = aten_op(node)
    if not isinstance(op, torch._ops.OpOverload):
        return False
    if any(r.alias_info is not None for r in op._schema.returns):
        return False
    return not is_composite(op) or (fact is not None and fact.fresh)


def written(node: Node) -> list[Node]:
    """The operands that an op writes into."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or not op._schema.is_mutable:
        return []
    given = bind(op, node.args, node.kwargs)
    into = [given.get(a.name) for a in op._schema.arguments if a.alias_info and a.alias_info.is_write]
    return [n for n in pytree.tree_leaves(into) if isinstance(n, Node)]


def memory(graph: Graph) -> dict[Node, Node]:
    """Of each node, the first in whose memory its result lies: itself, unless it is a view or a write. Of
    several new results, each has its own."""
    found: dict[Node, Node] = {}
    for node in graph.nodes:
        op, shares = node.target, []
        if op is operator.getitem and not is_fresh(node.all_input_nodes[0], None):
            shares = node.all_input_nodes[:1]
        elif isinstance(op, torch._ops.OpOverload) and any(r.alias_info for r in op._schema.returns):
            given = bind(op, node.args, node.kwargs)
            shares = [given.get(a.name) for a in op._schema.arguments if a.alias_info]
        shares = [n for n in pytree.tree_leaves(shares) if isinstance(n, Node)]
        found[node] = found[shares[0]] if shares else node
    return found


def is_idle_dropout(node: Node) -> bool:
    """Whether a node is a dropout of any kind that drops nothing: p is 0, or it does not train."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload):
        return False
    names = [a.name for a in op._schema.arguments]
    return names == ["input", "p", "train"] and bool(node.args[1] == 0 or not node.args[2])


def is_composite(op: Any) -> bool:
    """Whether PyTorch itself runs ``op`` as other ops, on every device, forwards and backwards."""
    return isinstance(op, torch._ops.OpOverload) and torch._C._dispatch_has_kernel_for_dispatch_key(
        op.name(), "CompositeImplicitAutograd"
    )
