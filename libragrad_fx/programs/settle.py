"""Makes a flat graph shorter: constant folding, common subexpressions, views that say nothing new."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true as known
from torch.fx.node import map_arg

from libragrad_fx.decide.flow import reach

aten = torch.ops.aten
_SAME = {aten.view.default, aten.alias.default, aten.detach.default, aten.slice.Tensor, aten.expand.default}
"""Ops that give their operand if the shape stays the same."""


def settled(made: GraphModule, exact: Collection[int] = ()) -> GraphModule:
    """The same computation in fewer ops. exact: the places of results whose bits stay the same; others may
    be rounded otherwise."""
    _fold(made)
    _lay(made)
    _one_product(made.graph, exact)
    _one_size(made)
    for node in made.graph.nodes:
        _shorten(node)
    made.graph.eliminate_dead_code()
    return GraphModule(made, fx_graph_cse(made.graph))


def _fold(made: GraphModule) -> None:
    """Constants of the graph are computed once."""
    for node in [n for n in made.graph.nodes if n.op == "call_function"]:
        if (read := node.all_input_nodes) and all(n.op == "get_attr" for n in read):
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: getattr(made, str(n.target)))
            value, name = node.target(*args, **kwargs), f"_folded_{node.name}"
            if isinstance(value, torch.Tensor):
                made.register_buffer(name, value)
                with made.graph.inserting_before(node):
                    constant = made.graph.get_attr(name)
                constant.meta = node.meta
                node.replace_all_uses_with(constant)


def _lay(made: GraphModule) -> None:
    """Constants lie where they are read: an index may lie on the CPU, and is copied at each call."""
    for node in made.graph.find_nodes(op="get_attr"):
        value = getattr(made, name := str(node.target))
        devices = {u.meta["val"].device for u in node.users if isinstance(u.meta.get("val"), torch.Tensor)}
        if value.ndim and len(devices) == 1:
            setattr(made, name, value.to(*devices))


def _one_product(graph: Graph, exact: Collection[int]) -> None:
    """Products with one matrix, the same for the whole batch, are one product of more rows. PyTorch makes
    many of the linear layers whose input is no dense matrix."""
    results = graph.output_node().args[0]
    kept = reach([results[i] for i in exact], lambda n: n.all_input_nodes)  # type: ignore[index,arg-type]
    for node in graph.find_nodes(op="call_function", target=aten.bmm.default):
        a, b = node.args
        (count, rows, _), (_, terms, columns) = a.meta["val"].shape, b.meta["val"].shape
        sizes = [-1, rows, columns] if isinstance(rows, int) else [count, -1, columns]
        is_one = known(b.meta["val"].stride(0) == 0) and all(isinstance(n, int) for n in (terms, *sizes))
        if node in kept or not is_one:
            continue
        with graph.inserting_before(node):
            many = _call(graph, aten.reshape.default, a, [-1, terms])
            one = _call(graph, aten.mm.default, many, _call(graph, aten.select.int, b, 0, 0))
            node.replace_all_uses_with(_call(graph, aten.reshape.default, one, sizes))


def _call(graph: Graph, op: Any, *args: Any) -> Node:
    node = graph.call_function(op, args)
    node.meta["val"] = op(*map_arg(args, lambda n: n.meta["val"]))
    return node


def _one_size(made: GraphModule) -> None:
    """A size that is free is read, or computed, once."""
    first: dict[str, Node] = {}
    for node in made.graph.nodes:
        if node.op == "call_function" and isinstance(size := node.meta.get("val"), torch.SymInt):
            kept = first.setdefault(str(size), node)
            if kept is not node:
                node.replace_all_uses_with(kept)


def _shorten(node: Node) -> None:
    """A view of a view is one view; a view that changes nothing, or a transpose undone, is no op.

    A copy of an expanded tensor stays: what reads it rounds by how it lies."""
    x: Any = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(x, Node):
        return
    if node.target is aten.ones_like.default and not (seen := node.meta["val"]).ndim:  # of a sum, not read
        node.target, node.args = aten.ones.default, ([],)
        node.kwargs = {"dtype": seen.dtype, "device": seen.device}
    if node.target is aten.squeeze.dim and _shape(x) == _shape(node):  # ONNX has none that squeezes nothing
        node.target, node.args = aten.alias.default, (x,)
    if node.target is aten._unsafe_view.default:  # its schema does not say that it is a view
        node.target = aten.view.default
    if node.target is x.target is aten.view.default:
        node.args = (x := x.args[0], *node.args[1:])
    same: Any = None
    if node.target in _SAME and _shape(x) == _shape(node):
        same = x
    elif node.target is x.target is aten.t.default:
        same = x.args[0]
    if same is not None and not any(user.op == "output" for user in node.users):
        node.replace_all_uses_with(same)


def _shape(node: Node) -> str:
    return str(tuple(node.meta["val"].shape))
