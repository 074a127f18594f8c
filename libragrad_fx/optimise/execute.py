"""Generates the code that runs: bindings for ops, in place where the operand is dead, constants folded.

It is made anew from the lean graph when a module is loaded; the lean graph is what is pickled.
"""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict, namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from libragrad_fx.decide.flow import reach
from libragrad_fx.graph.notes import note
from libragrad_fx.ops.binding import PRODUCTS, binding, in_place
from libragrad_fx.ops.function import watched
from libragrad_fx.ops.gate import gated
from libragrad_fx.ops.places import idle, whole
from libragrad_fx.ops.product import halved_mul

_KEPT = 8  # how many sizes constants are kept for
_MANY = 2**20  # elements of constants that are kept together


def bound(graph: Graph) -> Graph:
    """A copy of ``graph`` that calls bindings where it is marked, nothing at all for ``x[:]`` and for
    idle dropouts, and writes over what nobody else reads."""
    new = Graph()
    new.output(new.graph_copy(graph, {}))
    for node in [n for n in new.nodes if note(n).gate is not None]:
        _gate(new, node)
    for node in list(new.nodes):
        read_out = any(user.op == "output" for user in node.users)
        if node.target is idle or (node.target is whole and not read_out):
            node.replace_all_uses_with(node.args[0])
            new.erase_node(node)
        elif note(node).over:
            node.target = in_place(node) or node.target.over
        elif note(node).bound:
            node.target = binding(node.target)
    _unbind(new)
    _fold(new)
    return new


def _gate(graph: Graph, node: Node) -> None:
    """One node for an activation, its product with a value, and the halving of the gradient."""
    at, over, halves = note(node).gate  # type: ignore[misc]
    product: Any = node if node.target is halved_mul else node.args[0]
    act = product.args[at]
    given = [*product.args]
    given[at] = act.args[0]
    if halves is not None:
        given = [_source(given[0])]
    call = gated(act.target, at, over, halves)
    with graph.inserting_before(node):
        new = graph.call_function(call, (*given, *act.args[1:]), act.kwargs)
    node.replace_all_uses_with(new)
    _erase(graph, node)


def _unbind(graph: Graph) -> None:
    """One ``unbind`` for the places of an axis that are taken one by one, as the steps of a scan are: the
    gradient of a ``select`` is as large as what it is taken from, and filled with zeros. Of an axis with
    one place, ``squeeze`` takes it."""
    groups: dict[Any, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if (place := note(node).place) is not None:
            axis, _, count = place
            groups[node.args[0], axis, count].append(node)
    for (x, axis, count), selects in groups.items():
        if count == 1:
            for node in selects:
                node.target, node.args = torch.squeeze, (x, axis)
        if not 2 <= len({note(n).place for n in selects}) >= count / 2:
            continue
        with graph.inserting_before(selects[0]):
            all_places = graph.call_function(torch.unbind, (x, axis))
        for node in selects:
            node.target, node.args = operator.getitem, (all_places, note(node).place[1])  # type: ignore[index]


def _source(node: Any) -> Node:
    return node if node.target in PRODUCTS else _source(node.args[0])


def _erase(graph: Graph, node: Node) -> None:
    """A node that nobody reads, and what was there for it alone."""
    read = node.all_input_nodes
    graph.erase_node(node)
    for n in read:
        if n.op == "call_function" and not n.users:
            _erase(graph, n)


def flattened(graph: Graph) -> tuple[Callable[[torch.nn.Module], Any], dict[str, Any]]:
    """Let ``graph`` name attributes by one name each.

    ``nn.Module`` looks for each part of ``layers.3.fc1.weight`` in Python, at every call: of a small
    network that is a tenth of the time. Here each submodule is looked up once a call, and where
    modules keep theirs, so that what a user replaces is seen.

    Returns:
        What looks the attributes up in a module, and a stand-in for each of them.
    """
    named = [n for n in graph.nodes if n.op in ("get_attr", "call_module")]
    names = {str(n.target): f"a{i}" for i, n in enumerate(named)}
    for node in named:
        node.target = names[str(node.target)]
    parents = [itertools.accumulate(p.split(".")[:-1], "{}.{}".format) for p in names]
    modules = [(p, *p.rpartition(".")[::2]) for p in sorted(set(itertools.chain(*parents)))]
    leaves = [p.rpartition(".")[::2] for p in names]
    Attributes = namedtuple("Attributes", names.values())  # of plain objects, Dynamo knows not all

    def attributes(root: torch.nn.Module) -> Any:
        found: dict[str, Any] = {"": root}
        for path, parent, name in modules:
            found[path] = found[parent]._modules[name]
        values = []
        for parent, name in leaves:
            holder = found[parent]
            own = holder._parameters.get(name, holder._modules.get(name))
            values.append(getattr(holder, name) if own is None else own)
        return Attributes(*values)

    return attributes, dict.fromkeys(names.values())


def _fold(graph: Graph) -> None:
    """Compute what is marked as fixed once for each of the numbers (mostly sizes) that it depends on:
    a call that gives it stands in its place. What depends on no number is computed once for all calls."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    fixed = [n for n in order if note(n).fixed]
    numbers: dict[Node, frozenset[Node]] = {}
    groups: dict[frozenset[Node], list[Node]] = defaultdict(list)
    for node in fixed:
        numbers[node] = frozenset().union(*(numbers.get(n, {n}) for n in node.all_input_nodes))
        if not all(note(u).fixed for u in node.users):
            groups[numbers[node]].append(node)
    programs = [(sorted(k, key=order.__getitem__), read) for k, read in groups.items()]
    held = [_held(_program(fixed, given, read)) for given, read in programs]
    for (given, read), call in zip(programs, held, strict=True):
        with graph.inserting_after(given[-1]) if given else graph.inserting_before(read[0]):
            values = graph.call_function(call, tuple(given))
        for i, node in enumerate(read):
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_function(operator.getitem, (values, i)))
    for node in reversed(fixed):
        graph.erase_node(node)


def _program(fixed: Sequence[Node], given: Sequence[Node], read: Sequence[Node]) -> Graph:
    """The fixed nodes that ``read`` is made of, as a graph of its own over the numbers ``given``."""
    needed = reach(read, lambda n: [m for m in n.all_input_nodes if note(m).fixed])
    graph = Graph()
    env = {n: graph.placeholder(f"n{i}") for i, n in enumerate(given)}
    for node in fixed:
        if node in needed:
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[n] for n in read))
    return graph


def _held(program: Graph) -> Callable[..., Sequence[torch.Tensor]]:
    """Runs a program of numbers, and keeps what it made of the last few, if that is small."""
    make = torch.fx.GraphModule({}, program).forward
    kept: dict[Any, Any] = {}

    def fixed(*numbers: Any) -> Sequence[torch.Tensor]:
        if watched() or torch._C._len_torch_dispatch_stack() or torch._C._is_any_autocast_enabled():
            return make(*numbers)  # what such modes make of it is theirs
        key = (torch.get_default_dtype(), *numbers)  # constants may be made without a dtype
        if key in kept:
            return kept[key]  # type: ignore[no-any-return]
        with torch.inference_mode(False), torch.no_grad():
            made = make(*numbers)
        if len(kept) == _KEPT:
            kept.clear()
        if sum(t.numel() for t in made) <= _MANY:
            kept[key] = made
        return made  # type: ignore[no-any-return]

    return fixed
