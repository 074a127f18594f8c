"""A gradient graph as a picture (by Graphviz), and as a table of modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import networkx as nx

from libragrad_fx.extras import need
from libragrad_fx.viz.graph import SIDES, op_title
from libragrad_fx.viz.paint import SEEN, moved, paint
from libragrad_fx.viz.text import table

_LEGEND = (
    "violet: autograd loses gradient mass, orange: it creates some (% of the output); dashed: pruned;\\l"
    "width: the mass that comes back when balanced, from the output at the bottom to the input\\l"
)
_INK, _FAINT = "#222222", "#b0b0b0"


def to_dot(graph: nx.DiGraph, focus: str = "") -> Any:
    """Nodes are violet where autograd loses mass, orange where it creates some; pruned edges are dashed.

    The width of an edge is its mass when balanced. The gradient flows from bottom to top. Modules are
    named by their paths, inside ``focus`` relative to it.
    """
    graphviz = need("graphviz", "graph")
    unit = _unit(graph)
    worst = max((moved(d["plain"]) for _, d in graph.nodes(data=True)), default=0.0) / unit
    widest = max((abs(d["balanced"] or 0) for *_, d in graph.edges(data=True)), default=0.0)
    font = {"fontname": "Helvetica,Arial,sans-serif", "fontsize": "10"}
    box = {
        "shape": "box",
        "style": "filled,rounded",
        "color": _FAINT,
        "fontcolor": _INK,
        "height": "0.2",
        "margin": "0.1,0.05",
    }
    dot = graphviz.Digraph(
        graph_attr={"rankdir": "TB", "nodesep": "0.15", "ranksep": "0.2", "label": _LEGEND,
                    "labelloc": "t", "labeljust": "l", **font},
        node_attr={**box, **font}, edge_attr={"color": _INK, "arrowsize": "0.5", **font},
    )  # fmt: skip
    names = {n: f"n{i}" for i, n in enumerate(graph)}  # dot reads "a:b" as a port
    for node, data in graph.nodes(data=True):
        label = "\n".join(_lines(node, data, unit, focus))
        dot.node(
            names[node],
            graphviz.escape(label).replace("\n", "\\n"),
            fillcolor=paint(data["plain"], unit, worst),
            tooltip=graphviz.escape(f"{data['source']} {data['reason']}".strip() or node),
        )
    for a, b, data in graph.edges(data=True):
        if data["balanced"] is None:
            dot.edge(names[a], names[b], style="dashed", color=_FAINT)
        else:
            share = abs(data["balanced"]) / widest if widest else 0.0
            width = f"{0.6 + 2.4 * share:.2f}"
            dot.edge(names[a], names[b], penwidth=width)
    return dot


def _lines(node: str, data: dict[str, Any], unit: float, focus: str) -> Iterator[str]:
    silent = data["op"] in ("module", "target") or data["op"].startswith("input")
    title = data["title"] if data["op"] == "module" else op_title(data, focus)
    named = not silent and not title.endswith(node)
    about = [title, node if named else "", data["shape"]]
    yield "  ".join(filter(None, about))
    sums = data["plain"] or {"lost": 0.0, "created": 0.0}
    words = {"lost": "loses", "created": "creates"}
    seen = [f"{w} {_percent(sums[k], unit)}" for k, w in words.items() if sums[k] / unit >= SEEN]
    if seen:
        yield f"autograd {', '.join(seen)}"
    if data["actions"]:
        yield ", ".join(
            k.replace("_", " ") + (f" × {v}" if v > 1 else "") for k, v in data["actions"].items()
        )


def _unit(graph: nx.DiGraph) -> float:
    return abs(graph.graph["output"]["plain"]) or 1.0


def _percent(value: float, unit: float = 1.0) -> str:
    return f"{100 * value / unit:.3g} %"


# --- in a terminal


def modules(graph: nx.DiGraph, depth: int = 3) -> list[dict[str, Any]]:
    """By module, parents first: its ``ops``; the mass ``lost`` and ``created`` under autograd and the
    imbalance that is ``left`` when balanced, in units of the output; its ``edits``, by kind."""
    units = {side: abs(graph.graph["output"][side]) or 1.0 for side in SIDES}
    found: dict[str, dict[str, Any]] = {}
    for node, data in graph.nodes(data=True):
        if data["plain"] is None and data["balanced"] is None:
            continue
        parts = data["module"].split(".") if data["module"] else []
        for path in (".".join(parts[:i]) for i in range(min(len(parts), depth) + 1)):
            new = {"module": path, "ops": 0, "lost": 0.0, "created": 0.0, "left": 0.0, "edits": {}}
            row = found.setdefault(path, new)
            row["ops"] += node != "output"
            for key in ("lost", "created"):
                row[key] += (data["plain"] or {}).get(key, 0.0) / units["plain"]
            row["left"] += moved(data["balanced"]) / units["balanced"]
            if data["action"]:
                row["edits"][data["action"]] = row["edits"].get(data["action"], 0) + 1
    first = {path: i for i, path in enumerate(found)}
    return [found[path] for path in sorted(found, key=lambda p: _place(p, first))]


def tree(modules: Sequence[dict[str, Any]]) -> str:
    """``modules`` as a table for a terminal."""
    rows = [
        (
            "  " * path.count(".") + ("  " if path else "") + (path.rpartition(".")[2] or "(model)"),
            str(row["ops"]),
            _percent(row["lost"]),
            _percent(row["created"]),
            ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in row["edits"].items()),
            _percent(row["left"]),
        )
        for row in modules
        for path in [row["module"]]
    ]
    head = ("module", "ops", "lost", "created", "edits", "left when balanced")
    return "\n".join(table(head, rows))


def _place(path: str, first: dict[str, int]) -> list[int]:
    """Sort key of a module: after its parent; siblings in the order of the graph."""
    parts = path.split(".") if path else []
    return [first[".".join(parts[: i + 1])] for i in range(len(parts))]
