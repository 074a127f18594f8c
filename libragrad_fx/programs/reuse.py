"""Ops of a flat graph that write over an operand which nothing reads any more, in place of new memory.

New memory costs more than the arithmetic of a pointwise op: the operating system hands it out page by page.
Small constants (masks, tables of positions) are marked, so that they are computed once and stay.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from libragrad_fx.graph.alias import is_fresh, memory
from libragrad_fx.graph.notes import note
from libragrad_fx.graph.schema import is_elementwise
from libragrad_fx.optimise.reuse import constants
from libragrad_fx.optimise.work import Work

aten = torch.ops.aten


def reuse(graph: Graph) -> Graph:
    """A copy of a settled ``graph`` in which pointwise ops write over an operand of their shape, dtype and
    strides, if the graph itself has made its memory and they read it last. Bits stay the same.

    A view is a ``reshape`` there, which copies if a result lies otherwise than the traced one.
    """
    new = Graph()
    new.output(new.graph_copy(graph, {}))
    constants(Work(new, {}))
    owner = memory(new)
    last = {owner[read]: node for node in new.nodes for read in node.all_input_nodes}
    for node in new.nodes:
        if node.target is aten.view.default:  # PyTorch's fake kernels do not know all strides
            node.target = aten.reshape.default
        into = next((x for x in _operands(node) if _is_free(x, node, owner, last)), None)
        if into is None:
            continue
        name, node.target = _with_out(node.target)  # type: ignore[misc]
        node.kwargs = {**node.kwargs, name: into}
        if node in last:
            last[owner[into]] = last.pop(node)
        for n in [n for n, first in owner.items() if first is node]:  # its views too
            owner[n] = owner[into]
    return new


def _operands(node: Node) -> list[Node]:
    """The operands that an op may write over, as far as its kind says."""
    if note(node).fixed or not is_elementwise(node) or not _with_out(node.target):  # type: ignore[arg-type]
        return []
    return node.all_input_nodes


@functools.cache
def _with_out(op: torch._ops.OpOverload) -> tuple[str, torch._ops.OpOverload] | None:
    """The form of ``op`` that writes into a given tensor, and that argument's name; None if it has none."""

    def names(form: torch._ops.OpOverload, out: bool) -> list[str]:
        return [f"{a.name} {a.type}" for a in form._schema.arguments if a.is_out == out]

    packet = op._overloadpacket
    forms = [getattr(packet, name) for name in packet.overloads()]
    # a generated form computes into new memory and copies
    forms = [f for f in forms if torch.Tag.generated not in f.tags and len(names(f, True)) == 1]
    forms = [f for f in forms if names(f, False) == names(op, False)]
    return (names(forms[0], True)[0].partition(" ")[0], forms[0]) if forms else None


def _is_free(x: Node, node: Node, owner: dict[Node, Node], last: dict[Node, Node]) -> bool:
    """Whether ``node`` may write over its operand ``x``."""
    mine, made, read = owner[x], node.meta.get("val"), x.meta.get("val")
    if last.get(mine) is not node or not _is_new(mine):
        return False
    if any(owner[n] is mine for n in node.all_input_nodes if n is not x):
        return False  # a part of it, or its transpose: read at another place than is written
    return isinstance(made, torch.Tensor) and isinstance(read, torch.Tensor) and _form(made) == _form(read)


def _is_new(node: Node) -> bool:
    """Whether a node that shares no memory with its operands makes its own at each call."""
    return not note(node).fixed and (is_fresh(node, None) or node.target is operator.getitem)


def _form(x: torch.Tensor) -> Any:
    """What two tensors have in common if one can hold the other. A free size is its expression."""
    sizes = [str(n) for n in x.shape]
    strides = [str(s) for s, n in zip(x.stride(), sizes, strict=True) if n != "1"]
    return sizes, strides, x.dtype, x.device, x.layout
