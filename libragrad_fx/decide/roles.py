"""Roles of all values, and the nodes that the balanced gradient will pass: an abstract interpretation.

Forwards, every value gets a role from the roles of its operands. Backwards from the outputs, a node is
*demanded* if a gradient reaches it without crossing a gate operand. A gate source (tanh, softmax) that is
demanded is no gate after all: the tanh of an MLP or of an LSTM's cell carries the signal. The least
gate-like of these are relabelled as VALUE and everything is recomputed, until nothing changes. Labels are
only added, so this ends.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch.fx import Node

from libragrad_fx.decide.flow import is_inexact, reach, results
from libragrad_fx.decide.rulebook import RuleBook
from libragrad_fx.decide.stem import holds_input
from libragrad_fx.graph.origin import module_path, source_line
from libragrad_fx.graph.schema import aten_op, bind, members, op_name, operands, tensor_arguments
from libragrad_fx.ops import insert
from libragrad_fx.types import Analysis, Finding, Kind, OpFacts, Role, Trace

_RANK_ODD, _RANK_RECIPROCAL, _RANK_GATE_ONLY = 1, 4, 5
_GROUPS = ("stream", "factors", "gate", "denominator")


def analyze(
    trace: Trace, book: RuleBook, all_carry: bool = False, static: Container[str] = (),
    computed: Container[str] = (),
) -> Analysis:  # fmt: skip
    """Roles, live nodes and unruled ops of a captured graph, which is not changed.

    all_carry: a later graph reads every output, so none may be left to autograd as a gate.
    static:    paths of arguments that do not depend on the model's input.
    computed:  paths of arguments that do, and that another graph computed.
    """
    return _Analyzer(trace, book, all_carry, static, computed).run()


def is_affine(node: Node, fact: OpFacts) -> bool:
    """Whether literal arguments of this call make the op affine (a batch norm in eval mode)."""
    return _has_literals(node, fact.affine_if)


def _has_literals(node: Node, wanted: Mapping[str, Any]) -> bool:
    """Whether a call has all the literal arguments ``wanted``; False if none are."""
    values = bind(aten_op(node), node.args, node.kwargs) if wanted else {}
    return bool(wanted) and all(values[k] == v for k, v in wanted.items())


def kind_of(node: Node, fact: OpFacts) -> Kind:
    return Kind.LINEAR if is_affine(node, fact) else fact.kind


@dataclasses.dataclass
class _Analyzer:
    trace: Trace
    book: RuleBook
    all_carry: bool
    static: Container[str]
    computed: Container[str]

    def __post_init__(self) -> None:
        self.nodes = list(self.trace.graph.nodes)
        self.facts: dict[str, OpFacts] = {}
        self.groups: dict[str, dict[str, list[tuple[str, Node]]]] = {}
        for node in self.nodes:
            fact = self.book.fact(node.target) if _is_op(node) else None
            if fact is not None and not _has_literals(node, fact.unless):
                self.facts[node.name] = fact
                self.groups[node.name] = {g: operands(node, getattr(fact, g)) for g in _GROUPS}
        self.zeros = self._zeros()
        self.relabelled: set[str] = set()
        self.roles: dict[str, Role] = {}

    def run(self) -> Analysis:
        while True:
            self._assign_roles()
            demanded, gates = self._demand()
            sources = [n for n in demanded if self._is_source(n) and n.name not in self.relabelled]
            if not sources:
                break
            least = min(map(self._rank, sources))
            self.relabelled |= {n.name for n in sources if self._rank(n) == least}
        return Analysis(
            roles=self.roles,
            facts=self.facts,
            live=frozenset(n.name for n in demanded),
            relabelled=frozenset(self.relabelled),
            gate_outputs=gates,
            gate_heads=tuple(n.name for n in self._heads() if n.name in self.relabelled),
            zeros=frozenset(self.zeros),
            raw=self._raw(),
            unruled=tuple(self._unruled(n) for n in self.nodes if n in demanded and self._unknown(n)),
        )

    # --- forwards

    def _assign_roles(self) -> None:
        for node in self.nodes:
            self.roles[node.name] = self._role(node)

    def _role(self, node: Node) -> Role:
        if node.op in ("placeholder", "get_attr", "output") or _reads_a_shape(node):
            return Role.STATIC
        if node.target is insert.guard:
            if str(node.args[1]) in self.static:
                return Role.STATIC
            return Role.VALUE if is_inexact(node) else Role.CUT
        inputs = [self.roles[n.name] for n in self._read(node)]
        joined = max(inputs, default=Role.STATIC)
        if joined is Role.STATIC or node.name in self.zeros:
            return Role.STATIC
        if node.target is operator.getitem:
            return self._getitem_role(node, joined)
        fact = self.facts.get(node.name)
        if fact is not None and fact.kind is Kind.EMBEDDING:
            return Role.VALUE
        if not is_inexact(node):
            return Role.CUT
        if fact is None:
            return Role.VALUE if joined >= Role.GATE else Role.CUT
        return min(joined, Role.CUT) if fact.kind is Kind.CUT else self._op_role(node, fact, joined)

    def _read(self, node: Node) -> list[Node]:
        """The nodes whose values a node depends on, without those that only give a shape or a dtype."""
        fact = self.facts.get(node.name)
        if fact is None or not fact.like:
            return node.all_input_nodes
        skip = {n for _, n in operands(node, fact.like)}
        kept = {n for _, n in operands(node, fact.operands)}
        return [n for n in node.all_input_nodes if n not in skip or n in kept]

    def _op_role(self, node: Node, fact: OpFacts, joined: Role) -> Role:
        carried = max(self._of(node, "stream"), self._of(node, "factors"))
        if kind_of(node, fact) is Kind.GATE_SOURCE and carried is Role.VALUE:
            return Role.VALUE if node.name in self.relabelled else Role.GATE
        if carried <= Role.CUT and self._gates(node) >= Role.GATE:
            return Role.VALUE if node.name in self.relabelled else Role.GATE
        return carried if carried >= Role.GATE else min(joined, Role.CUT)

    def _getitem_role(self, node: Node, joined: Role) -> Role:
        if not is_inexact(node):
            return Role.CUT
        gated = self._gate_output(node) and node.name not in self.relabelled
        return Role.GATE if gated and joined is Role.VALUE else joined

    def _gate_output(self, node: Node) -> bool:
        """Whether a getitem takes an output that is a gate (``gate_outputs`` of the row)."""
        fact = self.facts.get(getattr(node.args[0], "name", ""))
        return fact is not None and node.args[1] in fact.gate_outputs

    def _of(self, node: Node, group: str) -> Role:
        return max((self.roles[n.name] for _, n in self.groups[node.name][group]), default=Role.STATIC)

    def _gates(self, node: Node) -> Role:
        return max(self._of(node, "gate"), self._of(node, "denominator"))

    def _zeros(self) -> set[str]:
        """Values that are zero whatever the input: a product with one of them is constant."""
        zeros: set[str] = set()
        for node in self.nodes:
            fact = self.facts.get(node.name)
            if fact is not None and fact.fill is not None:
                values = bind(aten_op(node), node.args, node.kwargs)
                if (values[fact.fill] if isinstance(fact.fill, str) else fact.fill) == 0:
                    zeros.add(node.name)
            elif fact is not None and (groups := self.groups[node.name]):
                nothing = all(_is_zero(m, zeros) for _, m in members(node, fact.stream))
                if fact.kind is Kind.PRODUCT:
                    nothing &= any(n.name in zeros for _, n in groups["factors"])
                if nothing and fact.kind in (Kind.PRODUCT, Kind.LINEAR) and not fact.constant:
                    zeros.add(node.name)
        return zeros

    def _raw(self) -> frozenset[str]:
        linear = {
            n.name for n in self.nodes if (f := self.facts.get(n.name)) and kind_of(n, f) is Kind.LINEAR
        }
        return holds_input(self.trace.graph, self.facts, linear, self.roles, self.computed)

    # --- backwards

    def _heads(self) -> list[Node]:
        """The gate sources that the model returns, seen through reshapes: a softmax, a sigmoid."""
        heads = []
        for node in results(self.trace.graph):
            while (fact := self.facts.get(node.name)) and fact.kind is Kind.LINEAR:
                carriers = self.carriers(node)
                if len(carriers) != 1 or len(node.all_input_nodes) != 1 or fact.constant:
                    break
                if any(m is not carriers[0] and m != 0 for _, m in members(node, fact.stream)):
                    break  # it adds something, so its result is no gate
                node = carriers[0]
            if fact is not None and fact.kind is Kind.GATE_SOURCE and fact.rank > _RANK_ODD:
                heads.append(node)
        return heads

    def _demand(self) -> tuple[set[Node], tuple[str, ...]]:
        """(nodes that a balanced gradient reaches, names of outputs left to autograd as gates)."""
        returned = results(self.trace.graph)
        values = [n for n in returned if self.roles[n.name] is Role.VALUE]
        gated = [n for n in returned if self.roles[n.name] is Role.GATE]
        first = next(filter(is_inexact, returned), None)  # explained by default
        ends = [n for n in gated if self.all_carry or not values or (n is first and self._is_end(n))]
        left = tuple(n.name for n in gated if n not in ends)
        return reach(values + ends, self.carriers), left

    def _is_end(self, result: Node) -> bool:
        """Whether a gate that the model returns modulates nothing inside, so that it may be a VALUE."""

        def gates(node: Node) -> list[Node]:
            carriers = [] if self._is_source(node) else self.carriers(node)
            return [n for n in carriers if self.roles[n.name] is Role.GATE]

        seen = reach([result], gates)
        readers = {u for n in seen for u in n.users} - seen
        return all(u.op in ("output", "call_module") for u in readers)

    def carriers(self, node: Node) -> list[Node]:
        """The operands to which a demanded node should send its gradient: its summands and the factors that
        carry. If none of these depends on the input, its gates."""
        groups = self.groups.get(node.name)
        if groups is None:
            return [n for n in node.all_input_nodes if self.roles[n.name] >= Role.GATE]

        def live(*names: str) -> list[Node]:
            found = [n for name in names for _, n in groups[name]]
            return [n for n in found if self.roles[n.name] >= Role.GATE]

        factors = live("factors")
        values = [n for n in factors if self.roles[n.name] is Role.VALUE]
        return live("stream") + (values or factors) or live("gate", "denominator")

    def _is_source(self, node: Node) -> bool:
        if self.roles[node.name] is not Role.GATE:
            return False
        if node.target is operator.getitem:
            return self._gate_output(node)
        return node.name in self.groups and any(
            self.roles[n.name] is Role.VALUE for n in self.carriers(node)
        )

    def _rank(self, node: Node) -> int:
        fact = self.facts.get(node.name)
        if fact is None:  # one output of several
            return _RANK_GATE_ONLY
        if fact.kind is Kind.GATE_SOURCE:
            return fact.rank
        return _RANK_RECIPROCAL if self._of(node, "denominator") >= Role.GATE else _RANK_GATE_ONLY

    # --- ops without a rule

    def _unknown(self, node: Node) -> bool:
        passes = node.target in (operator.getitem, insert.guard) or node.op == "call_module"
        return not passes and bool(node.name not in self.facts or self._unnamed(node))

    def _unnamed(self, node: Node) -> list[str]:
        """Live operands that the op's row does not name: no rule would balance or stop them."""
        fact = self.facts.get(node.name)
        if fact is None or fact.kind is Kind.CUT:
            return []
        found = operands(
            node, tuple(a for a in tensor_arguments(node) if a not in (*fact.operands, *fact.like))
        )
        return [k for k, n in found if self.roles[n.name] >= Role.GATE]

    def _unruled(self, node: Node) -> Finding:
        op = op_name(node.target)
        if unnamed := self._unnamed(node):
            where = self.facts[node.name].where
            return finding(
                node,
                f"{', '.join(unnamed)} depends on the input, and its row ({where}) does not name it",
                "name it in a row of your own: stream, factors, gate or denominator",
            )
        tensors = [k for k, _ in operands(node, tensor_arguments(node))] if _is_op(node) else []
        packet = op.rsplit(".", 1)[0]
        return finding(
            node,
            "no fact says how its output depends on its operands, and the gradient passes through it",
            f'add a row: {{op: {packet}, kind: …, stream: [{", ".join(tensors)}], why: "…"}} with'
            " transform(..., rules=FILE), or accept autograd's gradient with on_unknown='keep'",
        )


def finding(node: Node, problem: str, remedy: str) -> Finding:
    """A finding at ``node``, with its place in the user's code."""
    return Finding(node.name, op_name(node.target), module_path(node), source_line(node), problem, remedy)


def _is_op(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)


def _reads_a_shape(node: Node) -> bool:
    returns = node.target._schema.returns if _is_op(node) else ()  # type: ignore[union-attr]
    return bool(returns) and all(r.real_type.kind() == "SymIntType" for r in returns)


def _is_zero(value: Any, zeros: Container[str]) -> bool:
    return value.name in zeros if isinstance(value, Node) else value == 0
