"""The gradient graph of a model: what its pictures draw, and what can be asked of it.

A ``networkx.DiGraph``: a node for every op that a gradient passes, under autograd or balanced; an edge
from an op to each that reads it, with the gradient mass ⟨a, r(g)⟩ that comes back over it. Both sides
are in one graph, so that a picture can show either, and every number is the ledger's.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import networkx as nx
import torch

from libragrad_fx.errors import InputError
from libragrad_fx.ledger import ledger
from libragrad_fx.module import CapturedModule
from libragrad_fx.ops import insert
from libragrad_fx.rewrite import unedited
from libragrad_fx.types import Edit, LedgerRow

SIDES = ("plain", "balanced")
_SUMS = ("residual", "lost", "created", "bias")
_FEWEST = 4  # as many equal modules in a row are drawn as the first, those between, the last


def gradient_graph(gm: CapturedModule, inputs: Any, target: Any = None) -> nx.DiGraph:
    """Both accounts of one input as a graph.

    Args:
        gm: the result of ``transform``.
        inputs, target: as for ``audit``.

    Returns:
        A graph with ``output`` (plain and balanced) in its attributes, in units of the output.
        Nodes: ``op``, ``module``, ``source``, ``shape``, ``dtype``, ``action``, ``rule``, ``reason``, and
        for each side ``residual``, ``lost``, ``created``, ``bias`` (None where no gradient passes).
        Edges: ``plain`` and ``balanced``, the mass that comes back over them (None: pruned).

    Raises:
        InputError: ``gm`` is not the result of a transform, or is in several graphs.
    """
    if not isinstance(gm, CapturedModule) or gm.plan is None:
        raise InputError(
            f"a gradient graph is drawn of what transform returned, in one graph; got"
            f" {type(gm).__name__}"
        )
    accounts = {
        "plain": ledger(unedited(gm), inputs, target),
        "balanced": ledger(gm, inputs, target),
    }
    graph = nx.DiGraph(output={side: account.output for side, account in accounts.items()})
    known = {n.name: n for n in gm.graph.nodes}
    edits = {e.node: e for e in gm.plan.edits}
    for side, account in accounts.items():
        for row in account.rows:
            if row.node not in graph:
                graph.add_node(row.node, **_about(row, known.get(row.node), edits.get(row.node)))
            graph.nodes[row.node][side] = _sums(row)
            for producer, flow in row.flows:
                if producer not in graph:
                    graph.add_node(producer, **_source(known[producer]))
                if not graph.has_edge(producer, row.node):
                    graph.add_edge(producer, row.node, **dict.fromkeys(SIDES))
                graph.edges[producer, row.node][side] = flow
    return graph


def _about(row: LedgerRow, node: Any, edit: Edit | None) -> dict[str, Any]:
    action = "" if edit is None else str(edit.action)
    because = {"rule": edit.rule, "reason": edit.reason} if edit else {"rule": "", "reason": ""}
    where = {"op": row.op, "module": row.module, "source": row.source}
    return {**where, **_shape(node), "action": action, **because, **dict.fromkeys(SIDES)}


def _source(node: torch.fx.Node) -> dict[str, Any]:
    """An input of the model, or an embedding that it indexes: where the signal starts."""
    name = str(node.args[1]) if node.target is insert.guard else node.name
    blank = dict.fromkeys(("module", "source", "action", "rule", "reason"), "")
    return {"op": f"input {name}", **_shape(node), **blank, **dict.fromkeys(SIDES)}


def _shape(node: torch.fx.Node | None) -> dict[str, str]:
    value = None if node is None else node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return {"shape": "", "dtype": ""}
    return {"shape": str(tuple(value.shape)), "dtype": str(value.dtype).removeprefix("torch.")}


def _sums(row: LedgerRow) -> dict[str, float]:
    lost, created = max(row.residual, 0.0), max(-row.residual, 0.0)
    return {"residual": row.residual, "lost": lost, "created": created, "bias": row.bias}


# --- seen from further away


def collapse(graph: nx.DiGraph, depth: int = 2, focus: str = "") -> nx.DiGraph:
    """Ops of one module as one node, down to ``depth`` names of its path; ``focus`` stays open.

    Equal modules in a row are one node as well, but for the first and the last. Sums add up;
    nodes gain ``ops`` (how many) and ``actions`` (how many of which).
    """
    modules = {d["module"] for _, d in graph.nodes(data=True)}
    parents = {m[:i] for m in modules for i, c in enumerate(m) if c == "."}
    key = {n: _group(n, d["module"], parents, depth, focus) for n, d in graph.nodes(data=True)}
    groups = _merged(graph, key)
    runs = _runs(groups)
    return _merged(graph, {n: runs.get(k, k) for n, k in key.items()})


def _group(node: str, module: str, parents: set[str], depth: int, focus: str) -> str:
    """The module that stands for a node: of ``depth`` names, beside ``focus`` as many as it has.

    What a module computes itself, between submodules that are shown, stands for itself.
    """
    parts, open_ = module.split("."), focus.split(".") if focus else []
    shared = len([*itertools.takewhile(lambda p: p[0] == p[1], zip(parts, open_, strict=False))])
    if not module or (focus and shared == len(open_)):
        return node
    level = max(depth, shared + 1 if shared else 0)
    return node if len(parts) < level and module in parents else ".".join(parts[:level])


def _merged(graph: nx.DiGraph, key: Mapping[str, str]) -> nx.DiGraph:
    """The quotient by ``key``; edges within a group are gone, those between groups add up."""
    merged = nx.DiGraph(**graph.graph)
    members: dict[str, list[str]] = {}
    for node, k in key.items():
        members.setdefault(k, []).append(node)
    for k, nodes in members.items():
        data = [graph.nodes[n] for n in nodes]
        if len(nodes) == 1 and nodes[0] == k:
            merged.add_node(k, **data[0], ops=1, actions=_count([data[0]["action"]]))
            continue
        sums = {side: _total([d[side] for d in data]) for side in SIDES}
        actions = _count(d["action"] for d in data)
        blank = dict.fromkeys(("source", "shape", "dtype", "rule", "reason", "action"), "")
        ops = _count(d["op"] for d in data)
        merged.add_node(
            k, op="module", module=k, **blank, **sums, ops=len(nodes), actions=actions, kinds=ops
        )
    for a, b, data in graph.edges(data=True):
        if key[a] != key[b]:
            if not merged.has_edge(key[a], key[b]):
                merged.add_edge(key[a], key[b], **dict.fromkeys(SIDES))
            edge = merged.edges[key[a], key[b]]
            for side in SIDES:
                edge[side] = _plus(edge[side], data[side])
    return merged


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(v for v in values if v).most_common())


def _total(parts: Iterable[Mapping[str, float] | None]) -> dict[str, float] | None:
    found = [p for p in parts if p is not None]
    return {k: sum(p[k] for p in found) for k in _SUMS} if found else None


def _plus(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else a + b


def _runs(groups: nx.DiGraph) -> dict[str, str]:
    """Names for those between the first and the last of equal siblings in a row."""
    named: dict[str, str] = {}
    numbered = [k for k in groups if k.rpartition(".")[2].isdigit() and groups.nodes[k]["ops"] > 1]

    def alike(place: tuple[int, str]) -> Hashable:
        """The parent, the ops inside, and what stays the same while the number counts up."""
        parent, _, number = place[1].rpartition(".")
        return (
            parent,
            tuple(sorted(groups.nodes[place[1]]["kinds"].items())),
            int(number) - place[0],
        )

    for _, run in itertools.groupby(enumerate(numbered), alike):
        middle = [k for _, k in run][1:-1]
        if len(middle) >= _FEWEST - 2:
            named |= dict.fromkeys(middle, f"{middle[0]} … {middle[-1]} × {len(middle)}")
    return named


# --- questions


def bottlenecks(graph: nx.DiGraph, side: str = "balanced") -> list[str]:
    """The nodes that every path from the output to every source goes through, from the output on."""
    kept = [(a, b) for a, b, d in graph.edges(data=True) if d[side] is not None]
    back = nx.DiGraph((b, a) for a, b in kept)
    sources = [n for n in back if back.out_degree(n) == 0]
    if not sources:
        return []
    idom = nx.immediate_dominators(back, "output")
    chains = []
    for node in sources:
        chain = []
        while node is not None and node != "output":
            node = idom.get(node)
            chain.append(node)
        chains.append([n for n in reversed(chain) if n not in (None, "output")])
    return [n for n in chains[0] if all(n in c for c in chains)]


def imbalance(graph: nx.DiGraph, side: str) -> float:
    """Σ|residual| over all nodes, in units of the output."""
    rows = [d[side] for _, d in graph.nodes(data=True) if d[side] is not None]
    return sum(r["lost"] + r["created"] for r in rows) / (abs(graph.graph["output"][side]) or 1.0)
