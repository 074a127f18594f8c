"""Generates the code that runs: bindings for ops, in place where the operand is dead, constants folded.

Only the lean graph is pickled; its code is generated again when a module is loaded.
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

_KEPT = 8  # constants are kept for so many sizes
_MANY = 2**20  # the most elements of constants that are kept for one size


def bound(graph: Graph) -> Graph:
    """A copy of ``graph`` with the passes' notes carried out: bindings, fused gates, ``unbind``, in-place
    ops, folded constants. ``x[:]`` and idle dropouts are removed."""
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
    """Replace an activation, its product and the halving of the gradient by one ``gated`` op."""
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
    """Replace the selects of one axis (the steps of a scan) by one ``unbind``: each select's gradient would
    be as large as its operand, and mostly zeros. On an axis of size 1, ``squeeze`` replaces a select."""
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
    """Erase a node that has no readers, and the operands that have none after that."""
    read = node.all_input_nodes
    graph.erase_node(node)
    for n in read:
        if n.op == "call_function" and not n.users:
            _erase(graph, n)


def flattened(graph: Graph) -> tuple[Callable[[torch.nn.Module], Any], dict[str, Any]]:
    """Change ``graph`` so that its attributes have names without dots (``a0``, ``a1``).

    ``nn.Module`` looks up each part of ``layers.3.fc1.weight`` in Python, at every call: a tenth of the
    time of a small network. Here each submodule is looked up once a call, in the modules' own
    dictionaries; so a parameter that the user replaces takes effect.

    Returns:
        A function from a module to these attributes, and placeholder attributes to compile with.
    """
    named = [n for n in graph.nodes if n.op in ("get_attr", "call_module")]
    names = {str(n.target): f"a{i}" for i, n in enumerate(named)}
    for node in named:
        node.target = names[str(node.target)]
    read = reader([*names])
    Attributes = namedtuple("Attributes", names.values())  # a type that Dynamo can trace
    return lambda root: Attributes(*read(root)), dict.fromkeys(names.values())


def reader(paths: Sequence[str]) -> Callable[[torch.nn.Module], list[Any]]:
    """A function from a module to what it has at these paths. Each submodule is looked up once a call."""
    parents = [itertools.accumulate(p.split(".")[:-1], "{}.{}".format) for p in paths]
    modules = [(p, *p.rpartition(".")[::2]) for p in sorted(set(itertools.chain(*parents)))]
    leaves = [p.rpartition(".")[::2] for p in paths]

    def read(root: torch.nn.Module) -> list[Any]:
        found: dict[str, Any] = {"": root}
        for path, parent, name in modules:
            found[path] = found[parent]._modules[name]
        values = []
        for parent, name in leaves:
            own = found[parent]._parameters.get(name)
            values.append(entry(found[parent], name) if own is None else own)
        return values

    return read


def attribute(module: torch.nn.Module, path: str) -> Any:
    """What a graph's ``get_attr`` reads."""
    parent, _, name = path.rpartition(".")
    return entry(module.get_submodule(parent), name)


def entry(holder: torch.nn.Module, name: str) -> Any:
    """What a module has by a name: a submodule, parameter or buffer comes before an attribute of ours."""
    for place in (holder._modules, holder._parameters, holder._buffers):
        if name in place:
            return place[name]
    return getattr(holder, name)


def _fold(graph: Graph) -> None:
    """Constant folding. Replace the nodes marked ``fixed`` by calls that compute them once for each value
    of the numbers (mostly sizes) that they depend on; if there are none, once for all calls."""
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
    """A graph that computes the fixed nodes ``read`` from the numbers ``given``."""
    needed = reach(read, lambda n: [m for m in n.all_input_nodes if note(m).fixed])
    graph = Graph()
    env = {n: graph.placeholder(f"n{i}") for i, n in enumerate(given)}
    for node in fixed:
        if node in needed:
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[n] for n in read))
    return graph


def _held(program: Graph) -> Callable[..., Sequence[torch.Tensor]]:
    """A function that runs ``program`` on numbers, and caches small results for the last few."""
    make = torch.fx.GraphModule({}, program).forward
    kept: dict[Any, Any] = {}

    def fixed(*numbers: Any) -> Sequence[torch.Tensor]:
        modes = torch._C._len_torch_dispatch_stack() or torch._C._is_any_autocast_enabled()
        recorded = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if watched() or modes or recorded:  # then the result is not to be cached, or is dropped too early
            return make(*numbers)
        key = (torch.get_default_dtype(), *numbers)  # a constant may take the default dtype
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
