"""Queries on a gradient graph: its strongest paths, its bottlenecks, its residual stream."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Mapping

import networkx as nx

from libragrad_fx.viz.graph import SIDES

RESIDUAL, BRANCH = "residual", "branch"


def imbalance(graph: nx.DiGraph, side: str) -> float:
    """Σ|residual| over all nodes, in units of the output."""
    rows = [d[side] for _, d in graph.nodes(data=True) if d[side] is not None]
    return sum(r["lost"] + r["created"] for r in rows) / (abs(graph.graph["output"][side]) or 1.0)


def live(graph: nx.DiGraph, side: str) -> nx.DiGraph:
    """The edges that a gradient passes on one side, in the direction of the forward."""
    return nx.DiGraph((a, b, d) for a, b, d in graph.edges(data=True) if d[side] is not None)


def bottlenecks(graph: nx.DiGraph, side: str = "balanced") -> list[str]:
    """The nodes that lie on every path from the output to a source, beginning at the output."""
    back = live(graph, side).reverse(copy=False)
    sources = [n for n in back if back.out_degree(n) == 0]
    if not sources:
        return []
    above = nx.immediate_dominators(back, "output")
    chains = []
    for node in sources:
        chain: list[str] = []
        while (node := above.get(node)) not in (None, "output"):
            chain.append(node)
        chains.append(chain[::-1])
    return [n for n in chains[0] if all(n in chain for chain in chains)]


def strongest_paths(
    graph: nx.DiGraph, count: int = 5, side: str = "balanced"
) -> list[tuple[float, list[str]]]:
    """The ``count`` strongest paths from the output to the inputs, as (share, nodes).

    A node passes its share on to its operands in proportion to |mass| on the edges; a path's share is the
    product along its edges. The shares of all paths add up to 1. Paths are found one by one, so for
    thousands of nodes pass a ``collapse``. (There, a module that is called twice is one node, and a path
    passes it once.)
    """
    back = live(graph, side).reverse()
    sources = [n for n in back if back.out_degree(n) == 0]
    for node in back:
        mass = {b: abs(d[side]) for _, b, d in back.out_edges(node, data=True)}
        for b, m in mass.items():
            share = m / total if (total := sum(mass.values())) else 1 / len(mass)
            back.edges[node, b]["cost"] = -math.log(share) if share else math.inf
    back.remove_edges_from([(a, b) for a, b, d in back.edges(data=True) if d["cost"] == math.inf])
    end = ""  # one node behind all sources, so that one search finds the paths to each
    back.add_edges_from(((s, end) for s in sources), cost=0.0)
    if "output" not in back or not nx.has_path(back, "output", end):
        return []
    paths = itertools.islice(nx.shortest_simple_paths(back, "output", end, weight="cost"), count)
    return [(math.exp(-nx.path_weight(back, p, "cost")), p[:-1]) for p in paths]


# --- the residual stream against its branches


@dataclasses.dataclass(frozen=True)
class Join:
    """A node that all of the gradient passes and at which branches meet: mostly a residual sum, but also a
    product or a concatenation.

    masses: side -> branch -> the mass that goes back into it, as a share of the output. A branch is named
            after the submodule of most of its ops; the others are ``residual`` and ``branch``.
    gone:   side -> the mass that went to biases between here and the output
    """

    node: str
    module: str
    masses: Mapping[str, Mapping[str, float]]
    gone: Mapping[str, float]


def streams(graph: nx.DiGraph) -> list[Join]:
    """Every join, beginning at the input. Balanced, ``masses`` and ``gone`` add up to 1."""
    chain = bottlenecks(graph)
    sides = {side: live(graph, side) for side in SIDES}
    found = []
    for join, split in itertools.zip_longest(chain, chain[1:]):
        operands = _operands(graph, sides["balanced"], join)
        if len(operands) < 2:
            continue
        names = _names(graph, sides["balanced"], join, split, [a for a, _ in operands])
        masses: dict[str, dict[str, float]] = {side: {} for side in SIDES}
        for (a, b), name in zip(operands, names, strict=True):
            for side in SIDES:
                mass = (graph.edges[a, b][side] or 0.0) / (graph.graph["output"][side] or 1.0)
                masses[side][name] = masses[side].get(name, 0.0) + mass
        gone = {side: _gone(graph, sides[side], join, side) for side in SIDES}
        found.append(Join(join, graph.nodes[join]["module"], masses, gone))
    return found[::-1]


def _operands(graph: nx.DiGraph, flow: nx.DiGraph, node: str) -> list[tuple[str, str]]:
    """The edges into a join; nested sums count as one join."""
    adds = lambda n: graph.nodes[n]["kind"] == "linear" and flow.in_degree(n) > 1  # noqa: E731
    edges: list[tuple[str, str]] = []
    for a in flow.predecessors(node):
        inner = adds(node) and adds(a) and flow.out_degree(a) == 1
        edges += _operands(graph, flow, a) if inner else [(a, node)]
    return edges


def _names(graph: nx.DiGraph, flow: nx.DiGraph, join: str, split: str | None, ends: list[str]) -> list[str]:
    """A name for each branch between the split and the join.

    The residual stream is the shortest branch without ops of submodules (often it has no ops at all).
    """
    after = (nx.descendants(flow, split) | {split}) if split in flow else set(flow)
    home = graph.nodes[join]["module"]
    ops = [(nx.ancestors(flow, a) | {a}) & after - {split} for a in ends]
    inner = [[m for n in branch if (m := _child(graph.nodes[n]["module"], home))] for branch in ops]
    bare = [i for i, modules in enumerate(inner) if not modules]
    residual = min(bare, key=lambda i: len(ops[i]), default=None)
    return [RESIDUAL if i == residual else _most(modules) for i, modules in enumerate(inner)]


def _child(module: str, home: str) -> str:
    """The name of the submodule of ``home`` that contains ``module``; "" if none does."""
    inside = module.removeprefix(f"{home}.") if home else module
    return "" if module == home or (home and inside == module) else inside.partition(".")[0]


def _most(modules: list[str]) -> str:
    found = Counter(modules).most_common(1)
    return found[0][0] if found and 2 * found[0][1] > len(modules) else BRANCH


def _gone(graph: nx.DiGraph, flow: nx.DiGraph, join: str, side: str) -> float:
    after = nx.descendants(flow, join) if join in flow else set()
    rows = (graph.nodes[n][side] for n in (*after, join))
    total = sum(row["bias"] for row in rows if row is not None)
    return total / (graph.graph["output"][side] or 1.0)
