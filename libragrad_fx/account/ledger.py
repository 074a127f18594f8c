"""The account of one backward, node by node.

The law at a node: ``⟨y, g⟩ = Σ⟨a_i, r_i(g)⟩ + ⟨bias(op), g⟩`` over the operands that depend on the
model's input. ``r_i(g)`` is the gradient that this node alone sends to operand i: every edge of the graph
gets an alias of the operand, whose gradient that is. ``bias(op)`` is computed from the op (``ops.bias``),
never as a remainder.

The sums are taken while one backward runs, and each node's tensors are freed when its sums are done: an
account costs a small multiple of the backward that it describes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from libragrad_fx.account.observe import Observer, flat_arguments, site_bias, source_name
from libragrad_fx.decide.flow import reach
from libragrad_fx.graph.notes import note
from libragrad_fx.graph.schema import aten_op, bind, operands, spread, tensor_arguments
from libragrad_fx.module.captured import CapturedModule, Forward, InGraphs
from libragrad_fx.module.walk import blocks, calls
from libragrad_fx.ops import insert
from libragrad_fx.ops.function import same
from libragrad_fx.ops.insert import is_end, is_scale, probed
from libragrad_fx.target import Target, as_call, differentiable, dot, moving, select
from libragrad_fx.types import Boundary, Flow, Ledger, LedgerRow, Site

_OUTPUT = "output"


class Recorder(Observer):
    """Runs a graph; every site gets aliases of its operands, and hooks note their gradients.

    An op and the scales inserted for it are one unit: its operands are taken before their scales, its
    output behind its scale.

    leaves: for one graph of several, the inputs of the whole model. An argument that another graph computed
        is then no source: its gradient goes on to that graph.
    """

    def __init__(self, module: CapturedModule, leaves: Collection[torch.Tensor] | None = None) -> None:
        super().__init__(module)
        self.leaves = leaves
        # the account ends at embeddings that start the signal: they are no sites
        self.table: dict[str, Site] = {s.node: s for s in module.record.sites if not s.starts}
        self.rows = {name: _Row() for name in (*self.table, _OUTPUT)}
        self.constants: list[torch.Tensor] = []  # outputs that depend on parameters alone
        inputs = {n.name for n in module.graph.nodes if n.target is insert.guard}
        self.starts = inputs | self.embeddings
        self.origin = _origins(module, {*self.table, *self.starts})
        started = [n for n in module.graph.nodes if n.name in self.starts]
        self.moved = reach(started, lambda n: list(n.users))
        scales: Any = [(n.args[0], note(n).host) for n in module.graph.nodes if is_scale(n)]
        self.scaled = {x.name for x, host in scales if x.name == host}

    def started(self, n: Node, x: Any) -> Any:
        if self.leaves is None or n.name in self.embeddings:
            return super().started(n, x)
        if not any(x is t for t in self.leaves):  # another graph computed it
            self.starts.discard(n.name)
        elif _moves(x):
            self.sources[source_name(n)] = x
        return x

    def computed(self, n: Node) -> Any:
        if is_scale(n) and not is_end(n):
            return self._scale(n)
        if n.op == "output" or n.target == "output_structure":
            return self._returned(n)
        site = self.table.get(n.name)
        if site is None:
            return super().computed(n)
        values = self.fetch_args_kwargs_from_env(n)
        row = self.rows[n.name]
        inside = {m for m in n.all_input_nodes if is_scale(m) and note(m).host == n.name}
        named = [(k, m) for k, m in operands(n, tensor_arguments(n)) if m not in inside]
        if site.bias is not None:
            row.bias = lambda: site_bias(site, n, *values)
        producers = {k: self.origin.get(m, "") for k, m in named if k in site.live}
        args, kwargs = _aliased(n, *values, producers, row.operand)
        y = n.target(*args, **kwargs)  # type: ignore[operator]
        return y if n.name in self.scaled else row.watch(y)

    def _scale(self, n: Node) -> Any:
        (x, factor), _ = self.fetch_args_kwargs_from_env(n)
        host, inner = note(n).host, n.args[0]
        row = self.rows[host]
        if inner.name == host:  # type: ignore[union-attr]
            return row.watch(insert.scale(x, factor))
        return insert.scale(row.operand(x, self.origin.get(inner, "")), factor)  # type: ignore[arg-type]

    def _returned(self, n: Node) -> Any:
        """The model's output; the row of the target is its reader."""
        args: Any = map_arg(n.args, self._read)  # type: ignore[arg-type]
        if n.op == "output":
            return args[0]
        return self.module.get_submodule("output_structure")(*args)

    def _read(self, m: Node) -> Any:
        x = self.env[m]
        if m in self.moved or not _moves(x):
            return self.rows[_OUTPUT].operand(x, self.origin.get(m, ""))
        self.constants.append(same(x))
        return self.constants[-1]


def _origins(module: CapturedModule, producers: Container[str]) -> dict[Node, str]:
    """By node, the site or the model input whose value it hands on unchanged."""
    found: dict[Node, str] = {}
    for n in module.graph.nodes:
        if n.name in producers:
            found[n] = n.name
            continue
        handed = probed(n) or (n.args[0] if n.args and n.op != "call_module" else None)
        if isinstance(handed, Node) and handed in found:
            found[n] = found[handed]
    return found


class _Row:
    """The sums of one site, filled while the backward runs. ``flows``: Σ⟨a, r(g)⟩ by the operand's
    producer; ``squares``: Σ‖r(g)‖² likewise."""

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
            value = held.pop()  # freed: the rest of the backward does not need it
            flow, square = (0.0, 0.0) if g is None else (dot(value, g), dot(g, g))
            self.flows[producer] = self.flows.get(producer, 0.0) + flow
            self.squares[producer] = self.squares.get(producer, 0.0) + square

        alias.register_hook(note)
        return alias

    def watch(self, y: Any) -> Any:
        """Note ⟨y, g⟩ and ⟨bias, g⟩ when the gradient of ``y`` (a tensor or several) is complete."""
        if isinstance(y, (tuple, list)):
            # one output may feed another inside the op (an LSTM's cell), so readers get aliases
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


def _aliased(
    n: Node, args: Any, kwargs: Any, producers: Mapping[str, str], alias: Callable[[Any, str], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments, with an alias for each operand that ``producers`` names."""
    op = aten_op(n)

    def place(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [place(f"{name}[{i}]", v) for i, v in enumerate(value)]
        return alias(value, producers[name]) if name in producers else value

    return spread(op, {k: place(k, v) for k, v in bind(op, args, kwargs).items()})


# --- the account


def ledger(module: InGraphs, inputs: Any, target: Target = None) -> Ledger:
    """The account of one backward of a captured model, balanced or not, node by node.

    Args:
        inputs: as ``module`` takes them: a tensor, a tuple, or a dict of keyword arguments.
        target: what to explain, see ``target.select_each``.
    """
    return ledger_and_forward(module, inputs, target)[0]


def ledger_and_forward(module: InGraphs, inputs: Any, target: Target) -> tuple[Ledger, Forward]:
    """As ``ledger``, with the forward that it describes."""
    recorders: list[tuple[str, Recorder]] = []

    def record(name: str, graph: CapturedModule, leaves: Any, args: Any, kwargs: Any) -> Any:
        recorder = Recorder(graph, None if leaves is None else leaves.values())
        recorders.append((name, recorder))
        return recorder.run(*flat_arguments(graph, args, kwargs))

    with differentiable(), module.unchanged():
        forward = module.run_by(record, *as_call(inputs))
        return settle(recorders, forward, target), forward


def share_as_run(module: InGraphs, forward: Forward, inputs: Any, target: Target) -> float | None:
    """⟨x, ∂f/∂x⟩ by the lean graph; None if no gradient comes back.

    If the signal starts at embeddings of tokens, x are their rows; None if that is in one of several
    graphs. ``forward`` says which graphs ran.
    """
    starting = [g for g in forward.graphs.values() if g.record.starts]
    if starting not in ([], [module]):
        return None
    leaves, spec = pytree.tree_flatten(as_call(inputs))
    with differentiable(), module.unchanged():
        leaves = [moving(x) for x in leaves]
        sources = [x for x in leaves if _moves(x)]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        if starting:
            running = Observer(starting[0], graph=starting[0].lean)
            output = running.run(*flat_arguments(starting[0], args, kwargs))
            sources = [*running.sources.values()]
        else:
            output = module(*args, **kwargs)
        scalar = select(output, target)
        if not sources or not scalar.requires_grad:
            return None
        grads = torch.autograd.grad(scalar, sources, allow_unused=True)
    pairs = zip(sources, grads, strict=True)
    return sum(dot(x.detach(), g) for x, g in pairs if g is not None)


def settle(recorders: Sequence[tuple[str, Recorder]], forward: Forward, target: Target) -> Ledger:
    """Run the backward of the recorded graphs, and add up the ledger."""
    scalar = select(forward.output, target)
    started = {id(x): x for x in forward.leaves.values() if _moves(x)}
    started |= {id(x): x for _, r in recorders for x in r.sources.values()}
    sources = list(started.values())
    constants = [x for name, r in recorders if not name for x in r.constants]
    values = [*sources, *constants]
    pairs = zip(values, torch.autograd.grad(scalar, values, allow_unused=True), strict=True)
    masses = [0.0 if g is None else dot(x.detach(), g) for x, g in pairs]
    carried, constant = sum(masses[: len(sources)]), sum(masses[len(sources) :])
    total = float(scalar.detach())
    rows: list[LedgerRow] = []
    boundaries: tuple[Boundary, ...] = ()
    for name, recorder in recorders:
        found = recorder.rows
        sites = [s for s in recorder.table.values() if s.node in found]
        if not name:  # the only graph: the target gets a row as well
            found[_OUTPUT].constant = constant
            boundaries = (*_boundaries(recorder, total),)
            found[_OUTPUT].out = total
            sites.append(Site(_OUTPUT, "target", "", "", (), None, False, ()))
        rows += [_row(s, name, found[s.node], recorder.starts) for s in sites]
    return Ledger(tuple(rows), total, carried, sum(r.bias for r in rows), boundaries)


def _row(site: Site, name: str, row: _Row, starts: set[str]) -> LedgerRow:
    flows = {at: sum(v for k, v in row.flows.items() if (k in starts) is at) for at in (True, False)}
    residual = row.out - flows[False] - flows[True] - row.constant
    node = f"{name}/{site.node}" if name else site.node
    return LedgerRow(
        node, site.op, site.module, site.source, row.out, flows[False], flows[True], row.constant, residual,
        tuple(Flow(k, flow, math.sqrt(row.squares[k])) for k, flow in row.flows.items()),
    )  # fmt: skip


def _boundaries(recorder: Recorder, total: float) -> Iterator[Boundary]:
    """Completeness behind each block: mass that crosses there, and the constants of later nodes.

    A signal that starts after the block (the other tower of a model with two) counts as crossing.
    """
    module: CapturedModule = recorder.module  # type: ignore[assignment]
    place = {n.name: i for i, n in enumerate(module.graph.nodes)}
    ends = {name: place[n.name] for name, n in calls(module).items()}
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
