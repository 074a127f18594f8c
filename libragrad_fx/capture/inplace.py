"""Replaces in-place ops of an exported graph by plain ones, if no alias of the tensor is read later.

PyTorch can make any program functional, by tracing it once more; that costs twice the export. Most
networks write only into the fresh result of a convolution or a norm (``relu_``, ``+=``). There, later
readers can simply read the plain op's result. Other writes are left to PyTorch.
"""

from __future__ import annotations

import contextlib
import operator

import torch
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from libragrad_fx.decide.rulebook import RuleBook
from libragrad_fx.graph.alias import functional, is_fresh


def rename(graph: Graph, book: RuleBook) -> None:
    """Replace every in-place op of ``graph`` for which that is safe; the others stay."""
    place = {n: i for i, n in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        plain = functional(node.target) if node.args and isinstance(node.args[0], Node) else None
        if plain is None or not _is_safe(node, place, book):
            continue
        target = node.args[0]
        assert isinstance(target, Node)
        node.target = plain
        for user in list(target.users):
            if place[user] > place[node]:
                user.replace_input_with(target, node)


def drop_returned(graph: Graph, book: RuleBook) -> None:
    """Remove every op that returns an argument itself: an idle dropout, ``x.to(x.dtype)``. ``no_grad`` cuts
    no gradient there; and PyTorch (2.11) would lose a later write, if the schema does not say so."""
    for node in list(graph.nodes):
        if (operand := _returned(node, book)) is not None:
            node.replace_all_uses_with(operand)
            graph.erase_node(node)


def _returned(node: Node, book: RuleBook) -> Node | None:
    """The operand that is a node's result: the same object, not only the same memory. The op runs on fake
    tensors to tell, without an assumption on their sizes."""
    source, place = node, ()
    if node.target is operator.getitem:
        source, place = node.all_input_nodes[0], node.args[1:]
    op = source.target
    if not isinstance(op, torch._ops.OpOverload) or op._schema.is_mutable:
        return None
    if is_fresh(source, book.fact(op)):
        return None
    values = {n: n.meta.get("val") for n in source.all_input_nodes}
    mode = detect_fake_mode([*values.values()])
    if mode is None or _form(node) not in map(_form, values):
        return None
    args, kwargs = map_arg((source.args, source.kwargs), values.get)
    silent = mode.shape_env.suppress_guards() if mode.shape_env else contextlib.nullcontext()
    with mode, torch.no_grad(), silent:
        made = op(*args, **kwargs)
    found = operator.getitem(made, *place) if place else made
    return next((n for n, x in values.items() if x is found), None)


def _form(node: Node) -> object:
    """Size and dtype of a tensor. As text, because to compare free sizes is an assumption on them."""
    x = node.meta.get("val")
    return (str(x.shape), x.dtype) if isinstance(x, torch.Tensor) else node


def _is_safe(node: Node, place: dict[Node, int], book: RuleBook) -> bool:
    """Whether the tensor written to has no alias, and keeps its dtype."""
    target = node.args[0]
    assert isinstance(target, Node)
    operands = [n.meta.get("val") for n in node.all_input_nodes]
    dtypes = {v.dtype for v in operands if isinstance(v, torch.Tensor)}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        return False
    names = [target, *(u for u in target.users if place[u] < place[node])]
    return all(is_fresh(n, book.fact(n.target)) for n in names)
