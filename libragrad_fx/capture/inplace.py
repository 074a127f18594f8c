"""Replaces in-place ops of an exported graph by plain ones, if no alias of the tensor is read later.

PyTorch can make any program functional, by tracing it once more; that costs twice the export. Most
networks write only into the fresh result of a convolution or a norm (``relu_``, ``+=``). There, later
readers can simply read the plain op's result. Other writes are left to PyTorch.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from libragrad_fx.decide.rulebook import RuleBook
from libragrad_fx.graph.alias import functional, is_fresh, is_idle_dropout


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


def drop_idle(graph: Graph) -> None:
    """Remove every dropout that drops nothing. It returns its argument, which its schema does not say, so
    PyTorch (2.11) would lose a later write through that alias."""
    for node in list(graph.nodes):
        if is_idle_dropout(node):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph.erase_node(node)


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
