"""The module tree, as a graph's probes show it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence

from torch.fx import Node
from torch.utils import _pytree as pytree

from libragrad_fx.decide.flow import hands_on, reach, results
from libragrad_fx.graph.schema import operands, tensor_arguments
from libragrad_fx.module.captured import CapturedModule, one_graph
from libragrad_fx.ops.insert import guard, probed


def calls(module: CapturedModule) -> dict[str, Node]:
    """The calls of submodules that are in the graph, in the order in which they end: name -> probe. The
    second call of a module is called ``path#2``."""
    seen, found = Counter[str](), dict[str, Node]()
    for node in one_graph(module).graph.nodes:
        if node.op == "call_module" and "_output" in node.kwargs:
            seen[path := str(node.target)] += 1
            found[path if seen[path] == 1 else f"{path}#{seen[path]}"] = node
    return found


def path_of(call: str) -> str:
    """The module path of a call."""
    return call.partition("#")[0]


def argument(call: Node) -> Node | None:
    """The first tensor that a module was called with."""
    return next((n for n in pytree.tree_leaves(call.kwargs["_args"]) if isinstance(n, Node)), None)


def returned(call: Node) -> list[Node]:
    """The tensors that a module returned."""
    return [n for n in pytree.tree_leaves(probed(call)) if isinstance(n, Node)]


def origin(node: Node) -> Node:
    """The node that computed the tensor that a node hands on: a probe returns its call's result itself."""
    while isinstance(result := probed(node), Node):
        node = result
    return node


def senders(module: CapturedModule) -> Callable[[Node], Sequence[Node]]:
    """Where a node of a captured graph sends a gradient that leads to the model's input."""
    live = {site.node: site.live for site in module.record.sites}

    def sends(node: Node) -> list[Node]:
        if node.name in live:
            return [n for k, n in operands(node, tensor_arguments(node)) if k in live[node.name]]
        if not hands_on(node) or node.target is guard or node.op in ("placeholder", "get_attr"):
            return []
        given = [n for n in pytree.tree_leaves(probed(node)) if isinstance(n, Node)]
        return given or list(node.all_input_nodes)

    found: dict[Node, list[Node]] = {}
    return lambda n: found[n] if n in found else found.setdefault(n, sends(n))


def bypassed(module: CapturedModule, node: Node, sends: Callable[[Node], Sequence[Node]]) -> bool:
    """Whether a path from what ``node`` is computed from to the output leads past it."""
    node = origin(node)
    past = reach(results(module.graph), lambda n: () if n is node else sends(n))
    return bool(past & (reach([node], sends) - {node}))


def blocks(module: CapturedModule, among: Collection[str] | None = None) -> list[str]:
    """The repeated blocks of a network (transformer, mixer, residual blocks), in the order in which they
    run, each call of them; empty if it has none. FullGrad+ sums over them. ``among``: only these modules.

    They are the instances of one class whose names end in a digit (``layers.3``, ``encoder_layer_3``), if a
    gradient comes back to what they return (to a gate, none): of that of which most have the whole stream
    go through them, with no path past them; where that leaves several, of the most frequent. Where there
    are no two such, of a class that has siblings.
    """
    every, sends = calls(module), senders(module)
    live = reach(results(module.graph), sends)
    called = {c: n for c, n in every.items()
              if (among is None or path_of(c) in among) and live & {*map(origin, returned(n))}}  # fmt: skip
    groups = (defaultdict[type, list[str]](list), defaultdict[type, list[str]](list))
    composed = {c: type(m) for c in called if [*(m := module.get_submodule(path_of(c))).children()]}
    kinds = {path_of(c): kind for c, kind in composed.items()}
    beside = Counter((path.rpartition(".")[0], kind) for path, kind in kinds.items())
    for call, kind in composed.items():
        path = path_of(call)
        if path[-1:].isdigit():
            groups[0][kind].append(call)
        elif beside[path.rpartition(".")[0], kind] > 1:
            groups[1][kind].append(call)

    def size(names: Sequence[str]) -> tuple[int, ...]:
        given = (argument(called[name]) for name in names)
        whole = sum(n is not None and not bypassed(module, n, sends) for n in given)
        return whole, len(names), -names[0].count(".")

    for group in groups:
        several = [names for names in group.values() if len(names) > 1]
        if several:
            return several[0] if len(several) == 1 else max(several, key=size)
    return []
