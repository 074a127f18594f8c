"""Whole numbers of a recorded graph (masks, indices, lengths) become inputs of it.

They carry no gradient, and the shapes of what they select are not known before they are: boxes that pass
a threshold, tokens that are no padding. For one call they are numbers, and what selects by a mask selects
by its indices.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from libragrad_fx.ops.selection import select_by_index
from libragrad_fx.target import inexact


def freeze(
    body: GraphModule, given: Sequence[torch.Tensor], inputs: int
) -> tuple[GraphModule, list[torch.Tensor], list[bool], list[torch.Tensor]]:
    """``body`` with one more placeholder for each tensor of whole numbers that an op on real or complex
    numbers reads, or that it returns; these tensors; which of them depend on the model's input; and what
    ``body`` returns for ``given``.

    body:   ATen ops as they were recorded, in-place ones too; it is changed.
    given:  what it was recorded on, before it wrote into that.
    inputs: how many of these are the model's inputs; they come first.
    """
    run = _Run(body, inputs)
    with torch.no_grad():
        outputs = run.run(*given)
    graph, placed = body.graph, dict[tuple[Any, ...], Node]()
    tensors: list[torch.Tensor] = []
    moves: list[bool] = []
    last = [n for n in graph.nodes if n.op == "placeholder"]
    behind = last[-1] if last else None

    def place(key: tuple[Any, ...], make: Callable[[], torch.Tensor]) -> Node:
        nonlocal behind
        if key not in placed:
            with graph.inserting_after(behind) if behind else graph.inserting_before():
                behind = placed[key] = graph.placeholder(f"still_{len(tensors)}")
            tensors.append(make())
            moves.append(key[0] in run.moves)
        return placed[key]

    for node in [*graph.nodes]:
        if node in run.idle:
            continue
        read = run.read.get(node, {})
        select_by_index(node, read, place, run.shapes)
        for source, (version, value) in read.items():
            if source.op != "placeholder" and source in node.all_input_nodes:
                node.replace_input_with(source, place((source, version), lambda v=value: v))
    for node in reversed([*graph.nodes]):
        if node in run.idle and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code(has_effect)
    graph.lint()
    return GraphModule(body, graph), tensors, moves, outputs


def has_effect(node: Node) -> bool:
    """Whether a node matters though nobody reads it. What Python asked of values has been answered."""
    op = node.target
    if isinstance(op, torch._ops.OpOverload):
        return op._schema.is_mutable or torch.Tag.nondeterministic_seeded in op.tags
    return op is not operator.getitem


class _Run(Interpreter):
    """Runs a graph on real tensors and notes what is read of whole numbers.

    read:   by node that makes real numbers, or returns: each tensor of whole numbers that it reads, with
            the count of the writes into it so far
    idle:   nodes that make or write whole numbers that nobody outside the graph sees
    shapes: of what a node makes
    moves:  nodes that depend on the model's input
    """

    def __init__(self, body: GraphModule, inputs: int) -> None:
        super().__init__(body, garbage_collect_values=True)
        self.extra_traceback = False
        self.read: dict[Node, dict[Node, tuple[int, torch.Tensor]]] = {}
        self.idle: set[Node] = set()
        self.shapes: dict[Node, Any] = {}
        self.outside: dict[int, Any] = {}  # held, or another storage may get its place
        self.moves = set([n for n in body.graph.nodes if n.op == "placeholder"][:inputs])

    def run_node(self, n: Node) -> Any:
        values = {a: self.env[a] for a in n.all_input_nodes}
        whole = {a: v for a, v in values.items() if isinstance(v, torch.Tensor) and not inexact(v)}
        noted = {a: (v._version, v.clone()) for a, v in whole.items()}
        result = super().run_node(n)
        if any(a in self.moves for a in values):
            self.moves.add(n)
        made = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.shapes[n] = made[0].shape if made else None
        if n.op == "placeholder":
            self.outside |= {s._cdata: s for s in (t.untyped_storage() for t in made)}
        elif n.op == "output" or any(map(inexact, made)):
            self.read[n] = noted
        elif not has_effect(n) or self._writes_inside(n, whole):
            self.idle.add(n)
        return result

    def _writes_inside(self, n: Node, whole: dict[Node, torch.Tensor]) -> bool:
        """Whether an op writes whole numbers that nobody outside the graph sees."""
        op = n.target
        if not isinstance(op, torch._ops.OpOverload) or not op._schema.is_mutable:
            return False
        into = whole.get(n.args[0])  # type: ignore[arg-type]
        return into is not None and into.untyped_storage()._cdata not in self.outside
