"""(trace, analysis, rules) -> ``Plan``: what will be done and why; a pure function of its inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch.fx import Node

from libragrad_fx.decide.flow import is_complex, is_inexact
from libragrad_fx.decide.path import Found, Path
from libragrad_fx.decide.roles import finding, kind_of
from libragrad_fx.decide.rulebook import RuleBook
from libragrad_fx.errors import NoPathError, RuleError, UnknownOpError
from libragrad_fx.graph.origin import module_path, source_line
from libragrad_fx.graph.schema import op_name, operands
from libragrad_fx.ops import TWINS
from libragrad_fx.ops.temper import TEMPERED
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
    Share,
    Trace,
)

_SHARED = {
    Action.GAMMA: "terms of the sign of their sum count more",
    Action.Z_PLUS: "only terms of the sign of their sum get a share",
    Action.BOX: "terms are measured from the ends of the input's range",
}
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
        if node in planner.path:
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
        unmatched=tuple(r for r in book.rows if not r.optional and r not in planner.matched),
    )


def require_matched(plans: Iterable[Plan]) -> None:
    """Raise ``RuleError`` if a row that is not optional has no site in any part of a model."""
    missed = [set(p.unmatched) for p in plans]
    rows = sorted(set.intersection(*missed) if missed else (), key=lambda r: r.where.line)
    if rows:
        said = "\n".join(f"{r.where}: row {r} has no site in this model" for r in rows)
        raise RuleError(f"{said}\n    correct it, or say 'optional: true' if it is for other models")


class _Planner:
    """Visits the nodes that the gradient passes; each visit adds edits or findings."""

    def __init__(self, trace: Trace, analysis: Analysis, book: RuleBook) -> None:
        self.roles, self.facts = analysis.roles, analysis.facts
        self.book = book
        self.path = Path(trace.graph, analysis, book)
        self.edits: list[Edit] = []
        self.unknown: list[Finding] = []
        self.unbalanced: list[Finding] = []
        self.matched: set[PolicyRow] = set()

    def visit(self, node: Node) -> None:
        fact = self.facts.get(node.name)
        if fact is None:
            if node in self.path.behind and isinstance(node.target, torch._ops.OpOverload):
                self.unknown.append(
                    finding(node, "no fact rules it, behind a gate that is live", "add a row for it")
                )
            return
        kind = kind_of(node, fact)
        if self.path.carrying(node, (*fact.stream, *fact.factors)) or kind is Kind.EMBEDDING:
            self._carried(node, fact, kind, self._gates(node, fact, kind))
        elif node in self.path.behind:
            self._gates(node, fact, kind)
        elif self.path.alive(node, fact.denominator):
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

    def _gates(self, node: Node, fact: OpFacts, kind: Kind) -> Found:
        """Rule what modulates. Returned are gates that count as factors: ``scale`` without a number."""
        counted: Found = []
        for site, found in self.path.modulating(node, fact, kind).items():
            for row, same in self._by_row(node, kind, site, found):
                names = tuple(k for k, _ in same)
                if row.action is Action.STOP and kind is Kind.ATTENTION:
                    self._edit(node, row, names, "attention weights are held; v carries", fact=fact)
                elif row.action is Action.STOP:
                    reason = f"{', '.join(n.name for _, n in same)} modulates and does not carry"
                    self._edit(node, row, names, reason)
                elif row.action is Action.SCALE and row.number is None:
                    counted += same
                else:
                    self._let_through(node, row, names, f"operand {', '.join(names)} depends on the input")
                    inside = self._row(node, kind, "weights") if kind is Kind.ATTENTION else None
                    if inside is not None and inside.action is Action.TEMPER:
                        self._temper(node, inside, "the softmax inside goes back at a temperature")
        return counted

    def _let_through(self, node: Node, row: PolicyRow, names: tuple[str, ...], problem: str) -> None:
        if row.action is Action.SCALE:
            self._edit(node, row, names, f"the policy's number for {', '.join(names)}", factor=row.number)
        self._left(node, row, problem)

    # --- operands that carry

    def _carried(self, node: Node, fact: OpFacts, kind: Kind, counted: Found) -> None:
        factors = self.path.carrying(node, fact.factors)
        if kind is Kind.EMBEDDING and factors:  # rows that depend on the input, weighted by what does
            kind = Kind.PRODUCT
            factors += self.path.carrying(node, fact.stream)
        several = kind is Kind.PRODUCT and len(factors) > 1
        if counted or several:
            return self._product(node, fact, factors, counted)
        behind = node in self.path.behind
        if behind and (kind in _BALANCED_KINDS or kind is Kind.PRODUCT):
            return None
        row = self._row(node, kind, "behind" if behind else "value")
        if row is None:
            return None
        if row.action is Action.KEEP:
            if kind not in _BALANCED_KINDS and kind is not Kind.PRODUCT:
                self._left(node, row, f"a {kind} op is not balanced under autograd")
        elif row.action is Action.SCALE:
            names = tuple(k for k, _ in factors)
            self._let_through(node, row, names, f"the gradient of {', '.join(names)} is scaled")
        elif row.action is Action.TEMPER:
            self._temper(node, row, "it goes back at a temperature")
        elif row.shares:
            self._share(node, fact, row, factors[0][0])
        elif fact.degree is not None:
            self._power(node, fact, row)
        elif any(map(is_complex, node.all_input_nodes)) and not _takes_complex(fact):
            problem = "it carries complex values, and its balanced vjp is for real ones"
            self.unknown.append(finding(node, problem, "compute on the real and imaginary parts"))
        elif fact.twin is None:
            self.unknown.append(
                finding(node, "its row names no balanced vjp", "add 'slope:' or 'vjp:' to it")
            )
        else:
            self._edit(node, row, (), _reason(kind), fact=fact)
        return None

    def _product(self, node: Node, fact: OpFacts, factors: Found, counted: Found) -> None:
        """A product of several operands that carry, gates among them that count as factors."""
        site, every = self.path.values(node), [*factors, *counted]
        ruled = self._by_row(node, Kind.PRODUCT, site, factors) if len(factors) > 1 else []
        stopping = [(r, s) for r, s in ruled if r.action is Action.STOP]
        stops = [x for _, same in stopping for x in same]
        if stops and len(stops) == len(factors):
            self.unknown.append(finding(node, f"row {stopping[0][0]} would stop every factor", "narrow it"))
            return
        for row, same in stopping:
            reason = f"{', '.join(n.name for _, n in same)} is stopped by the policy"
            self._edit(node, row, tuple(k for k, _ in same), reason)
        rest = [(r, s) for r, s in ruled if r.action is not Action.STOP]
        rest += self._by_row(node, Kind.PRODUCT, "gate", counted)
        count = len(every) - len(stops)
        if count < 2:
            return
        # an offset is no factor: with one, the factors are scaled and not the whole output
        whole = len({(r.action, r.number) for r, _ in rest}) == 1 and not operands(node, fact.stream)
        if len(rest) == 1:
            rest = [(rest[0][0], [x for x in every if x not in stops])]
        for row, same in rest[:1] if whole else rest:
            if row.action is Action.SCALE:
                factor = row.number or 1 / count
                reason = f"a product of {count} values counts its gradient {count} times"
                self._edit(node, row, () if whole else tuple(k for k, _ in same), reason, factor=factor)
                if math.isclose(factor, 1 / count):
                    continue
            self._left(node, row, f"{count} operands carry the signal")

    def _temper(self, node: Node, row: PolicyRow, reason: str) -> None:
        if node.target in TEMPERED:
            self._edit(node, row, (), reason, temperature=row.number)
            self._left(node, row, "its backward is that of another temperature")
        else:
            self.unknown.append(
                finding(node, f"row {row.name} tempers it, which is for softmax", "narrow the row")
            )

    def _share(self, node: Node, fact: OpFacts, row: PolicyRow, value: str) -> None:
        ((name, weight),) = self.path.weights(node, fact)
        count, x = len(row.box[0]) if row.box else 1, dict(operands(node, (value,)))[value].meta["val"]
        axis = 1 - weight.meta["val"].ndim if count > 1 else -1
        share = Share(value, name, fact.stream, row.number, row.box, axis)
        if count > 1 and not (-x.ndim <= axis < 0 and str(x.shape[axis]) == str(count)):
            problem = f"it has no axis of {count} channels, so row {row.name} has no box for it"
            self.unknown.append(finding(node, problem, "narrow it"))
        else:
            self._edit(node, row, (value,), _SHARED[row.action], share=share)

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
            names = tuple(k for k, _ in self.path.alive(node, fact.denominator))
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
            if user.args[1] in fact.gate_outputs and user in self.path:
                site = "behind" if user in self.path.behind else "value"
                row = self._row(node, Kind.GATE_SOURCE, site) if fact.twin else None
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

    def _by_row(self, node: Node, kind: Kind, site: str, found: Found) -> list[tuple[PolicyRow, Found]]:
        """The operands of a site, by the row that rules them."""
        groups: dict[PolicyRow, Found] = {}
        for name, operand in found:
            row = self._row(node, kind, site, operand)
            if row is not None:
                groups.setdefault(row, []).append((name, operand))
        return list(groups.items())

    def _row(self, node: Node, kind: Kind, site: str, operand: Node | None = None) -> PolicyRow | None:
        row = self.path.row(node, kind, site, operand)
        if row is not None:
            self.matched.add(row)
        else:
            problem = f"policy {self.book.policy} has no row for {kind}/{site}"
            self.unknown.append(finding(node, problem, f"add a row: {{kind: {kind}, site: {site}, …}}"))
        return row

    def _left(self, node: Node, row: PolicyRow, problem: str) -> None:
        does = "keeps autograd's gradient" if row.action is Action.KEEP else f"says {row.action}"
        remedy = f"row {row} of policy {self.book.policy} {does} ({row.cite})"
        self.unbalanced.append(finding(node, problem, remedy))

    def _edit(
        self, node: Node, row: PolicyRow, names: tuple[str, ...], reason: str,
        *, factor: float | None = None, fact: OpFacts | None = None, action: Action | None = None,
        temperature: float | None = None, share: Share | None = None,
    ) -> None:  # fmt: skip
        self.edits.append(
            Edit(
                node=node.name, op=op_name(node.target), action=action or row.action, operands=names,
                factor=factor, twin=fact and fact.twin, secant=fact and fact.secant,
                rule=row.name, reason=reason, module=module_path(node), source=source_line(node),
                temperature=temperature, share=share,
            )
        )  # fmt: skip


def _reason(kind: Kind) -> str:
    if kind is Kind.GATE_SOURCE:
        return "carries the signal here, though it could gate: secant about f(0)"
    if kind is Kind.NORMALISER:
        return "1/sigma is held, centring is linear"
    return "gates and slopes are held" if kind is Kind.RECURRENT else "x * gate(x) with the gate held"


def _takes_complex(fact: OpFacts) -> bool:
    """Whether a row's twin has a backward for complex values; without a twin the plan says so."""
    return fact.vjp is None or hasattr(TWINS[fact.vjp], "takes_complex")


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
        on_path = node in planner.path
        lines.append(
            "  no edit: " + ("balanced by itself" if on_path else "no balanced gradient passes here")
        )
    return "\n".join(lines)
