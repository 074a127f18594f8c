"""Writes a gradient graph as a file; the ending decides the format."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import networkx as nx

from libragrad_fx.errors import InputError
from libragrad_fx.extras import need, writable, writing
from libragrad_fx.viz.draw import to_dot
from libragrad_fx.viz.explorer import to_html
from libragrad_fx.viz.flow import streams
from libragrad_fx.viz.graph import NAMES, NORMS, SIDES, around
from libragrad_fx.viz.model_explorer import overlay, to_model_explorer
from libragrad_fx.viz.strip import save

_PICTURES = (".svg", ".png", ".pdf")
ENDINGS: Mapping[str, tuple[str, ...]] = {
    "graph": (".html", *_PICTURES, ".dot", ".json"),
    "streams": _PICTURES,
    "model-explorer": (".json",),
}


def check_path(path: str | Path, view: str = "graph") -> Path:
    """The path, if a view can be written there: checked before the work.

    Raises:
        InputError: it cannot.
    """
    if view not in ENDINGS:
        raise InputError(f"view is one of {', '.join(ENDINGS)}; got {view!r:.40}")
    return writable(Path(path), ENDINGS[view])


def write(
    graph: nx.DiGraph, path: str | Path, view: str = "graph", depth: int = 2, focus: str = ""
) -> Path:
    """Write a view of ``graph`` in the format of the path's ending.

    graph: .svg, .png, .pdf, .dot draw its ``collapse`` to ``depth``, or ``focus`` and its neighbours; .html
        opens like that; .json holds every op, for networkx's ``node_link_graph``.
    streams: the mass that comes back over the residual stream and over each branch.
    model-explorer: .json for Google's Model Explorer, and an overlay file for each side:
        ``model-explorer g.json --node_data_paths g.autograd.json,g.balanced.json``.

    Raises:
        InputError: another ending, a path that cannot be written, a number that is not finite, or
            Graphviz is not installed (.html, .dot and .json do not need it).
    """
    path = check_path(path, view)
    _require_finite(graph)
    with writing(path):
        _write(graph, path, view, depth, focus)
    return path


def _write(graph: nx.DiGraph, path: Path, view: str, depth: int, focus: str) -> None:
    if view == "streams":
        save(streams(graph), path, graph.graph.get("title", ""))
    elif view == "model-explorer":
        for side in SIDES:
            _save_json(overlay(graph, side), path.with_suffix(f".{NAMES[side]}.json"))
        _save_json(to_model_explorer(graph), path)
    elif path.suffix == ".json":
        _save_json(nx.node_link_data(graph, edges="edges"), path)
    elif path.suffix == ".html":
        path.write_text(to_html(graph, depth, focus), "utf-8")
    elif path.suffix == ".dot":
        path.write_text(to_dot(around(graph, depth, focus), focus).source, "utf-8")
    else:
        path.write_bytes(_picture(to_dot(around(graph, depth, focus), focus), path.suffix[1:]))


def _require_finite(graph: nx.DiGraph) -> None:
    for node, data in graph.nodes(data=True):
        if not all(math.isfinite(v) for side in SIDES for v in (data[side] or {}).values()):
            raise InputError(f"{node} ({data['op']}): its account is not finite: no picture shows it")
    for a, b, data in graph.edges(data=True):
        if not all(math.isfinite(data[k] or 0.0) for k in (*SIDES, *NORMS.values())):
            raise InputError(f"what comes back from {b} to {a} is not finite: no picture shows it")


def _save_json(value: object, path: Path) -> None:
    path.write_text(json.dumps(value, indent=1), "utf-8")


def _picture(dot: Any, ending: str) -> bytes:
    graphviz = need("graphviz", "graph")
    try:
        return dot.pipe(format=ending)  # type: ignore[no-any-return]
    except graphviz.ExecutableNotFound as e:
        raise InputError(
            f".{ending} is drawn by Graphviz, whose program 'dot' is not installed here"
            " (apt install graphviz, brew install graphviz); .html, .dot and .json need none"
        ) from e
