"""Names of ops, and the arguments of a call or a node by their names in the op's schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node


def op_name(target: Any) -> str:
    """``aten.add.Tensor`` for an overload; the function's own name for anything else."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return getattr(target, "__name__", str(target))


def signature(op: torch._ops.OpOverload) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Any, ...]]:
    """Argument names in schema order, the keyword-only ones (they are last), and all defaults."""
    arguments = op._schema.arguments
    return (
        tuple(a.name for a in arguments),
        tuple(a.name for a in arguments if a.kwarg_only),
        tuple(a.default_value if a.has_default_value() else None for a in arguments),
    )


def bind(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by schema name, defaults filled in, in schema order."""
    names, _, defaults = signature(op)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {n: given.get(n, d) for n, d in zip(names, defaults, strict=True)}


def spread(op: torch._ops.OpOverload, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inverse of ``bind``: positional and keyword-only arguments."""
    _, keyword, _ = signature(op)
    positional = tuple(v for k, v in values.items() if k not in keyword)
    return positional, {k: values[k] for k in keyword}


def tensor_arguments(node: Node) -> tuple[str, ...]:
    """Names of all arguments in an op's schema, whether tensors or not."""
    return tuple(a.name for a in aten_op(node)._schema.arguments)


def aten_op(node: Node) -> torch._ops.OpOverload:
    """The ATen op of a node, or of the twin that it calls."""
    return getattr(node.target, "aten_op", node.target)  # type: ignore[return-value]


def place_of(operand: str) -> tuple[str, int | None]:
    """``("tensors", 1)`` of ``tensors[1]``, ``("self", None)`` of ``self``: see ``members``."""
    name, _, index = operand.partition("[")
    return name, int(index[:-1]) if index else None


def is_elementwise(node: Node) -> bool:
    """Whether each element of the result is made of the operands' elements at its place."""
    return torch.Tag.pointwise in getattr(aten_op(node), "tags", ())


def members(node: Node, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    """(name, value) of the named schema arguments that are not None; list members as ``name[i]``."""
    values = bind(aten_op(node), node.args, node.kwargs)
    found: list[tuple[str, Any]] = []
    for name in names:
        value = values.get(name)
        if isinstance(value, (list, tuple)):
            found.extend((f"{name}[{i}]", v) for i, v in enumerate(value))
        else:
            found.append((name, value))
    return [(k, v) for k, v in found if v is not None]


def operands(node: Node, names: tuple[str, ...]) -> list[tuple[str, Node]]:
    """The ``members`` that are nodes: (name, node)."""
    return [(k, v) for k, v in members(node, names) if isinstance(v, Node)]
