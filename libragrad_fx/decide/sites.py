"""(graph, analysis) -> ``Site``s: the nodes that a gradient passes, and the facts the ledger needs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from libragrad_fx.decide.flow import signal
from libragrad_fx.decide.roles import kind_of
from libragrad_fx.graph.origin import module_path, source_line
from libragrad_fx.graph.schema import aten_op, members, op_name
from libragrad_fx.types import Analysis, ArgSpec, Kind, OpFacts, Site

_EXPLICIT = {Kind.LINEAR, Kind.PRODUCT, Kind.NORMALISER, Kind.RECURRENT, Kind.EMBEDDING}


def sites(graph: Graph, inputs: Sequence[ArgSpec], analysis: Analysis) -> tuple[Site, ...]:
    """The ops of a graph, balanced or not, that a gradient passes on its way to the model's input."""
    found = []
    symbol = next((s.shape[0] for s in inputs if s.shape and isinstance(s.shape[0], str)), None)
    for node, live in signal(graph, analysis).items():
        fact, op = analysis.facts.get(node.name), aten_op(node)
        if not isinstance(op, torch._ops.OpOverload):
            continue  # getitem, guard: they return an argument
        explicit = fact is not None and kind_of(node, fact) in _EXPLICIT
        bias = None if fact is None else _bias_name(node, fact, live)
        where = (module_path(node), source_line(node))
        value = node.meta.get("val")
        values = value if isinstance(value, (tuple, list)) else (value,)
        batch = tuple(_batch_axis(v, symbol) for v in values)
        starts = fact is not None and fact.kind is Kind.EMBEDDING and not live
        found.append(Site(node.name, op_name(op), *where, live, bias, explicit, batch, starts))
    return tuple(found)


def _batch_axis(value: Any, symbol: str | None) -> int | None:
    """The first axis whose traced size is the batch size or a multiple of it; None if that is not known."""
    if symbol is None or not isinstance(value, torch.Tensor):
        return None
    mentions = (i for i, d in enumerate(value.shape) if symbol in re.findall(r"\w+", str(d)))
    return next(mentions, None)


def _bias_name(node: Node, fact: OpFacts, live: Sequence[str]) -> str | None:
    """The name (in ``BIASES``) of how a node's constant is computed; None if it is always zero."""
    if fact.bias != "at_zero":
        return None if fact.bias == "none" else fact.bias
    if fact.kind in (Kind.GATED, Kind.GATE_SOURCE):
        return None if fact.at_zero == 0 else "at_zero"
    multiplied = (*fact.factors, *fact.denominator)
    if live and not any(k.partition("[")[0] in (*fact.stream, *multiplied) for k in live):
        return None  # only gates are live: there is no constant (A⁻¹ B at A = 0 is infinite)
    if fact.kind is Kind.PRODUCT and not any(k.partition("[")[0] in multiplied for k in live):
        return "at_zero"  # only the offset is live, so the product is a constant
    added = any(k not in live and m != 0 for k, m in members(node, fact.stream))
    return "at_zero" if fact.constant or added else None
