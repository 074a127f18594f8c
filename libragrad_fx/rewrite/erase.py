"""Undoes what was done to a graph: what is left is spelled like the original, node for node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate, map_arg

from libragrad_fx.errors import VerificationError
from libragrad_fx.graph.notes import Undo, note
from libragrad_fx.graph.schema import aten_op
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.ops import insert
from libragrad_fx.ops.insert import leaf
from libragrad_fx.types import Trace


def erase(edited: Graph) -> Graph:
    """The graph as it was before it was rewritten and made lean: what the note on each node says of it.

    A node that is dropped is None to its readers. If one of the original's read it, the graphs differ.
    """
    graph = Graph()
    env: dict[Node, Any] = {}
    for node in edited.nodes:
        args = map_arg(node.args, env.__getitem__)
        kwargs = map_arg(node.kwargs, env.__getitem__)
        match note(node).undo:
            case Undo.DROP:
                env[node] = None
            case Undo.PASS:
                env[node] = args[0]
            case Undo.OUTPUT:
                env[node] = leaf(*args) if node.target is leaf else kwargs["_output"]
            case Undo.OP:
                env[node] = graph.create_node(node.op, aten_op(node), args, kwargs, node.name)  # type: ignore[arg-type]
    return graph


def spell(graph: Graph) -> tuple[str, ...]:
    """A graph as text, one line a node; nodes are numbered, so names do not matter."""
    number = {node: f"%{i}" for i, node in enumerate(graph.nodes)}

    def text(value: Any) -> Any:
        return number[value] if isinstance(value, Node) else repr(value)

    def given(n: Node) -> Any:
        # what a guard lets through follows ``.to(dtype)``; what it hands on is its first argument
        return (n.args[:2], {}) if n.target is insert.guard else (n.args, dict(n.kwargs))

    return tuple(f"{n.op} {_target(n)} {map_aggregate(given(n), text)}" for n in graph.nodes)


def _target(node: Node) -> str:
    """A node's target by name: the same in every process."""
    target = node.target
    if isinstance(target, (str, torch._ops.OpOverload)):
        return str(target)
    return f"{target.__module__}.{getattr(target, '__qualname__', target)}"


def first_difference(graph: Graph, original: Sequence[str]) -> str | None:
    """None if ``graph`` is spelled like ``original`` node for node; else where they part."""
    for mine, theirs in zip(spell(graph), original, strict=False):
        if mine != theirs:
            return f"{mine} is not {theirs}"
    return None if len(graph.nodes) == len(original) else "one has more nodes than the other"


def erased_difference(module: CapturedModule, original: Sequence[str]) -> str | None:
    """As ``first_difference``, of every graph that may run, its edits erased."""
    differences = (first_difference(erase(graph), original) for graph in module.graphs())
    return next(filter(None, differences), None)


def require_same_graph(module: CapturedModule, trace: Trace) -> None:
    """Raise ``VerificationError`` unless erasing the edits gives the trace back, node for node."""
    if difference := erased_difference(module, spell(trace.graph)):
        raise VerificationError(f"an edit changed the forward graph: {difference}")
