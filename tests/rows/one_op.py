"""A traced model of one op, for the stages after capture: what export gives, in milliseconds."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from libragrad_fx.account.ledger import ledger
from libragrad_fx.decide.plan import plan as decide
from libragrad_fx.decide.roles import analyze
from libragrad_fx.decide.rulebook import RuleBook, load
from libragrad_fx.graph.schema import bind
from libragrad_fx.module.captured import CapturedModule, Record
from libragrad_fx.ops import TWINS, insert
from libragrad_fx.ops.activation import secant
from libragrad_fx.rewrite.edits import rewrite
from libragrad_fx.rewrite.erase import require_same_graph
from libragrad_fx.target import inexact
from libragrad_fx.types import Analysis, Ledger, OpFacts, Plan, Trace
from tests.samples import Call


def _twin(row: OpFacts) -> Any:
    packet = getattr(torch.ops.aten, row.op.split(".")[1])
    return secant(packet.default, *row.secant) if row.secant else TWINS[row.vjp or ""]


ALL_TWINS = {row.twin: _twin(row) for row in load().facts.values() if row.twin}
"""Those that rows name, and those that are made from their row."""


def tensors(call: Call, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Floating-point tensors among the named arguments; members of a list as ``name[i]``."""
    values = bind(call.op, call.args, call.kwargs)
    found: dict[str, torch.Tensor] = {}
    for name in names:
        value = values.get(name)
        if isinstance(value, (list, tuple)):
            found |= {f"{name}[{i}]": v for i, v in enumerate(value) if inexact(v)}
        elif inexact(value):
            found[name] = value
    return found


def cast(call: Call, dtype: torch.dtype) -> Call:
    """The same call with its float64 tensors in another dtype."""

    def move(value: Any) -> Any:
        if not inexact(value):
            return value
        if value.is_complex():  # halves of complex numbers have few kernels
            return value.to((dtype if dtype.itemsize >= 4 else torch.float32).to_complex())
        return value.to(dtype)

    args, kwargs = torch.utils._pytree.tree_map(move, (call.args, call.kwargs))
    return Call(call.op, tuple(args), kwargs)


@dataclasses.dataclass(frozen=True)
class Balanced:
    """One op taken through analyze, plan and rewrite, with the inputs to run it on."""

    call: Call
    live: tuple[str, ...]
    inputs: tuple[torch.Tensor, ...]
    analysis: Analysis
    plan: Plan
    module: CapturedModule

    def plain(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The op itself on ``inputs`` in the place of its live operands."""
        named = dict(zip(self.live, inputs, strict=True))
        values = bind(self.call.op, self.call.args, self.call.kwargs)
        for name, value in values.items():
            if isinstance(value, (list, tuple)):
                values[name] = [named.get(f"{name}[{i}]", v) for i, v in enumerate(value)]
            else:
                values[name] = named.get(name, value)
        keyword = {a.name for a in self.call.op._schema.arguments if a.kwarg_only}
        y = self.call.op(
            *(v for k, v in values.items() if k not in keyword),
            **{k: v for k, v in values.items() if k in keyword},
        )
        return list(y) if isinstance(y, (tuple, list)) else [y]

    def ledger(self, target: Any) -> Ledger:
        return ledger(self.module, self.inputs, target)


def balance(
    book: RuleBook, row: OpFacts, call: Call, live: Sequence[str],
    *, gated: Sequence[str] = (), on_unknown: str = "raise",
) -> Balanced:  # fmt: skip
    """``call`` as a model whose inputs are its operands ``live``; those in ``gated`` pass a sigmoid
    first, so that their role is GATE."""
    trace, inputs = trace_call(row, call, live, gated)
    analysis = analyze(trace, book)
    plan = decide(trace, analysis, book, on_unknown)
    module = rewrite(trace, plan, analysis)
    require_same_graph(module, trace)
    return Balanced(call, tuple(live), inputs, analysis, plan, module)


def trace_call(
    row: OpFacts, call: Call, live: Sequence[str], gated: Sequence[str] = (), beside: bool = False
) -> tuple[Trace, tuple[torch.Tensor, ...]]:
    """A graph as ``normalize`` makes it. ``beside``: the first input is an output too."""
    graph, root = Graph(), torch.nn.Module()
    values = bind(call.op, call.args, call.kwargs)
    given = tensors(call, values)
    moving: dict[str, Node] = {}
    for i, name in enumerate(live):
        x = graph.placeholder(f"x{i}")
        node = graph.call_function(
            insert.guard,
            (x, f"x{i}", tuple(given[name].shape), insert.dtype_name(given[name]), (False, False)),
        )
        node.meta["val"] = given[name]
        moving[name] = node
    for name in gated:
        node = graph.call_function(torch.ops.aten.sigmoid.default, (moving[name],))
        node.meta["val"] = given[name]
        moving[name] = node

    def place(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [place(f"{name}[{i}]", v) for i, v in enumerate(value)]
        if not isinstance(value, torch.Tensor) or name in moving:
            return moving.get(name, value)
        at = f"static_{len(dict(root.named_buffers()))}"
        root.register_buffer(at, value)
        node = graph.create_node("get_attr", at)
        node.meta["val"] = value
        return node

    keyword = {a.name for a in call.op._schema.arguments if a.kwarg_only}
    placed = {k: place(k, v) for k, v in values.items()}
    node = graph.call_function(
        call.op,
        tuple(v for k, v in placed.items() if k not in keyword),
        {k: v for k, v in placed.items() if k in keyword and v is not None},
    )
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        node.meta["val"] = call.op(*call.args, **call.kwargs)
    outputs: list[Node] = [] if not beside else [next(iter(moving.values()))]
    graph.output(tuple(outputs + _results(graph, node, row)))
    trace = Trace(CapturedModule(root, graph, Record(False)), ())
    return trace, tuple(given[name] for name in live)


def _results(graph: Graph, node: Node, row: OpFacts) -> list[Node]:
    """The op's outputs; those that are gates beside one that carries are left out."""
    value = node.meta["val"]
    if not isinstance(value, (tuple, list)):
        return [node]
    found = []
    for i, v in enumerate(value):
        if i not in row.gate_outputs:
            item = graph.call_function(operator.getitem, (node, i))
            item.meta["val"] = v
            found.append(item)
    return found
