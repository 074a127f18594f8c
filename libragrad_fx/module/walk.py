"""The module tree, as a graph's probes show it."""

from __future__ import annotations

from collections import Counter

from libragrad_fx.module.captured import CapturedModule, one_graph


def called_modules(module: CapturedModule) -> list[str]:
    """Paths of the submodules whose calls are in the graph, in the order in which calls end."""
    nodes = one_graph(module).graph.nodes
    return [str(n.target) for n in nodes if n.op == "call_module" and "_output" in n.kwargs]


def blocks(module: CapturedModule) -> list[str]:
    """The repeated blocks of a network (transformer, mixer, residual blocks), in the order in which they
    run; empty if it has none. FullGrad+ sums over them.

    They are the instances of one class, the most frequent one, whose names end in a digit (``layers.3``,
    ``encoder_layer_3``) or that have a sibling of their class.
    """
    called = dict.fromkeys(called_modules(module))
    composed = {p: type(m) for p in called if list((m := module.get_submodule(p)).children())}
    beside = Counter((p.rpartition(".")[0], kind) for p, kind in composed.items())
    groups: dict[type, list[str]] = {}
    for path, kind in composed.items():
        if path[-1].isdigit() or beside[path.rpartition(".")[0], kind] > 1:
            groups.setdefault(kind, []).append(path)
    found = max(groups.values(), key=lambda ps: (len(ps), -ps[0].count(".")), default=[])
    return sorted(found, key=[n.target for n in module.graph.nodes].index) if len(found) > 1 else []
