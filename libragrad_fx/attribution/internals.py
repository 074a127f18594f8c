"""One forward and one backward of a captured module, with its inside in view.

Block inputs are found by module path in the graph (the arguments of the probe that ends the call),
bias terms are the graph's own additive constants; their gradients come from the same backward.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from libragrad_fx.account.observe import Observer, flat_arguments, site_bias, source_name
from libragrad_fx.attribution import attention as heads
from libragrad_fx.decide import rulebook
from libragrad_fx.decide.flow import reach
from libragrad_fx.errors import InputError
from libragrad_fx.graph.schema import aten_op
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.module.walk import called_modules
from libragrad_fx.ops import insert
from libragrad_fx.ops.places import taken
from libragrad_fx.target import Target, as_call, differentiable, select_each, undisturbed
from libragrad_fx.types import Kind, OpFacts, Site

Pair = tuple[torch.Tensor, torch.Tensor]
Term = tuple[Site, int | None, torch.Tensor, torch.Tensor]
"""A site, which axis counts samples, its constant, and the output that it is part of, or its gradient."""


@dataclasses.dataclass(frozen=True)
class Internals:
    """What one backward shows.

    output:  (B,) what is explained, one number a sample
    inputs:  name -> (x, df/dx) for every floating-point input (or embedded token sequence)
    layers:  module path -> (h, df/dh) for the input h of each module asked for
    biases:  (site, axis, b, df/db) for the additive constants that are not upstream of the first
             layer; b and df/db have the shape of the op's output, ``axis`` counts its samples
    shapes:  shapes of the values upstream of the first layer, in graph order (``()`` for a tuple)
    before:  module path -> the nodes and inputs that the layer's input is computed from
    tokens:  node, input or module path -> the inputs whose positions it has (see ``positions``)
    attention: every attention, in the order of the graph, where it was asked for
    streams: for each of these the residual stream behind it; None where there is none
    ends:    what the module at each layer returned, likewise
    read:    which token of the last layer's module is read alone, by what comes behind it; None if none is
    """

    output: torch.Tensor
    inputs: Mapping[str, Pair]
    layers: Mapping[str, Pair]
    biases: tuple[Term, ...]
    shapes: tuple[tuple[int, ...], ...]
    before: Mapping[str, frozenset[str]]
    tokens: Mapping[str, frozenset[str]]
    attention: tuple[heads.Attention, ...] = ()
    streams: tuple[torch.Tensor | None, ...] = ()
    ends: tuple[torch.Tensor, ...] = ()
    read: int | None = None


def observe(
    module: CapturedModule,
    inputs: Any,
    target: Target,
    layers: Sequence[str] = (),
    biases: bool = True,
    attention: bool = False,
) -> Internals:
    """Run ``module`` forward and backward once.

    Args:
        inputs: as ``module`` takes them: a tensor, a tuple, or a dict of keyword arguments.
        target: what to explain (see ``verify.select``).
        layers: module paths; of a module called several times the first call counts.
        biases: whether bias terms are wanted.
        attention: whether attention probabilities are wanted.

    Raises:
        InputError: no such layer, or the target does not fit.
    """
    taps = {path: layer_input(module, path) for path in layers}
    first = next(iter(taps.values()), None)
    upstream = _ancestors(first) if first is not None else set()
    # without layers, what starts the signal is an input, and no constant
    sites = [s for s in module.record.sites if taps or not s.starts]
    counted = {s.node: s for s in sites if biases and s.bias}
    facts = _facts_of(module)
    attends = [*heads.sites(module.graph, facts)] if attention else []
    behind = [heads.stream_after(site, facts) for site in attends]
    ends = [_at_call(module, path, "_output") for path in layers] if attention else []
    at = {site.node for site in attends}
    wanted = {*taps.values(), *at, *behind, *ends}
    called: dict[Node, Any] = {}
    kept: dict[Node, torch.Tensor] = {}
    sizes: dict[Node, tuple[int, ...]] = {}
    terms: list[Term] = []

    def tap(n: Node, y: Any) -> None:
        if (shape := _shape(y)) is not None:
            sizes[n] = shape
        if n in wanted:
            kept[n] = y
        if n in at:
            called[n] = run.fetch_args_kwargs_from_env(n)
        if n not in upstream and (site := counted.get(n.name)) is not None:
            terms.extend(_terms(site, y, site_bias(site, n, *run.fetch_args_kwargs_from_env(n))))

    run = Observer(module, tap)
    with differentiable(), undisturbed(module):
        each = select_each(run.run(*flat_arguments(module, *as_call(inputs))), target)
        values = [*run.sources.values(), *(kept[n] for n in taps.values()), *(t for *_, t in terms)]
        values += [kept[site.node] for site in attends]
        found = iter(_pairs(each, values))
    sources = {name: next(found) for name in run.sources}
    tapped = {path: next(found) for path in taps}
    constants = tuple(
        (site, axis, _finite(b.expand_as(t), g), g)
        for (site, axis, b, t), (_, g) in zip(terms, itertools.islice(found, len(terms)), strict=True)
    )
    attended = tuple(
        heads.attention(site, called[site.node], g, each.shape[0])
        for site, (_, g) in zip(attends, found, strict=True)
    )
    streams = tuple(None if n is None else kept[n].detach() for n in behind)
    shapes = tuple(shape for n, shape in sizes.items() if n in upstream)
    before = {p: frozenset(map(source_name, _ancestors(n))) for p, n in taps.items()}
    where = positions(module, facts, sizes, sources)
    tokens = {source_name(n): names for n, names in where.items()}
    tokens |= {p: where[n] for p, n in taps.items()}
    return Internals(
        each.detach(), sources, tapped, constants, shapes, before, tokens, attended, streams,
        tuple(kept[n].detach() for n in ends if n is not None), _read_token(ends[-1:], sizes),
    )  # fmt: skip


def run_from(
    module: CapturedModule, inputs: Any, target: Target, given: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output and the gradients of ``Internals.inputs``, if the signal starts from ``given``."""
    run = Observer(module, given=given)
    with differentiable(), undisturbed(module):
        each = select_each(run.run(*flat_arguments(module, *as_call(inputs))), target)
        pairs = _pairs(each, [*run.sources.values()])
    return each.detach(), {name: g for name, (_, g) in zip(run.sources, pairs, strict=True)}


def _read_token(ends: Sequence[Node | None], sizes: Mapping[Node, tuple[int, ...]]) -> int | None:
    """The first place of the axis of tokens that is taken alone behind a node of shape (B, T, C)."""
    behind = reach([n for n in ends if n is not None], lambda n: list(n.users))
    for found in (t for n in sizes if n in behind and (t := taken(n)) is not None):
        if len(sizes.get(found.x, ())) == 3 and found.axis == 1 and found.alone:
            return found.start
    return None


def _facts_of(module: CapturedModule) -> heads.Facts:
    """The row of a node's op: as the module was balanced by, else the shipped one."""
    made, shipped = module.record.history, rulebook.load().fact
    own = made.facts if made is not None else {}
    return lambda n: own.get(n.name) or shipped(aten_op(n))


def _pairs(each: torch.Tensor, values: Sequence[torch.Tensor]) -> list[Pair]:
    """Values with their gradients: zeros where none arrives."""
    grads = torch.autograd.grad(each.sum(), values, allow_unused=True)
    pairs = zip(values, grads, strict=True)
    return [(t.detach(), torch.zeros_like(t) if g is None else g) for t, g in pairs]


def _terms(site: Site, y: Any, bias: Any) -> Iterator[Term]:
    """The constants of one site, and the outputs that they are part of."""
    ys, bs = (v if isinstance(v, (tuple, list)) else (v,) for v in (y, bias))
    for axis, t, b in zip(site.batch, ys, bs, strict=True):
        if b is not None and t.requires_grad:
            yield site, axis, b, t


def positions(
    module: CapturedModule, facts: heads.Facts, sizes: Mapping[Node, tuple[int, ...]],
    floating: Collection[str],
) -> dict[Node, frozenset[str]]:  # fmt: skip
    """The inputs whose positions (tokens, pixels) each node's value has.

    A value has the positions of all that it is computed from, with two exceptions. Attention, matrix
    products and layer norms have those of their first operand (queries, rows). Inputs whose values
    are added or multiplied position by position (word and segment embeddings) share their positions.

    Args:
        sizes: node -> shape of its value in this run, of tensors and of tuples of them (``()``).
        floating: the inputs that carry a gradient.
    """
    import networkx as nx  # who attributes nothing does not wait for it

    starts = module.record.starts
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
            if len({found[n] for n in carried}) > 1 and _by_position(node, carried, sizes):
                nx.add_path(shared, sorted(found[node]))
        if node.name in starts:
            found[node] = found[node] or frozenset([node.name])
            signal |= found[node]
    alike = {name: frozenset(group) for group in nx.connected_components(shared) for name in group}
    return {
        n: frozenset().union(*(alike.get(name, {name}) for name in names)) & signal or names
        for n, names in found.items()
    }


def _by_position(node: Node, read: Sequence[Node], sizes: Mapping[Node, tuple[int, ...]]) -> bool:
    """Whether the operands meet element by element, over more than one position."""
    if not _is_pointwise(node):
        return False
    shape = sizes.get(node, ())
    return len(shape) > 2 and shape[1] > 1 and all(sizes.get(n) == shape for n in read)


def _has_rows(node: Node, fact: OpFacts | None) -> bool:
    """Whether the rows of a node are those of its first operand: queries, what is multiplied or normed."""
    kinds = (Kind.ATTENTION, Kind.PRODUCT, Kind.NORMALISER)
    return fact is not None and fact.kind in kinds and not _is_pointwise(node)


def _is_pointwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(aten_op(node), "tags", ())


def _finite(bias: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """A constant that gets no gradient counts nothing, were it infinite (a pool's padding)."""
    return bias if bool(bias.isfinite().all()) else bias.masked_fill(g == 0, 0.0)


def layer_input(module: CapturedModule, path: str) -> Node:
    """The graph node that is the first tensor argument of the module at ``path``."""
    if (found := _at_call(module, path, "_args")) is not None:
        return found
    called = called_modules(module)
    near = difflib.get_close_matches(str(path), called, 3) or called[:6]
    hint = f"; called are, for example, {', '.join(near)}"
    raise InputError(f"no module {path!r} is called with a tensor in this graph{hint}")


def _at_call(module: CapturedModule, path: str, side: str) -> Node | None:
    """The first tensor that the module at ``path`` is called with (``_args``) or returns (``_output``)."""
    for node in module.graph.nodes:
        if node.op == "call_module" and node.target == path and "_output" in node.kwargs:
            found: list[Node] = []
            map_arg(node.kwargs[side], found.append)
            if found:
                return found[0]
    return None


def _ancestors(node: Node) -> set[Node]:
    return reach([node], lambda n: n.all_input_nodes)


def _shape(y: Any) -> tuple[int, ...] | None:
    """The shape of a tensor, ``()`` for a tuple of them; None for a number."""
    if isinstance(y, torch.Tensor):
        return tuple(y.shape)
    return () if isinstance(y, (tuple, list)) else None
