"""Back-propagates through the live features of a product alone.

In a fused qkv projection, only v carries a gradient. The balanced backward would still go through all rows
of the weight, with zeros for q and k that views had put together. This pass detaches the product's result.
Behind the views that lead to a live part, a ``graft`` sends the gradient directly to the product's
operands, through the part's own rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from libragrad_fx.decide.flow import Facts, live, takes_gradient
from libragrad_fx.graph.notes import Undo, annotate
from libragrad_fx.graph.schema import bind
from libragrad_fx.ops import insert
from libragrad_fx.ops.binding import PRODUCTS
from libragrad_fx.ops.graft import graft
from libragrad_fx.ops.insert import LEAN
from libragrad_fx.optimise.views import is_sized, only_moves, replay, sizes
from libragrad_fx.optimise.work import Work


def graft_live(work: Work) -> None:
    """Detach every product with features that get no gradient, and graft its live parts."""
    graph = work.graph
    alive = live(graph, work.facts)
    found = list(_parts(work, alive))
    taken = [[u for u in p.end.users if takes_gradient(u, p.end, alive, work.facts)] for p in found]
    for part, users in zip(found, taken, strict=True):
        operands, conv = _operands(part.product)
        with graph.inserting_after(part.end):
            new = graph.call_function(graft, (part.end, *operands, conv, part.order, part.rows))
        new.meta["val"] = part.end.meta["val"]
        annotate(new, rule=LEAN, host=part.product.name, undo=Undo.PASS)
        for user in users:
            user.replace_input_with(part.end, new)
    for product in dict.fromkeys(p.product for p in found):
        with graph.inserting_after(product):
            cut = graph.call_function(insert.stop, (product,))
        annotate(cut, rule=LEAN, host=product.name, undo=Undo.PASS)
        product.replace_all_uses_with(cut, delete_user_cb=lambda u, cut=cut: u is not cut)


@dataclasses.dataclass(frozen=True)
class Part:
    """A live part of a product's result.

    end:   the node that holds it, made from the result of ``product`` by views and copies
    order: for each axis of the result, the axes of ``end`` that it was split into
    rows:  the result's features that ``end`` holds, in the order of ``end``
    """

    end: Node
    product: Node
    order: tuple[tuple[int, ...], ...]
    rows: slice | tuple[int, ...]


def _parts(work: Work, alive: set[Node]) -> Iterator[Part]:
    """The live parts of every product with enough features that get no gradient."""
    for node in work.graph.nodes:
        if node.target not in PRODUCTS or node not in alive:
            continue
        if not _has_features(node):
            work.no(node, "its weight is a vector, or has several groups")
            continue
        if not is_sized(node):
            work.no(node, "a size of it depends on data")
            continue
        parts = _cover(node, node, alive, work.facts)
        if isinstance(parts, str):
            work.no(node, parts)
            continue
        features = sizes(node)[PRODUCTS[node.target]]
        dead = features - sum(_count(p.rows) for p in parts)
        # Each part costs one more matrix product in the backward, and one more addition into the input's
        # gradient. So a split must save a quarter of the features for each part beyond the first.
        if parts and dead > 0 and dead >= features * (len(parts) - 1) / 4:
            yield from parts
        elif parts and dead > 0:
            work.no(node, f"{len(parts)} live parts would cost more than {dead} of {features} save")
        else:
            work.no(node, "all its features get a gradient")


def _has_features(product: Node) -> bool:
    """Whether each row of the weight makes one feature: a matrix, or a convolution of one group."""
    (_, weight, _), conv = _operands(product)
    return len(sizes(weight)) > 1 and conv[-1:] in ((), (1,))


def _operands(product: Node) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(input, weight, bias), and of a convolution stride, padding, dilation and groups."""
    values = tuple(bind(product.target, product.args, product.kwargs).values())  # type: ignore[arg-type]
    return values[:3], values[3:]


def _cover(product: Node, node: Node, alive: set[Node], facts: Facts) -> list[Part] | str:
    """The smallest views that together hold all of ``node`` that gets a gradient; or why there are none."""
    parts: list[Part] = []
    for user in node.users:
        if not takes_gradient(user, node, alive, facts):
            continue
        inner = _cover(product, user, alive, facts) if only_moves(user, facts) else "read as a whole"
        if isinstance(inner, str):
            whole = part_of(product, node, facts)
            return whole if isinstance(whole, str) else [whole]
        parts += inner
    return parts


def part_of(product: Node, end: Node, facts: Facts) -> Part | str:
    """``end`` as a part of ``product``'s result, or why it is none. It is a part if it holds all other axes
    whole and in order, and features along axes of their own.
    """
    whole = torch.empty(sizes(product), device="meta")
    view = replay(end, product, whole, facts)
    if view is whole:
        return "all its features get a gradient"
    if not torch.is_tensor(view) or view._base is not whole or view.numel() == 0:
        return f"{end.name} is no view of it"  # a list of views, a copy, an empty tensor
    feature = PRODUCTS[product.target] % whole.ndim  # type: ignore[index]
    axes = [_axis(whole, n, s) for n, s in zip(view.shape, view.stride(), strict=True)]
    first, rest = divmod(int(view.storage_offset()), int(whole.stride(feature)))
    if None in axes or rest or first >= whole.shape[feature]:
        return f"an axis of {end.name} runs over several of its axes"
    held: list[list[int]] = [[] for _ in whole.shape]
    for i, axis in enumerate(axes):
        held[axis].append(i)  # type: ignore[index]
    for axis, size in enumerate(whole.shape):
        steps = [(view.shape[i], view.stride(i)) for i in held[axis] if view.shape[i] > 1]
        if axis != feature and steps != ([(size, whole.stride(axis))] if size > 1 else []):
            return f"{end.name} holds a part of another axis than that of the features"
    held[feature].sort(key=lambda i: -view.stride(i))
    rows = [first]
    for i in held[feature]:
        step = view.stride(i) // whole.stride(feature)
        rows = [r + k * step for r in rows for k in range(view.shape[i])]
    return Part(end, product, tuple(map(tuple, held)), _as_slice(rows))


def _as_slice(rows: list[int]) -> slice | tuple[int, ...]:
    """A slice if the rows are adjacent: indexing by a slice copies no weights."""
    together = rows == list(range(rows[0], rows[0] + len(rows)))
    return slice(rows[0], rows[0] + len(rows)) if together else tuple(rows)


def _count(rows: slice | tuple[int, ...]) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def _axis(whole: torch.Tensor, size: int, stride: int) -> int | None:
    """The axis of a contiguous tensor within which ``size`` steps of ``stride`` stay."""
    for axis, (n, step) in enumerate(zip(whole.shape, whole.stride(), strict=True)):
        if size == 1 or (stride % step == 0 and stride * (size - 1) < step * n and stride < step * n):
            return axis
    return None
