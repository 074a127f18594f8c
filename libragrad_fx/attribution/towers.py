"""Parts of a network that share no input, and the repeated blocks of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch.fx import Node

from libragrad_fx.decide.flow import reach, results
from libragrad_fx.module.captured import CapturedModule, one_graph
from libragrad_fx.module.walk import argument, blocks, bypassed, calls, origin, path_of, returned, senders
from libragrad_fx.ops import insert


def towers(module: CapturedModule) -> list[list[str]]:
    """The repeated blocks of each tower, in the order in which they run; of a tower that has none, [].

    Towers are parts of a network that share no input: of CLIP pictures go through one and texts through
    another, until they meet in a product behind all blocks. Where blocks of two parts meet (a decoder
    that reads an encoder), it is one tower.
    """
    found = [blocks(module, part) for part in _apart(_read_inputs(module))]
    return found if len(found) > 1 and any(found) else [blocks(module)]


def avoidable(module: CapturedModule, names: Sequence[str]) -> bool:
    """Whether an output is computed without one of these calls: a target may not depend on it."""
    called, sends = calls(module), senders(module)
    given = [{*map(origin, returned(called[name]))} for name in names]
    found = [reach([result], sends) for result in results(module.graph)]
    return not all(past & nodes for past in found for nodes in given)


def take_whole(module: CapturedModule, names: Iterable[str]) -> Iterator[str]:
    """Of these calls, those whose first tensor is all that the output is computed from: a block, whose
    residual stream goes through it, and no branch. The first of those that share a tensor."""
    called, sends, seen = calls(module), senders(module), set[Node]()
    for name in names:
        given = argument(called[name])
        if given is not None and (node := origin(given)) not in seen and not bypassed(module, node, sends):
            seen.add(node)
            yield name


def entered(module: CapturedModule) -> list[str]:
    """The largest list of modules of one class that the whole stream enters, one behind the other; [] if
    there is none of two."""
    lists: dict[tuple[str, type], list[str]] = {}
    for name in take_whole(module, calls(module)):
        head, _, last = (path := path_of(name)).rpartition(".")
        if last.isdigit():
            lists.setdefault((head, type(module.get_submodule(path))), []).append(name)
    found = max(lists.values(), key=len, default=[])
    return found if len(found) > 1 else []


def _read_inputs(module: CapturedModule) -> dict[str, frozenset[str]]:
    """Of each called module that has modules inside, the inputs of the model that its first tensor argument
    is computed from."""
    reads: dict[Node, frozenset[str]] = {}
    found: dict[str, frozenset[str]] = {}
    for node in one_graph(module).graph.nodes:
        if node.target is insert.guard:
            reads[node] = frozenset([node.name])
        elif node.target in (insert.sizes, insert.structure):
            reads[node] = frozenset()  # the size of the batch is everybody's
        else:
            reads[node] = frozenset().union(*(reads[n] for n in node.all_input_nodes))
    for call, node in calls(module).items():
        path, given = path_of(call), argument(node)
        if given is not None and [*module.get_submodule(path).children()]:
            found.setdefault(path, reads[given])
    return found


def _apart(reads: Mapping[str, frozenset[str]]) -> list[list[str]]:
    """Modules in groups that share no input; those that read none are left out."""
    groups: list[tuple[frozenset[str], list[str]]] = []
    for path, inputs in reads.items():
        if not inputs:
            continue
        members = [path]
        for group in [g for g in groups if g[0] & inputs]:
            groups.remove(group)
            inputs, members = inputs | group[0], [*group[1], *members]
        groups.append((inputs, members))
    order = {path: i for i, path in enumerate(reads)}
    return sorted((members for _, members in groups), key=lambda paths: min(order[p] for p in paths))


def called_modules(module: CapturedModule) -> list[str]:
    """Names of the calls of submodules that are in the graph, in the order in which they end: module paths,
    and ``path#2`` for the second call of one."""
    return [*calls(module)]
