"""Graphs as plain data, for pickles: fx would re-trace generated code, and lose twins and source lines."""

from __future__ import annotations

import dataclasses
import importlib
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx.node import map_aggregate

from libragrad_fx.graph import notes
from libragrad_fx.graph.origin import FORM, form, origin
from libragrad_fx.ops import TWINS, insert
from libragrad_fx.ops.activation import secant
from libragrad_fx.ops.share import shared
from libragrad_fx.ops.temper import tempered

_INSERTS = {
    insert.guard: "guard", insert.constant: "constant", insert.scale: "scale",
    insert.probe: "probe", insert.structure: "structure", insert.sizes: "sizes",
}  # fmt: skip
_MADE: dict[str, Any] = {"secant": secant, "temper": tempered, "share": shared}
"""Twins that are made from an op and plain values, which they keep under this name."""


@dataclasses.dataclass(frozen=True)
class _Ref:
    name: str


@dataclasses.dataclass(frozen=True)
class _Constant:
    name: str


def spelled(graph: torch.fx.Graph) -> list[Any]:
    return [
        (n.op, n.name, _encode(n.target) if n.op == "call_function" else n.target,
         _refs(n.args), _refs(n.kwargs), {k: _plain(v) for k, v in _kept(n).items()})
        for n in graph.nodes
    ]  # fmt: skip


def _kept(node: torch.fx.Node) -> dict[str, Any]:
    """The part of a node's ``meta`` that is pickled: our note, its form, its place in the user's code."""
    noted = {notes.KEY: node.meta[notes.KEY]} if notes.KEY in node.meta else {}
    return noted | {FORM: form(node)} | origin(node)


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _refs(args: Any) -> Any:
    def ref(a: Any) -> Any:
        if isinstance(a, torch.memory_format):  # ``torch.save`` cannot pickle it
            return _Constant(str(a).removeprefix("torch."))
        return _Ref(a.name) if isinstance(a, torch.fx.Node) else a

    return map_aggregate(args, ref)


def graph_of(nodes: list[Any]) -> torch.fx.Graph:
    graph, by_name = torch.fx.Graph(), {}

    def real(a: Any) -> Any:
        if isinstance(a, _Constant):
            return getattr(torch, a.name)
        return by_name[a.name] if isinstance(a, _Ref) else a

    for op, name, target, args, kwargs, meta in nodes:
        target = _decode(target) if op == "call_function" else target
        args, kwargs = map_aggregate(args, real), map_aggregate(kwargs, real)
        node = graph.create_node(op, target, args, kwargs, name)
        node.meta.update(meta)
        by_name[name] = node
    return graph


def _encode(target: Any) -> tuple[str, Any]:
    if isinstance(target, torch._ops.OpOverload):
        return "op", str(target)
    if target in _INSERTS:
        return "insert", _INSERTS[target]
    for kind in _MADE:
        if (made_of := getattr(target, kind, None)) is not None:
            op, *numbers = made_of
            return kind, (str(op), *numbers)
    if TWINS.get(getattr(target, "__name__", "")) is target:
        return "twin", target.__name__
    module = "operator" if target.__module__ == "_operator" else target.__module__
    return "python", f"{module}:{target.__qualname__}"


def _decode(code: tuple[str, Any]) -> Any:
    kind, name = code
    if kind == "op":
        return operator.attrgetter(name)(torch.ops)
    if kind in _MADE:
        op, *numbers = name
        return _MADE[kind](operator.attrgetter(op)(torch.ops), *numbers)
    if kind == "insert":
        return getattr(insert, name)
    if kind == "twin":
        return TWINS[name]
    module, _, qualified = name.partition(":")
    return operator.attrgetter(qualified)(importlib.import_module(module))
