"""In-place ops of an exported graph as plain ones, where no other name of the tensor is read later.

PyTorch can make any program functional, by tracing it once more: that costs twice the export. What
most networks write in place is the fresh result of a convolution or a norm (``relu_``, ``+=``), and
there a rename does it. Everything else is left for PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten
_FRESH = {  # composite ops whose result is always a tensor of its own
    aten.conv1d, aten.conv2d, aten.conv3d, aten.conv_transpose1d, aten.conv_transpose2d, aten.linear,
    aten.batch_norm, aten.layer_norm, aten.group_norm, aten.instance_norm, aten.rms_norm, aten.matmul,
}  # fmt: skip
_DROPOUTS = {aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout}


def rename(graph: Graph) -> None:
    """Replace every in-place op of ``graph`` for which it is safe; the others stay."""
    place = {n: i for i, n in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        plain = functional(node.target) if node.args and isinstance(node.args[0], Node) else None
        if plain is None or not _is_safe(node, place):
            continue
        target = node.args[0]
        assert isinstance(target, Node)
        node.target = plain
        for user in list(target.users):
            if place[user] > place[node]:
                user.replace_input_with(target, node)


def drop_idle(graph: Graph) -> None:
    """Take out every dropout that drops nothing. It returns its argument itself, and its schema does
    not say: PyTorch (2.11) would lose what is written to that by its other name."""
    for node in list(graph.nodes):
        packet = getattr(node.target, "_overloadpacket", None)
        if packet in _DROPOUTS and (not node.args[2] or node.args[1] == 0):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph.erase_node(node)


def functional(op: Any) -> torch._ops.OpOverload | None:
    """The op that computes what an in-place op writes; None if ``op`` is none such."""
    if not (isinstance(op, torch._ops.OpOverload) and op.namespace == "aten"):
        return None
    if not op._schema.is_mutable or not op._opname.endswith("_"):
        return None
    packet = getattr(aten, op._opname[:-1], None)
    plain = getattr(packet, op._overloadname, None)
    names = [a.name for a in op._schema.arguments]
    same = plain is not None and [a.name for a in plain._schema.arguments] == names
    return plain if same else None


def _is_safe(node: Node, place: dict[Node, int]) -> bool:
    """Whether what is written to has no other name that is read later, and keeps its dtype."""
    target = node.args[0]
    assert isinstance(target, Node)
    operands = [n.meta.get("val") for n in node.all_input_nodes]
    dtypes = {v.dtype for v in operands if isinstance(v, torch.Tensor)}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point or not is_fresh(target):
        return False
    return all(is_fresh(u) for u in target.users if place[u] < place[node])


def is_fresh(node: Node) -> bool:
    """Whether an op's result shares no memory with its operands."""
    op = getattr(node.target, "aten_op", node.target)  # what a twin is the twin of
    if not isinstance(op, torch._ops.OpOverload):
        return False
    if any(r.alias_info is not None for r in op._schema.returns):
        return False
    return not is_composite(op) or op._overloadpacket in _FRESH


def is_composite(op: Any) -> bool:
    """Whether PyTorch itself runs ``op`` as other ops, on every device, forwards and backwards."""
    return isinstance(op, torch._ops.OpOverload) and torch._C._dispatch_has_kernel_for_dispatch_key(
        op.name(), "CompositeImplicitAutograd"
    )
