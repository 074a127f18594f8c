"""One forward and one backward of a captured module, with its inside in view.

Block inputs are found by module path in the graph (the arguments of the probe that ends the call),
bias terms are the graph's own additive constants; their gradients come from the same backward.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from libragrad_fx.account.observe import flat_arguments, site_bias, source_name
from libragrad_fx.attribution import again, maps
from libragrad_fx.attribution import attention as heads
from libragrad_fx.attribution.past import Apart, Read, reads_past
from libragrad_fx.attribution.places import Located, Locator, laid_out, samples_axis
from libragrad_fx.decide import rulebook
from libragrad_fx.decide.flow import reach
from libragrad_fx.errors import InputError
from libragrad_fx.graph.origin import form
from libragrad_fx.graph.schema import aten_op, is_elementwise
from libragrad_fx.module.captured import CapturedModule, InGraphs, one_graph
from libragrad_fx.module.walk import argument, calls, origin, senders
from libragrad_fx.module.walk import returned as passed_on
from libragrad_fx.ops import insert
from libragrad_fx.ops.places import taken
from libragrad_fx.target import (
    Target,
    as_call,
    differentiable,
    first_tensor,
    product,
    select_each,
    undisturbed,
)
from libragrad_fx.types import Kind, OpFacts, Site

Pair = tuple[torch.Tensor, torch.Tensor]
_PRIME = 97  # stands for the number of samples
Term = tuple[Site, maps.Rows | None, torch.Tensor, torch.Tensor]
"""A site, where samples are, its constant, and the gradient of the output that it is part of."""


@dataclasses.dataclass(frozen=True)
class Internals:
    """What one backward shows. Values of inputs and layers count samples first, however the model has them.

    output:  (B,) what is explained, one number a sample
    inputs:  name -> (x, df/dx) for every floating-point input (or embedded token sequence)
    layers:  module path -> (h, df/dh) for the input h of each module asked for
    biases:  (site, rows, b, df/db) for the additive constants that are not upstream of the first
             layer; b and df/db have the shape of the op's output, ``rows`` says where its samples are
    upstream: likewise for those upstream of it, where biases were asked for
    places:  likewise for the additive tables of positions, upstream or not
    shapes:  shapes of the values upstream of the first layer, in graph order (``()`` for a tuple)
    before:  module path -> the nodes and inputs that the layer's input is computed from
    past:    module path of a layer that paths from what it reads lead past -> (B,) what comes by those;
             nan where it is not known which rows of it are whose
    tokens:  node, input or module path -> the inputs whose positions it has (see ``positions``)
    axes:    input -> its axes that are positions
    layouts: nodes whose tokens are known to lie somewhere -> how they lie
    windows: likewise of constants whose rows are parts of samples; their axes count samples first
    attention: every attention, in the order of the graph, where it was asked for
    streams: for each of these the residual stream behind it; None where there is none
    returned: what the module at each layer returned, with its gradient, where attention or it was asked for
    read:    which token of the last layer's module is read alone, by what comes behind it; None if none is
    apart:   module paths of layers whose tokens are not those of the layer before (a decoder's first)
    reached: the inputs and layers that a gradient came back to, were it zero; of layers, to what the module
             there returned, where that was asked for
    rows:    of each constant of the run, where samples are
    """

    output: torch.Tensor
    inputs: Mapping[str, Pair]
    layers: Mapping[str, Pair]
    biases: tuple[Term, ...]
    upstream: tuple[Term, ...]
    places: tuple[Term, ...]
    shapes: tuple[tuple[int, ...], ...]
    before: Mapping[str, frozenset[str]]
    past: Mapping[str, torch.Tensor]
    tokens: Mapping[str, frozenset[str]]
    axes: Mapping[str, tuple[int, ...]]
    layouts: Mapping[str, maps.Layout]
    windows: Mapping[str, maps.Layout]
    rows: tuple[maps.Rows | None, ...] = ()
    attention: tuple[heads.Attention, ...] = ()
    streams: tuple[torch.Tensor | None, ...] = ()
    returned: tuple[Pair, ...] = ()
    read: int | None = None
    apart: frozenset[str] = frozenset()
    reached: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Known:
    """What one run showed that holds for all runs of a graph on inputs of such sizes. A traced run takes
    it: its tensors have no values to ask.

    located:    where inputs, tokens and windows lie
    rows:       of each constant, where its samples are
    kinds:      of each constant, whether it is a table of positions, and whether it is finite
    windows, shapes: see ``Internals``
    token:      the token that attention is followed to, where more than one gets a gradient
    attributes: the module's tensors by path, to run with in place of its own
    """

    located: Located
    rows: tuple[maps.Rows | None, ...]
    kinds: tuple[tuple[bool, bool], ...]
    windows: Mapping[str, maps.Layout]
    shapes: tuple[tuple[int, ...], ...]
    token: int | None = None
    attributes: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Constant:
    """An additive constant of the graph.

    site, axis: whose it is, and which axis of ``output`` counts samples, None if that is not known
    value:      the constant; ``output`` is what it is part of
    counts:     whether it is a bias term, which is not upstream of the first layer
    places:     whether it is a table of positions: added element by element, and not everywhere the same
    finite:     whether no element is infinite
    """

    site: Site
    axis: int | None
    value: torch.Tensor
    output: torch.Tensor
    counts: bool
    places: bool
    finite: bool

    def term(self, gradient: torch.Tensor, rows: maps.Rows | None) -> Term:
        """One that gets no gradient counts nothing, were it infinite (a pool's padding)."""
        value = self.value.expand_as(self.output)
        return self.site, rows, value if self.finite else value.masked_fill(gradient == 0, 0.0), gradient

    def rows(self, batch: int) -> maps.Rows | None:
        """Where its samples are, if its shape leaves no doubt."""
        return _rows_in(self.output.shape, self.axis, batch)


def _rows_in(shape: Sequence[int], axis: int | None, batch: int) -> maps.Rows | None:
    """Where samples are in a value; ``axis`` counts them, None if that is not known."""
    if batch == 1 and shape and axis is None:
        axis = shape.index(1) if 1 in shape else 0
    if axis is None or (batch > 1 and shape[axis] != batch):
        return None
    return maps.Rows(axis, shape[axis] // batch)


@dataclasses.dataclass(frozen=True)
class Run:
    """One forward with its inside in view. ``back`` goes back from a target, and from another one.

    output:   what the module returned
    sources:  name -> the floating-point inputs and embedded tokens, as leaves of autograd
    layers:   module path -> the node of its input
    values:   of the nodes that were asked for
    attends, called: every attention asked for, and what it was called with
    streams, ends: nodes as in ``Internals``
    sizes:    the shape of each node's value, ``()`` for a tuple
    located:  where inputs, tokens and windows lie
    samples:  which axis of a node's value counts samples; of sources by their names, where not the first
    kinds:    of each constant that was looked at, whether it is a table of positions, and finite
    reads:    by layer, the reads that lead past it; ``seen``: what each of them saw
    known:    of a traced run, what an earlier one showed
    """

    module: InGraphs
    facts: heads.Facts
    output: Any
    sources: Mapping[str, torch.Tensor]
    layers: Mapping[str, Node]
    values: Mapping[Node, torch.Tensor]
    constants: Sequence[Constant]
    attends: Sequence[heads.Site]
    called: Mapping[Node, Any]
    streams: Sequence[Node | None]
    ends: Sequence[Node]
    sizes: Mapping[Node, tuple[int, ...]]
    located: Located
    samples: Mapping[Node | str, int]
    kinds: Sequence[tuple[bool, bool]] = ()
    reads: Mapping[str, Sequence[Read]] = dataclasses.field(default_factory=dict)
    seen: Mapping[Read, torch.Tensor] = dataclasses.field(default_factory=dict)
    known: Known | None = None

    def back(self, target: Target, last: bool = True) -> Internals:
        """The gradients of ``target``; ``last`` frees what a further backward would need.

        Raises:
            InputError: the target does not fit.
        """
        with differentiable():
            each = select_each(self.output, target)
            nodes = [*self.layers.values(), *(s.node for s in self.attends), *self.ends]
            inner = [self.values[n] for n in nodes]
            values = [*self.sources.values(), *(c.output for c in self.constants), *inner]
            values += self.seen.values()
            known = self.known
            rows = [*known.rows] if known else [c.rows(each.shape[0]) for c in self.constants]
            doubtful = any(r is None for r in rows)
            grads = _gradients(each, values, last and not doubtful)
            pairs = _filled(values, grads)
            gradients = [g for _, g in pairs[len(self.sources) :]]
            if doubtful and not known:
                rows = self._rows(each, rows)
            split = self._split(each, rows, gradients)
            found = iter(pairs)
        sources = {name: self._samples_first(name, next(found)) for name in self.sources}
        terms = [
            (c, c.term(split.get(i, next(found)[1]), maps.Rows(0, 1) if i in split else r))
            for i, (c, r) in enumerate(zip(self.constants, rows, strict=True))
        ]
        tapped = {path: self._samples_first(n, next(found)) for path, n in self.layers.items()}
        attended = tuple(
            heads.attention(site, self.called[site.node], g, each.shape[0])
            for site, (_, g) in zip(self.attends, itertools.islice(found, len(self.attends)), strict=True)
        )
        between = [None] * (len(self.constants) + (len(self.layers) + len(self.attends)) * bool(self.ends))
        names = zip([*self.sources, *between, *self.layers], grads, strict=False)
        reached = {n for n, g in names if g is not None and n is not None}
        return Internals(
            output=each.detach(),
            reached=frozenset(reached),
            inputs=sources,
            layers=tapped,
            biases=tuple(term for c, term in terms if c.counts),
            upstream=tuple(term for c, term in terms if not c.counts),
            places=tuple(term for c, term in terms if c.places),
            attention=attended,
            returned=tuple(
                self._samples_first(n, pair)
                for n, pair in zip(self.ends, itertools.islice(found, len(self.ends)), strict=True)
            ),
            past=self._past(dict(zip(self.seen, found, strict=True)), torch.zeros_like(each).double()),
            rows=tuple(rows),
            windows=known.windows if known else self._windows(terms, each.shape[0]),
            **self.layout,
        )

    def _samples_first(self, of: Node | str, pair: Pair) -> Pair:
        value, gradient = pair
        axis = self.samples.get(of, 0)
        return (value.movedim(axis, 0), gradient.movedim(axis, 0)) if axis else pair

    def backs(self, targets: Sequence[Target]) -> Iterator[Internals]:
        """``back`` from each target; the last frees what a further backward would need."""
        for i, target in enumerate(targets):
            yield self.back(target, last=i == len(targets) - 1)

    def _past(self, seen: Mapping[Read, Pair], none: torch.Tensor) -> dict[str, torch.Tensor]:
        """What comes by the reads that lead past each layer: (B,), as ``none``."""
        if not self.reads:
            return {}
        axes = {s.node: s.batch for s in one_graph(self.module).record.sites}

        def share(read: Read) -> torch.Tensor:
            if read not in seen:  # it reads several tensors at once
                return torch.tensor(torch.nan)
            (x, g), made = seen[read], origin(read[1])
            (axis, *_) = axes.get(made.name, (0 if made.target is insert.guard else None,))
            rows = _rows_in(x.shape, axis, none.shape[0])
            if rows is None and (self.known or bool(g.any())):
                return torch.tensor(torch.nan)
            return maps.summed(maps.by_sample(product(x, g), rows, none.shape[0]))

        return {path: sum(map(share, reads), none) for path, reads in self.reads.items()}

    def _windows(self, terms: Sequence[tuple[Constant, Term]], batch: int) -> dict[str, maps.Layout]:
        """How the rows of constants lie that are parts of samples."""
        found = {}
        for constant, (site, rows, _, g) in terms:
            held = self.located.windows.get(site.node)
            if held is None or not constant.counts:
                continue
            whole = g.ndim > constant.output.ndim  # the rows of all samples, for each of them
            spots = {name: held_by.each(_samples_first(None if whole else rows, batch))
                     for name, held_by in held.items()}  # fmt: skip
            if (layout := laid_out(spots, self.located.axes, batch if whole else 1)) is not None:
                found[site.node] = layout
        return found

    def attended(self, index: int, value: torch.Tensor, gradient: torch.Tensor) -> heads.Attention:
        """One attention, with its gradient if ``gradient`` is that of ``value``, behind it."""
        site = self.attends[index]
        at = self.values[site.node]
        grads = torch.autograd.grad(value, at, gradient, retain_graph=True, allow_unused=True)
        ((_, g),) = _filled([at], grads)
        return heads.attention(site, self.called[site.node], g, value.shape[0])

    def _rows(self, each: torch.Tensor, rows: Sequence[maps.Rows | None]) -> list[maps.Rows | None]:
        """Where the samples of each constant are. Where its shape leaves that open (tokens in front of
        samples, windows), gradients tell (see ``_whose``). The target may leave so many rows without a
        gradient that several orders fit; then all that the model answers is taken with it.
        """
        batch, found = each.shape[0], [*rows]
        known: dict[int, torch.Tensor] = {}
        for asked in (each, each + _mixed(self.output, batch)):
            open_ = [i for i, r in enumerate(found) if r is None]
            whose = self._whose(asked, [self.constants[i].output for i in open_]) if open_ else []
            for i, samples in zip(open_, whose, strict=True):
                known[i] = torch.where(known[i] >= 0, known[i], samples) if i in known else samples
                axis = self.constants[i].axis
                found[i] = maps.rows_of(known[i], batch, [*range(samples.ndim)] if axis is None else [axis])
        return found

    @staticmethod
    def _whose(each: torch.Tensor, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Whose each element is, -1 if that is nobody's. If the number of a sample changes its sign, so do
        the gradients of its elements: the sample's index is read bit by bit, one backward each."""
        batch = each.shape[0]
        index = torch.arange(batch, device=each.device)
        before = [g for _, g in _filled(outputs, _gradients(each, outputs, False))]
        whose = [torch.zeros(g.shape, dtype=torch.long, device=g.device) for g in before]
        for bit in range((batch - 1).bit_length()):
            signs = 1 - 2 * (index >> bit & 1)
            back = _filled(outputs, _gradients(each * signs, outputs, False))
            for samples, plain, (_, g) in zip(whose, before, back, strict=True):
                samples += (g.signbit() != plain.signbit()).long() << bit
        return [samples.masked_fill(g == 0, -1) for samples, g in zip(whose, before, strict=True)]

    def _split(
        self, each: torch.Tensor, rows: Sequence[maps.Rows | None], gradients: Sequence[torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """By constant whose rows are of several samples, or of all alike: its gradient from each sample, in
        front of its axes. That takes a backward for each sample."""
        mixed = [i for i, r in enumerate(rows) if r is None and (self.known or bool(gradients[i].any()))]
        if not mixed:
            return {}
        outputs = [self.constants[i].output for i in mixed]
        found = [[g for _, g in _filled(outputs, _gradients(one, outputs, False))] for one in each]
        return {i: torch.stack(gs) for i, gs in zip(mixed, zip(*found, strict=True), strict=True)}

    @functools.cached_property
    def layout(self) -> Mapping[str, Any]:
        """The fields of ``Internals`` that do not depend on the target."""
        module = one_graph(self.module)
        sends, where = senders(module), positions(module, self.facts, self.sizes, self.sources)
        streams = (n if n is None else self.values[n].movedim(self.samples[n], 0) for n in self.streams)
        upstream = {p: reach([n], sends) for p, n in self.layers.items()}
        first = reach([*self.layers.values()][:1], lambda n: n.all_input_nodes)
        shapes = tuple(shape for n, shape in self.sizes.items() if n in first)
        tokens = {source_name(n): names for n, names in where.items()}
        rows = functools.partial(_same_rows, self.facts, where)
        pairs = itertools.pairwise(self.layers.items()) if self.attends else ()
        return {
            "shapes": shapes if self.known is None else self.known.shapes,
            "before": {p: frozenset(map(source_name, nodes)) for p, nodes in upstream.items()},
            "tokens": tokens | {p: where[n] for p, n in self.layers.items()},
            "axes": self.located.axes,
            "layouts": self.located.layouts,
            "streams": tuple(None if t is None else t.detach() for t in streams),
            "read": _read_token(self.ends[-1:], self.sizes, samples_axis(module), rows),
            "apart": frozenset(path for (_, n), (path, m) in pairs if n not in reach([m], rows)),
        }


def run(
    module: CapturedModule,
    inputs: Any,
    layers: Sequence[str] = (),
    biases: bool | None = True,
    attention: bool = False,
    given: Mapping[str, torch.Tensor] | None = None,
    starts: bool = False,
    located: Located | None = None,
    returned: bool = False,
    known: Known | None = None,
) -> Run:
    """Run ``module`` forward once.

    Args:
        inputs: as ``module`` takes them: a tensor, a tuple, or a dict of keyword arguments.
        layers: names of calls: module paths, and ``path#2`` for the second call of one.
        biases: whether bias terms are wanted; None leaves out tables of positions, too.
        attention: whether attention probabilities are wanted.
        given: what to start from instead of what is computed, by the names of ``Run.sources`` or of nodes.
        starts: whether embeddings at which the signal starts, and that do not pass a layer, are inputs and
            no constants.
        located: where things lie, if an earlier run has found it.
        returned: whether what the modules at the layers return is wanted.
        known: of a traced run, what an earlier one showed.

    Raises:
        InputError: no such layer.
    """
    called_by = calls(module)
    taps = {path: layer_input(called_by, path) for path in layers}
    first = next(iter(taps.values()), None)
    upstream = reach([] if first is None else [first], senders(module))
    starts = starts or not taps
    sites = {s.node: s for s in module.record.sites if s.bias and not (starts and s.starts)}
    facts = facts_of(module)
    attends = [*heads.sites(module.graph, facts)] if attention else []
    streams = [heads.stream_after(site, facts) for site in attends]
    ends = [n for p in layers for n in passed_on(called_by[p])[:1]] if attention or returned else []
    at = {site.node for site in attends}
    wanted = {*taps.values(), *at, *streams, *ends}
    called, values = dict[Node, Any](), dict[Node, torch.Tensor]()
    sizes: dict[Node, tuple[int, ...]] = {}
    constants: list[Constant] = []
    kinds: list[tuple[bool, bool]] = []
    axis = samples_axis(module)
    samples: dict[Node | str, int] = {n: axis(n) for n in wanted if n is not None}
    named = {n.name: n for n in module.graph.nodes}
    counted = [named[name] for name in sites if biases and named[name] not in upstream]
    flat, to_locate = flat_arguments(module, *as_call(inputs)), _ends([*taps.values()], counted, axis)
    asked = again.key([flat, dict(given or {})], *to_locate)
    located = known.located if known else located or again.recall(module, asked)
    locator = None if located else Locator(facts, axis, *to_locate)

    def tap(n: Node, y: Any) -> None:
        if locator is not None:
            follow(n, y, locator)
        if (shape := _shape(y)) is not None:
            sizes[n] = shape
        if n in wanted:
            values[n] = y
        if n in at:
            called[n] = runs.fetch_args_kwargs_from_env(n)
        site = sites.get(n.name)
        if site is not None and (biases or (biases is False and is_elementwise(n))):
            bias = site_bias(site, n, *runs.fetch_args_kwargs_from_env(n))
            counts = bool(biases) and n not in upstream
            for where, value, whole in _of_site(site, y, bias):
                known_kind = known.kinds[len(kinds)] if known else None
                table, finite = known_kind or _kind(n, value, whole, where)
                kinds.append((table, finite))
                if biases or table:
                    constants.append(Constant(site, where, value, whole, counts, table, finite))

    def follow(n: Node, y: Any, locator: Locator) -> None:
        name = source_name(n)
        if name in runs.sources and isinstance(y, torch.Tensor):
            locator.start(n, name, y, n.target is not insert.guard)
        locator.see(n, lambda: runs.fetch_args_kwargs_from_env(n), y)
        locator.forget(runs.user_to_last_uses.get(n, ()))

    reads = reads_past(module, taps)
    runs = Apart(
        module, {r for each in reads.values() for r in each}, tap, given=given,
        attributes=known.attributes if known else {},
    )  # fmt: skip
    with differentiable(), contextlib.nullcontext() if known else undisturbed(module):
        output = runs.run(*flat)
    located = again.keep(module, asked, locator) if locator is not None else located
    assert located is not None
    samples |= {name: axis(named[name]) for name in runs.sources if name in named}
    return Run(
        module, facts, output, runs.sources, taps, values, constants, attends, called, streams, ends, sizes,
        located, samples, kinds, reads, runs.seen, known,
    )  # fmt: skip


def _ends(
    layers: Sequence[Node], counted: Sequence[Node], axis: Callable[[Node], int]
) -> tuple[list[Node], list[Node]]:
    """The nodes whose tokens to locate: the first of each shape; and all that lie in windows,
    whose rows are parts of samples."""
    first: dict[str, Node] = {}
    windows = []
    for node in sorted({*layers, *counted}):
        _, shape = form(origin(node)) or ((), ())
        if len(shape) < 3:
            continue
        samples = shape[a := axis(node)]
        if _is_part(samples, node.graph):
            windows.append(node)
        elif len(shape) == 3:
            first.setdefault(str((*shape[:a], *shape[a + 1 :])), node)
    return [*first.values()], windows


def _is_part(rows: str, graph: Graph) -> bool:
    """Whether so many rows are more than there are samples, in symbols: inputs may each have their own."""
    import sympy

    forms = (form(n) for n in graph.nodes if n.target is insert.guard)
    batches = {shape[1][0] for shape in forms if shape is not None and shape[1]}
    if rows in batches or rows.isdigit():
        return False
    number = sympy.sympify(rows)
    return number.subs({s: _PRIME for s in number.free_symbols if str(s) in batches}) != _PRIME


def _read_token(
    ends: Sequence[Node], sizes: Mapping[Node, tuple[int, ...]], samples: Callable[[Node], int],
    rows: Callable[[Node], Sequence[Node]],
) -> int | None:  # fmt: skip
    """The first place of the axis of tokens that is taken alone behind a node of shape (B, T, C) or
    (T, B, C)."""
    for end in ends:
        behind = reach([end], lambda n: list(n.users))
        for found in (t for n in sizes if n in behind and (t := taken(n)) is not None):
            shape, axis = sizes.get(found.x, ()), 0 if samples(found.x) == 1 else 1
            tokens = len(shape) == 3 and shape[:2] == sizes[end][:2] and found.axis == axis
            if tokens and found.alone and end in reach([found.x], rows):
                return found.start
    return None


def facts_of(module: CapturedModule) -> heads.Facts:
    """The row of a node's op: as the module was balanced by, else the shipped one."""
    made, shipped = module.record.history, rulebook.load().fact
    own = made.facts if made is not None else {}
    return lambda n: own.get(n.name) or shipped(aten_op(n))


def _gradients(each: torch.Tensor, values: Sequence[torch.Tensor], last: bool) -> Sequence[Any]:
    """The gradients of values; None where none arrives."""
    if not each.requires_grad:  # on these values the model took a branch that gives a constant
        return [None] * len(values)
    return torch.autograd.grad(each.sum(), values, retain_graph=not last, allow_unused=True)


def _filled(values: Sequence[torch.Tensor], gradients: Sequence[Any]) -> list[Pair]:
    """Values with their gradients: zeros where none arrived."""
    pairs = zip(values, gradients, strict=True)
    return [(t.detach(), torch.zeros_like(t) if g is None else g) for t, g in pairs]


def _of_site(site: Site, y: Any, bias: Any) -> Iterator[tuple[int | None, torch.Tensor, torch.Tensor]]:
    """The constants of one site, none where they are all zero: the axis of samples, the constant, and the
    output that it is part of."""
    if bias is None:
        return
    ys, bs = (v if isinstance(v, (tuple, list)) else (v,) for v in (y, bias))
    for axis, t, b in zip(site.batch, ys, bs, strict=True):
        if b is not None and t.requires_grad:
            yield axis, b, t


def _kind(node: Node, value: torch.Tensor, whole: torch.Tensor, axis: int | None) -> tuple[bool, bool]:
    """Whether a constant is a table of positions, and whether it is finite."""
    table = is_elementwise(node) and _differs_by_place(value, whole, axis or 0)
    return table, bool(value.isfinite().all())


def _differs_by_place(bias: torch.Tensor, y: torch.Tensor, samples: int) -> bool:
    """Whether a constant differs between positions, and between channels, of a value whose axis ``samples``
    counts samples."""
    axes = [a for a in range(-bias.ndim, 0) if a != samples - y.ndim and bias.shape[a] > 1]
    return len(axes) > 1 and sum(not bool((bias == bias.narrow(a, 0, 1)).all()) for a in axes) > 1


def positions(
    module: CapturedModule, facts: heads.Facts, sizes: Mapping[Node, tuple[int, ...]],
    floating: Collection[str],
) -> dict[Node, frozenset[str]]:  # fmt: skip
    """The inputs whose positions (tokens, pixels) each node's value has.

    A value has the positions of all that it is computed from, with two exceptions. Attention, matrix
    products and layer norms have those of their first operand (queries, rows). Inputs whose values
    are added or multiplied position by position (word and segment embeddings) share their positions,
    if each operand is one sequence and not several, joined.

    Args:
        sizes: node -> shape of its value in this run, of tensors and of tuples of them (``()``).
        floating: the inputs that carry a gradient.
    """
    import networkx as nx  # who attributes nothing does not wait for it

    starts, samples = module.record.starts, samples_axis(module)
    signal: set[str] = set()
    shared: nx.Graph = nx.Graph()
    found: dict[Node, frozenset[str]] = {}
    for node in module.graph.nodes:
        read: list[Node] = []
        map_arg(node.kwargs.get("_output", node.args), read.append)
        carried = [n for n in dict.fromkeys(read) if found[n]]
        if node.target is insert.guard:
            found[node] = frozenset([source_name(node)])
            signal |= found[node] & set(floating)
        elif _has_rows(node, facts(node)):
            found[node] = found[carried[0]] if carried else frozenset()
        elif node.target in (insert.sizes, insert.structure) or node not in sizes:
            found[node] = frozenset()  # a number has no positions
        else:
            found[node] = frozenset().union(*(found[n] for n in carried))
            several = {found[n] & signal for n in carried}
            if len(several) > 1 and _by_position(node, carried, sizes, samples(node)):
                # what is joined of several sequences (text behind patches) does not make these one
                shared.add_nodes_from(found[node])
                if all(names and nx.is_connected(shared.subgraph(names)) for names in several):
                    nx.add_path(shared, sorted(frozenset().union(*several)))
        if node.name in starts:
            found[node] = found[node] or frozenset([node.name])
            signal |= found[node]
    alike = {name: frozenset(group) for group in nx.connected_components(shared) for name in group}
    return {
        n: frozenset().union(*(alike.get(name, {name}) for name in names)) & signal or names
        for n, names in found.items()
    }


def _same_rows(facts: heads.Facts, where: Mapping[Node, frozenset[str]], node: Node) -> Sequence[Node]:
    """The operands whose positions a value has, by ``positions``."""
    read: list[Node] = []
    map_arg(node.kwargs.get("_output", node.args), read.append)
    carried = [n for n in read if where[n]]
    return carried[:1] if _has_rows(node, facts(node)) else carried


def _by_position(
    node: Node, read: Sequence[Node], sizes: Mapping[Node, tuple[int, ...]], samples: int
) -> bool:
    """Whether the operands meet element by element, over more than one position."""
    if not is_elementwise(node):
        return False
    shape = sizes.get(node, ())
    return (
        len(shape) > 2 and shape[0 if samples == 1 else 1] > 1 and all(sizes.get(n) == shape for n in read)
    )


def _has_rows(node: Node, fact: OpFacts | None) -> bool:
    """Whether the rows of a node are those of its first operand: queries, what is multiplied or normed."""
    kinds = (Kind.ATTENTION, Kind.PRODUCT, Kind.NORMALISER)
    return fact is not None and fact.kind in kinds and not is_elementwise(node)


def _samples_first(rows: maps.Rows | None, batch: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: t[None] if rows is None else maps.by_sample(t, rows, batch)


def _mixed(output: Any, batch: int) -> torch.Tensor:
    """(B,): a sum over all entries of each sample's output, with weights that are all different."""
    y = first_tensor(output)
    if not y.is_floating_point() or y.ndim == 0 or len(y) != batch:
        return torch.zeros(batch, device=y.device)
    weights = torch.arange(1, y[0].numel() + 1, device=y.device).sqrt().to(y)
    return (y.flatten(1) if y.ndim > 1 else y[:, None]) @ weights


def layer_input(called: Mapping[str, Node], name: str) -> Node:
    """The node that is the first tensor argument of a call (``blocks.3``; the second, ``blocks.3#2``)."""
    if name in called and (found := argument(called[name])) is not None:
        return found
    near = difflib.get_close_matches(str(name), called, 3) or [*called][:6]
    hint = f"; called are, for example, {', '.join(near)}"
    raise InputError(f"no module {name!r} is called with a tensor in this graph{hint}")


def _shape(y: Any) -> tuple[int, ...] | None:
    """The shape of a tensor, ``()`` for a structure of them; None for a number."""
    if isinstance(y, torch.Tensor):
        return tuple(y.shape)
    return () if any(isinstance(t, torch.Tensor) for t in pytree.tree_leaves(y)) else None
