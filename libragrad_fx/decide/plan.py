"""(trace, analysis, rules) -> ``Plan``: what will be done and why; a pure function of its inputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from libragrad_fx.decide.flow import is_inexact
from libragrad_fx.decide.roles import finding, kind_of
from libragrad_fx.decide.rulebook import RuleBook
from libragrad_fx.errors import NoPathError, UnknownOpError
from libragrad_fx.graph.origin import module_path, source_line
from libragrad_fx.graph.schema import op_name, operands
from libragrad_fx.ops import TWINS
from libragrad_fx.types import (
    Action,
    Analysis,
    Edit,
    Finding,
    Kind,
    OpFacts,
    Plan,
    PolicyRow,
    Role,
    Trace,
)

_BALANCED_KINDS = {Kind.LINEAR, Kind.HOMOGENEOUS, Kind.SATURATING, Kind.EMBEDDING, Kind.ATTENTION}


def plan(trace: Trace, analysis: Analysis, book: RuleBook, on_unknown: str = "raise") -> Plan:
    """Decide every edit of ``trace``'s backward.

    Args:
        on_unknown: ``"raise"``, or ``"keep"`` autograd's gradient where no rule holds.

    Raises:
        UnknownOpError: lists every live op without a rule at once, with the row to add.
        NoPathError: no gradient path leads from an output to an input.
    """
    if not analysis.live:
        raise NoPathError(
            "no differentiable path leads from the outputs to a floating-point input: nothing to"
            " attribute. Integer inputs start a path only where they index an embedding."
        )
    planner = _Planner(trace, analysis, book)
    for node in trace.graph.nodes:
        if node.name in analysis.live:
            planner.visit(node)
        else:
            planner.visit_cut(node)
    unknown = (*analysis.unruled, *planner.unknown)
    if unknown and on_unknown == "raise":
        listing = "\n".join(str(f) for f in unknown)
        many = f"{len(unknown)} ops" if len(unknown) > 1 else "1 op"
        raise UnknownOpError(f"no rule balances {many} on a live gradient path:\n{listing}")
    notes = [*trace.notes, *_gate_notes(trace, analysis)]
    return Plan(
        policy=book.policy,
        digest=book.digest,
        edits=tuple(planner.edits),
        unknown=unknown,
        unbalanced=tuple(planner.unbalanced),
        notes=tuple(notes),
        why={n.name: _why(n, analysis, planner) for n in trace.graph.nodes},
    )


class _Planner:
    """Visits live nodes; each visit adds edits or findings."""

    def __init__(self, trace: Trace, analysis: Analysis, book: RuleBook) -> None:
        self.roles, self.facts, self.live = analysis.roles, analysis.facts, analysis.live
        self.relabelled, self.book = analysis.relabelled, book
        self.edits: list[Edit] = []
        self.unknown: list[Finding] = []
        self.unbalanced: list[Finding] = []

    def visit(self, node: Node) -> None:
        fact = self.facts.get(node.name)
        if fact is None:
            return
        kind = kind_of(node, fact)
        carried = [
            (k, n)
            for k, n in operands(node, (*fact.stream, *fact.factors))
            if self.roles[n.name] is Role.VALUE
        ]
        if carried or kind is Kind.EMBEDDING:
            self._gates(node, fact, kind)
            self._carried(node, fact, kind)
        elif self._live(operands(node, fact.denominator)):
            self._reciprocal(node, fact)
        else:
            self._gate_only(node)
        if fact.gate_outputs:
            self._gate_outputs(node, fact)

    def visit_cut(self, node: Node) -> None:
        """What depends on the input and has no gradient: make it so where autograd has another view.

        Its output still requires a gradient, as in the original: a kernel may ask for that
        (attention does, of its mask).
        """
        fact = self.facts.get(node.name)
        if fact is None or fact.kind is not Kind.CUT:
            return
        given = operands(node, fact.gate)
        if found := [k for k, n in given if self.roles[n.name] >= Role.CUT and is_inexact(n)]:
            row = PolicyRow(Kind.CUT, "fact", Action.CUT, fact.why, fact.where)
            self._edit(node, row, tuple(found), fact.why)

    # --- operands that modulate

    def _gates(self, node: Node, fact: OpFacts, kind: Kind) -> None:
        gates = self._live(operands(node, fact.gate))
        if kind is Kind.PRODUCT:
            factors = operands(node, fact.factors)
            gates += [(k, n) for k, n in factors if self.roles[n.name] is Role.GATE]
        for site, found in (
            ("gate", gates),
            ("denominator", self._live(operands(node, fact.denominator))),
        ):
            row = self._row(node, kind, site) if found else None
            if row is None:
                continue
            names = tuple(k for k, _ in found)
            if row.action is Action.STOP:
                if kind is not Kind.ATTENTION:
                    reason = f"{', '.join(n.name for _, n in found)} modulates and does not carry"
                    self._edit(node, row, names, reason)
                else:
                    reason = "attention weights are held; v carries"
                    self._edit(node, row, names, reason, fact=fact)
            else:
                self._left(node, row, f"operand {', '.join(names)} depends on the input")

    # --- operands that carry

    def _carried(self, node: Node, fact: OpFacts, kind: Kind) -> None:
        factors = [(k, n) for k, n in operands(node, fact.factors) if self.roles[n.name] is Role.VALUE]
        if kind is Kind.EMBEDDING and factors:  # rows that depend on the input, weighted by what does
            kind = Kind.PRODUCT
            factors += [(k, n) for k, n in operands(node, fact.stream) if self.roles[n.name] is Role.VALUE]
        several = kind is Kind.PRODUCT and len(factors) > 1
        row = self._row(node, kind, "values" if several else "value")
        if row is None:
            return
        if several:
            self._product(node, fact, row, tuple(k for k, _ in factors))
        elif row.action is Action.KEEP:
            if kind not in _BALANCED_KINDS and kind is not Kind.PRODUCT:
                self._left(node, row, f"a {kind} op is not balanced under autograd")
        elif fact.degree is not None:
            self._power(node, fact, row)
        elif any(map(_is_complex, node.all_input_nodes)) and not _takes_complex(fact):
            problem = "it carries complex values, and its balanced vjp is for real ones"
            self.unknown.append(finding(node, problem, "compute on the real and imaginary parts"))
        elif fact.twin is None:
            self.unknown.append(
                finding(node, "its row names no balanced vjp", "add 'slope:' or 'vjp:' to it")
            )
        else:
            self._edit(node, row, (), self._reason(node, kind), fact=fact)

    def _product(self, node: Node, fact: OpFacts, row: PolicyRow, names: tuple[str, ...]) -> None:
        if row.action is not Action.SCALE:
            return self._left(node, row, f"{len(names)} operands carry the signal")
        additive = bool(operands(node, fact.stream))
        reason = f"a product of {len(names)} values counts its gradient {len(names)} times"
        # an offset is no factor: with one, the factors are scaled and not the whole output
        self._edit(node, row, names if additive else (), reason, factor=1 / len(names))
        return None

    def _power(self, node: Node, fact: OpFacts, row: PolicyRow) -> None:
        if fact.degree != 1:
            assert fact.degree is not None
            reason = f"homogeneous of degree {fact.degree:g}"
            self._edit(node, row, (), reason, factor=1 / fact.degree, action=Action.SCALE)

    def _reciprocal(self, node: Node, fact: OpFacts) -> None:
        """constant / x that carries the signal: of degree -1, so its gradient changes sign."""
        row = self._row(node, Kind.GATE_SOURCE, "value")
        if row is not None and row.action is Action.KEEP:
            self._left(node, row, "what divides is the only operand that carries")
        elif row is not None:
            names = tuple(k for k, _ in self._live(operands(node, fact.denominator)))
            reason = "homogeneous of degree -1"
            self._edit(node, row, names, reason, factor=-1.0, action=Action.SCALE)

    def _gate_only(self, node: Node) -> None:
        self.unknown.append(
            finding(
                node,
                "only operands that modulate depend on the input, yet its output carries the signal",
                "there is no balanced backward for this; on_unknown='keep' accepts autograd's",
            )
        )

    def _gate_outputs(self, node: Node, fact: OpFacts) -> None:
        for user in node.users:
            if user.args[1] in fact.gate_outputs and user.name in self.live:
                row = self._row(node, Kind.GATE_SOURCE, "value") if fact.twin else None
                if row is not None and row.action is Action.KEEP:
                    self._left(user, row, "an output that is a gate carries")
                    continue
                if row is not None:
                    reason = "an output that is a gate carries: its secant, beside the others"
                    self._edit(node, row, (), reason, fact=fact)
                    return
                self.unknown.append(
                    finding(
                        user,
                        f"output {user.args[1]} of {op_name(node.target)} is a gate, yet it carries",
                        "compute it with an op of its own (var, std)",
                    )
                )

    # --- bookkeeping

    def _live(self, found: list[tuple[str, Node]]) -> list[tuple[str, Node]]:
        return [(k, n) for k, n in found if self.roles[n.name] >= Role.GATE]

    def _row(self, node: Node, kind: Kind, site: str) -> PolicyRow | None:
        row = self.book.rows.get((kind, site))
        if row is None:
            problem = f"policy {self.book.policy} has no row for {kind}/{site}"
            self.unknown.append(finding(node, problem, f"add a row: {{kind: {kind}, site: {site}, …}}"))
        return row

    def _left(self, node: Node, row: PolicyRow, problem: str) -> None:
        remedy = f"row {row.name} of policy {self.book.policy} keeps autograd's gradient ({row.cite})"
        self.unbalanced.append(finding(node, problem, remedy))

    def _reason(self, node: Node, kind: Kind) -> str:
        if kind is Kind.GATE_SOURCE:
            return "carries the signal here, though it could gate: secant about f(0)"
        if kind is Kind.NORMALISER:
            return "1/sigma is held, centring is linear"
        return "gates and slopes are held" if kind is Kind.RECURRENT else "x * gate(x) with the gate held"

    def _edit(
        self, node: Node, row: PolicyRow, names: tuple[str, ...], reason: str,
        *, factor: float | None = None, fact: OpFacts | None = None, action: Action | None = None,
    ) -> None:  # fmt: skip
        self.edits.append(
            Edit(
                node=node.name, op=op_name(node.target), action=action or row.action, operands=names,
                factor=factor, twin=fact and fact.twin, secant=fact and fact.secant,
                rule=row.name, reason=reason, module=module_path(node), source=source_line(node),
            )
        )  # fmt: skip


def _takes_complex(fact: OpFacts) -> bool:
    """Whether a row's twin has a backward for complex values; without a twin the plan says so."""
    return fact.vjp is None or hasattr(TWINS[fact.vjp], "takes_complex")


def _is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_complex()


def _gate_notes(trace: Trace, analysis: Analysis) -> Iterator[str]:
    ops = {n.name: op_name(n.target) for n in trace.graph.nodes}
    for name in analysis.gate_heads:
        yield (
            f"the model ends in a gate, {name} ({ops[name]}): its normaliser is held and it is"
            " balanced as a value, but what to explain is the logits before it"
        )
    for name in analysis.gate_outputs:
        yield f"output {name} ({ops[name]}) is a gate and keeps autograd's gradient: explain another"


def _why(node: Node, analysis: Analysis, planner: _Planner) -> str:
    fact, role = analysis.facts.get(node.name), analysis.roles[node.name].name
    head = f"{node.name}: {op_name(node.target) if node.op == 'call_function' else node.op}, role {role}"
    head += f", module {module_path(node) or '(root)'}, {source_line(node) or 'no source'}"
    lines = [head]
    if fact is not None:
        lines.append(f"  fact {fact.op} ({fact.kind}) at {fact.where}: {fact.why}")
        lines += [
            f"  operand {k} = {n.name}: {analysis.roles[n.name].name}"
            for k, n in operands(node, fact.operands)
        ]
    if node.name in analysis.relabelled:
        lines.append("  a gate source, but demanded: its output carries the signal (relabelled VALUE)")
    edits = [e for e in planner.edits if e.node == node.name]
    lines += [f"  edit: {e.action} {', '.join(e.operands)} by {e.rule}: {e.reason}" for e in edits]
    if not edits:
        on_path = node.name in analysis.live
        lines.append(
            "  no edit: " + ("balanced by itself" if on_path else "no balanced gradient passes here")
        )
    return "\n".join(lines)
