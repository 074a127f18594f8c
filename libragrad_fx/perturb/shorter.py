"""Runs what lies behind a sequence of tokens on some of its tokens.

A captured graph is of one length: sizes are written into views, and tables of positions are as long as the
sequence. So each op behind the sequence is looked at once (``plan``): which axes of its result count
tokens, which places it takes, and which tables it meets. Then the ops run on any choice of tokens (``run``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from libragrad_fx.decide.flow import hands_on
from libragrad_fx.errors import InputError
from libragrad_fx.graph.schema import bind, is_elementwise, spread
from libragrad_fx.types import Kind, OpFacts

Tensor = torch.Tensor


class Ends(NamedTuple):
    """What an axis counts beside the tokens that may go.

    front, behind: places of the sequence in front of them, and behind them
    outer, inner:  of an axis that is several, joined (tokens and samples): the sizes of those outside the
                   sequence, and of those inside
    """

    front: int
    behind: int
    outer: int = 1
    inner: int = 1


Axes = Mapping[int, Ends]
"""The axes of a value that count tokens."""
_SIZES = ("size", "shape")
"""The names of a result's sizes in schemas."""


class Refused(InputError):
    """A model that cannot run on fewer tokens, and why. place: the one token that it reads by its place."""

    def __init__(self, why: str, place: int | None = None) -> None:
        super().__init__(why)
        self.place = place


@dataclasses.dataclass(frozen=True)
class Step:
    """One op behind the sequence.

    axes:   of each tensor of its result
    tables: by argument (the index of a leaf), which of its axes are as long as the sequence
    parts:  of an op that takes places of the sequence, for each tensor of its result: the axis, the first
            place and the place behind the last, of all places
    """

    node: Node
    axes: tuple[Axes, ...]
    tables: Mapping[int, Axes] = dataclasses.field(default_factory=dict)
    parts: tuple[tuple[int, int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """The ops behind ``start``, in order."""

    start: Node
    axes: Axes
    steps: tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class Whole:
    """A run on all tokens.

    values: of ``start``, and of the nodes that do not depend on it
    shapes: of each node, those of the tensors of its value
    """

    values: Mapping[Node, Any]
    shapes: Mapping[Node, tuple[tuple[int, ...], ...]]

    def shape(self, node: Node) -> tuple[int, ...]:
        return self.shapes[node][0]


def shapes_of(value: Any) -> tuple[tuple[int, ...], ...]:
    """The shape of each tensor of a value."""
    return tuple(tuple(t.shape) for t in pytree.tree_leaves(value) if isinstance(t, Tensor))


@dataclasses.dataclass(frozen=True)
class Kept:
    """The tokens that stay, of each sample: ``at`` (B, K), int64, of ``tokens``."""

    at: Tensor
    tokens: int

    def length(self, ends: Ends) -> int:
        return (ends.front + self.at.shape[1] + ends.behind) * ends.outer * ends.inner

    def shape(self, full: Sequence[int], axes: Axes) -> list[int]:
        return [self.length(axes[i]) if i in axes else n for i, n in enumerate(full)]

    def of(self, x: Tensor, axes: Axes) -> Tensor:
        """The places of ``x`` that stay. A table of all samples becomes one for each."""
        for axis, ends in axes.items():
            places = self._places(ends)
            index = places.view(len(places), *[1] * (axis - 1), -1, *[1] * (x.ndim - axis - 1))
            x = x.expand(len(places), *x.shape[1:]).take_along_dim(index, axis)
        return x

    def part(self, x: Tensor, ends: Ends, part: tuple[int, int, int]) -> Tensor:
        """Places of ``x``, which has lost some. ``part`` is of all places."""
        axis, first, last = part
        gone = self.tokens - self.at.shape[1]
        first, last = (p if p <= ends.front else p - gone for p in (first, last))
        return x.narrow(axis, first, last - first)

    def _places(self, ends: Ends) -> Tensor:
        front = ends.front
        counted = torch.arange(front + ends.behind, device=self.at.device).expand(len(self.at), -1)
        return torch.cat([counted[:, :front], self.at + front, counted[:, front:] + self.tokens], 1)


# --- planning


def plan(
    interpreter: Interpreter, start: Node, axes: Axes, tokens: int, whole: Whole,
    facts: Callable[[Node], OpFacts | None],
) -> Plan:  # fmt: skip
    """Look at each op behind ``start``, on one token less.

    Args:
        interpreter: of the graph.
        start: the node of the sequence. Along its ``axes`` lie ``tokens`` that may go.
        whole: a run on at least two samples.

    Raises:
        Refused: an op needs all tokens; with its name.
    """
    planner = _Planner(interpreter, start, axes, tokens, whole, facts)
    steps = []
    for node in behind(start):
        try:
            steps.append(planner.step(node))
        except (RuntimeError, TypeError, ValueError, IndexError) as e:
            if isinstance(e, Refused):
                raise
            raise Refused(f"{node.name} needs all tokens: {str(e).splitlines()[0]:.160}") from e
    return Plan(start, axes, tuple(steps))


def behind(start: Node) -> list[Node]:
    """The nodes that depend on ``start``, in order."""
    mine, found = {start}, []
    for node in start.graph.nodes:
        if node is not start and any(n in mine for n in node.all_input_nodes):
            mine.add(node)
            found.append(node)
    return found


def _is_op(node: Node) -> bool:
    return node.op == "call_function" and not hands_on(node)


class _Planner:
    """axes: of the nodes looked at so far; env: their values without the last token."""

    def __init__(
        self, interpreter: Interpreter, start: Node, axes: Axes, tokens: int, whole: Whole,
        facts: Callable[[Node], OpFacts | None],
    ) -> None:  # fmt: skip
        self.interpreter, self.tokens, self.whole, self.facts = interpreter, tokens, whole, facts
        self.batch = whole.shape(start)[0]
        at = torch.arange(tokens - 1, device=whole.values[start].device).expand(self.batch, -1)
        self.kept = Kept(at, tokens)
        self.axes: dict[Node, tuple[Axes, ...]] = {start: (axes,)}
        self.env: dict[Node, Any] = {**whole.values, start: self.kept.of(whole.values[start], axes)}

    def step(self, node: Node) -> Step:
        seen = self._seen(node)
        self.env[node] = y = _computed(self.interpreter, seen, self.env, self.whole, self.kept, self.axes)
        if not seen.axes:
            seen = dataclasses.replace(seen, axes=self._by_size(node, shapes_of(y)))
        wrong = any(
            list(short) != self.kept.shape(full, axes)
            for short, full, axes in zip(shapes_of(y), self.whole.shapes[node], seen.axes, strict=True)
        )
        if wrong:
            raise Refused(
                f"{node.name} gives {shapes_of(y)} on one token less, {self.whole.shapes[node]} on all"
            )
        self._require_a_mean(seen, y)
        self.axes[node] = seen.axes
        return seen

    def _given(self, node: Node) -> dict[Node, Axes]:
        """The operands with tokens."""
        of = {n: self.axes[n][0] for n in node.all_input_nodes if len(self.axes.get(n, ())) == 1}
        return {n: axes for n, axes in of.items() if axes}

    def _seen(self, node: Node) -> Step:
        """The step of a node; ``axes`` is () where the sizes of its result will tell."""
        if not _is_op(node):
            return Step(node, self._handed_on(node))
        given, fact = self._given(node), self.facts(node)
        if not given or not self.whole.shapes[node]:
            return Step(node, ())
        if fact is not None and fact.moves:
            return self._moved(node, *next(iter(given.items())))
        if fact is not None and fact.kind is Kind.ATTENTION:
            return self._attended(node)
        if is_elementwise(node):
            return Step(node, (), self._tables(node, given, self.whole.shape(node)))
        if any(isinstance(a, (list, tuple)) and given.keys() & {*a} for a in node.args):
            return self._joined(node)
        if any(isinstance(a, (list, tuple)) for a in _named_sizes(node).values()):
            return Step(node, (self._expanded(node, given),))
        return Step(node, ())

    def _handed_on(self, node: Node) -> tuple[Axes, ...]:
        """Of a node that takes one of several results, or returns what it gets."""
        if node.op == "output" or not self.whole.shapes[node]:
            return tuple({} for _ in self.whole.shapes[node])
        index = node.args[1] if len(node.args) > 1 else None
        axes = self.axes[next(n for n in node.all_input_nodes if n in self.axes)]
        return (axes[index],) if isinstance(index, int) and len(axes) > 1 else axes

    def _moved(self, node: Node, x: Node, given: Axes) -> Step:
        """An op that only moves elements is run on the places of elements along each axis of tokens."""
        shape, whole = self.whole.shape(x), self.whole.shapes[node]
        found: list[dict[int, Ends]] = [{} for _ in whole]
        parts: tuple[tuple[int, int, int], ...] = ()
        for axis, ends in given.items():
            n = ends.front + self.tokens + ends.behind
            line = torch.arange(n).repeat_interleave(ends.inner).repeat(ends.outer)
            places = line.view(-1, *[1] * (len(shape) - axis - 1)).expand(shape).contiguous()
            ranges = [_range(node, t) for t in pytree.tree_leaves(self._called(node, {x: places}))]
            if any(last - first != n for _, first, last, *_ in ranges):
                parts = tuple((axis, first, last) for _, first, last, *_ in ranges)
                if ends[2:] != (1, 1):
                    raise Refused(f"{node.name} takes places of joined axes")
            for axes, (at, first, last, *joined) in zip(found, ranges, strict=True):
                if at is not None and first <= ends.front and last >= n - ends.behind:
                    axes[at] = Ends(ends.front - first, ends.behind - (n - last), *joined)
                elif last > ends.front and first < n - ends.behind:
                    alone = first - ends.front if last == first + 1 else None
                    raise Refused(f"{node.name} takes some tokens by their places", alone)
        return Step(node, tuple(found), parts=parts)

    def _called(self, node: Node, instead: Mapping[Node, Any]) -> Any:
        """The op on all tokens; sizes are those of its result then."""
        env = {n: instead.get(n, self.env.get(n)) for n in node.all_input_nodes}
        args, kwargs = pytree.tree_map_only(Node, env.__getitem__, (node.args, node.kwargs))
        bound = bind(_op(node), args, kwargs)
        bound |= {k: list(self.whole.shape(node)) for k in _named_sizes(node)}
        args, kwargs = spread(_op(node), bound)
        return _op(node)(*args, **kwargs)

    def _tables(
        self, node: Node, given: Mapping[Node, Axes], shape: Sequence[int], but: Sequence[Node] = ()
    ) -> dict[int, Axes]:
        """Which arguments, ``but`` some, do not depend on the sequence and meet its tokens. shape: of what
        they are broadcast to."""
        at = {}
        for n, axes in given.items():
            at |= {axis + len(shape) - len(self.whole.shape(n)): ends for axis, ends in axes.items()}
        tables = {}
        for i, leaf in enumerate(pytree.tree_leaves((node.args, node.kwargs))):
            if (
                not isinstance(leaf, Node)
                or leaf in self.axes
                or leaf in but
                or not self.whole.shapes.get(leaf)
            ):
                continue
            mine = (*[1] * (len(shape) - len(self.whole.shape(leaf))), *self.whole.shape(leaf))
            own = {axis: ends for axis, ends in at.items() if mine[axis] > 1}
            if own and (shape[0] != self.batch or 0 in own or any(e[2:] != (1, 1) for e in own.values())):
                raise Refused(f"{node.name}: the first axis of its result does not count samples")
            tables |= {i: own} if own else {}
        return tables

    def _attended(self, node: Node) -> Step:
        """Masks and biases lie over queries and keys; a query's row is a row of the result."""
        bound = bind(_op(node), node.args, node.kwargs)
        query, key, value = bound["query"], bound["key"], bound["value"]
        rank = len(self.whole.shape(query))
        over = {}
        for n, axis in ((query, rank - 2), (key, rank - 1)):
            axes = self.axes[n][0] if n in self.axes else {}
            over |= {axis: axes[rank - 2]} if rank - 2 in axes else {}
        scores = (*self.whole.shape(query)[:-1], self.whole.shape(key)[-2])
        tables = self._tables(node, {node: over}, scores, (query, key, value))
        return Step(node, ({k: e for k, e in over.items() if k == rank - 2},), tables)

    def _joined(self, node: Node) -> Step:
        """Sequences joined to one, with others in front of the tokens or behind them."""
        shape, parts = self.whole.shape(node), next(a for a in node.args if isinstance(a, (list, tuple)))
        nodes = [n for n in parts if isinstance(n, Node)]
        sizes = [self.whole.shape(n) for n in nodes]
        if len(sizes[0]) != len(shape):
            return Step(node, ())  # stacked
        joined = next((i for i, n in enumerate(shape) if sizes[0][i] != n), None)
        axes: dict[int, Ends] = {}
        for i, n in enumerate(nodes):
            for axis, ends in (self.axes[n][0] if n in self.axes else {}).items():
                if axis == joined:
                    before, after = (sum(s[axis] for s in some) for some in (sizes[:i], sizes[i + 1 :]))
                    ends = ends._replace(front=ends.front + before, behind=ends.behind + after)
                if axes.setdefault(axis, ends) != ends or (axis == joined and ends[2:] != (1, 1)):
                    raise Refused(f"{node.name} joins the tokens with themselves")
        return Step(node, (axes,))

    def _expanded(self, node: Node, given: Mapping[Node, Axes]) -> Axes:
        """Of an op that names the sizes of its result: axes as of its operand, from the last."""
        rank, axes = len(self.whole.shape(node)), dict[int, Ends]()
        for n, own in given.items():
            axes |= {axis + rank - len(self.whole.shape(n)): ends for axis, ends in own.items()}
        return axes

    def _by_size(self, node: Node, short: Sequence[Sequence[int]]) -> tuple[Axes, ...]:
        """The axes of each result that are shorter by one."""
        every = {e for n in node.all_input_nodes for axes in self.axes.get(n, ()) for e in axes.values()}
        ends = {(e.front + self.tokens + e.behind) * e.outer * e.inner: e for e in every}
        if len(ends) != len(every):
            raise Refused(f"{node.name} reads the tokens at two places of sequences of one length")
        return tuple(
            {i: ends[b] for i, (a, b) in enumerate(zip(less, full, strict=True)) if a != b and b in ends}
            for less, full in zip(short, self.whole.shapes[node], strict=True)
        )

    def _require_a_mean(self, step: Step, y: Any) -> None:
        """Refuse an op that adds up over tokens: constants behind it may know how many there are. A mean or
        a maximum is the same over all tokens twice."""
        node, fact = step.node, self.facts(step.node)
        given = self._given(node)
        lost = not any(step.axes) and _is_op(node) and isinstance(y, Tensor) and len(given) == 1
        if not lost or (fact is not None and fact.moves):
            return
        ((x, axes),) = given.items()
        for axis in axes:
            env = {**self.env, x: torch.cat([self.env[x]] * 2, axis)}
            args, kwargs = pytree.tree_map_only(Node, env.__getitem__, (node.args, node.kwargs))
            twice = _op(node)(*args, **kwargs)
            if twice.shape != y.shape or not torch.allclose(
                twice, y, rtol=1e-3, atol=1e-4 * float(y.abs().max())
            ):
                raise Refused(f"{node.name} adds up over tokens, and is no mean of them")


def _op(node: Node) -> Any:
    return cast(Any, node.target)


def _named_sizes(node: Node) -> dict[str, Any]:
    """The arguments of a node that are the sizes of its result."""
    return {
        k: v for k, v in bind(_op(node), node.args, node.kwargs).items() if k in _SIZES and v is not None
    }


def _range(node: Node, places: Tensor) -> tuple[int | None, int, int, int, int]:
    """The axis along which the places of a result differ, the first of them, the one behind the last, and
    ``outer`` and ``inner`` as of ``Ends``."""
    axes = [i for i in range(places.ndim) if bool((places != places.narrow(i, 0, 1)).any())]
    if len(axes) > 1:
        raise Refused(f"{node.name} lays the tokens out in rows, or in windows")
    first, last = int(places.min()), int(places.max()) + 1
    if not axes:
        return None, first, last, 1, 1
    line = places.movedim(axes[0], 0).flatten(1)[:, 0]
    inner = int((line != line[0]).nonzero()[0])
    outer = len(line) // (inner * (last - first))
    told = torch.arange(first, last).repeat_interleave(inner).repeat(outer)
    if not torch.equal(line, told):
        raise Refused(f"{node.name} puts the tokens in another order")
    return axes[0], first, last, outer, inner


# --- running


def run(interpreter: Interpreter, made: Plan, whole: Whole, kept: Kept) -> Any:
    """The output on the tokens that are kept. ``whole`` is a run on all tokens of the same samples."""
    env = {**whole.values, made.start: kept.of(whole.values[made.start], made.axes)}
    axes = {made.start: (made.axes,)} | {s.node: s.axes for s in made.steps}
    for step in made.steps:
        env[step.node] = _computed(interpreter, step, env, whole, kept, axes)
    return env[made.steps[-1].node]


def _computed(
    interpreter: Interpreter, step: Step, env: Mapping[Node, Any], whole: Whole, kept: Kept,
    axes: Mapping[Node, tuple[Axes, ...]],
) -> Any:  # fmt: skip
    node = step.node
    leaves, names = pytree.tree_flatten((node.args, node.kwargs))
    values = [env[x] if isinstance(x, Node) else x for x in leaves]
    if not _is_op(node):
        args, kwargs = pytree.tree_unflatten(values, names)
        return getattr(interpreter, node.op)(node.target, args, kwargs)
    if step.parts:
        x = next(n for n in node.all_input_nodes if any(axes.get(n, ())))
        ends = axes[x][0][step.parts[0][0]]
        shapes = [kept.shape(s, a) for s, a in zip(whole.shapes[node], step.axes, strict=True)]
        taken = [kept.part(env[x], ends, p).reshape(s) for p, s in zip(step.parts, shapes, strict=True)]
        return taken if isinstance(_op(node)._schema.returns[0].type, torch.ListType) else taken[0]
    rank = max((len(s) for s in whole.shapes[node]), default=0)
    for i, at in step.tables.items():
        values[i] = kept.of(values[i][(None,) * (rank - values[i].ndim)], at)
    args, kwargs = pytree.tree_unflatten(values, names)
    if step.axes and any(isinstance(v, (list, tuple)) for v in _named_sizes(node).values()):
        bound = bind(_op(node), args, kwargs)
        sizes = kept.shape(whole.shape(node), step.axes[0])
        args, kwargs = spread(_op(node), {k: sizes if k in _SIZES else v for k, v in bound.items()})
    return _op(node)(*args, **kwargs)
