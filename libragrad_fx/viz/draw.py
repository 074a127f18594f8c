"""A gradient graph as a file, and as a table of modules: static pictures by Graphviz, text, JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx as nx

from libragrad_fx.errors import InputError
from libragrad_fx.extras import need
from libragrad_fx.types import table
from libragrad_fx.viz.explorer import to_html
from libragrad_fx.viz.graph import SIDES, collapse

PICTURES = (".svg", ".png", ".pdf")
_LOST, _CREATED = (
    "#5e3c99",
    "#e66101",
)  # ends of ColorBrewer's PuOr, which colour-blind readers tell apart
_LEGEND = (
    "violet: autograd loses gradient mass, orange: it creates some (% of the output); dashed: pruned;\\l"
    "width: the mass that comes back when balanced, from the output at the bottom to the input\\l"
)
_SEEN = 5e-4  # of the output: what is less is neither said nor painted
_INK, _FAINT, _PAPER = "#222222", "#b0b0b0", "#f7f7f7"


def write(graph: nx.DiGraph, path: str | Path, depth: int = 2, focus: str = "") -> Path:
    """Write ``graph`` as its file's ending says.

    .svg, .png, .pdf, .dot show it from as far away as ``collapse`` does with ``depth`` and ``focus``;
    .html begins there; .json holds every op, as networkx's ``node_link_graph`` reads it.

    Raises:
        InputError: another ending, or Graphviz is not installed (.html, .dot and .json need none).
    """
    path = Path(path)
    if path.suffix == ".json":
        path.write_text(json.dumps(nx.node_link_data(graph, edges="edges"), indent=1), "utf-8")
    elif path.suffix == ".html":
        path.write_text(to_html(graph, depth, focus), "utf-8")
    elif path.suffix == ".dot":
        path.write_text(to_dot(collapse(graph, depth, focus)).source, "utf-8")
    elif path.suffix in PICTURES:
        graphviz = need("graphviz", "graph")
        try:
            path.write_bytes(to_dot(collapse(graph, depth, focus)).pipe(format=path.suffix[1:]))
        except graphviz.ExecutableNotFound as e:
            raise InputError(
                f"{path.suffix} is drawn by Graphviz, whose program 'dot' is not installed here"
                " (apt install graphviz, brew install graphviz); .html, .dot and .json need none"
            ) from e
    else:
        endings = ", ".join((".html", *PICTURES, ".dot", ".json"))
        raise InputError(f"{path.name!r}: a gradient graph is written as {endings}")
    return path


def to_dot(graph: nx.DiGraph) -> Any:
    """Painted by what autograd loses (violet) or creates (orange); dashed edges are pruned.

    Widths are the mass that comes back when balanced. The gradient flows from bottom to top.
    """
    graphviz = need("graphviz", "graph")
    unit = _unit(graph)
    worst = max((_moved(d["plain"]) for _, d in graph.nodes(data=True)), default=0.0) / unit
    widest = max((abs(d["balanced"] or 0) for *_, d in graph.edges(data=True)), default=0.0)
    font = {"fontname": "Helvetica,Arial,sans-serif", "fontsize": "10"}
    box = {"shape": "box", "style": "filled,rounded", "color": _FAINT, "fontcolor": _INK}
    dot = graphviz.Digraph(
        graph_attr={"rankdir": "TB", "nodesep": "0.25", "ranksep": "0.3", "label": _LEGEND,
                    "labelloc": "t", "labeljust": "l", **font},
        node_attr={**box, **font}, edge_attr={"color": _INK, "arrowsize": "0.6", **font},
    )  # fmt: skip
    names = {n: f"n{i}" for i, n in enumerate(graph)}  # dot reads "a:b" as a port
    for node, data in graph.nodes(data=True):
        label = "\n".join(_lines(node, data, unit))
        dot.node(
            names[node],
            graphviz.escape(label).replace("\n", "\\n"),
            fillcolor=_paint(data["plain"], unit, worst),
            tooltip=graphviz.escape(f"{data['source']} {data['reason']}".strip() or node),
        )
    for a, b, data in graph.edges(data=True):
        if data["balanced"] is None:
            dot.edge(names[a], names[b], style="dashed", color=_FAINT)
        else:
            share = abs(data["balanced"]) / widest if widest else 0.0
            dot.edge(names[a], names[b], penwidth=f"{0.6 + 3.4 * share:.2f}")
    return dot


def _lines(node: str, data: dict[str, Any], unit: float) -> Iterator[str]:
    yield data["title"]
    silent = data["op"] in ("module", "target") or data["op"].startswith("input")
    named = not silent and not data["title"].endswith(node)
    yield from filter(None, ["  ".join(filter(None, [node if named else "", data["shape"]]))])
    sums = data["plain"] or {"lost": 0.0, "created": 0.0}
    words = {"lost": "loses", "created": "creates"}
    seen = [f"{w} {_percent(sums[k], unit)}" for k, w in words.items() if sums[k] / unit >= _SEEN]
    if seen:
        yield f"autograd {', '.join(seen)}"
    if data["actions"]:
        yield ", ".join(
            k.replace("_", " ") + (f" × {v}" if v > 1 else "") for k, v in data["actions"].items()
        )


def _paint(sums: dict[str, float] | None, unit: float, worst: float) -> str:
    """White to the colour of what prevails, by the logarithm of how much."""
    amount = _moved(sums) / unit
    if not sums or amount < _SEEN:
        return _PAPER
    depth = math.log1p(100 * amount) / math.log1p(100 * worst)
    end = _LOST if sums["lost"] >= sums["created"] else _CREATED
    parts = [int(end[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(247 + (p - 247) * 0.6 * depth):02x}" for p in parts)


def _moved(sums: dict[str, float] | None) -> float:
    return sums["lost"] + sums["created"] if sums else 0.0


def _unit(graph: nx.DiGraph) -> float:
    return abs(graph.graph["output"]["plain"]) or 1.0


def _percent(value: float, unit: float) -> str:
    return f"{100 * value / unit:.3g} %"


# --- in a terminal


def tree(graph: nx.DiGraph, depth: int = 3) -> str:
    """What each module loses and creates under autograd, what is done about it, and what is left."""
    units = {side: abs(graph.graph["output"][side]) or 1.0 for side in SIDES}
    sums: dict[str, dict[str, float]] = {}
    actions: dict[str, dict[str, int]] = {}
    for node, data in graph.nodes(data=True):
        if data["plain"] is None and data["balanced"] is None:
            continue
        parts = data["module"].split(".") if data["module"] else []
        for path in (".".join(parts[:i]) for i in range(min(len(parts), depth) + 1)):
            row = sums.setdefault(path, dict.fromkeys(("ops", "lost", "created", "left"), 0.0))
            row["ops"] += node != "output"
            for key in ("lost", "created"):
                row[key] += (data["plain"] or {}).get(key, 0.0)
            row["left"] += _moved(data["balanced"])
            if data["action"]:
                done = actions.setdefault(path, {})
                done[data["action"]] = done.get(data["action"], 0) + 1
    first = {path: i for i, path in enumerate(sums)}
    rows = [
        (
            "  " * path.count(".")
            + ("  " if path else "")
            + (path.rpartition(".")[2] or "(model)"),
            f"{row['ops']:.0f}",
            _percent(row["lost"], units["plain"]),
            _percent(row["created"], units["plain"]),
            ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in actions.get(path, {}).items()),
            _percent(row["left"], units["balanced"]),
        )
        for path, row in sorted(sums.items(), key=lambda kv: _place(kv[0], first))
    ]
    head = ("module", "ops", "lost", "created", "edits", "left when balanced")
    return "\n".join(table(head, rows))


def _place(path: str, first: dict[str, int]) -> list[int]:
    """Where a module comes: behind its parent, among its siblings in the order of the graph."""
    parts = path.split(".") if path else []
    return [first[".".join(parts[: i + 1])] for i in range(len(parts))]
