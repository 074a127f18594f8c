"""Back-propagates through one token if only one is read.

A head reads one row of the last block's result: the class token, or a decoder's last token. Autograd fills
the gradient of the other rows with zeros, and takes them back through all ops that treat rows separately:
norms, projections, the MLP, the queries of attention. This pass computes these ops a second time, for the
one row, and the gradient comes back through that copy alone. Values still come from the full computation,
which is not recorded: kernels may round otherwise on one row. Ops that mix all rows, such as the keys and
values of attention, get their gradient as before.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from libragrad_fx.decide.flow import Facts, live, takes_gradient
from libragrad_fx.graph.notes import Undo, annotate, note
from libragrad_fx.graph.origin import in_example
from libragrad_fx.graph.schema import aten_op, bind, is_elementwise, signature, spread
from libragrad_fx.ops import insert
from libragrad_fx.ops.binding import PRODUCTS
from libragrad_fx.ops.graft import carried
from libragrad_fx.ops.insert import is_scale
from libragrad_fx.ops.places import idle, is_selection, only_place, take_one, taken
from libragrad_fx.optimise.views import elements, first, is_sized, only_moves, replay, sizes
from libragrad_fx.optimise.work import Work
from libragrad_fx.types import Kind, Location, OpFacts

_NARROW = "narrow"
_SMALL = 2**16  # up to so many elements of a product's result, calls cost more than its zeros
_FEW = 8  # below so many rows, likewise
_VIEW = OpFacts(
    "row", Kind.LINEAR, "one row of a value", Location(__name__, 1), stream=("self",), moves="view"
)
_COPY = dataclasses.replace(_VIEW, moves="copy")

Row = tuple[int, int]
"""(axis, place along it as in ``select``) of the only row that gets a gradient."""


def narrow(work: Work) -> None:
    """Back-propagate through one row if only one is read."""
    graph, facts = work.graph, work.facts
    alive = live(graph, facts)
    rows, mouths = _rows(work, alive)
    if not any(n.target in PRODUCTS and elements(n) > _SMALL for n in rows):
        for mouth, _ in mouths:
            work.no(mouth, f"no product before it has more than {_SMALL} elements")
        return
    entries = {n for n in rows if _is_entry(n, rows, alive, facts)}
    made: dict[Any, Node] = {}
    work.facts = dict(facts)
    for node in [n for n in graph.nodes if n in rows]:
        made[node, rows[node]] = new = _again(work, node, rows[node], made)
        if node.name in facts:
            work.facts[new.name] = facts[node.name]
    again = {node.name: made[node, row] for node, row in rows.items()}
    for new in again.values():  # a copied scale belongs to the copy of its host
        if (host := note(new).host) in again:
            annotate(new, host=again[host].name)
    read = [(mouth, made[x, rows[x]]) for mouth, x in mouths]
    for node in entries:
        _cut(graph, node, set(made.values()))
    for mouth, row in read:
        _join(work, mouth, row)
    for node in rows.keys() - entries:
        _plain(graph, node)


# --- where one row is enough


def _rows(work: Work, alive: set[Node]) -> tuple[dict[Node, Row], list[Any]]:
    """(the nodes of which only one row gets a gradient, with that row; (reader, node) where it is read).

    That row of a node is computed from one row of some operands, and from its other operands as a whole.
    """
    asked: dict[Node, set[Row | None]] = defaultdict(set)
    rows: dict[Node, Row] = {}
    readers: list[Node] = []
    for node in reversed(work.graph.nodes):
        if node not in alive:
            continue
        made_of: dict[Any, Row] | str = ""
        if (row := _read_row(node)) is not None:
            made_of = {node.args[0]: row}
            readers.append(node)
        elif len(asked[node]) == 1 and (row := next(iter(asked[node]))) is not None:
            made_of = _made_of(node, row, work.facts)
            if isinstance(made_of, str):
                work.no(node, made_of)
            else:
                rows[node] = row
        for operand in node.all_input_nodes:
            if takes_gradient(node, operand, alive, work.facts):
                asked[operand].add(None if isinstance(made_of, str) else made_of.get(operand))
    return rows, [(n, n.args[0]) for n in readers if n.args[0] in rows]


def _read_row(node: Node) -> Row | None:
    """The row that a node takes of its operand; None if it takes none or several, or of few."""
    found = taken(node)
    if found is None or not found.alone or not is_sized(found.x):
        return None
    if in_example(first(found.x).shape[found.axis]) < _FEW:
        return None
    return found.axis % len(sizes(found.x)), found.start


def _is_entry(node: Node, rows: dict[Node, Row], alive: set[Node], facts: Facts) -> bool:
    """Whether a node of ``rows`` sends a gradient to a node outside of it that is no parameter."""
    return isinstance(node.meta["val"], torch.Tensor) and any(
        n in alive and n.op != "get_attr" and takes_gradient(node, n, alive, facts)
        for n in node.all_input_nodes
        if n not in rows or not isinstance(n.meta["val"], torch.Tensor)
    )


# --- from which rows of its operands a row is computed


def _made_of(node: Node, row: Row, facts: Facts) -> dict[Any, Row] | str:
    """By operand, the row from which ``row`` of a node is computed; or why there is none."""
    op, fact = aten_op(node), facts.get(node.name)
    source: Any = node.args[0] if node.args else None
    if is_scale(node) or node.target in (operator.getitem, idle):
        return {source: row}
    if not isinstance(op, torch._ops.OpOverload) or op._schema.is_mutable:
        return "it is no functional op of PyTorch's"
    if not all(is_sized(n) for n in (node, *node.all_input_nodes) if hasattr(first(n), "shape")):
        return "a size of it depends on data"
    attends = fact is not None and fact.kind is Kind.ATTENTION
    if torch.Tag.nondeterministic_seeded in op.tags and not attends:
        return "it draws random numbers"
    axis, place = row
    if only_moves(node, facts):
        before = _axis_before(node, axis, facts)
        return "it moves the axis" if before is None else {source: (before, place)}
    if is_elementwise(node):
        return _broadcast(node, row)
    given, back = bind(op, node.args, node.kwargs), axis - len(sizes(node))
    if attends:
        found = _queries(given, place) if back == -2 else None
    else:
        found = _parted(node, given, back, {} if fact is None else fact.rowwise)
    leaves = pytree.tree_leaves(list(given.values()))
    if found is None:
        return "it mixes tokens"
    if any(leaves.count(n) > 1 for n in found):
        return "an operand is passed to it twice"
    return {n: (len(sizes(n)) + back, place) for n, back in found.items()}


def _axis_before(node: Node, axis: int, facts: Facts) -> int | None:
    """The operand's axis that is ``axis`` of a view, if the view also works on one row of it."""
    x: Any = node.args[0]
    whole = torch.empty(sizes(x), device="meta")
    view = first(replay(node, x, whole, facts))
    if view is None or view.shape[axis] == 1:
        return None
    steps = list(zip(whole.shape, whole.stride(), strict=True))
    step = view.shape[axis], view.stride(axis)
    if step not in steps:
        return None
    before = steps.index(step)
    row = first(replay(node, x, whole.narrow(before, 0, 1), facts, _resized(node, axis, facts)))
    want = [1 if i == axis else n for i, n in enumerate(view.shape)]
    return before if row is not None and list(row.shape) == want else None


def _resized(node: Node, axis: int, facts: Facts) -> Any:
    """A node's arguments if an axis of its result has size 1: a view's ``size`` argument is changed."""
    if not only_moves(node, facts) or node.target is operator.getitem:
        return node.args
    _, told, *_ = [*signature(aten_op(node))[0], "", ""]
    if told not in ("size", "shape"):
        return node.args
    x, given, *rest = node.args
    return (x, [1 if i == axis else n for i, n in enumerate(given)], *rest)  # type: ignore[arg-type]


def _broadcast(node: Node, row: Row) -> dict[Any, Row]:
    axis, place = row
    found: dict[Any, Row] = {}
    for n in node.all_input_nodes:
        if isinstance(n.meta["val"], torch.Tensor):
            own = axis - len(first(node).shape) + n.meta["val"].ndim
            if own >= 0 and sizes(n)[own] == sizes(node)[axis]:
                found[n] = own, place
    return found


def _parted(
    node: Node, given: dict[str, Any], back: int, rowwise: Mapping[str, int | str]
) -> dict[Any, int] | None:
    """The operands that the row key ``rowwise`` names, if rows stay apart along axis ``back``; a negative
    axis, which is that of the operands too."""
    found = {}
    for name, axes in rowwise.items():
        x = given[name]
        if len(sizes(x)) != len(sizes(node)) or back not in _apart(axes, given, len(sizes(x))):
            return None
        found[x] = back
    return found or None


def _apart(axes: int | str, given: dict[str, Any], rank: int) -> set[int]:
    """The negative axes along which rows stay apart; see ``rowwise`` in ``rules/README.md``."""
    if isinstance(axes, int):
        return {axes}
    every, but = set(range(-rank, 0)), axes.removeprefix("all").removeprefix(" but ")
    if but.startswith("len("):
        return {a for a in every if a < -len(given[but[4:-1]])}
    meet = given[but] if but in given else int(but) if but else []
    meet = meet if isinstance(meet, list | tuple) else [meet]
    return set() if None in meet else every - {d % rank - rank for d in meet}


def _queries(given: dict[str, Any], place: int) -> dict[Any, int] | None:
    """The axis of a row in attention's queries and in its mask, if causality hides no key from it."""
    q, k = (given[x].meta["val"].shape[-2] for x in ("query", "key"))
    last = place == -1 and str(q) == str(k)
    if given["dropout_p"] > 0 or (given["is_causal"] and not last):
        return None
    mask = given["attn_mask"]
    has_rows = mask is not None and len(sizes(mask)) > 1 and sizes(mask)[-2] > 1
    return {given["query"]: -2} | ({mask: -2} if has_rows else {})


# --- the row, computed again


def _again(work: Work, node: Node, row: Row, made: dict[Any, Node]) -> Node:
    """A new node for ``row`` of a node, computed from rows of its operands."""
    operands = _made_of(node, row, work.facts)
    assert isinstance(operands, dict)
    if node.target is operator.getitem and (node.args[0], row) not in made:
        return _taken(work, node, row, node.next)

    def part(n: Node) -> Node:
        if n not in operands:
            return n
        if (n, operands[n]) not in made:
            made[n, operands[n]] = _taken(work, n, operands[n], node)
        return made[n, operands[n]]

    args, kwargs = map_arg((_resized(node, row[0], work.facts), dict(node.kwargs)), part)
    if (fact := work.facts.get(node.name)) and fact.kind is Kind.ATTENTION:
        given = bind(aten_op(node), args, kwargs)
        args, kwargs = spread(aten_op(node), {**given, "is_causal": False})  # the last row sees all keys
    with work.graph.inserting_after(node):
        new = work.graph.call_function(node.target, tuple(args), kwargs)  # type: ignore[arg-type]
    new.meta.update(node.meta)
    annotate(new, undo=Undo.DROP)
    value = node.meta["val"]
    many = isinstance(value, list | tuple)
    new.meta["val"] = [_like(v, row[0]) for v in value] if many else _like(value, row[0])
    return new


def _taken(work: Work, node: Node, row: Row, before: Node) -> Node:
    """New nodes that take ``row`` of a node's value and copy it, so that the full value can be freed."""
    with work.graph.inserting_before(before):
        part, new = take_one(work.graph, node, *row)
    for n, fact in ((part, _VIEW), (new, _COPY)):
        n.meta["val"] = _like(node.meta["val"], row[0])
        annotate(n, undo=Undo.DROP)
        work.facts[n.name] = fact
    return new


def _like(value: torch.Tensor, axis: int) -> torch.Tensor:
    return value.new_empty([1 if i == axis else n for i, n in enumerate(value.shape)])


# --- the whole, not recorded


def _cut(graph: Graph, node: Node, made: set[Node]) -> None:
    """Detach behind a node, not before it: its kernel may depend on which operands require grad."""
    with graph.inserting_after(node):
        cut = graph.call_function(insert.stop, (node,))
    cut.meta["val"] = node.meta["val"]
    annotate(cut, rule=_NARROW, host=node.name, undo=Undo.PASS)
    takers = {cut} | {n for n in node.users if made & n.users.keys()}
    node.replace_all_uses_with(cut, delete_user_cb=lambda user: user not in takers)


def _join(work: Work, mouth: Node, row: Node) -> None:
    """Forward: the token from the full tensor. Backward: into the recomputed token."""
    path, graph = row, work.graph
    with graph.inserting_before(mouth.next):
        value = graph.call_function(insert.stop, (mouth,))
        if is_selection(mouth):
            path = only_place(graph, row, mouth.args[1])
            path.meta["val"] = mouth.meta["val"]
            annotate(path, undo=Undo.DROP)
            work.facts[path.name] = _VIEW
        new = graph.call_function(carried, (value, path))
    for n in (value, new):
        n.meta["val"] = mouth.meta["val"]
        annotate(n, rule=_NARROW, host=mouth.name, undo=Undo.PASS)
    mouth.replace_all_uses_with(new, delete_user_cb=lambda user: user is not value)


def _plain(graph: Graph, node: Node) -> None:
    """Undo the balancing of a node of the full computation, which gets no gradient now."""
    if is_scale(node):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        graph.erase_node(node)
    elif hasattr(node.target, "aten_op") and node.target is not idle:
        node.target = aten_op(node)
        annotate(node, rule="", host="")
