"""Finds gated activations and their product, which one op computes and saves less (``ops.gate``)."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from libragrad_fx.decide.flow import Facts
from libragrad_fx.graph.notes import annotate
from libragrad_fx.ops.binding import PRODUCTS
from libragrad_fx.optimise.features import Part, part_of
from libragrad_fx.optimise.scales import halved
from libragrad_fx.optimise.views import is_sized, only_cuts, sizes
from libragrad_fx.optimise.work import Work

Gate = tuple[int, bool, tuple[int, bool] | None]


def mark(work: Work) -> None:
    """Mark each ``act(x) * y`` whose gradient is halved; ``execute`` calls one op for it."""
    for node in work.graph.nodes:
        product = halved(node)
        if product is None or not all(isinstance(a, Node) for a in product.args):
            continue
        found = _gate(product, work.facts)
        if isinstance(found, str):
            work.no(node, found)
        elif found is not None:
            annotate(node, gate=found)


def _gate(product: Node, facts: Facts) -> Gate | str | None:
    """The arguments (at, over, halves) of ``gated`` for a product; a reason why not; None if neither factor
    is an activation."""
    reason = None
    for at in (0, 1):
        act: Any = product.args[at]
        value: Any = product.args[1 - at]
        if not hasattr(act.target, "slopes"):
            continue
        if len(act.users) > 1:
            reason = "its activation is read by others"
        elif not _alike(act, value):
            reason = "its factors have different shapes or dtypes"
        else:
            x, y = (value, act.args[0]) if at else (act.args[0], value)
            over = x is not y and all(n.target in PRODUCTS and len(n.users) == 1 for n in (x, y))
            halves = _halves(x, y, {act, product}, facts)
            return at, over or halves is not None, halves
    return reason


def _alike(a: Node, b: Node) -> bool:
    """Whether two values have the same symbolic shape and the same dtype."""
    x, y = a.meta["val"], b.meta["val"]
    return a is not b and str(x.shape) == str(y.shape) and x.dtype == y.dtype


def _halves(x: Any, y: Any, readers: set[Node], facts: Facts) -> tuple[int, bool] | None:
    """(axis, whether ``x`` is the second half) if ``x`` and ``y`` are the halves of one product's result
    and only ``readers`` read them; else None."""
    product = x
    while product.target not in PRODUCTS:
        if not only_cuts(product, facts):
            return None
        product = product.args[0]
    if x is y or not is_sized(product) or _readers(product, facts) != readers:
        return None
    parts = [part_of(product, n, facts) for n in (x, y)]
    axis = PRODUCTS[product.target] % len(sizes(product))
    half = sizes(product)[axis] // 2
    first, second = slice(0, half), slice(half, 2 * half)
    rows = [p.rows if isinstance(p, Part) else None for p in parts]
    return (axis, rows[0] == second) if rows in ([first, second], [second, first]) else None


def _readers(node: Node, facts: Facts) -> set[Node]:
    """The readers of a value, or of a part that views cut out of it."""
    return {r for u in node.users for r in (_readers(u, facts) if only_cuts(u, facts) else {u})}
