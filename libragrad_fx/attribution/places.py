"""Where in the inputs the elements of a value lie.

Each element of an input has coordinates, a number for each axis. Ops carry them on: a view moves them, a
convolution, a pool or a linear layer gives the mean of what it reads, and what reads no input has none.
So the graph itself says in which order tokens lie, which of them are class tokens, which axis of an input
holds its channels, and which tokens of a joined sequence come from which input. Sizes leave that open.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from libragrad_fx.attribution.maps import Layout, Part
from libragrad_fx.decide.flow import hands_on, reach
from libragrad_fx.graph.schema import aten_op, bind, is_elementwise, spread
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.module.walk import origin
from libragrad_fx.ops.insert import leaf, probed, stop
from libragrad_fx.types import Kind, OpFacts

Tensor = torch.Tensor
_NEAR = 1e-3  # coordinates of one row of patches differ by rounding alone
_RUN = (Kind.LINEAR, Kind.HOMOGENEOUS, Kind.PRODUCT)
"""The kinds of op that are run on numbers of spots."""


@dataclasses.dataclass(frozen=True)
class Spots:
    """Where the elements of a value lie in one input.

    mass: 0 of an element that reads nothing of it
    at:   for each axis of the input but the first, ``mass`` times the mean coordinate of what is read
    """

    mass: Tensor
    at: tuple[Tensor, ...]

    def each(self, change: Callable[[Tensor], Tensor]) -> Spots:
        return Spots(change(self.mass), tuple(map(change, self.at)))

    def even(self) -> Spots:
        """The same places, each of mass 1 or 0. A layer adds up the masses that it reads, and those would
        overflow behind some thirty layers of a language model."""
        held, safe = self._held()
        return Spots(held.double(), tuple(torch.where(held, a / safe, 0.0) for a in self.at))

    def coordinates(self) -> list[Tensor]:
        """An axis each; nan where nothing is read."""
        held, safe = self._held()
        return [torch.where(held, a / safe, torch.nan) for a in self.at]

    def _held(self) -> tuple[Tensor, Tensor]:
        """Which elements read something, and masses to divide by."""
        held = self.mass.abs() > 1e-9
        return held, torch.where(held, self.mass, 1.0)

    def wide(self, n: int) -> Spots:
        """As many elements along the last axis, which share one."""
        return self.each(lambda t: t.expand(*t.shape[:-1], n))

    def first(self) -> Spots:
        """Of the first sample, or row."""
        return self.each(lambda t: t[0])


Held = Mapping[str, Spots]
"""By input."""


@dataclasses.dataclass(frozen=True)
class Windows:
    """Spots whose rows are parts of samples. Each sample has the same: a row that comes again is held once.

    rows:  those that differ
    which: of each row, which of these it is
    """

    rows: Spots
    which: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> Spots:
        return self.rows.each(lambda t: change(t[self.which]))


def _windows(spots: Spots) -> Windows:
    shape = spots.mass.shape[1:]
    whole = torch.stack([spots.mass, *spots.at], 1).flatten(1)
    rows, which = whole.unique(dim=0, return_inverse=True)
    mass, *at = rows.unflatten(1, (-1, *shape)).unbind(1)
    return Windows(Spots(mass, tuple(at)), which)


def started(x: Tensor) -> Spots:
    """The spots of an input itself."""
    places = [torch.arange(n, dtype=torch.float64, device=x.device) for n in x.shape[1:]]
    at = (p.view(-1, *[1] * (x.ndim - 2 - i)).expand(x.shape) for i, p in enumerate(places))
    return Spots(torch.ones((), dtype=torch.float64, device=x.device).expand(x.shape), tuple(at))


@dataclasses.dataclass(frozen=True)
class Located:
    """What a run showed of where things lie.

    axes:    by input, those of its axes that are positions. Of a series (B, C, T) the channels are
             variables, and count
    layouts: by node, how its tokens lie
    windows: of nodes whose rows are parts of samples (windows, frames), where their elements lie
    """

    axes: Mapping[str, tuple[int, ...]]
    layouts: Mapping[str, Layout]
    windows: Mapping[str, Mapping[str, Windows]]


def samples_axis(module: CapturedModule) -> Callable[[Node], int]:
    """Which axis of a node's value counts samples: the first, unless capture saw the batch's size elsewhere
    (tokens in front of samples, PyTorch's own order)."""
    axes = {site.node: site.batch for site in module.record.sites}

    def axis(node: Node) -> int:
        node, index = origin(node), 0
        if node.target is operator.getitem:
            whole, place = node.args[:2]
            node, index = cast(Node, whole), cast(int, place)
        found = axes.get(node.name, ())
        return (found[index] or 0) if index < len(found) else 0

    return axis


class Locator:
    """Follows the inputs through one run, as far as ``ends`` need it.

    samples: which axis of a node's value counts samples
    windows: of the ends, those whose rows are parts of samples
    read:    nodes whose values, and not only their sizes, had a say in where things lie
    """

    def __init__(
        self, facts: Callable[[Node], OpFacts | None], samples: Callable[[Node], int],
        ends: Collection[Node], windows: Collection[Node],
    ) -> None:  # fmt: skip
        self.facts, self.samples, self.ends, self.windows = facts, samples, {*ends}, {*windows}
        self.nodes = reach([*ends, *windows], lambda n: n.all_input_nodes)
        self.held: dict[Node, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.channels: dict[str, int | None] = {}
        self.found: dict[str, Held] = {}
        self.read: set[Node] = set()

    def start(self, node: Node, name: str, x: Tensor, embedded: bool) -> None:
        """An input, or the embedding of one."""
        samples = self.samples(node)
        x = x.movedim(samples, 0) if x.ndim else x
        self.shapes[name] = tuple(x.shape)
        if embedded or x.ndim < 3:
            self.channels[name] = x.ndim - 1 if x.ndim > 2 else None
        if x.ndim > 1:
            self.held[node] = {name: started(x).each(lambda t: t.movedim(0, samples))}

    def see(self, node: Node, call: Callable[[], tuple[Any, Any]], y: Any) -> None:
        """One node, and what it was called with."""
        asked = node in self.nodes or self.channels.keys() < self.shapes.keys()
        if asked and node not in self.held and any(m in self.held for m in node.all_input_nodes):
            fact = self.facts(node)
            if fact is not None and fact.kind in _RUN and not hands_on(node) and not is_elementwise(node):
                self.read.update(untold(node, fact))
            found = carried(node, fact, call(), y, self.held)
            if found:
                self.held[node] = found
                self._contracted(node, found)
        if (node in self.ends or node in self.windows) and isinstance(held := self.held.get(node), dict):
            found = {name: _narrowed(spots) for name, spots in held.items()}
            if node in self.ends and (samples := self.samples(node)):
                found = {name: s.each(lambda t: t.movedim(samples, 0)) for name, s in found.items()}
            self.found[node.name] = found

    def forget(self, nodes: Sequence[Node]) -> None:
        """Nodes that nobody reads any more."""
        for node in nodes:
            self.held.pop(node, None)

    def located(self) -> Located:
        axes = {name: _positions(shape, self.channels.get(name, 0)) for name, shape in self.shapes.items()}
        windows = {n.name for n in self.windows}
        each = {n: laid_out(h, axes) for n, h in self.found.items() if n not in windows}
        layouts = {n: x for n, x in each.items() if x is not None and not self._finer(x, axes)}
        inside = {n: {k: _windows(s) for k, s in h.items()} for n, h in self.found.items() if n in windows}
        return Located(axes, layouts, inside)

    def _finer(self, layout: Layout, axes: Mapping[str, Sequence[int]]) -> bool:
        """Whether there are more cells than the input has places, as behind a padded convolution."""
        sizes = {p.source: [self.shapes[p.source][i] for i in axes[p.source]] for p in layout.parts}
        return any(n > size for p in layout.parts for n, size in zip(p.grid, sizes[p.source], strict=True))

    def _contracted(self, node: Node, found: Any) -> None:
        """Notes which axis of an input the first product sums over: its elements all lie at one place."""
        fact = self.facts(node)
        if (
            not isinstance(found, dict)
            or fact is None
            or fact.kind is not Kind.PRODUCT
            or is_elementwise(node)
        ):
            return
        for name, spots in found.items():
            if name not in self.channels:
                shape = self.shapes[name]
                gone = [i for i, c in enumerate(spots.coordinates(), 1) if shape[i] > 1 and not _varies(c)]
                single = [i for i in range(1, len(shape)) if shape[i] == 1]
                one = next((axes[0] for axes in (gone, single) if len(axes) == 1), 0)
                self.channels[name] = one or _usual(shape)


def _usual(shape: Sequence[int]) -> int:
    """The channels where the graph does not tell: of tokens (B, N, C) the last axis, else the first."""
    return 2 if len(shape) == 3 else 1


def _positions(shape: Sequence[int], channel: int | None) -> tuple[int, ...]:
    """The axes of an input that are positions. channel: 0 if that is not known, None if there is none."""
    if channel == 0:
        channel = _usual(shape) if len(shape) > 2 else None
    series = len(shape) == 3 and channel == 1
    return tuple(i for i in range(1, len(shape)) if series or i != channel)


def _narrowed(spots: Spots) -> Spots:
    """One of the elements along the last axis, if all lie at one place: the others need no memory."""
    alike = all(bool((t == t[..., :1]).all()) for t in (spots.mass, *spots.at))
    return spots.each(lambda t: t[..., :1].clone()) if alike else spots


def _varies(c: Tensor) -> bool:
    known = c[~c.isnan()]
    return known.numel() > 1 and bool(known.max() - known.min() > _NEAR)


# --- through ops


def carried(
    node: Node, fact: OpFacts | None, call: tuple[Any, Any], y: Any, held: Mapping[Node, Any]
) -> Any:
    """What a node holds of each input: ``Held``, a list of these for a tuple, or None."""
    if node.target in (operator.getitem, leaf):
        of = held.get(node.args[0])  # type: ignore[arg-type]
        return of[node.args[1]] if isinstance(of, list) else of  # type: ignore[index]
    if hands_on(node) or node.target is stop:
        result = probed(node)
        if result is None:
            return held.get(node.all_input_nodes[0]) if node.all_input_nodes else None
        leaves = [held.get(n) if isinstance(n, Node) else None for n in pytree.tree_leaves(result)]
        return leaves[0] if isinstance(result, Node) else leaves
    if fact is None or not isinstance(aten_op(node), torch._ops.OpOverload):
        return None
    names = dict.fromkeys(n for m in node.all_input_nodes if isinstance(held.get(m), dict) for n in held[m])
    found = {n: s for n in names if (s := _through(node, fact, call, y, _one(held, n))) is not None}
    several = [n for n, s in found.items() if isinstance(s, list)]
    if several:
        return [{n: found[n][i] for n in several} for i in range(len(found[several[0]]))]
    return found or None


def _one(held: Mapping[Node, Any], name: str) -> dict[Node, Spots]:
    return {n: h[name] for n, h in held.items() if isinstance(h, dict) and name in h}


def _through(node: Node, fact: OpFacts, call: tuple[Any, Any], y: Any, spots: Mapping[Node, Spots]) -> Any:
    """The spots behind an op, in one input; None where nobody knows."""
    op = aten_op(node)
    nodes, given = bind(op, node.args, node.kwargs), bind(op, *call)
    if is_elementwise(node) and isinstance(y, Tensor):
        mine = [spots[m] for m in node.all_input_nodes if m in spots]
        return _sum([s.each(lambda t: t.expand(y.shape)) for s in mine])
    leading = next((n for k in (*fact.stream, *fact.gate) if (n := _node(nodes.get(k))) in spots), None)
    if fact.kind is Kind.ATTENTION:
        query = nodes["query"]
        wide = lambda t: t.mean(-1, keepdim=True).expand(y.shape)  # noqa: E731
        return spots[query].each(wide) if query in spots else None
    if fact.kind in (Kind.NORMALISER, Kind.GATE_SOURCE, Kind.SATURATING, Kind.GATED, Kind.CUT):
        same = leading is not None and isinstance(y, Tensor) and spots[leading].mass.shape == y.shape
        return spots[leading] if same and leading is not None else None
    if fact.kind not in _RUN:
        return None
    if fact.kind is Kind.PRODUCT:  # rows are those of the first factor that has some
        first = next((n for k in fact.factors for n in _nodes(nodes[k]) if n in spots), None)
        if first is not None and _sums_rows(fact, nodes, first, spots[first], y):
            return spots[first].each(lambda t: t.sum(-1, keepdim=True)).even().wide(y.shape[-1])
        spots = {first: spots[first]} if first is not None else spots
    return _run(op, fact, nodes, given, spots)


def _run(
    op: Any, fact: OpFacts, nodes: Mapping[str, Any], given: Mapping[str, Any], spots: Mapping[Node, Spots]
) -> Any:
    """The op on each number of its operands' spots; other addends are zeros, and other factors ones."""
    held = next(iter(spots.values()))

    def part(name: str, value: Any, node: Any, of: Callable[[Spots], Tensor]) -> Any:
        if isinstance(value, (list, tuple)) and isinstance(node, (list, tuple)):
            return [part(name, v, n, of) for v, n in zip(value, node, strict=True)]
        if isinstance(node, Node) and node in spots:
            return (
                of(spots[node]) if fact.moves else of(spots[node]).contiguous()
            )  # ``as_strided`` wants it
        if isinstance(value, Tensor) and name in fact.stream:
            return torch.zeros_like(value, dtype=held.mass.dtype)
        if isinstance(value, Tensor) and name in fact.factors:
            return torch.ones_like(value, dtype=held.mass.dtype)
        return 0 if name in fact.stream and isinstance(value, (int, float)) else value

    def on(of: Callable[[Spots], Tensor]) -> Any:
        args, kwargs = spread(op, {k: part(k, v, nodes[k], of) for k, v in given.items()})
        with torch.no_grad():
            return op(*args, **kwargs)

    try:
        mass = on(lambda s: s.mass)
        at = [on(lambda s, i=i: s.at[i]) for i in range(len(held.at))]
    except (RuntimeError, TypeError, ValueError, IndexError):  # an op that these numbers do not fit
        return None
    each = (lambda s: s) if fact.moves else Spots.even  # what only moves is as even as it was
    if isinstance(mass, Tensor):
        return each(Spots(mass, tuple(at)))
    if all(isinstance(m, Tensor) for m in mass):
        return [each(Spots(m, tuple(a[i] for a in at))) for i, m in enumerate(mass)]
    return None


def _sums_rows(fact: OpFacts, nodes: Mapping[str, Any], first: Node, held: Spots, y: Any) -> bool:
    """Whether each element of a product is a sum over the last axis of its first factor."""
    rows = any(nodes[k] is first for k in fact.rowwise)
    return rows and isinstance(y, Tensor) and y.shape[:-1] == held.mass.shape[:-1]


def untold(node: Node, fact: OpFacts | None) -> list[Node]:
    """The operands whose values, and not only their sizes, may say where a result lies: an index."""
    told = (*fact.stream, *fact.factors, *fact.like) if fact is not None else ()
    given = bind(aten_op(node), node.args, node.kwargs)
    return [n for k, v in given.items() if k not in told for n in _nodes(v)]


def _sum(found: Sequence[Spots]) -> Spots | None:
    if not found:
        return None
    at = (torch.stack(ts).sum(0) for ts in zip(*(s.at for s in found), strict=True))
    return Spots(torch.stack([s.mass for s in found]).sum(0), tuple(at))


def _node(value: Any) -> Node | None:
    return value if isinstance(value, Node) else None


def _nodes(value: Any) -> list[Node]:
    return [n for n in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(n, Node)]


# --- from spots to the layout of tokens


def laid_out(held: Held, axes: Mapping[str, Sequence[int]], times: int = 1) -> Layout | None:
    """How the tokens of a value lie, so many in each cell; None if they are on no grid, or on that of
    several inputs at once."""
    found = {name: (spots.mass.shape, _tokens(spots, axes[name])) for name, spots in held.items()}
    kept = {name: (shape, *f) for name, (shape, f) in found.items() if f is not None}
    if len({places for _, places, _ in kept.values()}) != 1:
        return None
    shape, places, _ = next(iter(kept.values()))
    tokens, parts, taken = torch.Size(shape[i] for i in places).numel(), list[Part](), set[int]()
    for name, (_, _, at) in kept.items():
        part = _part(name, at, times)
        if part is not None and any(part[1:] == other[1:] for other in parts):
            continue  # words and segments, added token by token
        if part is None or taken & set(part.order):
            return None
        parts.append(part)
        taken |= set(part.order)
    return Layout(tokens, tuple(parts), tuple(i for i in range(tokens) if i not in taken), places)


def _tokens(spots: Spots, axes: Sequence[int]) -> tuple[tuple[int, ...], Tensor] | None:
    """The axes of a value along which its places differ, and where its tokens are: (N, axes)."""
    coordinates = spots.first().coordinates()
    at = torch.stack([coordinates[i - 1] for i in axes], -1)
    places = tuple(i + 1 for i in range(at.ndim - 1) if _differs(at, i))
    if not places:
        return None
    order = [i - 1 for i in places] + [i for i in range(at.ndim - 1) if i + 1 not in places]
    tokens = torch.Size(at.shape[i - 1] for i in places).numel()
    return places, at.permute(*order, -1).reshape(tokens, -1, len(axes)).nanmean(1)


def _differs(at: Tensor, axis: int) -> bool:
    first = at.narrow(axis, 0, 1)
    return bool((((at - first).abs() > _NEAR) | (at.isnan() != first.isnan())).any())


def _part(name: str, at: Tensor, times: int) -> Part | None:
    """Tokens with coordinates (N, axes) on a grid: the rank along each axis."""
    known = ~at.isnan().any(1)
    held, ranks, grid = known.nonzero()[:, 0].tolist(), [], []
    for c in at[known].T:
        ordered = c.sort().values
        starts = torch.cat([ordered[:1], ordered[1:][ordered.diff() > _NEAR]])
        ranks.append((torch.searchsorted(starts, c + _NEAR / 2, right=True) - 1).tolist())
        grid.append(len(starts))
    cells = [*zip(*ranks, strict=True)]
    order = [i for _, i in sorted(zip(cells, held, strict=True))]
    even = set(Counter(cells).values()) == {times} and len(cells) == times * torch.Size(grid).numel()
    return Part(name, tuple(grid), tuple(order)) if even else None
