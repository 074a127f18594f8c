"""The gradient graph of a model, which pictures draw and ``flow`` queries.

A ``networkx.DiGraph``: a node for every op that a gradient passes, under autograd or balanced; an edge
from an op to each reader, with the gradient mass ⟨a, r(g)⟩ that comes back over it. Both sides are in one
graph, so a picture can show either. Every number is the ledger's.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import networkx as nx
import torch

from libragrad_fx.account.ledger import ledger
from libragrad_fx.errors import InputError
from libragrad_fx.graph.origin import module_path, source_line
from libragrad_fx.graph.schema import op_name, operands
from libragrad_fx.module.captured import CapturedModule, one_graph
from libragrad_fx.ops import insert
from libragrad_fx.rewrite.edits import root_of
from libragrad_fx.rewrite.erase import erase
from libragrad_fx.types import Edit, LedgerRow, Plan

SIDES = ("plain", "balanced")
NORMS = {"plain": "plain_norm", "balanced": "balanced_norm"}
_CARRIED = (*SIDES, *NORMS.values())
_PLACE = ("op", "module", "source")
NAMES = {"plain": "autograd", "balanced": "balanced"}  # the sides' names in pictures
_SUMS = ("residual", "lost", "created", "bias")
_SYMBOL = re.compile(r"\b[su]\d+\b")
_FEWEST = 4  # from so many equal modules in a row on, those between the first and the last are a group


def gradient_graph(gm: CapturedModule, inputs: Any, target: Any = None) -> nx.DiGraph:
    """Both accounts of one input as a graph.

    Args:
        gm: the result of ``transform``.
        inputs, target: as for ``audit``.

    Returns:
        A graph with ``output`` (plain and balanced) in its attributes, in units of the output.
        Nodes: ``title``, ``op``, ``module``, ``source``, ``role``, ``kind``, ``shape``, ``dtype``,
        ``action`` (and ``actions``: by action, how often, as for groups), the ``operands`` that it acts
        on ("": all), the ``scale`` of their gradient, ``rule``, ``reason``; and for each side, the
        ledger's ``residual`` and ``bias``, and what is ``lost`` and ``created`` (None: no gradient).
        Edges: ``plain`` and ``balanced``, the mass ⟨a, r(g)⟩ that comes back over them (None: pruned);
        ``plain_norm`` and ``balanced_norm``, ‖r(g)‖; the producer's ``role``; ``scale``, the factor by
        which the reader's edit multiplies the gradient of this edge.

    Raises:
        InputError: ``gm`` is not the result of a transform, or is in several graphs.
    """
    refusal = "a gradient graph is drawn of what transform returned, in one graph; got {}"
    if (plan := one_graph(gm, refusal).plan) is None:
        raise InputError(refusal.format(type(gm).__name__))
    plain = _unedited(gm)
    accounts = {"plain": ledger(plain, inputs, target), "balanced": ledger(gm, inputs, target)}
    graph = nx.DiGraph(output={side: account.output for side, account in accounts.items()})
    describe = _describer(gm, plan)
    for side, account in accounts.items():
        for row in account.rows:
            if row.node not in graph:
                graph.add_node(row.node, **describe(row.node, row))
            lost, created = row.moved(account.output)
            sums = {"residual": row.residual, "lost": lost, "created": created, "bias": row.bias}
            graph.nodes[row.node][side] = sums
            for producer, mass, norm in row.flows:
                if producer not in graph:
                    graph.add_node(producer, **describe(producer, None))
                if not graph.has_edge(producer, row.node):
                    graph.add_edge(producer, row.node, **dict.fromkeys(_CARRIED), scale=1.0)
                graph.edges[producer, row.node].update({side: mass, NORMS[side]: norm})
    graph.remove_nodes_from(set(graph) - nx.ancestors(graph, "output") - {"output"})
    for producer, node in _scaled(graph, plain.graph, plan.edits):
        graph.edges[producer, node]["scale"] = graph.nodes[node]["scale"]
    for node, chain in chains(graph).items():
        data = graph.nodes[node]
        data |= {
            "title": op_title(data, chain[-1] if chain else ""),
            "actions": _count([data["action"]]),
        }
    for producer, _, data in graph.edges(data=True):
        data["role"] = graph.nodes[producer]["role"]
    return graph


def _unedited(module: CapturedModule) -> CapturedModule:
    """The plain trace that a balanced module was made of: the same parameters, autograd's backward."""
    plain = module.record.history.plain_sites if module.record.history else module.record.sites
    record = dataclasses.replace(module.record, sites=plain, history=None)
    return CapturedModule(root_of(module), erase(module.graph), record)


def _describer(gm: CapturedModule, plan: Plan) -> Callable[[str, LedgerRow | None], dict[str, Any]]:
    """A function from a node and its row to its attributes. A node without a row is where the signal
    starts: an input, or an embedding that an input indexes."""
    nodes = {n.name: n for n in gm.graph.nodes}
    edits = {e.node: e for e in plan.edits}
    roles, facts = gm.history.roles, gm.history.facts

    def describe(name: str, row: LedgerRow | None) -> dict[str, Any]:
        node = nodes.get(name)
        return {
            **(_start(name, node) if row is None else {k: getattr(row, k) for k in _PLACE}),
            "role": roles[name].name.lower() if name in roles else "value",
            "kind": str(facts[name].kind) if name in facts else "",
            **_shape(node),
            **_because(edits.get(name)),
            **dict.fromkeys(SIDES),
        }

    return describe


def _start(name: str, node: torch.fx.Node | None) -> dict[str, str]:
    if node is None or node.op != "call_function":
        return {"op": f"input {name}", "module": "", "source": ""}
    if node.target is insert.guard:
        return {"op": f"input {node.args[1]}", "module": "", "source": ""}
    return {"op": op_name(node.target), "module": module_path(node), "source": source_line(node)}


def _scaled(graph: nx.DiGraph, trace: torch.fx.Graph, edits: Iterable[Edit]) -> Iterator[tuple[str, str]]:
    """The edges whose gradient an edit scales: those of its operands, or all of the node."""
    nodes = {n.name: n for n in trace.nodes}
    for edit in edits:
        if edit.factor is None or edit.node not in graph:
            continue
        named = [n for _, n in operands(nodes[edit.node], edit.operands)]
        for n in named:
            while n.name not in graph and n.all_input_nodes:  # a getitem of an op's outputs
                n = n.all_input_nodes[0]
            if graph.has_edge(n.name, edit.node):
                yield n.name, edit.node
        yield from () if named else graph.in_edges(edit.node)


def _because(edit: Edit | None) -> dict[str, Any]:
    if edit is None:
        return {**dict.fromkeys(("action", "operands", "rule", "reason"), ""), "scale": 1.0}
    operands = ", ".join(edit.operands)
    action = {"action": str(edit.action), "operands": operands, "scale": edit.factor or 1.0}
    return {**action, "rule": edit.rule, "reason": edit.reason}


def _shape(node: torch.fx.Node | None) -> dict[str, str]:
    """Shape and dtype as text. Free sizes are letters: B for the first of a value, then C …"""
    value = None if node is None else node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return {"shape": "", "dtype": ""}
    symbols = dict.fromkeys(_SYMBOL.findall(sizes := " × ".join(str(n) for n in value.shape)))
    names = dict(zip(symbols, string.ascii_uppercase[1:], strict=False))
    shape = _SYMBOL.sub(lambda m: names.get(m[0], m[0]), sizes)
    return {"shape": shape, "dtype": str(value.dtype).removeprefix("torch.")}


def op_title(data: Mapping[str, Any], outer: str = "") -> str:
    """An op's short name, after its module's path relative to ``outer``: ``attn.proj · linear``."""
    op = data["op"].split(".")[1] if "." in data["op"] else data["op"]
    below = data["module"].removeprefix(outer).removeprefix(".")
    return f"{below} · {op}" if below else op


# --- groups of nodes


def chains(graph: nx.DiGraph) -> dict[str, tuple[str, ...]]:
    """The groups that each node is in, outermost first: the prefixes of its module's path.

    A group is left out if it has one node, or the same nodes as a smaller group. Of equal modules in a row,
    those between the first and the last form a group too.
    """
    paths = {n: _prefixes(d["module"]) for n, d in graph.nodes(data=True)}
    members = _members(paths)
    telling = {g for g, nodes in members.items() if len({_below(paths[n], g) or n for n in nodes}) > 1}
    kinds = {g: _count(graph.nodes[n]["op"] for n in members[g]) for g in members if g in telling}
    run = _runs(kinds)
    name = {g: f"{g} (module)" if g in graph else g for g in telling}  # ops are nodes beside them
    return {
        n: tuple(g for p in path if p in telling for g in (run.get(p), name[p]) if g)
        for n, path in paths.items()
    }


def _below(path: tuple[str, ...], group: str) -> str:
    """The next smaller group on a path, if there is one."""
    return next(iter(path[path.index(group) + 1 :]), "")


def _prefixes(module: str) -> tuple[str, ...]:
    parts = module.split(".") if module else []
    return tuple(".".join(parts[: i + 1]) for i in range(len(parts)))


def _members(chains: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """group -> its nodes."""
    found: dict[str, list[str]] = {}
    for node, chain in chains.items():
        for group in chain:
            found.setdefault(group, []).append(node)
    return found


def _runs(kinds: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    """By module, the name of its run: those between the first and the last of equal siblings in a row.

    Siblings may alternate between two or three kinds (shifted windows and plain ones).
    """
    named: dict[str, str] = {}
    families: dict[str, list[str]] = {}
    for group in kinds:
        parent, _, number = group.rpartition(".")
        if number.isdigit():
            families.setdefault(parent, []).append(group)
    for row in families.values():
        start = 0
        while start < len(row):
            ends = {period: _end(row, start, period, kinds) for period in (1, 2, 3)}
            period = max(ends, key=lambda p: ends[p] - 2 * p)
            between = row[start + period : ends[period] - period]
            if len(between) >= _FEWEST - 2:
                last = between[-1].rpartition(".")[2]
                named |= dict.fromkeys(between, f"{between[0]} … {last} (× {len(between)})")
                start = ends[period]
            else:
                start += 1
    return named


def _end(row: Sequence[str], start: int, period: int, kinds: Mapping[str, Any]) -> int:
    """The index after the last sibling that repeats the one ``period`` before it, numbered without gaps."""
    number = [int(group.rpartition(".")[2]) for group in row]
    end = start + 1
    while (
        end < len(row)
        and number[end] == number[end - 1] + 1
        and (end - start < period or kinds[row[end]] == kinds[row[end - period]])
    ):
        end += 1
    return end


def opened(graph: nx.DiGraph, depth: int = 2, focus: str = "") -> set[str]:
    """The groups whose insides are drawn: those above ``depth``, the number of names of a path that are
    drawn apart (an op's own is the last), and all inside or around ``focus``. Runs of equal modules stay
    closed."""
    found = chains(graph)
    inner = {a for chain in found.values() for a in chain[:-1]}
    inside = {n for n, d in graph.nodes(data=True) if focus and _within(d["module"], focus)}
    return {
        group
        for group, nodes in _members(found).items()
        if not inside.isdisjoint(nodes)
        or ("…" not in group and group.count(".") + 1 + (group not in inner) < depth)
    }


def _within(module: str, focus: str) -> bool:
    return module == focus or module.startswith(f"{focus}.")


def collapse(graph: nx.DiGraph, depth: int = 2, focus: str = "") -> nx.DiGraph:
    """A graph in which each group (``chains``) that is not ``opened`` is one node.

    Sums are added; nodes gain ``ops`` (how many), ``kinds`` (how many of which op) and ``actions``.
    """
    open_ = opened(graph, depth, focus)
    return _merged(
        graph,
        {n: next((g for g in chain if g not in open_), n) for n, chain in chains(graph).items()},
    )


def around(graph: nx.DiGraph, depth: int = 2, focus: str = "") -> nx.DiGraph:
    """As ``collapse``; with a ``focus``, only nodes inside it and their neighbours."""
    far = collapse(graph, depth, focus)
    inside = {n for n, d in far.nodes(data=True) if focus and _within(d["module"], focus)}
    near = {n for edge in far.edges if not inside.isdisjoint(edge) for n in edge}
    return far.subgraph(inside | near) if inside else far


def groups(graph: nx.DiGraph) -> dict[str, dict[str, Any]]:
    """group -> the attributes of its node in a ``collapse``, and ``parent``."""
    found = chains(graph)
    parents = {g: up for chain in found.values() for g, up in zip(chain, ("", *chain), strict=False)}
    return {
        group: {**_summed(graph, group, nodes), "parent": parents[group]}
        for group, nodes in _members(found).items()
    }


def _merged(graph: nx.DiGraph, key: Mapping[str, str]) -> nx.DiGraph:
    """The quotient graph by ``key``: edges inside a group are dropped, those between groups are added."""
    merged = nx.DiGraph(**graph.graph)
    for k, nodes in _members({node: (k,) for node, k in key.items()}).items():
        if nodes == [k]:
            data = graph.nodes[k]
            merged.add_node(k, **data, ops=1, kinds={})
        else:
            merged.add_node(k, **_summed(graph, k, nodes))
    for a, b, data in graph.edges(data=True):
        if key[a] != key[b]:
            if not merged.has_edge(key[a], key[b]):
                merged.add_edge(key[a], key[b], **dict.fromkeys(_CARRIED))
            edge = merged.edges[key[a], key[b]]
            for side in SIDES:
                edge[side] = _both(operator.add, edge[side], data[side])
                edge[NORMS[side]] = _both(math.hypot, edge[NORMS[side]], data[NORMS[side]])
    return merged


def _summed(graph: nx.DiGraph, group: str, nodes: Iterable[str]) -> dict[str, Any]:
    data = [graph.nodes[n] for n in nodes]
    return {
        **dict.fromkeys(("source", "role", "kind", "shape", "dtype"), ""),
        **_because(None),
        **{side: _total([d[side] for d in data]) for side in SIDES},
        "title": group,
        "op": "module",
        "module": group,
        "ops": len(data),
        "kinds": _count(d["op"] for d in data),
        "actions": _count(d["action"] for d in data),
    }


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(v for v in values if v).most_common())


def _total(parts: Iterable[Mapping[str, float] | None]) -> dict[str, float] | None:
    found = [p for p in parts if p is not None]
    return {k: sum(p[k] for p in found) for k in _SUMS} if found else None


def _both(of: Callable[[float, float], float], a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else of(a, b)
