"""A probe where each module call ended: it hands the call's true arguments and output to listeners."""

from __future__ import annotations

from typing import Any, cast

from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from libragrad_fx.graph.notes import Undo, annotate, note
from libragrad_fx.ops.insert import is_scale, leaf
from libragrad_fx.types import ModuleCall

_PROBE = "probe"


def insert_probes(graph: Graph, calls: tuple[ModuleCall, ...], by_name: dict[str, Node]) -> None:
    """One pass in graph order; from a probe on, its outputs are what later nodes read."""
    ends: dict[Node, list[ModuleCall]] = {}
    for call in calls:
        if call.after in by_name:
            ends.setdefault(by_name[call.after], []).append(call)
    scaled = {n: _scaled(n) for n in by_name.values()}
    stand_ins = set(scaled.values()) - set(scaled)
    replaced: dict[Node, Node] = {}

    def latest(node: Node) -> Node:
        while node in replaced:
            node = replaced[node]
        return node

    def value(node: Node) -> Node:
        """What a node of the trace reads as at this point of the new graph."""
        return latest(scaled[by_name[node.name]])

    for node in list(graph.nodes):
        last = scaled.get(node, node)
        if node in stand_ins:  # seen with its host: a probe behind both comes too late for it
            continue
        for n in {node, last} if replaced else ():
            n.args, n.kwargs = map_arg(n.args, latest), map_arg(n.kwargs, latest)
        for call in ends.get(node, ()):
            parts = (call.args, dict(call.kwargs), call.output)
            args, kwargs, output = cast(tuple[Any, dict[str, Any], Any], map_arg(parts, value))
            with graph.inserting_after(last):
                last = probe = graph.call_module(
                    call.path, args, {**kwargs, "_output": output, "_args": args}
                )
            annotate(probe, rule=_PROBE, host=call.path, undo=Undo.OUTPUT)
            if isinstance(output, Node):
                replaced[output] = probe
                continue
            for i, old in enumerate(pytree.tree_leaves(output)):
                if isinstance(old, Node):
                    with graph.inserting_after(last):
                        last = graph.call_function(leaf, (probe, i))
                    annotate(last, rule=_PROBE, host=call.path, undo=Undo.OUTPUT)
                    replaced[latest(old)] = last


def _scaled(node: Node) -> Node:
    """The node that stands for ``node``'s value: itself, or what was inserted on its output."""
    for user in node.users:
        if is_scale(user) and note(user).host == node.name:
            return user
    return node
