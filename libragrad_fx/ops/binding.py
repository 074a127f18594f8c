"""PyTorch's own Python functions in place of the ops that they call.

A captured graph names ops (``aten.add.Tensor``); called by that name, the arguments of each call are
held against the op's schema in a general way. ``torch.add`` parses them by code that was generated
from the same schema, and dispatches to the same op: some microseconds less a call, of which a small
network makes hundreds.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Container
from typing import Any

import torch
from torch.fx import Graph, Node

from libragrad_fx.ops.graft import whole

_PLACES = (torch, torch._C._nn, torch.Tensor)  # type: ignore[attr-defined]
_PREFIXES = {"special_": torch.special, "linalg_": torch.linalg, "fft_": torch.fft}
_NATIVE = (types.BuiltinFunctionType, types.MethodDescriptorType)
_OTHERWISE = {"tensor_split", "narrow", "std", "var", "std_mean", "var_mean"}
"""Ops of which Python calls another overload than the one that is meant."""


@functools.cache
def binding(op: Any) -> Callable[..., Any] | None:
    """The Python function that PyTorch generated for ``op``, where there is one."""
    name = op._schema.name.removeprefix("aten::")
    if op.namespace != "aten" or name in _OTHERWISE or "Tensor?[]" in str(op._schema):
        return None  # of the last, Python takes lists without a gap only
    found = [getattr(place, name, None) for place in _PLACES]
    for prefix, place in _PREFIXES.items():
        if name.startswith(prefix):
            found.append(getattr(place, name.removeprefix(prefix), None))
    return next((f for f in found if isinstance(f, _NATIVE)), None)


def bound(graph: Graph, tested: Container[str]) -> Graph:
    """A copy of ``graph`` that calls bindings, and nothing at all for ``x[:]``.

    tested: names of the nodes whose ops have a row in ``rules/ops.yaml``; every row's tests hold its
    binding against it.
    """
    new = Graph()
    new.output(new.graph_copy(graph, {}))
    for node in list(new.nodes):
        op = node.target
        if op is whole and not any(user.op == "output" for user in node.users):
            node.replace_all_uses_with(node.args[0])
            new.erase_node(node)
        elif isinstance(op, torch._ops.OpOverload) and node.name in tested and _is_plain(node):
            node.target = binding(op) or op
    return new


def _is_plain(node: Node) -> bool:
    """Whether those arguments alone are given by name that cannot be given otherwise: Python has
    other names for the rest (``input``, not ``self``)."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    return set(node.kwargs) <= {a.name for a in arguments if a.kwarg_only}
