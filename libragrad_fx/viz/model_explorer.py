"""A gradient graph for Google's Model Explorer: its graph format, and the accounts as overlays."""

from __future__ import annotations

from typing import Any

import networkx as nx

from libragrad_fx.viz.graph import NAMES
from libragrad_fx.viz.paint import LOST, moved, paint

_TITLE = "gradient graph"


def to_model_explorer(graph: nx.DiGraph) -> dict[str, Any]:
    """A graph collection: module paths become namespaces, pruned edges an overlay."""
    facts = ("op", "shape", "dtype", "source", "action", "operands", "rule", "reason")
    nodes = [
        {
            "id": node,
            "label": data["op"].split(".")[1] if "." in data["op"] else data["op"],
            "namespace": data["module"].replace(".", "/"),
            "attrs": [
                *({"key": k, "value": data[k]} for k in facts if data[k]),
                *(
                    {"key": f"{name}, {k}", "value": f"{v:.6g}"}
                    for side, name in NAMES.items()
                    for k, v in (data[side] or {}).items()
                ),
            ],
            "incomingEdges": [{"sourceNodeId": a} for a in graph.predecessors(node)],
        }
        for node, data in graph.nodes(data=True)
    ]
    pruned = [
        {"sourceNodeId": a, "targetNodeId": b, "label": f"{d['plain']:.3g}"}
        for a, b, d in graph.edges(data=True)
        if d["balanced"] is None
    ]
    overlays = [{"name": "pruned", "edgeColor": LOST, "edgeWidth": 2, "edges": pruned}]
    tasks = {"edgeOverlaysDataListLeftPane": [
        {"type": "edge_overlays", "name": "what balancing prunes", "overlays": overlays}
    ]}  # fmt: skip
    name = graph.graph.get("title", _TITLE)
    return {"label": name, "graphs": [{"id": name, "nodes": nodes, "tasksData": tasks}]}


def overlay(graph: nx.DiGraph, side: str) -> dict[str, Any]:
    """Node data of one side; both sides use the colour scale of autograd's."""
    unit = abs(graph.graph["output"][side]) or 1.0
    worst = max(moved(d["plain"]) for _, d in graph.nodes(data=True)) / unit
    results = {
        node: {
            "value": float(f"{100 * (row['created'] - row['lost']) / unit:.6g}"),
            "bgColor": paint(row, unit, worst),
        }
        for node, data in graph.nodes(data=True)
        if (row := data[side]) is not None
    }
    name = f"{NAMES[side]}: created (+) or lost (-), % of the output"
    return {graph.graph.get("title", _TITLE): {"name": name, "results": results}}
