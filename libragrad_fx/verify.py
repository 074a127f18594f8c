"""Is it true? The ledger of a backward, node by node, and the certificate of a transform.

The law at a node: ``⟨y, g⟩ = Σ⟨a_i, r_i(g)⟩ + ⟨bias(op), g⟩`` over the operands that depend on the
model's input. ``r_i(g)`` is what this node alone sends to operand i, so every edge of the graph gets
an alias whose gradient is that; ``bias(op)`` is computed from the op (``ops.bias``), never as a rest.
"""

from __future__ import annotations

import copy
import importlib.metadata
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from libragrad_fx.analyze import aten_op, kind_of, live_operands, operands, tensor_arguments
from libragrad_fx.errors import InputError
from libragrad_fx.module import CapturedModule
from libragrad_fx.normalize import module_path, source_line
from libragrad_fx.ops import bias as biases
from libragrad_fx.ops import insert
from libragrad_fx.ops.twin import bind
from libragrad_fx.rewrite import erase, first_difference, is_scale
from libragrad_fx.rulebook import op_name
from libragrad_fx.types import (
    Analysis,
    Certificate,
    Kind,
    Ledger,
    LedgerRow,
    OpFacts,
    Plan,
    Role,
    Site,
    Trace,
)

Target = Any
_EXPLICIT = {Kind.LINEAR, Kind.PRODUCT, Kind.NORMALISER, Kind.RECURRENT, Kind.EMBEDDING}


def sites(trace: Trace, analysis: Analysis, balanced: bool) -> tuple[Site, ...]:
    """The nodes that a gradient passes: the live ones, or under autograd all that see the input."""
    found = []
    symbol = next(
        (s.shape[0] for s in trace.inputs if s.shape and isinstance(s.shape[0], str)), None
    )
    for node in trace.graph.nodes:
        fact = analysis.facts.get(node.name)
        if fact is None and not isinstance(node.target, torch._ops.OpOverload):
            continue  # getitem, guard: they hand on what they get
        if analysis.roles[node.name] < Role.GATE or (balanced and node.name not in analysis.live):
            continue
        if balanced:
            live = tuple(live_operands(node, analysis))
        else:
            named = operands(node, fact.operands if fact else tensor_arguments(node))
            live = tuple(k for k, n in named if analysis.roles[n.name] >= Role.GATE)
        explicit = fact is not None and kind_of(node, fact) in _EXPLICIT
        bias = None if fact is None else _bias_name(node, fact, live)
        where = (module_path(node), source_line(node))
        batch = _batch_axis(node, symbol)
        found.append(Site(node.name, op_name(node.target), *where, live, bias, explicit, batch))
    return tuple(found)


def _batch_axis(node: Node, symbol: str | None) -> int | None:
    """The first axis whose traced size is the batch size or a multiple of it."""
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) else value
    if symbol is None or not isinstance(value, torch.Tensor):
        return 0
    mentions = (i for i, d in enumerate(value.shape) if symbol in re.findall(r"\w+", str(d)))
    return next(mentions, None)


def _bias_name(node: Node, fact: OpFacts, live: Sequence[str]) -> str | None:
    """How the node's own constant is computed; None where it is zero by its form."""
    if fact.bias != "at_zero":
        return None if fact.bias == "none" else fact.bias
    if fact.kind in (Kind.GATED, Kind.GATE_SOURCE):
        return None if fact.at_zero == 0 else "at_zero"
    multiplied = (*fact.factors, *fact.denominator)
    if fact.kind is Kind.PRODUCT and not any(k.partition("[")[0] in multiplied for k in live):
        return "at_zero"  # only its offset is live: the product is a constant
    streams = bind(aten_op(node), node.args, node.kwargs)
    for name in fact.stream:
        value = streams.get(name)
        members = value if isinstance(value, (list, tuple)) else [value]
        keys = [
            f"{name}[{i}]" if isinstance(value, (list, tuple)) else name
            for i in range(len(members))
        ]
        if any(
            k not in live and m is not None and m != 0 for k, m in zip(keys, members, strict=True)
        ):
            return "at_zero"
    return None


def select(output: Any, target: Target) -> torch.Tensor:
    """The scalar to differentiate: the sum over the batch of each sample's target."""
    return select_each(output, target).sum()


def select_each(output: Any, target: Target) -> torch.Tensor:
    """What to explain, one number a sample: (B,).

    Args:
        output: a tensor (B, ...), or a structure whose first floating-point tensor is taken (the
            field ``logits`` where there is one).
        target: as in Captum: an int, a tuple (for outputs of more dimensions), a 0-d or 1-d tensor
            or list with one entry a sample, a list of tuples; None for outputs of shape (B,) or
            (B, 1); or a callable from the output to scalars.

    Raises:
        InputError: the target does not fit the output.
    """
    if callable(target):
        chosen = target(output)
        if not isinstance(chosen, torch.Tensor):
            raise InputError(
                f"the target callable must return a tensor, got {type(chosen).__name__}"
            )
        return chosen.reshape(-1)
    y = first_tensor(output)
    batch = y.shape[0] if y.ndim else 1
    if target is None:
        if y.numel() != batch:
            raise InputError(f"the output has shape {tuple(y.shape)}: say which target to explain")
        return y.reshape(batch)
    if isinstance(target, torch.Tensor):
        target = target.tolist()
    try:
        if isinstance(target, (int, tuple)):
            target = [target] * batch
        if len(target) != batch:
            raise IndexError(f"{len(target)} targets for a batch of {batch}")
        rows = [t if isinstance(t, (tuple, list)) else (t,) for t in target]
        if any(len(r) != y.ndim - 1 for r in rows):
            raise IndexError(f"need {y.ndim - 1} indices a sample")
        return torch.stack([y[(i, *map(int, row))] for i, row in enumerate(rows)])
    except (IndexError, TypeError, ValueError) as e:
        raise InputError(f"target {target!r} does not fit output {tuple(y.shape)}: {e}") from e


def first_tensor(output: Any) -> torch.Tensor:
    """The tensor of an output structure that is explained: ``logits``, else the first float leaf."""
    if isinstance(output, torch.Tensor):
        return output
    logits = (
        output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    )
    if isinstance(logits, torch.Tensor):
        return logits
    leaves = pytree.tree_leaves(output)
    for t in leaves:
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            return t
    raise InputError(
        f"the output ({type(output).__name__}) holds no floating-point tensor to explain"
    )


# --- running a graph with every edge or some nodes in view


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


class _Recorder(torch.fx.Interpreter):
    """Runs a graph; every operand of every site is an alias of its own, whose gradient is noted.

    A host and the nodes inserted for it are one unit: operands are taken before a scale that was
    put on them, the output behind a scale that was put on it.
    """

    def __init__(self, module: CapturedModule, table: Mapping[str, Site]) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.table = table
        self.rows: dict[str, _Row] = {n.name: _Row() for n in module.graph.nodes if n.name in table}
        self.sources: list[torch.Tensor] = []
        self.scaled = {
            n.args[0].name
            for n in module.graph.nodes
            if is_scale(n) and n.meta["libragrad"][1] == n.args[0].name
        }

    def run_node(self, n: Node) -> Any:
        if n.target is insert.guard:
            return self._source(super().run_node(n))
        if is_scale(n):
            return self._scale(n)
        site = self.table.get(n.name)
        if site is None:
            return super().run_node(n)
        row, values = self.rows[n.name], self.fetch_args_kwargs_from_env(n)
        if not site.live:  # an embedding indexed by the input: the signal starts here
            self.rows.pop(n.name)
            return self._source(n.target(*values[0], **values[1]))  # type: ignore[operator]
        inside = {m for m in n.all_input_nodes if is_scale(m) and m.meta["libragrad"][1] == n.name}
        skip = {k for k, m in operands(n, tensor_arguments(n)) if m in inside}
        row.bias = site_bias(site, n, *values)
        args, kwargs = _aliased(n, site, *values, row, skip)
        y = n.target(*args, **kwargs)  # type: ignore[operator]
        return y if n.name in self.scaled else row.watch(y)

    def _source(self, x: Any) -> Any:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x = x.detach().requires_grad_()
            self.sources.append(x)
        return x

    def _scale(self, n: Node) -> Any:
        (x, factor), _ = self.fetch_args_kwargs_from_env(n)
        host = n.meta["libragrad"][1]
        row = self.rows[host]
        if n.args[0].name == host:  # type: ignore[union-attr]
            return row.watch(insert.scale(x, factor))
        return insert.scale(row.operand(x), factor)


class _Row:
    """The sums of one site, filled while the backward runs."""

    def __init__(self) -> None:
        self.out = self.streams = self.constant = 0.0
        self.bias: Any = None

    def operand(self, x: torch.Tensor) -> torch.Tensor:
        """An alias of ``x`` for this site alone; its gradient is r_i(g)."""
        if not (isinstance(x, torch.Tensor) and x.requires_grad):
            return x
        alias, value = x.view_as(x), x.detach()

        def note(g: torch.Tensor | None) -> None:
            self.streams += 0.0 if g is None else dot(value, g)

        alias.register_hook(note)
        return alias

    def watch(self, y: Any) -> Any:
        """Note ⟨y, g⟩ and ⟨bias, g⟩ when the gradient of ``y`` (a tensor or several) is complete."""
        ys = y if isinstance(y, (tuple, list)) else (y,)
        bs = self.bias if isinstance(self.bias, (tuple, list)) else [self.bias] * len(ys)
        for t, b in zip(ys, bs, strict=True):
            if isinstance(t, torch.Tensor) and t.requires_grad:
                t.register_hook(self._note(t.detach(), b))
        return y

    def _note(self, value: torch.Tensor, bias: Any) -> Any:
        def note(g: torch.Tensor | None) -> None:
            if g is None:  # autograd's zero: a pruned path ends below
                return
            self.out += dot(value, g)
            if bias is not None:
                self.constant += dot(bias.expand_as(g), g)

        return note


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """⟨a, b⟩ accumulated in float64."""
    return float((a.double() * b.double()).sum())


def _aliased(
    n: Node, site: Site, args: Any, kwargs: Any, row: _Row, skip: Iterable[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments in schema order with an alias for every live operand of the site."""
    op = aten_op(n)
    values = bind(op, args, kwargs)
    for name, value in values.items():
        if name in site.live and name not in skip:
            values[name] = row.operand(value)
        elif isinstance(value, (list, tuple)):
            values[name] = [
                row.operand(v) if f"{name}[{i}]" in site.live and f"{name}[{i}]" not in skip else v
                for i, v in enumerate(value)
            ]
    keyword = {a.name for a in op._schema.arguments if a.kwarg_only}
    positional = tuple(v for k, v in values.items() if k not in keyword)
    return positional, {k: v for k, v in values.items() if k in keyword}


def site_bias(site: Site, n: Node, args: Any, kwargs: Any) -> Any:
    """The constant of one site, shaped like its output (or None)."""
    if site.bias is None:
        return None
    op = aten_op(n)
    return biases.bias(site.bias, op, site.live, args, kwargs)


# --- the public checks


def ledger(module: CapturedModule, inputs: Any, target: Target = None) -> Ledger:
    """The account of one backward of a captured module, balanced or not, node by node.

    Args:
        inputs: as ``module`` takes them: a tensor, a tuple, or a dict of keyword arguments.
        target: what to explain, see ``select``.
    """
    args, kwargs = as_call(inputs)
    table: dict[str, Site] = {s.node: s for s in module.record.info["sites"]}
    recorder = _Recorder(module, table)
    with torch.enable_grad():
        output = recorder.run(*flat_arguments(module, args, kwargs))
        scalar = select(output, target)
        grads = torch.autograd.grad(scalar, recorder.sources, allow_unused=True)
    carried = sum(
        dot(x.detach(), g) for x, g in zip(recorder.sources, grads, strict=True) if g is not None
    )
    rows = tuple(
        LedgerRow(
            s.node, s.op, s.module, s.source, r.out, r.streams, r.constant,
            r.out - r.streams - r.constant,
        )
        for s in table.values() if (r := recorder.rows.get(s.node)) is not None
    )  # fmt: skip
    return Ledger(rows, float(scalar.detach()), carried, sum(r.bias for r in rows))


def certify(
    model: torch.nn.Module,
    module: CapturedModule,
    inputs: Any,
    target: Target,
    tolerance: float | None,
) -> Certificate:
    """Check the promises of a transform on one input (see ``libragrad_fx.verify``)."""
    args, kwargs = as_call(inputs)
    equal, difference = forward_equal(model, module, args, kwargs)
    account = ledger(module, inputs, target)
    plan: Plan | None = module.plan
    if plan is None:
        raise InputError(
            "a plain trace promises nothing to verify; audit(module, inputs) accounts for it"
        )
    original: Sequence[str] = module.record.info["original"]
    worst = account.worst(1)
    like = next(
        (t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)), None
    )
    dtype = next((p.dtype for p in module.parameters()), like.dtype if like is not None else None)
    return Certificate(
        forward_equal=equal,
        max_abs_difference=difference,
        erased_equal=first_difference(erase(module), original) is None,
        unbalanced=tuple(f.node for f in (*plan.unbalanced, *plan.unknown)),
        worst_residual=abs(worst[0].residual) if worst else 0.0,
        worst_node=worst[0].node if worst else "",
        output=account.output,
        input_share=account.input,
        bias_share=account.bias,
        completeness_error=account.completeness_error,
        tolerance=_tolerance(dtype, account) if tolerance is None else tolerance,
        edits=len(plan.edits),
        nodes=len(original),
        policy=plan.policy,
        digest=plan.digest,
        dtype=str(dtype),
        device=str(like.device) if like is not None else "cpu",
        versions={p: importlib.metadata.version(p) for p in ("torch", "libragrad-fx")},
    )


def _tolerance(dtype: torch.dtype | None, account: Ledger) -> float:
    """What rounding may leave: a few hundred ulp of the largest flow through a node."""
    eps = torch.finfo(dtype or torch.float32).eps
    largest = max((abs(r.out) for r in account.rows), default=0.0)
    return 1e3 * eps * max(1.0, abs(account.output), largest)


def forward_equal(
    model: torch.nn.Module, module: CapturedModule, args: Any, kwargs: Any
) -> tuple[bool, float]:
    """Whether both give the same bits under grad mode with inputs that require grad.

    The model's state (batch-norm statistics) and the random state are left as they were.
    """
    outputs = []
    for m in (model, module):
        m = copy.deepcopy(m) if m.training else m
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(0)
            moving = pytree.tree_map(_requiring_grad, (args, dict(kwargs)))
            outputs.append(pytree.tree_leaves(m(*moving[0], **moving[1])))
    pairs = list(zip(*outputs, strict=True))
    return all(_same_bits(a, b) for a, b in pairs), max(map(_distance, *zip(*pairs)), default=0.0)  # noqa: B905


def _requiring_grad(x: Any) -> Any:
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return x.detach().clone().requires_grad_()
    return x


def _same_bits(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor):
        return a == b or a is b
    same = torch.equal(a.isnan(), b.isnan()) if a.is_floating_point() else True
    return (
        a.dtype == b.dtype and a.shape == b.shape and same
        and torch.equal(a.nan_to_num() if a.is_floating_point() else a,
                        b.nan_to_num() if b.is_floating_point() else b)
    )  # fmt: skip


def _distance(a: Any, b: Any) -> float:
    if not isinstance(a, torch.Tensor) or a.numel() == 0 or a.shape != b.shape:
        return 0.0
    return float((a.detach().double() - b.detach().double()).abs().nan_to_num().max())


def flat_arguments(module: CapturedModule, args: Any, kwargs: Any) -> list[Any]:
    """The call's arguments in the order of the graph's placeholders, defaults filled in."""
    names = [n for n in module.graph.nodes if n.op == "placeholder"]
    given = dict(zip((n.name for n in names), args, strict=False)) | dict(kwargs)
    if unknown := set(given) - {n.name for n in names}:
        raise InputError(f"forward takes no {', '.join(sorted(unknown))}")
    missing = [n.name for n in names if n.name not in given and not n.args]
    if missing or len(args) > len(names):
        raise InputError(f"the inputs do not fit forward({', '.join(n.name for n in names)})")
    return [given[n.name] if n.name in given else n.args[0] for n in names]
