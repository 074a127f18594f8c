"""The module tree, as a graph's probes show it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection

from libragrad_fx.module.captured import CapturedModule, one_graph


def called_modules(module: CapturedModule) -> list[str]:
    """Paths of the submodules whose calls are in the graph, in the order in which calls end."""
    nodes = one_graph(module).graph.nodes
    return [str(n.target) for n in nodes if n.op == "call_module" and "_output" in n.kwargs]


def blocks(module: CapturedModule, among: Collection[str] | None = None) -> list[str]:
    """The repeated blocks of a network (transformer, mixer, residual blocks), in the order in which they
    run; empty if it has none. FullGrad+ sums over them. ``among``: only of these modules.

    They are the instances of the most frequent class whose names end in a digit (``layers.3``,
    ``encoder_layer_3``); where there are no two such, of a class that has siblings. The two MLPs of a
    mixer's block have a sibling each, but are no blocks.
    """
    called = dict.fromkeys(p for p in called_modules(module) if among is None or p in among)
    composed = {p: type(m) for p in called if list((m := module.get_submodule(p)).children())}
    beside = Counter((p.rpartition(".")[0], kind) for p, kind in composed.items())
    numbered, others = defaultdict[type, list[str]](list), defaultdict[type, list[str]](list)
    for path, kind in composed.items():
        if path[-1:].isdigit():
            numbered[kind].append(path)
        elif beside[path.rpartition(".")[0], kind] > 1:
            others[kind].append(path)
    sizes = lambda paths: (len(paths), -paths[0].count("."))  # noqa: E731
    most = [max(groups.values(), key=sizes, default=[]) for groups in (numbered, others)]
    return next((paths for paths in most if len(paths) > 1), [])
