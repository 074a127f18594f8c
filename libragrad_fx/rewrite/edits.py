"""Does what the plan says and nothing else: inserts nodes that return what they get, or twins.

``erase`` undoes it. ``require_same_graph`` proves by it that the forward is the original's, node for node;
``torch.equal`` is only a check of that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from libragrad_fx.decide.sites import sites
from libragrad_fx.graph.notes import Undo, annotate
from libragrad_fx.graph.origin import origin
from libragrad_fx.graph.schema import operands, place_of, tensor_arguments
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.ops import TWINS, insert
from libragrad_fx.ops.activation import secant
from libragrad_fx.ops.share import shared
from libragrad_fx.ops.temper import tempered
from libragrad_fx.optimise.passes import optimise
from libragrad_fx.rewrite.probes import insert_probes
from libragrad_fx.types import Action, Analysis, Edit, History, Plan, Trace


def rewrite(
    trace: Trace, plan: Plan | None, analysis: Analysis | None = None, history: History | None = None
) -> CapturedModule:
    """A new module: ``trace``'s graph with the plan's edits, and a probe for every module call.

    plan:     None gives the captured model with autograd's own backward
    analysis: what the ledger needs; without it the result has no account
    history:  where it is given, a leaner graph runs where nobody listens to submodules
    """
    source: CapturedModule = trace.module  # type: ignore[assignment]
    graph, env = _copy(trace.graph)
    by_name = {old.name: new for old, new in env.items()}
    for edit in plan.edits if plan else ():
        _apply(graph, by_name[edit.node], edit)
    found = sites(graph, trace.inputs, analysis) if analysis else ()
    short = None
    if history is not None:
        short, facts, passes = optimise(_copy(graph)[0], history.facts)
        history = dataclasses.replace(history, lean_facts=facts, passes=passes)
    insert_probes(graph, trace.calls, by_name)
    graph.lint()
    record = dataclasses.replace(source.record, sites=found, history=history)
    return CapturedModule(root_of(source), graph, record, short)


def _copy(graph: Graph) -> tuple[Graph, dict[Node, Node]]:
    new, env = Graph(), dict[Node, Node]()
    new.output(new.graph_copy(graph, env))
    return new, env


def root_of(module: torch.nn.Module) -> torch.nn.Module:
    """The module's tree under a fresh root: two results of one trace share parameters, not dicts."""
    root = torch.nn.Module()
    root.__dict__.update({k: v for k, v in vars(module).items() if "hooks" not in k})
    return root


def _apply(graph: Graph, node: Node, edit: Edit) -> None:
    annotate(node, rule=edit.rule, host=node.name)
    op: Any = node.target
    if edit.temperature is not None:
        node.target = tempered(op, edit.temperature)
        return
    if edit.share is not None:
        node.target = shared(op, *edit.share)
        return
    if edit.twin is not None:
        node.target = TWINS[edit.twin] if edit.secant is None else secant(op, *edit.secant)
        return
    added: tuple[Any, ...] = (insert.stop,) if edit.factor is None else (insert.scale, edit.factor)
    if edit.action is Action.CUT and isinstance(node.meta["val"], torch.Tensor):
        sources = [n for _, n in operands(node, edit.operands)]
        _stand_for(graph, node, edit, insert.scale, 0.0, *sources)
    elif not edit.operands:
        _stand_for(graph, node, edit, *added)
    for operand in edit.operands:
        with graph.inserting_before(node):
            _set_operand(node, operand, lambda n: _add(graph, node, edit, n, *added))


def _stand_for(graph: Graph, node: Node, edit: Edit, *added: Any) -> None:
    """What reads ``node`` reads what is added behind it."""
    with graph.inserting_after(node):
        new = _add(graph, node, edit, node, *added)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def _add(graph: Graph, host: Node, edit: Edit, x: Node, target: Any, *rest: Any) -> Node:
    new = graph.call_function(target, (x, *rest))
    new.meta = origin(host)
    new.meta["val"] = x.meta.get("val")
    annotate(new, rule=edit.rule, host=host.name, undo=Undo.PASS)
    return new


def _set_operand(node: Node, operand: str, change: Callable[[Node], Node]) -> None:
    """Replace one operand, given by schema name (``tensors[1]`` for a member of a list)."""
    name, index = place_of(operand)
    place = tensor_arguments(node).index(name)
    args, kwargs = list(node.args), dict(node.kwargs)
    holder: Any = kwargs if name in kwargs else args
    key: Any = name if name in kwargs else place
    if index is not None:
        members = list(holder[key])
        members[index] = change(members[index])
        holder[key] = members
    else:
        holder[key] = change(holder[key])
    node.args, node.kwargs = tuple(args), kwargs
