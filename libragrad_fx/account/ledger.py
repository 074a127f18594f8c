"""The account of one backward, node by node.

The law at a node: ``⟨y, g⟩ = Σ⟨a_i, r_i(g)⟩ + ⟨bias(op), g⟩`` over the operands that depend on the
model's input. ``r_i(g)`` is what this node alone sends to operand i, so every edge of the graph gets
an alias whose gradient is that; ``bias(op)`` is computed from the op (``ops.bias``), never as a rest.

The sums are taken while one backward runs, and what a node needed for its sums is let go with it:
an account costs a small multiple of the backward it describes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from libragrad_fx.errors import InputError
from libragrad_fx.graph.notes import note
from libragrad_fx.graph.schema import aten_op, bind, operands, spread, tensor_arguments
from libragrad_fx.module.captured import CapturedModule, Forward, InGraphs
from libragrad_fx.module.walk import blocks
from libragrad_fx.ops import bias as biases
from libragrad_fx.ops import insert
from libragrad_fx.ops.function import same
from libragrad_fx.ops.insert import is_end, is_scale, probed
from libragrad_fx.target import Target, as_call, differentiable, inexact, moving, product, select
from libragrad_fx.types import Boundary, Flow, Ledger, LedgerRow, Site

_OUTPUT = "output"


# --- running a graph with every edge in view


class Running(torch.fx.Interpreter):
    """Runs a graph node by node, called as the module is: see ``flat_arguments``."""

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """As fx has it, but for ``*args``, whose value is one of the arguments here."""
        return next(self.args_iter)


class Recorder(Running):
    """Runs a graph; every operand of every site is an alias of its own, whose gradient is noted.

    A host and the nodes inserted for it are one unit: operands are taken before a scale that was
    put on them, the output behind a scale that was put on it.

    leaves: for a module that is one graph of several, the inputs of the whole model; what comes from
        another graph is then part of its gradient, and not a source.
    """

    def __init__(
        self, module: CapturedModule, leaves: Sequence[torch.Tensor] | None = None
    ) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.extra_traceback = False  # an op's own error is enough
        self.leaves = leaves
        self.table: dict[str, Site] = {s.node: s for s in module.record.sites}
        table = self.table
        self.rows = {n.name: _Row() for n in module.graph.nodes if n.name in table}
        self.rows[_OUTPUT] = _Row()
        self.sources: list[torch.Tensor] = []
        inputs = {n.name for n in module.graph.nodes if n.target is insert.guard}
        self.starts = inputs | {s.node for s in table.values() if s.starts}
        self.origin = _origins(module, table)
        self.scaled = {
            n.args[0].name
            for n in module.graph.nodes
            if is_scale(n) and note(n).host == n.args[0].name
        }

    def run_node(self, n: Node) -> Any:
        if n.target is insert.guard:
            x = super().run_node(n)
            if self.leaves is not None and not any(x is t for t in self.leaves):
                self.starts.discard(n.name)
                return x
            return self._source(x)
        if is_scale(n) and not is_end(n):
            return self._scale(n)
        if n.op == "output" or n.target == "output_structure":
            return self._returned(n)
        site = self.table.get(n.name)
        if site is None:
            return super().run_node(n)
        values = self.fetch_args_kwargs_from_env(n)
        if site.starts:  # an embedding indexed by the input: the signal starts here
            self.rows.pop(n.name)
            return self._source(n.target(*values[0], **values[1]))  # type: ignore[operator]
        row = self.rows[n.name]
        inside = {m for m in n.all_input_nodes if is_scale(m) and note(m).host == n.name}
        named = [(k, m) for k, m in operands(n, tensor_arguments(n)) if m not in inside]
        if site.bias is not None:
            row.bias = lambda: site_bias(site, n, *values)
        producers = {k: self.origin.get(m, "") for k, m in named if k in site.live}
        args, kwargs = _aliased(n, *values, producers, row.operand)
        y = n.target(*args, **kwargs)  # type: ignore[operator]
        return y if n.name in self.scaled else row.watch(y)

    def _source(self, x: Any) -> Any:
        if isinstance(x, (tuple, list)):  # an embedding bag gives four tensors
            return tuple(map(self._source, x))
        if inexact(x):
            if self.leaves is None or not any(x is t for t in self.leaves):
                x = x.detach().requires_grad_()
            self.sources.append(x)
        return x

    def _scale(self, n: Node) -> Any:
        (x, factor), _ = self.fetch_args_kwargs_from_env(n)
        host, inner = note(n).host, n.args[0]
        row = self.rows[host]
        if inner.name == host:  # type: ignore[union-attr]
            return row.watch(insert.scale(x, factor))
        return insert.scale(row.operand(x, self.origin.get(inner, "")), factor)  # type: ignore[arg-type]

    def _returned(self, n: Node) -> Any:
        """What the model returns; the target is the last consumer in the account."""
        row = self.rows[_OUTPUT]
        args: Any = map_arg(n.args, lambda m: row.operand(self.env[m], self.origin.get(m, "")))  # type: ignore[arg-type]
        if n.op == "output":
            return args[0]
        return self.module.get_submodule("output_structure")(*args)


def _origins(module: CapturedModule, table: Mapping[str, Site]) -> dict[Node, str]:
    """Which site's output, or which input of the model, a node hands on unchanged."""
    found: dict[Node, str] = {}
    for n in module.graph.nodes:
        if n.name in table or n.target is insert.guard:
            found[n] = n.name
            continue
        own = n.args[0] if n.args and n.op != "call_module" else None
        handed = probed(n) or own
        if isinstance(handed, Node) and handed in found:
            found[n] = found[handed]
    return found


class _Row:
    """The sums of one site, filled while the backward runs. By producer, ``flows`` are Σ⟨a, r(g)⟩
    and ``squares`` Σ‖r(g)‖²."""

    def __init__(self) -> None:
        self.out = self.constant = 0.0
        self.flows: dict[str, float] = {}
        self.squares: dict[str, float] = {}
        self.bias: Callable[[], Any] | None = None

    def operand(self, x: Any, producer: str) -> Any:
        """An alias of ``x`` for this site alone; its gradient is r_i(g)."""
        if not _moves(x):
            return x
        alias, held = same(x), [x.detach()]

        def note(g: torch.Tensor | None) -> None:
            value = held.pop()  # let go of it: the rest of the backward does not need it
            flow, square = (0.0, 0.0) if g is None else (dot(value, g), dot(g, g))
            self.flows[producer] = self.flows.get(producer, 0.0) + flow
            self.squares[producer] = self.squares.get(producer, 0.0) + square

        alias.register_hook(note)
        return alias

    def watch(self, y: Any) -> Any:
        """Note ⟨y, g⟩ and ⟨bias, g⟩ when the gradient of ``y`` (a tensor or several) is complete."""
        if isinstance(y, (tuple, list)):
            # one may be part of another inside the op, as an LSTM's cell is: readers have aliases
            return [self._noted(same(t), i) if _moves(t) else t for i, t in enumerate(y)]
        return self._noted(y, 0) if _moves(y) else y

    def _noted(self, y: torch.Tensor, index: int) -> torch.Tensor:
        held = [y.detach()]

        def note(g: torch.Tensor | None) -> None:
            value = held.pop()
            if g is None:  # autograd's zero: a pruned path ends below
                return
            self.out += dot(value, g)
            bias = self.bias() if self.bias else None
            if isinstance(bias, (tuple, list)):
                bias = bias[index]
            elif self.bias:
                self.bias = None
            if bias is not None:
                self.constant += dot(bias.expand_as(g), g)

        y.register_hook(note)
        return y


def _moves(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """⟨a, b⟩ accumulated in float64; what gets no gradient counts nothing, were it infinite."""
    products = product(a, b)
    total = float(products.sum())
    if math.isnan(total):  # a pool's padding of -inf, a mask: inf times 0
        total = float(products.masked_fill_((a == 0) | (b == 0), 0.0).sum())
    return total


def _aliased(
    n: Node, args: Any, kwargs: Any, producers: Mapping[str, str], alias: Callable[[Any, str], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments in schema order, an alias for each operand that ``producers`` names."""
    op = aten_op(n)

    def place(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [place(f"{name}[{i}]", v) for i, v in enumerate(value)]
        return alias(value, producers[name]) if name in producers else value

    return spread(op, {k: place(k, v) for k, v in bind(op, args, kwargs).items()})


def site_bias(site: Site, n: Node, args: Any, kwargs: Any) -> Any:
    """The constant of one site, shaped like its output (or None)."""
    if site.bias is None:
        return None
    return biases.bias(site.bias, aten_op(n), site.live, args, kwargs)


# --- the account


def ledger(module: InGraphs, inputs: Any, target: Target = None) -> Ledger:
    """The account of one backward of a captured model, balanced or not, node by node.

    Args:
        inputs: as ``module`` takes them: a tensor, a tuple, or a dict of keyword arguments.
        target: what to explain, see ``target.select_each``.
    """
    return ledger_and_forward(module, inputs, target)[0]


def ledger_and_forward(module: InGraphs, inputs: Any, target: Target) -> tuple[Ledger, Forward]:
    """As ``ledger``, and the forward that it is of."""
    recorders: list[tuple[str, Recorder]] = []

    def record(name: str, graph: CapturedModule, leaves: Any, args: Any, kwargs: Any) -> Any:
        recorder = Recorder(graph, leaves)
        recorders.append((name, recorder))
        return recorder.run(*flat_arguments(graph, args, kwargs))

    with differentiable(), module.unchanged():
        forward = module.run_by(record, *as_call(inputs))
        return settle(recorders, forward, target), forward


def share_as_run(module: InGraphs, forward: Forward, inputs: Any, target: Target) -> float | None:
    """⟨x, ∂f/∂x⟩ by the graph that runs and not by the one that is accounted for; None where nothing
    comes back. Where the signal starts behind the inputs (embeddings of tokens), x is what starts it; None
    where that is in one of several graphs. ``forward`` says which graphs run.
    """
    starting = [g for g in forward.graphs.values() if g.record.starts]
    if starting not in ([], [module]):
        return None
    leaves, spec = pytree.tree_flatten(as_call(inputs))
    with differentiable(), module.unchanged():
        leaves = [moving(x) for x in leaves]
        sources = [x for x in leaves if inexact(x)]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        if starting:
            running = _Started(starting[0])
            output = running.run(*flat_arguments(starting[0], args, kwargs))
            sources += running.sources
        else:
            output = module(*args, **kwargs)
        scalar = select(output, target)
        if not sources or not scalar.requires_grad:
            return None
        grads = torch.autograd.grad(scalar, sources, allow_unused=True)
    pairs = zip(sources, grads, strict=True)
    return sum(dot(x.detach(), g) for x, g in pairs if g is not None)


class _Started(Running):
    """Runs the graph that runs; what starts the signal there is noted as a source."""

    def __init__(self, module: CapturedModule) -> None:
        graph = module.graph if module.lean is None else module.lean
        super().__init__(module, garbage_collect_values=True, graph=graph)
        self.extra_traceback = False
        self.starts: frozenset[str] = module.record.starts
        self.sources: list[torch.Tensor] = []

    def run_node(self, n: Node) -> Any:
        y = super().run_node(n)
        if n.name not in self.starts:
            return y
        return pytree.tree_map(self._source, y)

    def _source(self, x: Any) -> Any:
        if not inexact(x):
            return x
        self.sources.append(x.detach().requires_grad_())
        return self.sources[-1]


def settle(recorders: Sequence[tuple[str, Recorder]], forward: Forward, target: Target) -> Ledger:
    """Run the backward of what was recorded, one graph or several by name, and add it up."""
    scalar = select(forward.output, target)
    started = {id(x): x for x in forward.leaves if inexact(x)}
    started |= {id(x): x for _, r in recorders for x in r.sources}
    sources = list(started.values())
    grads = torch.autograd.grad(scalar, sources, allow_unused=True)
    pairs = zip(sources, grads, strict=True)
    carried = sum(dot(x.detach(), g) for x, g in pairs if g is not None)
    total = float(scalar.detach())
    rows: list[LedgerRow] = []
    boundaries: tuple[Boundary, ...] = ()
    for name, recorder in recorders:
        found = recorder.rows
        sites = [s for s in recorder.table.values() if s.node in found]
        if not name:  # the only graph: the target is the last that reads
            boundaries = (*_boundaries(recorder, total),)
            found[_OUTPUT].out = total
            sites.append(Site(_OUTPUT, "target", "", "", (), None, False, ()))
        rows += [_row(s, name, found[s.node], recorder.starts) for s in sites]
    return Ledger(tuple(rows), total, carried, sum(r.bias for r in rows), boundaries)


def _row(site: Site, name: str, row: _Row, starts: set[str]) -> LedgerRow:
    flows = {
        at: sum(v for k, v in row.flows.items() if (k in starts) is at) for at in (True, False)
    }
    residual = row.out - flows[False] - flows[True] - row.constant
    node = f"{name}/{site.node}" if name else site.node
    return LedgerRow(
        node, site.op, site.module, site.source, row.out, flows[False], flows[True], row.constant, residual,
        tuple(Flow(k, flow, math.sqrt(row.squares[k])) for k, flow in row.flows.items()),
    )  # fmt: skip


def _boundaries(recorder: Recorder, total: float) -> Iterator[Boundary]:
    """Completeness behind each block: what crosses there, and the constants that come after it.

    A signal that starts after the block (the other tower of a model with two) counts as crossing.
    """
    module: CapturedModule = recorder.module  # type: ignore[assignment]
    place = {n.name: i for i, n in enumerate(module.graph.nodes)}
    ends = {n.target: i for i, n in enumerate(module.graph.nodes) if "_output" in n.kwargs}
    for path in blocks(module):
        end = ends[path]
        after = [r for k, r in recorder.rows.items() if place.get(k, len(place)) > end]
        crossing = sum(
            flow
            for r in after
            for producer, flow in r.flows.items()
            if place[producer] <= end or producer in recorder.starts
        )
        constants = sum(r.constant for r in after)
        yield Boundary(path, crossing, constants, abs(total - crossing - constants))


def flat_arguments(module: CapturedModule, args: Any, kwargs: Any) -> list[Any]:
    """The call's arguments in the order of the graph's placeholders, defaults filled in."""
    names = [n for n in module.graph.nodes if n.op == "placeholder"]
    star = next((n for n in names if str(n.target).startswith("*")), None)
    plain = [n for n in names if n is not star]
    count = len(plain) if star is None else names.index(star)
    given = dict(zip((n.name for n in plain[:count]), args, strict=False)) | dict(kwargs)
    if unknown := set(given) - {n.name for n in plain}:
        raise InputError(f"forward takes no {', '.join(sorted(unknown))}")
    missing = [n.name for n in plain if n.name not in given and not n.args]
    if missing or (star is None and len(args) > count):
        raise InputError(f"the inputs do not fit forward({', '.join(n.name for n in names)})")
    if star is not None:
        given[star.name] = tuple(args[count:])
    return [given[n.name] if n.name in given else n.args[0] for n in names]
