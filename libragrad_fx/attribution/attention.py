"""Attention of a captured graph, written out or fused: its probabilities, and their gradient.

A fused kernel does not hand its probabilities out, and a balanced backward cuts them. Both are computed
here, for the explanation alone: A = softmax(s·q·kᵀ + mask), and dA = dO·Vᵀ.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from libragrad_fx.decide.flow import reach
from libragrad_fx.graph.origin import module_path
from libragrad_fx.graph.schema import aten_op, bind, operands, place_of, spread
from libragrad_fx.kernels.blocks import repeated
from libragrad_fx.ops.attention import is_softmax, probabilities
from libragrad_fx.ops.insert import is_scale, probed, stop
from libragrad_fx.types import Kind, OpFacts

Facts = Callable[[Node], OpFacts | None]


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a graph attends: ``node`` multiplies probabilities with values.

    module: path of the module that it was traced in
    before, after: names of its operands in the op's schema; ``before`` is "" where the kernel is fused
    """

    node: Node
    module: str
    before: str
    after: str


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attention: ``weights`` and ``gradient``, (B, heads, queries, keys) each, in float64. Of attention
    within windows, B counts these."""

    module: str
    weights: Tensor
    gradient: Tensor


def sites(graph: Graph, facts: Facts) -> Iterator[Site]:
    """Every attention of a graph, in its order."""
    for node in graph.nodes:
        fact = facts(node)
        if fact is None:
            continue
        if fact.kind is Kind.ATTENTION:
            yield Site(node, module_path(node), "", "value")
        elif fact.kind is Kind.PRODUCT and not fact.stream:
            factors = operands(node, fact.factors)
            if len(factors) == 2 and _is_softmax(factors[0][1], facts):
                (before, _), (after, _) = factors
                yield Site(node, module_path(node), before, after)


def _is_softmax(node: Node, facts: Facts) -> bool:
    """Whether a value is a softmax, seen through all that hands it on: a dropout, a cast, a view, a cut."""
    while not is_softmax(node):
        behind, fact = probed(node), facts(node)
        hands_on = is_scale(node) or node.target is stop or (fact is not None and fact.kind is Kind.LINEAR)
        if behind is None and hands_on and len(node.all_input_nodes) == 1:
            (behind,) = node.all_input_nodes
        if not isinstance(behind, Node):
            return False
        node = behind
    return True


def attention(site: Site, call: tuple[Any, Any], gradient: Tensor, batch: int) -> Attention:
    """The probabilities at a site, and their gradient.

    call:     what the op was called with
    gradient: of its output
    """
    op = aten_op(site.node)
    given = bind(op, *call)
    if site.before:
        weights = _operand(given, site.before).detach().double()
        found = [weights, _written_out(site, given, weights, gradient.double())]
    else:
        weights, value = _probabilities(given), given["value"].detach().double()
        value = repeated(value, weights.shape[1] // value.shape[1]) if value.ndim == 4 else value
        found = [weights, gradient.double() @ value.mT]
    split = (batch, weights.shape[0] // batch)
    return Attention(site.module, *(t if t.ndim == 4 else t.unflatten(0, split) for t in found))


def _operand(given: Mapping[str, Any], name: str) -> Any:
    name, place = place_of(name)
    return given[name] if place is None else given[name][place]


def _written_out(site: Site, given: Mapping[str, Any], weights: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of probabilities that are a factor of a product, whichever axes that sums over."""
    values = {
        name: pytree.tree_map_only(Tensor, lambda t: t.detach().double(), v) for name, v in given.items()
    }
    leaf = weights.clone().requires_grad_()
    name, place = place_of(site.before)
    values[name] = (
        leaf if place is None else [leaf if i == place else v for i, v in enumerate(values[name])]
    )
    op = aten_op(site.node)
    args, kwargs = spread(op, values)
    (found,) = torch.autograd.grad(op(*args, **kwargs), leaf, gradient)
    return found


def _probabilities(given: Mapping[str, Any]) -> Tensor:
    q, k = (given[name].detach().double() for name in ("query", "key"))
    k = repeated(k, q.shape[-3] // k.shape[-3]) if given["enable_gqa"] else k
    scale = given["scale"] if given["scale"] is not None else 1 / math.sqrt(q.shape[-1])
    mask = None if given["attn_mask"] is None else given["attn_mask"].detach()
    return probabilities(q, k, mask, 0, given["is_causal"], scale)


def stream_after(site: Site, facts: Facts) -> Node | None:
    """The residual stream behind an attention: the first sum of what comes from it and of what does not."""
    behind = reach([site.node], lambda n: list(n.users))
    for node in site.node.graph.nodes:
        fact = facts(node)
        if node in behind and fact is not None and fact.kind is Kind.LINEAR and len(fact.stream) > 1:
            added = [n for _, n in operands(node, fact.stream)]
            if len(added) == 2 and sum(n in behind for n in added) == 1:
                return node
    return None
