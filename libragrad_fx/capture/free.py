"""Which sizes of the inputs are free."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

from libragrad_fx.errors import InputError
from libragrad_fx.target import inexact


@dataclasses.dataclass(frozen=True)
class Free:
    """Which sizes of the inputs are free.

    batch:   axis 0 of every tensor
    lengths: axis 1 of tokens, (B, L) of whole numbers, and of every tensor with the same L
    named:   more axes, by argument, as ``transform(dynamic=...)`` takes them
    """

    batch: bool = True
    lengths: bool = True
    named: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def fewer(self) -> Free | None:
        """The next to try if these sizes cannot be free; None if none is free here."""
        if self.lengths:
            return dataclasses.replace(self, lengths=False)
        return FIXED if self.batch else None

    def axes(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The free axes of each tensor of a call, as export wants them."""
        long = token_lengths(args, kwargs) if self.lengths else set()

        def of(t: Any) -> dict[int, Any] | None:
            if not isinstance(t, torch.Tensor) or not t.ndim:
                return None
            return {axis: Dim.AUTO for axis in range(min(t.ndim, 2)) if not axis or t.shape[1] in long}

        return pytree.tree_map(of, (args, kwargs))


USUAL = Free()


FIXED = Free(batch=False, lengths=False)


def token_lengths(args: Any, kwargs: Any) -> set[int]:
    """The lengths of the token sequences among a call's arguments."""
    tensors = (t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
    whole = (t for t in tensors if not inexact(t) and t.dtype is not torch.bool)
    return {t.shape[1] for t in whole if t.ndim == 2}


def batch_of_two(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A call with its batch of one doubled, because export fixes a size of 1; others are unchanged."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if any(isinstance(t, torch.Tensor) and t.is_nested for t in leaves):
        raise InputError("a nested tensor has no shape to capture: pad it to one")
    tensors = [t for t in leaves if isinstance(t, torch.Tensor) and t.ndim > 0]
    if tensors and all(t.shape[0] == 1 for t in tensors):
        leaves = [
            torch.cat([t.detach(), t.detach()]) if isinstance(t, torch.Tensor) and t.ndim else t
            for t in leaves
        ]
    return pytree.tree_unflatten(leaves, spec)


def by_name(model: torch.nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by parameter, as export wants ``dynamic_shapes``."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    found = dict(bound.arguments)
    for p in bound.signature.parameters.values():
        if p.kind is p.VAR_KEYWORD:
            found |= found.pop(p.name, {})
    return found


def freed(path: str, value: Any, spec: Any) -> Any:
    """The free axes of one argument, as export wants them: by number, for each tensor.

    Raises:
        InputError: ``spec`` does not fit the example.
    """
    if isinstance(value, torch.Tensor) and isinstance(spec, Mapping):
        axes: dict[int, Any] = {0: Dim.AUTO} if value.ndim else {}
        for axis, name in spec.items():
            if not isinstance(axis, int) or not -value.ndim <= axis < value.ndim:
                raise InputError(f"dynamic: {path} of shape {tuple(value.shape)} has no axis {axis!r:.40}")
            bounds = {k: getattr(name, k, None) for k in ("min", "max")}
            axes[axis % value.ndim] = Dim.AUTO(**{k: b for k, b in bounds.items() if b is not None})
        return axes
    if isinstance(value, Mapping) and isinstance(spec, Mapping) and value.keys() == spec.keys():
        return {k: freed(f"{path}[{k!r}]", value[k], spec[k]) for k in value}
    if isinstance(value, (list, tuple)) and isinstance(spec, (list, tuple)) and len(value) == len(spec):
        parts = [freed(f"{path}[{i}]", *pair) for i, pair in enumerate(zip(value, spec, strict=True))]
        return type(value)(parts) if type(value) in (list, tuple) else parts
    if spec is None:
        return pytree.tree_map(lambda t: {0: Dim.AUTO} if isinstance(t, torch.Tensor) else None, value)
    raise InputError(
        f"dynamic: {path} is {type(value).__name__} in the example; give the axes of a tensor by number"
        " ({1: 'length'}), and for a container one such entry for each of its members"
    )
