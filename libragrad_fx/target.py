"""What to explain: from a model's output and a target to one number a sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from libragrad_fx.errors import InputError

Target = Any


def select(output: Any, target: Target) -> torch.Tensor:
    """The scalar to differentiate: the sum over the batch of each sample's target."""
    return select_each(output, target).sum()


def select_each(output: Any, target: Target) -> torch.Tensor:
    """What to explain, one number a sample: (B,).

    Args:
        output: a tensor (B, ...), or a structure whose first floating-point tensor is taken (the
            field ``logits`` where there is one).
        target: as in Captum: an int, a tuple (for outputs of more dimensions), a 0-d or 1-d tensor
            or list with one entry a sample, a list of tuples; None for outputs of shape (B,) or
            (B, 1); or a callable from the output to scalars.

    Raises:
        InputError: the target does not fit the output.
    """
    if callable(target):
        chosen = target(output)
        if not isinstance(chosen, torch.Tensor):
            raise InputError(
                f"the target callable must return a tensor, got {type(chosen).__name__}"
            )
        return chosen.reshape(-1)
    y = first_tensor(output)
    batch = y.shape[0] if y.ndim else 1
    if target is None:
        if y.numel() != batch:
            raise InputError(f"the output has shape {tuple(y.shape)}: say which target to explain")
        return y.reshape(batch)
    if isinstance(target, torch.Tensor):
        target = target.tolist()
    try:
        if isinstance(target, (int, tuple)):
            target = [target] * batch
        if len(target) != batch:
            raise IndexError(f"{len(target)} targets for a batch of {batch}")
        rows = [t if isinstance(t, (tuple, list)) else (t,) for t in target]
        if any(len(r) != y.ndim - 1 for r in rows):
            raise IndexError(f"need {y.ndim - 1} indices a sample")
        return torch.stack([y[(i, *map(int, row))] for i, row in enumerate(rows)])
    except (IndexError, TypeError, ValueError) as e:
        raise InputError(f"target {target!r} does not fit output {tuple(y.shape)}: {e}") from e


def first_tensor(output: Any) -> torch.Tensor:
    """The tensor of an output structure that is explained: ``logits``, else the first float leaf."""
    if isinstance(output, torch.Tensor):
        return output
    logits = (
        output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    )
    if isinstance(logits, torch.Tensor):
        return logits
    leaves = pytree.tree_leaves(output)
    for t in leaves:
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            return t
    raise InputError(
        f"the output ({type(output).__name__}) holds no floating-point tensor to explain"
    )


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}
