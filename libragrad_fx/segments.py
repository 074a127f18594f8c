"""Activation checkpointing: keep the values that cross a few cuts of the graph, and recompute the rest."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint

from libragrad_fx.errors import InputError
from libragrad_fx.module.captured import CapturedModule, one_graph


class _Segment(torch.nn.Module):
    """A part of a graph whose activations are recomputed in the backward."""

    def __init__(self, part: torch.nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: Any) -> Any:
        return checkpoint(self.part, *args, use_reentrant=False)


def checkpointed(gm: CapturedModule, segments: int | None = None) -> GraphModule:
    """``gm`` with the same output and gradients in less memory, for about one more forward.

    The graph is cut where few values cross (between blocks), into parts of about equal length. Only the
    inputs of each part are kept, and the backward runs the part again (``torch.utils.checkpoint``).

    Args:
        gm: the result of ``transform`` or ``trace``; it is not changed, parameters are shared.
        segments: the number of parts. The default, sqrt(nodes / 10), makes the memory between parts about
            equal to the memory within one.

    Returns:
        A module to call like ``gm``. Its submodules are the parts: hooks belong on ``gm``.

    Raises:
        InputError: ``gm`` was not captured, or ``segments`` is less than one or too many.
    """
    graph = Graph()
    graph.output(graph.graph_copy(one_graph(gm).lean or gm.graph, {}))
    inside = [n for n in graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
    count = math.isqrt(max(1, len(inside) // 10)) if segments is None else segments
    if not isinstance(count, int) or not 1 <= count <= len(inside):
        raise InputError(f"segments must be from 1 to {len(inside)}, the nodes of the graph: {count!r}")
    cuts = _cuts(graph, inside, count)
    part = {n: sum(i >= c for c in cuts) for i, n in enumerate(inside)}
    module = split_module(GraphModule(gm, graph), gm, lambda n: part[n], keep_original_order=True)
    for name, child in list(module.named_children()):
        if name.startswith("submod_"):
            setattr(module, name, _Segment(child))
    return module.train(gm.training)  # type: ignore[return-value]


def _cuts(graph: Graph, inside: list[Node], count: int) -> list[int]:
    """The indices of the nodes to cut before: at about equal distances, where the fewest values cross."""
    place = {n: i for i, n in enumerate(inside)}
    crossing = [0] * (len(inside) + 1)
    for node, start in place.items():
        last = max((place.get(u, len(inside)) for u in node.users), default=start)
        for i in range(start + 1, last + 1):
            crossing[i] += 1
    step = len(inside) / count
    cuts = []
    for k in range(1, count):
        near = range(*(math.ceil((k + side) * step) for side in (-0.5, 0.5)))
        cuts.append(min(near, key=lambda i, at=k * step: (crossing[i], abs(i - at))))
    return cuts
