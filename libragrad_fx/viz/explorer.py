"""A gradient graph as one HTML file that works from disk, without a network."""

from __future__ import annotations

import importlib.resources
import importlib.util
from pathlib import Path
from typing import Any

import networkx as nx

from libragrad_fx.errors import LibraGradError
from libragrad_fx.extras import how_to_get
from libragrad_fx.viz.graph import chains, groups, opened
from libragrad_fx.viz.template import markup, rendered, script


def to_html(graph: nx.DiGraph, depth: int = 2, focus: str = "") -> str:
    """The explorer of ``graph``; ``depth`` and ``focus`` decide which modules are open at first.

    Raises:
        LibraGradError: a package that makes the page is not installed.
    """
    here = importlib.resources.files("libragrad_fx.viz")
    return rendered(
        "viz/explorer.html", "graph", title=graph.graph.get("title", "gradient graph"),
        data=script(to_data(graph, depth, focus), "graph"), engine=script(_engine(), "graph"),
        script=markup(here.joinpath("explorer.js").read_text("utf-8"), "graph"),
    )  # fmt: skip


def to_data(graph: nx.DiGraph, depth: int = 2, focus: str = "") -> dict[str, Any]:
    """The page's data: nodes and groups with their accounts, edges with both masses."""
    found = chains(graph)
    return {
        "output": graph.graph["output"],
        "nodes": [{"id": n, **d, "groups": found[n]} for n, d in graph.nodes(data=True)],
        "groups": [{"id": g, **d} for g, d in groups(graph).items()],
        "edges": [{"from": a, "to": b, **d} for a, b, d in graph.edges(data=True)],
        "open": sorted(opened(graph, depth, focus)),
    }


def _engine() -> str:
    """Graphviz as JavaScript, with its WebAssembly inside: a file of the package graphviz-anywidget."""
    spec = importlib.util.find_spec("graphviz_anywidget")  # not imported: that needs Jupyter's packages
    if spec is None or spec.origin is None:
        raise LibraGradError(
            ".html is laid out by the package 'graphviz-anywidget', which is not installed:"
            f" {how_to_get('graph')}"
        )
    return (Path(spec.origin).parent / "static" / "widget.js").read_text("utf-8")
