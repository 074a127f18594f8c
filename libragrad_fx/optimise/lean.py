"""Dead-gradient elimination (design §6): the graph that runs, where nobody listens to submodules.

The balanced graph says what the backward *is*; much of what it would compute is zero. A product of
whose features only some get a gradient (the fused qkv projection, of which v alone carries) would
back-propagate zeros through all its rows, after views had gathered them into a tensor. Here it
back-propagates through the live rows alone: its result is cut off, and behind the views that lead
to the live part a ``graft`` sends the gradient to the product's operands directly. A product of two
values halves its gradient on the way. Forward and gradients are those of the balanced graph.
Probes, which are for listeners, are left out as well.
"""

from __future__ import annotations

import dataclasses
import operator
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from libragrad_fx.decide.flow import Facts, live, takes_gradient
from libragrad_fx.graph.alias import is_fresh
from libragrad_fx.graph.notes import Undo, annotate, note
from libragrad_fx.graph.schema import bind
from libragrad_fx.ops import insert
from libragrad_fx.ops.binding import PRODUCTS, mark
from libragrad_fx.ops.insert import LEAN, is_scale
from libragrad_fx.optimise.execute import IN_PLACE
from libragrad_fx.optimise.graft import graft, idle, whole
from libragrad_fx.optimise.narrow import narrow
from libragrad_fx.optimise.product import halved_mul
from libragrad_fx.optimise.views import elements, is_sized, only_moves, replay, sizes

aten = torch.ops.aten
_SMALL = 2**16  # elements
_UNREAD = {
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.batch_norm.default,
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor,
}  # fmt: skip
"""Ops that make new memory, which their backward does not read."""
_JOINS = {aten.stack.default, aten.cat.default}
_CUTS = {"chunk", "split", "split_with_sizes", "tensor_split", "slice", "narrow"}


# --- what can be grafted, found where shapes are known


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of a product's result of which alone a gradient comes back.

    end:   the node that holds it: what views and copies make of the result of ``product``
    order: for each axis of the result, the axes of ``end`` that make it up
    rows:  the result's features that ``end`` holds, in its order
    """

    end: Node
    product: Node
    order: tuple[tuple[int, ...], ...]
    rows: slice | tuple[int, ...]


def _parts(graph: Graph, alive: set[Node], facts: Facts) -> Iterator[_Part]:
    """The live parts of every product of which not all features get a gradient."""
    for node in graph.nodes:
        if node.target not in PRODUCTS or node not in alive or not _has_features(node):
            continue
        if not is_sized(node):
            continue
        parts = _cover(node, node, alive, facts) or []
        features = sizes(node)[PRODUCTS[node.target]]
        dead = features - sum(_count(p.rows) for p in parts)
        # each part is a product of its own backwards, and one more sum over what went in
        if parts and dead > 0 and dead >= features * (len(parts) - 1) / 4:
            yield from parts


def _has_features(product: Node) -> bool:
    """Whether a row of the weight makes a feature: it is a matrix, of one group."""
    (_, weight, _), conv = _operands(product)
    return len(sizes(weight)) > 1 and conv[-1:] in ((), (1,))


def _operands(product: Node) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(input, weight, bias), and of a convolution stride, padding, dilation and groups."""
    values = tuple(bind(product.target, product.args, product.kwargs).values())  # type: ignore[arg-type]
    return values[:3], values[3:]


def _cover(product: Node, node: Node, alive: set[Node], facts: Facts) -> list[_Part] | None:
    """Parts that hold all of ``node`` that gets a gradient, as small as views can make them."""
    parts: list[_Part] = []
    for user in node.users:
        if not takes_gradient(user, node, alive, facts):
            continue
        inner = _cover(product, user, alive, facts) if only_moves(user) else None
        if inner is None:
            whole = _part(product, node)
            return None if whole is None else [whole]
        parts += inner
    return parts


def _part(product: Node, end: Node) -> _Part | None:
    """Where the elements of ``end`` lie in ``product``'s result; None if they are no plain part of it:
    every other axis whole, in order, and the features along axes of their own.
    """
    whole = torch.empty(sizes(product), device="meta")
    view = replay(end, product, whole)
    if not torch.is_tensor(view) or view._base is not whole or view.numel() == 0:
        return None  # a list of parts, a copy, nothing
    feature = PRODUCTS[product.target] % whole.ndim  # type: ignore[index]
    axes = [_axis(whole, n, s) for n, s in zip(view.shape, view.stride(), strict=True)]
    first, rest = divmod(int(view.storage_offset()), int(whole.stride(feature)))
    if None in axes or rest or first >= whole.shape[feature]:
        return None
    held: list[list[int]] = [[] for _ in whole.shape]
    for i, axis in enumerate(axes):
        held[axis].append(i)  # type: ignore[index]
    for axis, size in enumerate(whole.shape):
        steps = [(view.shape[i], view.stride(i)) for i in held[axis] if view.shape[i] > 1]
        if axis != feature and steps != ([(size, whole.stride(axis))] if size > 1 else []):
            return None
    held[feature].sort(key=lambda i: -view.stride(i))
    rows = [first]
    for i in held[feature]:
        step = view.stride(i) // whole.stride(feature)
        rows = [r + k * step for r in rows for k in range(view.shape[i])]
    return _Part(end, product, tuple(map(tuple, held)), _as_slice(rows))


def _as_slice(rows: list[int]) -> slice | tuple[int, ...]:
    """A slice where they lie side by side: it copies no weights."""
    together = rows == list(range(rows[0], rows[0] + len(rows)))
    return slice(rows[0], rows[0] + len(rows)) if together else tuple(rows)


def _count(rows: slice | tuple[int, ...]) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def _axis(whole: torch.Tensor, size: int, stride: int) -> int | None:
    """The axis of a contiguous tensor that ``size`` steps of ``stride`` stay in."""
    for axis, (n, step) in enumerate(zip(whole.shape, whole.stride(), strict=True)):
        if size == 1 or (
            stride % step == 0 and stride * (size - 1) < step * n and stride < step * n
        ):
            return axis
    return None


# --- the graph that runs


def lean(graph: Graph, facts: Facts) -> tuple[Graph, Facts]:
    """A graph with ``graph``'s forward and gradients that back-propagates fewer zeros, and the facts about
    its ops.

    graph: balanced, without probes, with the traced values in ``meta["val"]``; it is changed.
    """
    for node in graph.nodes:
        if node.target is aten.dropout.default and (node.args[1] == 0 or not node.args[2]):
            node.target = idle
            annotate(node, rule=LEAN, host=node.name)
    facts = narrow(graph, facts)
    alive = live(graph, facts)
    found = list(_parts(graph, alive, facts))
    taken = [[u for u in p.end.users if takes_gradient(u, p.end, alive, facts)] for p in found]
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
    for node in list(filter(is_scale, graph.nodes)):
        _halve(graph, node)
    for node in [n for n in graph.nodes if n.target in _JOINS]:
        _merge(graph, node)
    for node in graph.nodes:
        if (gate := _gate(node)) is not None:
            annotate(node, gate=gate)
    shown = _shown(graph)
    _fix(graph, shown)
    for node in graph.nodes:
        if node.target is aten.slice.Tensor and _takes_all(node):
            node.target = whole
            annotate(node, rule=LEAN, host=node.name)
        elif node.target is aten.select.int and node in alive - shown and (place := _place(node)):
            annotate(node, place=place)
        elif (node.target in IN_PLACE and _writes_over(node)) or _reads_last(node):
            annotate(node, over=True)
    mark(graph)
    graph.lint()
    return graph, facts


def _shown(graph: Graph) -> set[Node]:
    """What may lie in memory that the user gets, who may write to it."""
    shown = set[Node]()
    for node in reversed(graph.nodes):
        if node.op == "output" or (node in shown and not is_fresh(node)):
            shown.update(node.all_input_nodes)
    return shown


def _fix(graph: Graph, shown: set[Node]) -> None:
    """Mark what need not be computed at every call: small values that depend on no input and no
    parameter (masks, tables of positions)."""
    for node in graph.nodes:
        if node not in shown and _is_fixed(node):
            annotate(node, fixed=True)


def _is_fixed(node: Node) -> bool:
    op, value = node.target, node.meta.get("val")
    if isinstance(op, torch._ops.OpOverload):
        if op._schema.is_mutable or torch.Tag.nondeterministic_seeded in op.tags:
            return False
    elif op is not operator.getitem:
        return False
    if not isinstance(value, torch.Tensor) or any(not isinstance(n, int) for n in value.shape):
        return False
    return value.numel() <= _SMALL and all(note(n).fixed for n in node.all_input_nodes)


def _takes_all(node: Node) -> bool:
    """Whether a slice keeps its axis as it is. An axis that may have another size ends at 2^63 - 1."""
    x, dim, start, end, step = bind(node.target, node.args, node.kwargs).values()  # type: ignore[arg-type]
    size = x.meta["val"].shape[dim] if "val" in x.meta else sys.maxsize
    known = size if isinstance(size, int) else sys.maxsize
    return (
        start in (0, None)
        and step == 1
        and (end is None or (isinstance(end, int) and end >= known))
    )


def _place(node: Node) -> tuple[int, int, int] | None:
    """Along which axis a ``select`` takes which place of how many, where these numbers are fixed."""
    x, axis, place = node.args
    shape = x.meta["val"].shape  # type: ignore[union-attr]
    count = shape[axis]
    if not (isinstance(place, int) and isinstance(count, int)):
        return None
    return axis % len(shape), place % count, count  # type: ignore[operator]


def _writes_over(node: Node) -> bool:
    """Whether ``node`` alone reads its first operand, which is as large, and new memory of an op whose
    backward does not read it."""
    x: Any = node.args[0]
    if x.target not in _UNREAD or len(x.users) > 1 or x in node.args[1:] or note(x).fixed:
        return False
    if node.target is aten.leaky_relu.default and not (len(node.args) < 2 or node.args[1] > 0):  # type: ignore[operator]
        return False
    a, b = x.meta["val"], node.meta["val"]
    return str(a.shape) == str(b.shape) and a.dtype == b.dtype and a.is_floating_point()


def _reads_last(node: Node) -> bool:
    """Whether an activation alone reads its operand, a product or a view of one: new memory that no
    backward keeps, where it may leave its slope."""
    if not hasattr(node.target, "over"):
        return False
    x: Any = node.args[0]
    while len(x.users) == 1 and only_moves(x):
        x = x.args[0]
    return x.target in PRODUCTS and len(x.users) == 1


def _halve(graph: Graph, scale: Node) -> None:
    """``mul`` and a scale by 1/2 on its result become one twin, where a pass over memory costs more
    than a call from Python."""
    host = _halved(scale)
    if host is not None and (not is_sized(host) or elements(host) > _SMALL):
        host.target = halved_mul
        annotate(host, rule=LEAN, host=host.name)
        scale.replace_all_uses_with(host)
        graph.erase_node(scale)


def _merge(graph: Graph, join: Node) -> None:
    """One scale behind ``join`` for equal ones on all that it joins: the steps of a scan have many."""
    joined: Any = join.args[0]
    found = [_scale_above(x) for x in joined] if isinstance(joined, list | tuple) else []
    scales = [s for s in found if s is not None]
    if len(scales) < max(2, len(found)) or len({s.args[1:] for s in scales}) > 1:
        return
    with graph.inserting_after(join):
        behind = graph.call_function(insert.scale, (join, *scales[0].args[1:]))
    behind.meta["val"] = join.meta["val"]
    annotate(behind, rule=LEAN, host=join.name, undo=Undo.PASS)
    join.replace_all_uses_with(behind, delete_user_cb=lambda user: user is not behind)
    for scale in dict.fromkeys(scales):
        scale.replace_all_uses_with(scale.args[0])  # type: ignore[arg-type]
        graph.erase_node(scale)


def _scale_above(node: Any) -> Node | None:
    """The gradient scale that a value is read through, views and copies apart, and by nobody else."""
    while len(node.users) == 1 and not is_scale(node) and only_moves(node):
        node = node.args[0]
    return node if is_scale(node) and len(node.users) == 1 and node.args[1] else None


def _halved(node: Node) -> Node | None:
    """The product of two real values whose result, of half the gradient, ``node`` is."""
    if node.target is halved_mul:
        return node
    if not is_scale(node):
        return None
    host, factor, *_ = node.args
    assert isinstance(host, Node)
    alone = host.target is aten.mul.Tensor and factor == 0.5 and len(host.users) == 1
    return host if alone and not host.meta["val"].is_complex() else None


# --- gated activations


def _gate(node: Node) -> tuple[int, bool, tuple[int, bool] | None] | None:
    """How ``node`` is ``act(x) * y`` of half the gradient, in the words of ``gated``; None if not."""
    product = _halved(node)
    if product is None or not all(isinstance(a, Node) for a in product.args):
        return None
    for at in (0, 1):
        act: Any = product.args[at]
        value: Any = product.args[1 - at]
        if hasattr(act.target, "slopes") and len(act.users) == 1 and _alike(act, value):
            x, y = (value, act.args[0]) if at else (act.args[0], value)
            over = x is not y and all(n.target in PRODUCTS and len(n.users) == 1 for n in (x, y))
            halves = _halves(x, y, {act, product})
            return at, over or halves is not None, halves
    return None


def _alike(a: Node, b: Node) -> bool:
    """Whether two values have one shape, whatever the sizes of the inputs, and one dtype."""
    x, y = a.meta["val"], b.meta["val"]
    return a is not b and str(x.shape) == str(y.shape) and x.dtype == y.dtype


def _halves(x: Any, y: Any, readers: set[Node]) -> tuple[int, bool] | None:
    """The axis of a product's result of which ``x`` and ``y`` are the halves, that only ``readers``
    read, and whether ``x`` is the second of them."""
    product = x
    while product.target not in PRODUCTS:
        if not _only_cuts(product):
            return None
        product = product.args[0]
    if x is y or not is_sized(product) or _readers(product) != readers:
        return None
    parts = [_part(product, n) for n in (x, y)]
    axis = PRODUCTS[product.target] % len(sizes(product))
    half = sizes(product)[axis] // 2
    first, second = slice(0, half), slice(half, 2 * half)
    rows = [p and p.rows for p in parts]
    return (axis, rows[0] == second) if rows in ([first, second], [second, first]) else None


def _only_cuts(node: Node) -> bool:
    """Whether a node's value is its operand between two places of one axis, or a list of such."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._opname in _CUTS
    return node.target is operator.getitem


def _readers(node: Node) -> set[Node]:
    """What reads a value, or what is cut out of it."""
    return {r for u in node.users for r in (_readers(u) if _only_cuts(u) else {u})}
