"""Makes the whole numbers of a recorded graph (masks, indices, lengths) inputs of it.

They carry no gradient, and the shapes of what they select depend on their values: boxes that pass a
threshold, tokens that are no padding. For one recorded call these values are known. So a selection by a
mask becomes one by indices, of known size.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from libragrad_fx.decide.rulebook import RuleBook
from libragrad_fx.ops.selection import select_by_index
from libragrad_fx.target import inexact


def freeze(
    body: GraphModule, given: Sequence[torch.Tensor], inputs: int, book: RuleBook
) -> tuple[GraphModule, list[torch.Tensor], list[bool], list[torch.Tensor]]:
    """Give ``body`` a placeholder for each tensor of whole numbers that it returns, or that an op on real
    or complex numbers reads.

    Returns (new body, the tensors for these placeholders, which of them depend on the model's input, what
    ``body`` returns for ``given``).

    body:   recorded ATen ops, in-place ones too; it is changed.
    given:  the tensors that it was recorded on, before it wrote into them.
    inputs: how many of these are the model's inputs; they come first.
    book:   knows the ops that fill a tensor of the shape of their operand.
    """
    run = _Run(body, inputs, book)
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
    """Whether a node matters without readers: it writes or draws random numbers. (Python's questions about
    values were answered during the recording.)"""
    op = node.target
    if isinstance(op, torch._ops.OpOverload):
        return op._schema.is_mutable or torch.Tag.nondeterministic_seeded in op.tags
    return op is not operator.getitem


class _Run(Interpreter):
    """Runs a graph on real tensors and notes which whole numbers are read.

    read:   by node that makes real numbers (or is the output): each tensor of whole numbers that it reads,
            with the count of writes into it so far
    idle:   nodes that make or write only whole numbers inside the graph
    shapes: by node, the shape of its result
    moves:  nodes that depend on the model's input
    """

    def __init__(self, body: GraphModule, inputs: int, book: RuleBook) -> None:
        super().__init__(body, garbage_collect_values=True)
        self.extra_traceback = False
        self.read: dict[Node, dict[Node, tuple[int, torch.Tensor]]] = {}
        self.idle: set[Node] = set()
        self.shapes: dict[Node, Any] = {}
        self.outside: dict[int, Any] = {}  # by address; kept alive, or the address may be reused
        self.book = book
        self.moves = set([n for n in body.graph.nodes if n.op == "placeholder"][:inputs])

    def run_node(self, n: Node) -> Any:
        values = {a: self.env[a] for a in n.all_input_nodes}
        whole = {a: v for a, v in values.items() if isinstance(v, torch.Tensor) and not inexact(v)}
        noted = {a: (v._version, v.clone()) for a, v in whole.items()}
        result = super().run_node(n)
        fact = self.book.fact(n.target)
        if any(a in self.moves for a in values) and (fact is None or fact.fill is None):
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
        """Whether an op writes whole numbers into memory that was allocated inside the graph."""
        op = n.target
        if not isinstance(op, torch._ops.OpOverload) or not op._schema.is_mutable:
            return False
        into = whole.get(n.args[0])  # type: ignore[arg-type]
        return into is not None and into.untyped_storage()._cdata not in self.outside
