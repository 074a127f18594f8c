"""One forward and one backward of a captured module, with its inside in view.

Block inputs are found by module path in the graph (the arguments of the probe that ends the call),
bias terms are the graph's own additive constants; their gradients come from the same backward.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from libragrad_fx.account.ledger import Running, flat_arguments, site_bias
from libragrad_fx.errors import InputError
from libragrad_fx.graph.schema import aten_op
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.module.walk import called_modules
from libragrad_fx.ops import insert
from libragrad_fx.target import Target, as_call, differentiable, inexact, select_each, undisturbed
from libragrad_fx.types import Site

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Internals:
    """What one backward shows.

    output:  (B,) what is explained, one number a sample
    inputs:  name -> (x, df/dx) for every floating-point input (or embedded token sequence)
    layers:  module path -> (h, df/dh) for the input h of each module asked for
    biases:  (site, axis, b, df/db) for the additive constants that are not upstream of the first
             layer; b and df/db have the shape of the op's output, ``axis`` counts its samples
    shapes:  shapes of the values upstream of the first layer, in graph order
    before:  module path -> the nodes and inputs that the layer's input is computed from
    tokens:  node, input or module path -> the inputs whose positions it has (see ``positions``)
    """

    output: torch.Tensor
    inputs: Mapping[str, Pair]
    layers: Mapping[str, Pair]
    biases: tuple[tuple[Site, int | None, torch.Tensor, torch.Tensor], ...]
    shapes: tuple[tuple[int, ...], ...]
    before: Mapping[str, frozenset[str]]
    tokens: Mapping[str, frozenset[str]]


def observe(
    module: CapturedModule,
    inputs: Any,
    target: Target,
    layers: Sequence[str] = (),
    biases: bool = True,
) -> Internals:
    """Run ``module`` forward and backward once.

    Args:
        inputs: as ``module`` takes them: a tensor, a tuple, or a dict of keyword arguments.
        target: what to explain (see ``verify.select``).
        layers: module paths; of a module called several times the first call counts.
        biases: whether bias terms are wanted.

    Raises:
        InputError: no such layer, or the target does not fit.
    """
    taps = {path: layer_input(module, path) for path in layers}
    first = next(iter(taps.values()), None)
    upstream = _ancestors(first) if first is not None else set()
    with differentiable(), undisturbed(module):
        args, kwargs = as_call(inputs)
        watch = _Watch(module, set(taps.values()), upstream, biases)
        each = select_each(watch.run(*flat_arguments(module, args, kwargs)), target)
        wanted = [*watch.sources.values(), *(watch.kept[n] for n in taps.values())]
        wanted += [t for *_, t in watch.terms]
        grads = torch.autograd.grad(each.sum(), wanted, allow_unused=True)
    found = iter([
        (t.detach(), torch.zeros_like(t) if g is None else g) for t, g in zip(wanted, grads, strict=True)
    ])  # fmt: skip
    sources = {name: next(found) for name in watch.sources}
    tapped = {path: next(found) for path in taps}
    terms = tuple(
        (site, axis, _finite(b.expand_as(t), g), g)
        for (site, axis, b, t), (_, g) in zip(watch.terms, found, strict=True)
    )
    before = {p: frozenset(map(_source_name, _ancestors(tap))) for p, tap in taps.items()}
    where = positions(module, watch.sizes, sources)
    tokens = {_source_name(n): names for n, names in where.items()}
    tokens |= {p: where[tap] for p, tap in taps.items()}
    return Internals(each.detach(), sources, tapped, terms, tuple(watch.shapes), before, tokens)


def positions(
    module: CapturedModule, sizes: Mapping[Node, tuple[int, ...]], floating: Collection[str]
) -> dict[Node, frozenset[str]]:
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
            found[node] = frozenset([_source_name(node)])
            signal |= found[node] & set(floating)
        elif _packet_name(node) in _MEET:
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
    if _packet_name(node) not in ("add", "add_", "sub", "mul", "mul_"):
        return False
    shape = sizes.get(node, ())
    return len(shape) > 2 and shape[1] > 1 and all(sizes.get(n) == shape for n in read)


_MEET = {
    "scaled_dot_product_attention", "matmul", "bmm", "mm", "addmm", "baddbmm", "linear", "mv",
    "_native_multi_head_attention", "layer_norm", "native_layer_norm",
}  # fmt: skip


def _finite(bias: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """A constant that gets no gradient counts nothing, were it infinite (a pool's padding)."""
    return bias if bool(bias.isfinite().all()) else bias.masked_fill(g == 0, 0.0)


def layer_input(module: CapturedModule, path: str) -> Node:
    """The graph node that is the first tensor argument of the module at ``path``."""
    for node in module.graph.nodes:
        if node.op == "call_module" and node.target == path and "_output" in node.kwargs:
            found: list[Node] = []
            map_arg(node.args, found.append)
            if found:
                return found[0]
    called = called_modules(module)
    near = difflib.get_close_matches(str(path), called, 3) or called[:6]
    hint = f"; called are, for example, {', '.join(near)}"
    raise InputError(f"no module {path!r} is called with a tensor in this graph{hint}")


def _packet_name(node: Node) -> str:
    return getattr(aten_op(node), "_opname", "")


def _source_name(node: Node) -> str:
    return str(node.args[1]) if node.target is insert.guard else node.name


def _ancestors(node: Node) -> set[Node]:
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return seen


def _shape(y: Any) -> tuple[int, ...] | None:
    """The shape of a tensor, ``()`` for a tuple of them; None for a number."""
    if isinstance(y, torch.Tensor):
        return tuple(y.shape)
    return () if isinstance(y, (tuple, list)) else None


class _Watch(Running):
    """Runs the graph, keeping the values and constants whose gradients are wanted."""

    def __init__(
        self, module: CapturedModule, taps: set[Node], upstream: set[Node], biases: bool
    ) -> None:
        super().__init__(module)
        self.extra_traceback = False  # an op's own error is enough
        self.taps, self.upstream = taps, upstream
        sites: Sequence[Site] = module.record.sites
        self.started = {s.node for s in sites if s.starts}
        # without layers, what starts the signal is an input, and no constant
        skip = set() if taps else self.started
        self.table = {s.node: s for s in sites if s.bias and biases and s.node not in skip}
        self.kept: dict[Node, torch.Tensor] = {}
        self.sources: dict[str, torch.Tensor] = {}
        self.terms: list[tuple[Site, int | None, torch.Tensor, torch.Tensor]] = []
        self.shapes: list[tuple[int, ...]] = []
        self.sizes: dict[Node, tuple[int, ...]] = {}

    def run_node(self, n: Node) -> Any:
        y = super().run_node(n)
        if n.target is insert.guard:
            y = self._start(str(n.args[1]), y)
        elif n.name in self.started:
            y = self._start(n.name, y)
        if (shape := _shape(y)) is not None:
            self.sizes[n] = shape
        if n in self.taps:
            self.kept[n] = y
        if n in self.upstream:
            if isinstance(y, torch.Tensor):
                self.shapes.append(tuple(y.shape))
        elif (site := self.table.get(n.name)) is not None:
            self._term(site, n, y)
        return y

    def _start(self, name: str, y: Any) -> Any:
        """``y`` as a leaf of the gradient; of several outputs (an embedding bag's) the first."""
        if isinstance(y, (tuple, list)):
            return (self._start(name, y[0]), *y[1:])
        if inexact(y):
            self.sources[name] = y = y.detach().requires_grad_()
        return y

    def _term(self, site: Site, n: Node, y: Any) -> None:
        bias = site_bias(site, n, *self.fetch_args_kwargs_from_env(n))
        ys = y if isinstance(y, (tuple, list)) else (y,)
        bs = bias if isinstance(bias, (tuple, list)) else (bias,)
        for axis, t, b in zip(site.batch, ys, bs, strict=True):
            if b is not None and t.requires_grad:
                self.terms.append((site, axis, b, t))
