"""Makes a flat graph shorter: constant folding, common subexpressions, views that say nothing new."""

from __future__ import annotations

from typing import Any

import torch
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from libragrad_fx.graph.schema import is_elementwise
from libragrad_fx.ops.binding import example

aten = torch.ops.aten
_RESHAPES = {aten.view.default, aten._unsafe_view.default}
_SAME = {*_RESHAPES, aten.alias.default, aten.detach.default, aten.slice.Tensor, aten.expand.default}
"""Ops that give their operand if the shape stays the same."""
_TURNS = {aten.t.default}
"""Ops that are undone by themselves."""


def settled(made: GraphModule) -> GraphModule:
    """The same computation in fewer ops."""
    _fold(made)
    _lay(made)
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


def _one_size(made: GraphModule) -> None:
    """A free size is read from one tensor: the first that has it."""
    first: dict[str, Node] = {}
    for node in made.graph.find_nodes(op="call_function", target=aten.sym_size.int):
        kept = first.setdefault(str(node.meta["val"]), node)
        if kept is not node:
            node.replace_all_uses_with(kept)


def _shorten(node: Node) -> None:
    """A view of a view is one view. A view that changes nothing, a transpose undone, or a copy for ops that
    do not need it, is no op."""
    x: Any = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(x, Node):
        return
    if node.target in _RESHAPES and x.target in _RESHAPES:
        node.args = (x := x.args[0], *node.args[1:])
    copied = node.target is aten.clone.default and x.target is aten.expand.default
    unread = copied and _only_pointwise(node, example(x.meta["val"]))
    same: Any = None
    if unread or (node.target in _SAME and _shape(x) == _shape(node)):
        same = x
    elif node.target in _TURNS and x.target is node.target:
        same = x.args[0]
    if same is not None and not any(user.op == "output" for user in node.users):
        node.replace_all_uses_with(same)


def _only_pointwise(node: Node, like: torch.Tensor) -> bool:
    """Whether a tensor is read element by element alone, so that it may lie as ``like``."""
    for user in node.users:
        if user.target in _RESHAPES:
            try:
                seen = like.view(example(user.meta["val"]).shape)
            except RuntimeError:  # it has to be dense for that
                return False
            if not _only_pointwise(user, seen):
                return False
        elif not is_elementwise(user):
            return False
    return True


def _shape(node: Node) -> str:
    return str(tuple(node.meta["val"].shape))
