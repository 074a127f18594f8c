"""The static proof: every node that a gradient passes is balanced by its kind, or is named.

It reads only the rewritten graph, not the plan that made it, and asks of each node to which operands its
gradient goes. That a kind or a twin is balanced is tested numerically, row by row, in ``tests/rows``; the
proof combines these facts.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import Counter
from collections.abc import Collection, Container, Mapping
from typing import Any

from torch.fx import Graph, Node

from libragrad_fx.decide.flow import hands_on, is_inexact, passes, reached, results
from libragrad_fx.decide.roles import finding, is_affine, kind_of
from libragrad_fx.graph.notes import note
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.ops import insert
from libragrad_fx.ops.graft import graft
from libragrad_fx.ops.insert import LEAN, is_scale, probed
from libragrad_fx.ops.places import idle, whole
from libragrad_fx.ops.product import halved_mul
from libragrad_fx.types import Finding, History, Kind, OpFacts, Proof, Role, Share

_BY_KIND = {
    Kind.LINEAR: "linear in what carries",
    Kind.ATTENTION: "attention with weights that do not depend on the input",
    Kind.HOMOGENEOUS: "homogeneous of degree 1",
    Kind.SATURATING: "the identity or a constant",
}
_BY_TWIN = {
    Kind.GATED: "gated activation, its gate held by a twin",
    Kind.GATE_SOURCE: "nonlinearity that carries, its secant taken by a twin",
    Kind.NORMALISER: "normaliser, 1/sigma held by a twin",
    Kind.ATTENTION: "attention, its weights held by a twin",
    Kind.LINEAR: "linear, its output that is a gate scaled by a twin",
    Kind.RECURRENT: "recurrent layer, its gates held by a twin",
}
_SCALED = ", scaled"  # in a reason that rests on it
_NONZERO = ", if no element that it reads is 0"  # z-box: what such an element gets, no gradient carries
_ONCE = ", if no two of its indices coincide"  # of two writes one survives, but autograd answers both


def prove(module: CapturedModule, as_run: bool = False) -> Proof:
    """Prove ``module``'s graph, or with ``as_run`` the lean one that runs in its place; see ``Proof``."""
    history = module.history
    graph, facts = module.graph, history.facts
    if as_run and module.lean is not None:
        graph, facts = module.lean, history.lean_facts
    moving = _moving(graph, history, module.record.starts, facts)
    reasons: Counter[str] = Counter()
    open_: list[Finding] = []
    kept = history.gate_outputs
    starts = [n for n in results(graph) if n in moving and _source_name(n) not in kept]
    arrived = reached(starts, facts, moving)
    for node in (n for n in graph.nodes if n in arrived):
        if hands_on(node) and node.target is not graft:
            continue
        reason, problem = _judge(node, facts, moving, arrived)
        if stray := [] if _SCALED in reason else [*itertools.chain(*_scales(node))]:
            reason, problem = "", f"its gradient is scaled by {stray[0]:g}"
        if reason:
            reasons[reason] += 1
        else:
            open_.append(finding(node, problem, "the plan says why: plan.explain(node)"))
    return Proof(dict(reasons.most_common()), tuple(open_))


def _moving(
    graph: Graph, history: History, starting: frozenset[str], facts: Mapping[str, OpFacts]
) -> set[Node]:
    """Nodes whose value has a gradient that leads back to the model's input."""
    moving: set[Node] = set()
    for node in graph.nodes:
        fact = facts.get(node.name)
        if node.target is insert.guard:
            still = history.roles.get(node.name) is Role.STATIC
            starts = is_inexact(node) and not still
        elif node.name in starting:
            starts = True
        else:
            cut = insert.is_end(node) or (fact is not None and fact.kind is Kind.CUT)
            zero = node.name in history.zeros  # a product with zero sends zeros back
            starts = not (cut or zero) and bool(passes(node, fact, moving))
            starts = starts and (is_inexact(node) or hands_on(node))
        if starts:
            moving.add(node)
    return moving


def _source_name(node: Node) -> str:
    """The name of the node that an output reads, seen through probes."""
    while isinstance(behind := probed(node), Node):
        node = behind
    return node.name


def _judge(
    node: Node, facts: Mapping[str, OpFacts], moving: set[Node], reached: Container[Node]
) -> tuple[str, str]:
    """(why a node is balanced, "") or ("", why it is not known to be)."""
    fact = facts.get(node.name)
    if node.target is graft:  # its gradient goes to the operands of a product
        factors = sum(n in moving for n in node.args[1:3])
        if factors < 2:
            return "part of a product with one factor that carries", ""
        return _scaled(node, facts, 1 / factors, "part of a product, scaled", "both factors carry", factors)
    if fact is None:
        return "", "no fact says how its output depends on its operands"
    kind = kind_of(node, fact)
    sends = {k for k, _ in passes(node, fact, moving)}
    if kind is Kind.EMBEDDING:
        if not sends:
            return "embedding indexed by the input: the signal starts", ""
        if len(sends) == 1:
            return _BY_KIND[Kind.LINEAR], ""
        reason = "rows times weights, scaled by 1/2"
        return _scaled(node, facts, 0.5, reason, "both count its gradient", 2, whole=False)
    if stray := sends - _among(sends, (*fact.stream, *fact.factors, *fact.denominator)):
        return "", f"{', '.join(sorted(stray))} gets a gradient, though it only modulates"
    twin = hasattr(node.target, "aten_op")
    if hasattr(node.target, "temper"):
        return "", "its softmax goes back at another temperature"
    if made_of := getattr(node.target, "share", ()):
        boxed = Share(*made_of[1:]).box is not None
        return "sum of products, shared among its terms by a twin" + (_NONZERO if boxed else ""), ""
    gates = () if twin else fact.gate_outputs
    if gates and any(u.args[1] in gates for u in node.users if u in reached):
        return "", "an output of it that is a gate carries"
    if node.target is halved_mul:
        if len(sends) == 2:
            return "product of 2 values, halved", ""
        return "", "it halves the gradient of one value"
    if twin and node.target not in (whole, idle):
        return _BY_TWIN[kind], ""
    return _judge_under_autograd(node, kind, fact, sends, facts)


def _judge_under_autograd(
    node: Node, kind: Kind, fact: OpFacts, sends: set[str], facts: Mapping[str, OpFacts]
) -> tuple[str, str]:
    """As ``_judge``, for a node with autograd's own backward, which sends gradients to ``sends``."""
    if fact.degree == 1:
        return "of degree 1 about its constant", ""
    if fact.degree is not None:
        wanted = 1 / fact.degree
        reason = f"homogeneous of degree {fact.degree:g}, scaled by its inverse"
        return _scaled(node, facts, wanted, reason, f"its gradient is not scaled by {wanted:g}", len(sends))
    if divisors := _among(sends, fact.denominator):
        if sends != divisors:
            return "", "a divisor gets a gradient beside what it divides"
        reason = "reciprocal, scaled by -1"
        return _scaled(node, facts, -1.0, reason, "a divisor gets a gradient", len(divisors))
    factors = len(_among(sends, fact.factors))
    if kind is Kind.PRODUCT and factors > 1:
        reason = f"product of {factors} values, scaled by 1/{factors}"
        problem = f"a product of {factors} values counts its gradient {factors} times"
        alone = not _among(sends, fact.stream)
        return _scaled(node, facts, 1 / factors, reason, problem, factors, whole=alone)
    if kind is Kind.PRODUCT:
        return "product with one factor that carries", ""
    if kind in _BY_KIND:
        unsure = sends & set(fact.once) and not is_affine(node, fact)
        return _BY_KIND[kind] + (_ONCE if unsure else ""), ""
    return "", f"a {kind} op is not balanced under autograd"


def _among(sends: set[str], arguments: Collection[str]) -> set[str]:
    """The operands (``tensors[0]``) that belong to one of the arguments (``tensors``)."""
    return {s for s in sends if s.partition("[")[0] in arguments}


def _behind_a_join(node: Node, facts: Mapping[str, OpFacts]) -> list[Any]:
    """The factor of a scale that the pass ``joins`` moved behind a ``cat`` of the value with others."""
    while len(node.users) == 1:
        (node,) = node.users
        if is_scale(node):
            return [node.args[1]] if note(node).rule == LEAN else []
        fact = facts.get(node.name)
        if node.target is not operator.getitem and (fact is None or fact.kind is not Kind.LINEAR):
            break
    return []


def _scaled(
    node: Node, facts: Mapping[str, OpFacts], wanted: float, reason: str, problem: str, operands: int,
    whole: bool = True,
) -> tuple[str, str]:  # fmt: skip
    """(reason, "") if a node's output, or each of so many operands, is scaled by ``wanted``; else
    ("", problem). whole: scaling the output counts as well."""
    inner, outer = _scales(node)
    outer = outer or _behind_a_join(node, facts)
    if outer:
        inner, operands = outer if whole and not inner and len(node.users) == 1 else [], 1
    good = len(inner) == operands and all(math.isclose(f, wanted) for f in inner)
    return (reason, "") if good else ("", problem)


def _scales(node: Node) -> tuple[list[Any], list[Any]]:
    """The factors of the scales that were put on a node's operands, and on its output."""
    mine = lambda n: is_scale(n) and not insert.is_end(n) and note(n).host == node.name  # noqa: E731
    sides = node.all_input_nodes, node.users
    return tuple([n.args[1] for n in side if mine(n) and note(n).rule != LEAN] for side in sides)  # type: ignore[return-value]
