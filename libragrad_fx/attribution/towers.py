"""Parts of a network that share no input, and the repeated blocks of each."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node
from torch.fx.node import map_arg

from libragrad_fx.module.captured import CapturedModule, one_graph
from libragrad_fx.module.walk import composed, repeated
from libragrad_fx.ops import insert


def towers(module: CapturedModule) -> list[list[str]]:
    """The repeated blocks of each tower, in the order in which they run; of a tower that has none, [].

    Towers are parts of a network that share no input: of CLIP pictures go through one and texts through
    another, until they meet in a product behind all blocks. Where blocks of two parts meet (a decoder
    that reads an encoder), it is one tower.
    """
    modules = composed(module)
    found = [repeated(part) for part in _apart(modules, _read_inputs(module))]
    return found if len(found) > 1 and any(found) else [repeated(modules)]


def _read_inputs(module: CapturedModule) -> dict[str, frozenset[str]]:
    """Of each called module the inputs of the model that its first tensor argument is computed from."""
    reads: dict[Node, frozenset[str]] = {}
    found: dict[str, frozenset[str]] = {}
    for node in one_graph(module).graph.nodes:
        if node.target is insert.guard:
            reads[node] = frozenset([node.name])
        elif node.target in (insert.sizes, insert.structure):
            reads[node] = frozenset()  # the size of the batch is everybody's
        else:
            reads[node] = frozenset().union(*(reads[n] for n in node.all_input_nodes))
        if node.op == "call_module" and "_output" in node.kwargs:
            given: list[Node] = []
            map_arg(node.kwargs["_args"], given.append)
            found.setdefault(str(node.target), reads[given[0]] if given else frozenset())
    return found


def _apart(modules: Mapping[str, type], reads: Mapping[str, frozenset[str]]) -> list[dict[str, type]]:
    """Modules in groups that share no input; those that read none are left out."""
    groups: list[tuple[frozenset[str], list[str]]] = []
    for path in modules:
        inputs, members = reads[path], [path]
        if not inputs:
            continue
        for group in [g for g in groups if g[0] & inputs]:
            groups.remove(group)
            inputs, members = inputs | group[0], [*group[1], *members]
        groups.append((inputs, members))
    return [{p: kind for p, kind in modules.items() if p in members} for _, members in groups]
