"""Ops whose result size depends on values (a mask, lengths), rewritten with indices if these are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten
_BY_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
_MASKS = (torch.bool, torch.uint8)


def select_by_index(node: Node, read: Any, place: Any, shapes: dict[Node, Any]) -> None:
    """If the size of ``node``'s result depends on values, rewrite it so that the size is known.

    read:   by node whose whole numbers ``node`` reads: (count of writes into them so far, the numbers)
    place:  ``(key, make)`` -> the placeholder of a tensor of whole numbers, one for each key
    shapes: the shape of each node's result
    """
    if node.target in _BY_INDEX:
        indices: list[Any] = []
        for index in node.args[1]:  # type: ignore[union-attr]
            version, value = read.get(index, (0, None))
            if value is None or value.dtype not in _MASKS:
                indices.append(index)
                continue
            columns = value.nonzero(as_tuple=True)
            indices += [place((index, version, i), lambda c=c: c) for i, c in enumerate(columns)]
        node.args = (node.args[0], indices, *node.args[2:])
    elif node.target is aten.masked_select.default:
        x, mask = node.args
        version, value = read[mask]
        shape = torch.broadcast_shapes(shapes[x], value.shape)  # type: ignore[index]
        columns = value.expand(shape).nonzero(as_tuple=True)
        with node.graph.inserting_before(node):
            wide = node.graph.call_function(aten.expand.default, (x, [*shape]))
        node.target = aten.index.Tensor
        indices = [place((mask, version, i), lambda c=c: c) for i, c in enumerate(columns)]
        node.args = (wide, indices)
    elif node.target is aten.repeat_interleave.self_Tensor:
        axis = (node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")) or 0
        node.kwargs = {**node.kwargs, "output_size": shapes[node][axis]}
    elif node.target is aten._pack_padded_sequence.default:
        x, lengths, batch_first = node.args
        version, count = read[lengths]
        held = torch.arange(int(count.max()))[:, None] < count.cpu()
        indices = _columns(held, batch_first, (lengths, version), place)
        _replace_first(node, lambda g: g.call_function(aten.index.Tensor, (x, indices)))
    elif node.target is aten._pad_packed_sequence.default:
        x, sizes, batch_first, value, _ = node.args
        version, count = read[sizes]
        held = torch.arange(int(count.max())) < count.cpu()[:, None]
        indices = _columns(held, batch_first, (sizes, version), place)

        def padded(g: Graph) -> Node:
            empty = g.call_function(aten.new_full.default, (x, [*shapes[node]], value))
            return g.call_function(aten.index_put.default, (empty, indices, x))

        _replace_first(node, padded)


def _columns(held: torch.Tensor, batch_first: Any, key: Any, place: Any) -> list[Node]:
    """The indices of packed elements in the padded tensor. held: which (step, sequence) has an element."""
    columns = held.nonzero(as_tuple=True)
    nodes = [place((*key, i), lambda c=c: c) for i, c in enumerate(columns)]
    return nodes[::-1] if batch_first else nodes


def _replace_first(node: Node, make: Callable[[Graph], Node]) -> None:
    with node.graph.inserting_before(node):
        new = make(node.graph)
    for user in [*node.users]:
        if user.args[1] == 0:
            user.replace_all_uses_with(new)
            node.graph.erase_node(user)
