"""Plans how what lies behind a sequence runs on some of its tokens: four laws say what each op does.

Each op is run on the tokens as they are, and again

* on one token less: the axes that get shorter count tokens;
* in two other orders (the first two swapped, all moved by one), which every order can be made from: its
  result must come in that order;
* with each place twice: its result must be the same, each place twice, times 2^d. A mean over tokens has
  d = 0, a sum 1, the weights of a softmax -1. What the model returns must have d = 0.

So a model that reads tokens by their order has no plan. Nor has one whose answer grows with their number:
a constant of its graph may divide by that (``x.sum(1) / x.shape[1]``). One thing a graph cannot show: a
number that Python computed from the number of tokens and that divides no sum, such as a temperature of
log N. It stays as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from libragrad_fx.graph.schema import bind, is_elementwise, operands, spread
from libragrad_fx.perturb.kept import Axes, Ends, Kept, Part, shapes_of, tensors
from libragrad_fx.perturb.shorter import (
    Plan,
    Refused,
    Step,
    Whole,
    behind,
    computed,
    is_op,
    named_sizes,
    target,
)
from libragrad_fx.target import first_tensor, inexact
from libragrad_fx.types import Kind, OpFacts

Tensor = torch.Tensor
_DEGREES = (0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 1.5, -1.5)
_ALONE = Ends(0, 0)
"""``outer`` and ``inner`` of an axis that is no several."""


def plan(
    interpreter: Interpreter, start: Node, axes: Axes, tokens: int, whole: Whole,
    facts: Callable[[Node], OpFacts | None], form: Callable[[Node], Sequence[str]],
) -> Plan:  # fmt: skip
    """Look at each op behind ``start``.

    Args:
        interpreter: of the graph.
        start: the node of the sequence; its first axis counts samples. Along ``axes`` lie ``tokens`` that
            may go, at least two.
        whole: a run on all tokens.
        facts: the row of a node's op.
        form: the sizes of a node's value as text, with letters for free ones.

    Raises:
        Refused: an op needs all tokens, their order or their number; with its name.
    """
    planner = _Planner(interpreter, start, axes, tokens, whole, facts, form)
    nodes = behind(start)
    last = {n: node for node in nodes for n in node.all_input_nodes}
    steps = []
    for node in nodes:
        planner.env[node] = planner.whole_value(node)
        try:
            steps.append(planner.step(node))
        except (RuntimeError, TypeError, ValueError, IndexError) as e:
            if isinstance(e, torch.OutOfMemoryError):
                raise
            raise Refused(f"{node.name} needs all tokens: {str(e).splitlines()[0]:.160}") from e
        for read in node.all_input_nodes:
            if last[read] is node and read in planner.axes:
                del planner.env[read]
    return Plan(start, axes, tuple(steps), planner.returned(nodes[-1]))


class _Planner:
    """Of the nodes looked at so far, for each tensor of its value:

    axes:    those that count tokens
    degrees: d, or why it is of no use
    env:     the values on all tokens
    """

    def __init__(
        self, interpreter: Interpreter, start: Node, axes: Axes, tokens: int, whole: Whole,
        facts: Callable[[Node], OpFacts | None], form: Callable[[Node], Sequence[str]],
    ) -> None:  # fmt: skip
        self.interpreter, self.tokens, self.whole = interpreter, tokens, whole
        self.facts, self.form, self.batch = facts, form, form(start)[0]
        line = torch.arange(tokens, device=whole.values[start].device)[None]
        swapped = torch.cat([line[:, :2].flip(1), line[:, 2:]], 1)
        self.short = Kept(line[:, :-1], tokens)
        self.orders = (Kept(swapped, tokens), Kept(line.roll(1, 1), tokens))
        self.twice = Kept(line, tokens, 2)
        self.axes: dict[Node, tuple[Axes, ...]] = {start: (axes,)}
        self.degrees: dict[Node, tuple[float | str, ...]] = {start: (0.0,)}
        self.env: dict[Node, Any] = dict(whole.values)

    def whole_value(self, node: Node) -> Any:
        args, kwargs = pytree.tree_map_only(Node, self.env.__getitem__, (node.args, node.kwargs))
        return getattr(self.interpreter, node.op)(node.target, args, kwargs)

    def step(self, node: Node) -> Step:
        if not is_op(node):
            return self._handed_on(node)
        seen = self._seen(node)
        short = self._on(seen, self.short)
        if not seen.axes:
            seen = dataclasses.replace(seen, axes=self._by_size(node, shapes_of(short)))
        self._require_sizes(seen, short)
        self.axes[node] = seen.axes
        self.degrees[node] = self._found(seen)
        return seen

    def returned(self, output: Node) -> Axes:
        """The axes of the first tensor that the model returns."""
        value = self.env[output]
        first = first_tensor(value)
        i = next(i for i, t in enumerate(tensors(value)) if t is first)
        if self.degrees[output][i] != 0:
            raise Refused("its answer depends on the number of its tokens")
        return self.axes[output][i]

    # --- running an op on other tokens

    def _on(self, step: Step, kept: Kept, offsets: float = 0.0) -> Any:
        env = {n: self._of(n, kept) for n in step.node.all_input_nodes}
        if offsets and (fact := self.facts(step.node)) is not None and fact.kind is Kind.PRODUCT:
            given = [n for _, n in operands(step.node, fact.stream)]
            learned = [n for n in given if isinstance(env[n], torch.nn.Parameter)]
            env |= {n: env[n] * 2**offsets for n in learned}
        return computed(self.interpreter, step, env, self.whole, kept, self.axes)

    def _of(self, node: Node, kept: Kept) -> Any:
        """The value of an operand on other tokens."""
        value = self.env[node]
        if node not in self.axes or not isinstance(value, Tensor):
            return value
        degree = self.degrees[node][0]
        assert not isinstance(degree, str)
        value = kept.of(value, self.axes[node][0])
        return value * 2**degree if kept.times > 1 and degree else value

    # --- the laws

    def _require_sizes(self, step: Step, short: Any) -> None:
        node, full = step.node, self.whole.shapes[step.node]
        want = tuple(tuple(self.short.shape(s, a)) for s, a in zip(full, step.axes, strict=True))
        if shapes_of(short) != want:
            raise Refused(f"{node.name} gives {shapes_of(short)} on one token less, {full} on all")
        if _numbers(short) != _numbers(self.env[node]):
            raise Refused(f"{node.name} counts the tokens")

    def _found(self, step: Step) -> tuple[float | str, ...]:
        """The degrees of a result.

        Raises:
            Refused: it has none, since the op depends on the order of tokens or on their number.
        """
        node, y = step.node, tensors(self.env[step.node])
        mine = [n for n in node.all_input_nodes if n in self.axes]
        still = not any(axes for n in mine for axes in self.axes[n])
        if still and not any(d for n in mine for d in self.degrees[n]):
            return (0.0,) * len(y)
        found: list[float | str] = self._powers(step)
        lowest = min((d for n in mine for d in self.degrees[n] if not isinstance(d, str)), default=0.0)
        if isinstance(found[0], str) and lowest < 0:
            found = self._powers(step, lowest)
        for kept in () if still else self.orders:
            other = tensors(self._on(step, kept))
            for i, (a, b, axes) in enumerate(zip(other, y, step.axes, strict=True)):
                if not self._alike(step, a, kept.of(b, axes)):
                    found[i] = f"{node.name} depends on the order of the tokens"
        if len(found) == 1 and isinstance(found[0], str):
            raise Refused(found[0])
        return tuple(found)

    def _powers(self, step: Step, offsets: float = 0.0) -> list[float | str]:
        """The degree of each result where its operands have theirs, and learned offsets (a linear layer's
        bias) have ``offsets``. Offsets of weights, which shrink with the number of tokens, may stay as they
        are: no constant that divides by it is among what was learned."""
        other, found = tensors(self._on(step, self.twice, offsets)), list[float | str]()
        for a, b, axes in zip(other, tensors(self.env[step.node]), step.axes, strict=True):
            b = self.twice.of(b, axes)
            fits = (d for d in _DEGREES if self._alike(step, a, b * 2**d if d else b))
            found.append(next(fits, self._counts(step.node)))
        return found

    def _counts(self, node: Node) -> str:
        for n in node.all_input_nodes:
            if self.degrees.get(n, (0.0,)) != (0.0,):
                return f"{node.name} reads {n.name}, which depends on the number of the tokens"
        return f"{node.name} depends on the number of the tokens"

    def _alike(self, step: Step, a: Tensor, b: Tensor) -> bool:
        """Whether two values differ by rounding alone. Sums come in another order, in float32 at least."""
        node, fact = step.node, self.facts(step.node)
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not inexact(a):
            return torch.equal(a, b)
        fine = torch.finfo(torch.promote_types(a.dtype, torch.float32)).eps
        near = 4 * torch.finfo(a.dtype).eps + 64 * fine
        of = [] if is_elementwise(node) else [b]
        if of and fact is not None and fact.kind in (Kind.LINEAR, Kind.PRODUCT):  # terms may cancel
            of += [t for n in node.all_input_nodes if n in self.axes for t in tensors(self.env[n])]
        least = torch.finfo(a.dtype).tiny  # below, halves are not exact
        scale = max((_largest(t) for t in of), default=0.0)
        return torch.allclose(a, b, rtol=near, atol=near * scale + least, equal_nan=True)

    # --- what the axes of a result are

    def _seen(self, node: Node) -> Step:
        """The step of a node; ``axes`` is () where the sizes of its result will tell."""
        given, fact = self._given(node), self.facts(node)
        if not given or not self.whole.shapes[node]:
            return Step(node, ())
        if fact is not None and fact.moves:
            return self._moved(node, *next(iter(given.items())))
        if fact is not None and fact.kind is Kind.ATTENTION:
            return self._attended(node)
        if is_elementwise(node):
            shape = self.whole.shape(node)
            return self._with_tables(Step(node, ()), self._broadcast(given, len(shape)), len(shape))
        if fact is not None and fact.kind is Kind.LINEAR and _listed(node, fact):
            return self._joined(node, _listed(node, fact))
        if named_sizes(node):
            return Step(node, (self._expanded(node, given),))
        return Step(node, ())

    def _given(self, node: Node) -> dict[Node, Axes]:
        """The operands with tokens."""
        of = {n: self.axes[n][0] for n in node.all_input_nodes if len(self.axes.get(n, ())) == 1}
        return {n: axes for n, axes in of.items() if axes}

    def _handed_on(self, node: Node) -> Step:
        """Of a node that takes one of several results, or returns what it gets."""
        if node.op == "output":
            read = [n for n in pytree.tree_leaves(node.args) if isinstance(n, Node)]
            read = [n for n in read for _ in self.whole.shapes[n]]
            axes = tuple(self.axes.get(n, ({},))[0] for n in read)
            self.degrees[node] = tuple(self.degrees.get(n, (0.0,))[0] for n in read)
        else:
            x, index = next(n for n in node.all_input_nodes if n in self.axes), node.args[1:]
            at = [i for i in index if isinstance(i, int)] if len(self.axes[x]) > 1 else []
            axes = tuple(self.axes[x][i] for i in at) or self.axes[x]
            self.degrees[node] = tuple(self.degrees[x][i] for i in at) or self.degrees[x]
        self.axes[node] = axes
        if why := next((d for d in self.degrees[node] if isinstance(d, str)), ""):
            raise Refused(why)
        return Step(node, axes)

    def _moved(self, node: Node, x: Node, given: Axes) -> Step:
        """An op that only moves elements is run on the places of elements along each axis of tokens."""
        shape, whole = self.whole.shape(x), self.whole.shapes[node]
        found: list[dict[int, Ends]] = [{} for _ in whole]
        parts: tuple[Part, ...] = ()
        for axis, ends in given.items():
            n = ends.front + self.tokens + ends.behind
            line = torch.arange(n).repeat_interleave(ends.inner).repeat(ends.outer)
            places = line.view(-1, *[1] * (len(shape) - axis - 1)).expand(shape).contiguous()
            ranges = [_range(node, t) for t in tensors(self._called(node, {x: places}))]
            if any(last - first != n for _, first, last, *_ in ranges):
                parts = tuple(Part(axis, first, last) for _, first, last, *_ in ranges)
                if ends[2:] != _ALONE[2:]:
                    raise Refused(f"{node.name} takes places of joined axes")
                _require_whole(node, parts, ends, self.tokens)
            for axes, (at, first, last, *joined) in zip(found, ranges, strict=True):
                if at is not None and first <= ends.front and last >= n - ends.behind:
                    if at in axes:
                        raise Refused(f"{node.name} joins two axes of tokens")
                    axes[at] = Ends(ends.front - first, ends.behind - (n - last), *joined)
        return Step(node, tuple(found), parts=parts)

    def _called(self, node: Node, instead: Mapping[Node, Any]) -> Any:
        """The op on all tokens; sizes are those of its result then."""
        env = {n: instead.get(n, self.env[n]) for n in node.all_input_nodes}
        args, kwargs = pytree.tree_map_only(Node, env.__getitem__, (node.args, node.kwargs))
        bound = bind(target(node), args, kwargs)
        bound |= {k: list(self.whole.shape(node)) for k in named_sizes(node)}
        args, kwargs = spread(target(node), bound)
        return target(node)(*args, **kwargs)

    def _broadcast(self, given: Mapping[Node, Axes], rank: int) -> Axes:
        """The axes of what operands are broadcast to."""
        at: dict[int, Ends] = {}
        for n, axes in given.items():
            at |= {axis + rank - len(self.whole.shape(n)): ends for axis, ends in axes.items()}
        return at

    def _with_tables(self, step: Step, at: Axes, rank: int, but: Sequence[Any] = ()) -> Step:
        """A step with its tables: arguments, ``but`` some, that do not depend on the sequence and meet its
        tokens. at: the axes of what they are broadcast to, of that rank."""
        node, tables = step.node, {}
        for i, leaf in enumerate(pytree.tree_leaves((node.args, node.kwargs))):
            shapes = self.whole.shapes.get(leaf, ()) if isinstance(leaf, Node) else ()
            if not shapes or leaf in self.axes or leaf in but:
                continue
            mine = (*[1] * (rank - len(shapes[0])), *shapes[0])
            own = {axis: ends for axis, ends in at.items() if mine[axis] > 1}
            tables |= {i: own} if own else {}
        if not tables and not step.causal:
            return step
        samples = [i for i, size in enumerate(self.form(node)) if size == self.batch]
        if len(samples) != 1 or any(e[2:] != _ALONE[2:] for e in at.values()):
            raise Refused(f"{node.name} meets a table where samples and tokens are no axes of their own")
        return dataclasses.replace(step, tables=tables, samples=samples[0])

    def _attended(self, node: Node) -> Step:
        """Masks and biases lie over queries and keys."""
        bound = bind(target(node), node.args, node.kwargs)
        query, key, value = bound["query"], bound["key"], bound["value"]
        rank = len(self.whole.shape(query))
        of = {n: self.axes.get(n, ({},))[0] for n in (query, key)}
        over = {axis: ends for axis, ends in of[query].items() if axis < rank - 1}
        over |= {rank - 1: of[key][rank - 2]} if rank - 2 in of[key] else {}
        causal = {a: e for a, e in over.items() if a >= rank - 2} if bound["is_causal"] else {}
        return self._with_tables(Step(node, (), causal=causal), over, rank, (query, key, value))

    def _joined(self, node: Node, nodes: Sequence[Node]) -> Step:
        """Sequences joined to one, with others in front of the tokens or behind them."""
        shape = self.whole.shape(node)
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
                if axes.setdefault(axis, ends) != ends or (axis == joined and ends[2:] != _ALONE[2:]):
                    raise Refused(f"{node.name} joins the tokens with themselves")
        along = {axis: ends for axis, ends in axes.items() if axis != joined}
        places = joined if joined in axes else None
        return self._with_tables(Step(node, (axes,), joined=places), along, len(shape))

    def _expanded(self, node: Node, given: Mapping[Node, Axes]) -> Axes:
        """Of an op that names the sizes of its result: axes as of its operand, from the last."""
        shape = self.whole.shape(node)
        sizes = {ends: self.whole.shape(n)[axis] for n, own in given.items() for axis, ends in own.items()}
        at = self._broadcast(given, len(shape))
        return {axis: ends for axis, ends in at.items() if axis >= 0 and shape[axis] == sizes[ends]}

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


def _numbers(value: Any) -> list[Any]:
    return [x for x in pytree.tree_leaves(value) if not isinstance(x, Tensor)]


def _largest(t: Tensor) -> float:
    """The largest finite absolute value."""
    size = t.abs() if inexact(t) else t.new_zeros(0, dtype=torch.float32)
    return float(size.where(size.isfinite(), 0).max()) if size.numel() else 0.0


def _listed(node: Node, fact: OpFacts) -> list[Node]:
    """The operands that an op takes as a list."""
    return [n for k, n in operands(node, fact.stream) if "[" in k]


def _require_whole(node: Node, parts: Sequence[Part], ends: Ends, tokens: int) -> None:
    """Refuse an op that takes some of the tokens. If that is one of them, or all but one, say which."""
    places = ((p.first - ends.front, p.last - ends.front) for p in parts)
    inside = [(max(first, 0), min(last, tokens)) for first, last in places]
    some = [(a, b) for a, b in inside if a < b and b - a < tokens]
    if not some:
        return
    ((first, last), *more) = some
    place = first if last == first + 1 else None
    if last - first == tokens - 1:
        place = 0 if first else tokens - 1
    raise Refused(f"{node.name} takes some tokens by their places", None if more else place)


def _range(node: Node, places: Tensor) -> tuple[int | None, int, int, int, int]:
    """The axis along which the places of a result differ, the first of them, the one behind the last, and
    ``outer`` and ``inner`` as of ``Ends``."""
    if not places.numel():
        return None, 0, 0, 1, 1
    axes = [i for i in range(places.ndim) if bool((places != places.narrow(i, 0, 1)).any())]
    if len(axes) > 1:
        raise Refused(f"{node.name} lays the tokens out in rows, or in windows")
    first, last = int(places.min()), int(places.max()) + 1
    if not axes:
        return None, first, last, 1, 1
    line = places.movedim(axes[0], 0).reshape(places.shape[axes[0]], -1)[:, 0]
    inner = int((line != line[0]).nonzero()[0])
    outer = len(line) // (inner * (last - first))
    told = torch.arange(first, last).repeat_interleave(inner).repeat(outer)
    if not torch.equal(line, told):
        raise Refused(f"{node.name} puts the tokens in another order")
    return axes[0], first, last, outer, inner
