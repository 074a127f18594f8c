"""Does what the plan says and nothing else: inserts nodes that return what they get, or twins.

``erase`` undoes it. ``same_graph(erase(gm), trace)`` is the proof that the forward is the original's,
node for node; ``torch.equal`` is only its check.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate, map_arg
from torch.utils import _pytree as pytree

from libragrad_fx.analyze import operands
from libragrad_fx.errors import VerificationError
from libragrad_fx.graph.notes import Undo, annotate, note
from libragrad_fx.lean import lean
from libragrad_fx.module import CapturedModule, leaf
from libragrad_fx.ops import TWINS, insert
from libragrad_fx.ops.insert import is_scale
from libragrad_fx.types import Action, Edit, History, ModuleCall, Plan, Site, Trace

_PROBE = "probe"


def rewrite(
    trace: Trace, plan: Plan | None, sites: tuple[Site, ...] = (), history: History | None = None
) -> CapturedModule:
    """A new module: ``trace``'s graph with the plan's edits, and a probe for every module call.

    plan:    None gives the captured model with autograd's own backward
    sites:   what the ledger is to know of the result
    history: where it is given, a leaner graph runs where nobody listens to submodules
    """
    source: CapturedModule = trace.module  # type: ignore[assignment]
    graph, env = _copy(trace.graph)
    by_name = {old.name: new for old, new in env.items()}
    for edit in plan.edits if plan else ():
        _apply(graph, by_name[edit.node], edit)
    short = None
    if history is not None:
        short, facts = lean(_copy(graph)[0], history.facts)
        history = dataclasses.replace(history, lean_facts=facts)
    _insert_probes(graph, trace.calls, by_name)
    graph.lint()
    record = dataclasses.replace(source.record, sites=sites, history=history)
    return CapturedModule(_root(source), graph, record, short)


def unedited(module: CapturedModule) -> CapturedModule:
    """The plain trace that a balanced module was made of: the same parameters, autograd's backward."""
    sites = module.record.history.plain_sites if module.record.history else module.record.sites
    record = dataclasses.replace(module.record, sites=sites, history=None)
    return CapturedModule(_root(module), erase(module.graph), record)


def _copy(graph: Graph) -> tuple[Graph, dict[Node, Node]]:
    new, env = Graph(), dict[Node, Node]()
    new.output(new.graph_copy(graph, env))
    return new, env


def _root(module: torch.nn.Module) -> torch.nn.Module:
    """The module's tree under a fresh root: two results of one trace share parameters, not dicts."""
    root = torch.nn.Module()
    root.__dict__.update({k: v for k, v in vars(module).items() if "hooks" not in k})
    return root


def _apply(graph: Graph, node: Node, edit: Edit) -> None:
    annotate(node, rule=edit.rule, host=node.name)
    if edit.twin is not None:
        node.target = TWINS[edit.twin]
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
    new.meta = {k: host.meta[k] for k in ("nn_module_stack", "stack_trace") if k in host.meta}
    new.meta["val"] = x.meta.get("val")
    annotate(new, rule=edit.rule, host=host.name, undo=Undo.PASS)
    return new


def _set_operand(node: Node, operand: str, change: Callable[[Node], Node]) -> None:
    """Replace one operand, given by schema name (``tensors[1]`` for a member of a list)."""
    name, _, index = operand.partition("[")
    schema = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    place = schema.index(name)
    args, kwargs = list(node.args), dict(node.kwargs)
    holder: Any = kwargs if name in kwargs else args
    key: Any = name if name in kwargs else place
    if index:
        members = list(holder[key])
        members[int(index[:-1])] = change(members[int(index[:-1])])
        holder[key] = members
    else:
        holder[key] = change(holder[key])
    node.args, node.kwargs = tuple(args), kwargs


# --- the module tree: a probe where each call ended


def _insert_probes(graph: Graph, calls: tuple[ModuleCall, ...], by_name: dict[str, Node]) -> None:
    """One pass in graph order; from a probe on, its outputs are what later nodes read."""
    ends: dict[Node, list[ModuleCall]] = {}
    for call in calls:
        if call.after in by_name:
            ends.setdefault(by_name[call.after], []).append(call)
    scaled = {n: _scaled(n) for n in by_name.values()}
    stand_ins = set(scaled.values()) - set(scaled)
    replaced: dict[Node, Node] = {}

    def latest(node: Node) -> Node:
        while node in replaced:
            node = replaced[node]
        return node

    def value(node: Node) -> Node:
        """What a node of the trace reads as at this point of the new graph."""
        return latest(scaled[by_name[node.name]])

    for node in list(graph.nodes):
        last = scaled.get(node, node)
        if node in stand_ins:  # seen with its host: a probe behind both comes too late for it
            continue
        for n in {node, last} if replaced else ():
            n.args, n.kwargs = map_arg(n.args, latest), map_arg(n.kwargs, latest)
        for call in ends.get(node, ()):
            parts = (call.args, dict(call.kwargs), call.output)
            args, kwargs, output = cast(tuple[Any, dict[str, Any], Any], map_arg(parts, value))
            with graph.inserting_after(last):
                last = probe = graph.call_module(
                    call.path, args, {**kwargs, "_output": output, "_args": args}
                )
            annotate(probe, rule=_PROBE, host=call.path, undo=Undo.OUTPUT)
            if isinstance(output, Node):
                replaced[output] = probe
                continue
            for i, old in enumerate(pytree.tree_leaves(output)):
                if isinstance(old, Node):
                    with graph.inserting_after(last):
                        last = graph.call_function(leaf, (probe, i))
                    annotate(last, rule=_PROBE, host=call.path, undo=Undo.OUTPUT)
                    replaced[latest(old)] = last


def _scaled(node: Node) -> Node:
    """The node that stands for ``node``'s value: itself, or what was inserted on its output."""
    for user in node.users:
        if is_scale(user) and note(user).host == node.name:
            return user
    return node


# --- the proof


def erase(edited: Graph) -> Graph:
    """The graph as it was before it was rewritten and made lean: what the note on each node says of it.

    A node that is dropped is None to its readers. If one of the original's read it, the graphs differ.
    """
    graph = Graph()
    env: dict[Node, Any] = {}
    for node in edited.nodes:
        args = map_arg(node.args, env.__getitem__)
        kwargs = map_arg(node.kwargs, env.__getitem__)
        match note(node).undo:
            case Undo.DROP:
                env[node] = None
            case Undo.PASS:
                env[node] = args[0]
            case Undo.OUTPUT:
                env[node] = leaf(*args) if node.target is leaf else kwargs["_output"]
            case Undo.OP:
                target = getattr(node.target, "aten_op", node.target)
                env[node] = graph.create_node(node.op, target, args, kwargs, node.name)
    return graph


def spell(graph: Graph) -> tuple[str, ...]:
    """A graph as text, one line a node; nodes are numbered, so names do not matter."""
    number = {node: f"%{i}" for i, node in enumerate(graph.nodes)}

    def text(value: Any) -> Any:
        return number[value] if isinstance(value, Node) else repr(value)

    def given(n: Node) -> Any:
        # what a guard lets through follows ``.to(dtype)``; what it hands on is its first argument
        return (n.args[:2], {}) if n.target is insert.guard else (n.args, dict(n.kwargs))

    return tuple(f"{n.op} {_target(n)} {map_aggregate(given(n), text)}" for n in graph.nodes)


def _target(node: Node) -> str:
    """A node's target by name: the same in every process."""
    target = node.target
    if isinstance(target, (str, torch._ops.OpOverload)):
        return str(target)
    return f"{target.__module__}.{getattr(target, '__qualname__', target)}"


def first_difference(graph: Graph, original: Sequence[str]) -> str | None:
    """None if ``graph`` is spelled like ``original`` node for node; else where they part."""
    for mine, theirs in zip(spell(graph), original, strict=False):
        if mine != theirs:
            return f"{mine} is not {theirs}"
    return None if len(graph.nodes) == len(original) else "one has more nodes than the other"


def require_same_graph(module: CapturedModule, trace: Trace) -> None:
    """Raise ``VerificationError`` unless erasing the edits gives the trace back, node for node."""
    original = spell(trace.graph)
    for edited in module.graphs():
        difference = first_difference(erase(edited), original)
        if difference is not None:
            raise VerificationError(f"an edit changed the forward graph: {difference}")
