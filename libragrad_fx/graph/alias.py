"""Which ops write in place, share memory with their operands, or are made of other ops."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten
_FRESH = {  # composite ops whose result is always a tensor of its own
    aten.conv1d, aten.conv2d, aten.conv3d, aten.conv_transpose1d, aten.conv_transpose2d, aten.linear,
    aten.batch_norm, aten.layer_norm, aten.group_norm, aten.instance_norm, aten.rms_norm, aten.matmul,
}  # fmt: skip


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
