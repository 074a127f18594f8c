"""Runs what lies behind a sequence of tokens on some of its tokens, by a plan (see ``planner``).

A captured graph is of one length: sizes are written into views, and tables of positions are as long as the
sequence. A plan says for each op which axes count tokens, which places it takes, and which tables it meets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch.fx import Graph, Interpreter, Node
from torch.utils import _pytree as pytree

from libragrad_fx.decide.flow import hands_on, reach
from libragrad_fx.errors import InputError
from libragrad_fx.graph.schema import bind, spread
from libragrad_fx.perturb.kept import Axes, Kept, Part

_SIZES = ("size", "shape")
"""The names of a result's sizes in schemas."""


class Refused(InputError):
    """A model that cannot run on fewer tokens, and why. place: the one token that it reads by its place."""

    def __init__(self, why: str, place: int | None = None) -> None:
        super().__init__(why)
        self.place = place


@dataclasses.dataclass(frozen=True)
class Step:
    """One op behind the sequence.

    axes:    of each tensor of its result
    tables:  by argument (the index of a leaf), which of its axes are as long as the sequence
    samples: the axis of its result that counts samples, where it meets tables
    parts:   of an op that takes places of the sequence: those of each tensor of its result
    joined:  of an op that joins sequences, the axis along which it does
    causal:  of attention from each token to those before it: the axes of its mask
    """

    node: Node
    axes: tuple[Axes, ...]
    tables: Mapping[int, Axes] = dataclasses.field(default_factory=dict)
    samples: int = 0
    parts: tuple[Part, ...] = ()
    joined: int | None = None
    causal: Axes = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The ops behind ``start``, in order. returned: the axes of the first tensor that the model returns."""

    start: Node
    axes: Axes
    steps: tuple[Step, ...]
    returned: Axes


@dataclasses.dataclass(frozen=True)
class Whole:
    """A run on all tokens.

    values: of ``start``, and of the nodes beside it that those behind it read
    shapes: of each node, those of the tensors of its value
    """

    values: Mapping[Node, Any]
    shapes: Mapping[Node, tuple[tuple[int, ...], ...]]

    def shape(self, node: Node) -> tuple[int, ...]:
        return self.shapes[node][0]


def behind(start: Node) -> list[Node]:
    """The nodes that depend on ``start`` and that the output depends on, in order."""
    nodes = cast(Graph, start.graph).nodes
    live = reach([n for n in nodes if n.op == "output"], lambda n: n.all_input_nodes)
    mine, found = {start}, []
    for node in nodes:
        if node in live and node is not start and any(n in mine for n in node.all_input_nodes):
            mine.add(node)
            found.append(node)
    return found


def is_op(node: Node) -> bool:
    return node.op == "call_function" and not hands_on(node)


def target(node: Node) -> Any:
    return cast(Any, node.target)


def named_sizes(node: Node) -> dict[str, Any]:
    """The arguments of a node that are the sizes of its result."""
    given = bind(target(node), node.args, node.kwargs)
    return {k: v for k, v in given.items() if k in _SIZES and isinstance(v, (list, tuple))}


def run(interpreter: Interpreter, plan: Plan, whole: Whole, kept: Kept) -> Any:
    """The output on the tokens that are kept. ``whole`` is a run on all tokens of the same samples."""
    env = {**whole.values, plan.start: kept.of(whole.values[plan.start], plan.axes)}
    axes = {plan.start: (plan.axes,)} | {s.node: s.axes for s in plan.steps}
    for step in plan.steps:
        env[step.node] = computed(interpreter, step, env, whole, kept, axes)
    return env[plan.steps[-1].node]


def computed(
    interpreter: Interpreter, step: Step, env: Mapping[Node, Any], whole: Whole, kept: Kept,
    axes: Mapping[Node, tuple[Axes, ...]],
) -> Any:  # fmt: skip
    """The value of one node. env: of its operands, those that depend on the sequence without what is gone.
    axes: of these operands."""
    node = step.node
    leaves, names = pytree.tree_flatten((node.args, node.kwargs))
    values = [env[x] if isinstance(x, Node) else x for x in leaves]
    if not is_op(node):
        args, kwargs = pytree.tree_unflatten(values, names)
        return getattr(interpreter, node.op)(node.target, args, kwargs)
    if step.parts:
        return _parts(step, env, whole, kept, axes)
    if step.joined is not None and kept.times > 1:
        alone = [not (isinstance(x, Node) and step.joined in axes.get(x, ({},))[0]) for x in leaves]
        values = [
            v.repeat_interleave(kept.times, step.joined) if one and isinstance(v, torch.Tensor) else v
            for v, one in zip(values, alone, strict=True)
        ]
    rank = max((len(s) for s in whole.shapes[node]), default=0)
    for i, at in step.tables.items():
        values[i] = kept.of(values[i][(None,) * (rank - values[i].ndim)], at, step.samples)
    args, kwargs = pytree.tree_unflatten(values, names)
    changed: dict[str, Any] = _masked(step, whole, kept) if step.causal else {}
    if step.axes:
        changed |= {k: kept.shape(whole.shape(node), step.axes[0]) for k in named_sizes(node)}
    if changed:
        args, kwargs = spread(target(node), bind(target(node), args, kwargs) | changed)
    return target(node)(*args, **kwargs)


def _parts(
    step: Step, env: Mapping[Node, Any], whole: Whole, kept: Kept, axes: Mapping[Node, tuple[Axes, ...]]
) -> Any:
    """The places that an op takes: a tensor, or a list of them."""
    x = next(n for n in step.node.all_input_nodes if any(axes.get(n, ())))
    shapes = [kept.shape(s, a) for s, a in zip(whole.shapes[step.node], step.axes, strict=True)]
    ends = axes[x][0][step.parts[0].axis]
    taken = [kept.part(env[x], ends, p).reshape(s) for p, s in zip(step.parts, shapes, strict=True)]
    return taken if isinstance(target(step.node)._schema.returns[0].type, torch.ListType) else taken[0]


def _masked(step: Step, whole: Whole, kept: Kept) -> dict[str, Any]:
    """Arguments of attention from each token to those before it: the same, by a mask."""
    given = bind(target(step.node), step.node.args, step.node.kwargs)
    rows, columns = (whole.shape(given[k])[-2] for k in ("query", "key"))
    rank = len(whole.shape(step.node))
    device = kept.at.device
    mask = torch.ones(rows, columns, dtype=torch.bool, device=device).tril()[(None,) * (rank - 2)]
    return {"attn_mask": kept.of(mask, step.causal, step.samples), "is_causal": False}
