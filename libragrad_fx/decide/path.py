"""Where the gradient goes under a policy: which row holds at a node, and which operands it lets through.

``roles`` knows where a gradient passes if every gate is held. A policy may let it through some of them, or
stop a factor that carries. What the gradient gets to through gates alone is *behind* them.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from libragrad_fx.decide.flow import is_complex, results
from libragrad_fx.decide.roles import kind_of
from libragrad_fx.decide.rulebook import Place, RuleBook
from libragrad_fx.graph.origin import module_path
from libragrad_fx.graph.schema import aten_op, bind, is_elementwise, operands
from libragrad_fx.types import Action, Analysis, Kind, OpFacts, PolicyRow, Role

Found = list[tuple[str, Node]]
"""Operands by schema name, and what produces them."""


class Path:
    """The nodes that a gradient passes.

    direct: those that it gets to over what carries
    behind: those that it gets to through gates alone, which the policy does not stop
    """

    def __init__(self, graph: Graph, analysis: Analysis, book: RuleBook) -> None:
        self.roles, self.facts, self.book, self.raw = analysis.roles, analysis.facts, book, analysis.raw
        self.made = self._makers(graph)
        self.direct = {n for n in results(graph) if n.name in analysis.live}
        self.behind: set[Node] = set()
        for node in reversed(graph.nodes):
            if node in self.direct:
                self.behind.discard(node)
            if node in self:
                carried, gates = self._sent(node)
                (self.behind if node in self.behind else self.direct).update(carried)
                self.behind.update(gates)

    def __contains__(self, node: Node) -> bool:
        return node in self.direct or node in self.behind

    def row(self, node: Node, kind: Kind, site: str, operand: Node | None = None) -> PolicyRow | None:
        """The row that holds for one operand, or for the node itself."""
        fact = self.facts[node.name]
        names = fact.names if operand is None else self.made[operand]
        carried = self.carrying(node, (*fact.stream, *fact.factors))
        reads = bool(carried) and all(n.name in self.raw for _, n in carried)
        weighted = site == "value" and bool(self.weights(node, fact))
        return self.book.row(kind, site, Place(module_path(node), names, reads, weighted))

    def weights(self, node: Node, fact: OpFacts) -> Found:
        """The constant with which the one operand that carries is multiplied, if the op returns sums of
        such products, of real numbers; else none."""
        every, carried = operands(node, fact.factors), self.carrying(node, fact.factors)
        rest = [x for x in every if x not in carried]
        factor = bind(aten_op(node), node.args, node.kwargs).get("alpha", 1)  # of the sum
        fits = (
            fact.kind is Kind.PRODUCT
            and len(carried) == len(rest) == 1
            and self.roles[rest[0][1].name] is Role.STATIC
            and not is_elementwise(node)
            and not any(map(is_complex, node.all_input_nodes))
            and isinstance(factor, (int, float))
            and factor > 0
        )
        return rest if fits else []

    def values(self, node: Node) -> str:
        """The site of several operands that carry."""
        return "behind" if node in self.behind else "values"

    def alive(self, node: Node, names: tuple[str, ...]) -> Found:
        """The operands that depend on the input and may carry or modulate."""
        return [(k, n) for k, n in operands(node, names) if self.roles[n.name] >= Role.GATE]

    def carrying(self, node: Node, names: tuple[str, ...]) -> Found:
        """Those that carry; behind a gate, where there are none, those that are gates."""
        found = self.alive(node, names)
        values = [(k, n) for k, n in found if self.roles[n.name] is Role.VALUE]
        return values or (found if node in self.behind else [])

    def modulating(self, node: Node, fact: OpFacts, kind: Kind) -> dict[str, Found]:
        """Those that modulate, by site: what its facts name, and factors of a product that are gates."""
        gates = self.alive(node, fact.gate)
        if kind is Kind.PRODUCT:
            carry = self.carrying(node, fact.factors)
            gates += [x for x in self.alive(node, fact.factors) if x not in carry]
        return {"gate": gates, "denominator": self.alive(node, fact.denominator)}

    def stopped(self, node: Node, kind: Kind, site: str, found: Found) -> Found:
        """The operands whose row stops them, or which no row rules; of factors never all."""
        rows = [self.row(node, kind, site, n) for _, n in found]
        if site in ("gate", "denominator"):
            return [x for x, r in zip(found, rows, strict=True) if r is None or r.action is Action.STOP]
        stops = [x for x, r in zip(found, rows, strict=True) if r is not None and r.action is Action.STOP]
        return stops if len(stops) < len(found) else []

    def _sent(self, node: Node) -> tuple[list[Node], list[Node]]:
        """Where a node sends its gradient: operands that carry, and gates that are not stopped."""
        fact = self.facts.get(node.name)
        if fact is None:
            return [n for n in node.all_input_nodes if self.roles[n.name] >= Role.GATE], []
        kind, factors = kind_of(node, fact), self.carrying(node, fact.factors)
        carried, sites = self.alive(node, fact.stream) + factors, self.modulating(node, fact, kind)
        if not carried and node in self.direct:
            return [n for found in sites.values() for _, n in found], []
        several = kind is Kind.PRODUCT and len(factors) > 1
        held = self.stopped(node, kind, self.values(node), factors) if several else []
        through = [
            n for s, f in sites.items() for k, n in f if (k, n) not in self.stopped(node, kind, s, f)
        ]
        return [n for k, n in carried if (k, n) not in held], through

    def _makers(self, graph: Graph) -> dict[Node, set[str]]:
        """By value, the names of the ops that make it, and of their kinds: what is linear hands on what it
        gets, and so does a product of gates."""
        made: dict[Node, set[str]] = {}
        for node in graph.nodes:
            fact, role = self.facts.get(node.name), self.roles[node.name]
            hands_on = (Kind.LINEAR, Kind.PRODUCT) if role is Role.GATE else (Kind.LINEAR,)
            before = [n for n in node.all_input_nodes if self.roles[n.name] is role]
            if fact is None or (fact.kind in hands_on and before):
                made[node] = {m for n in before for m in made[n]}
            else:
                made[node] = fact.names
        return made
