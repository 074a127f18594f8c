"""Models that were captured on the way, kept as long as the model lives: the next call is fast."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import torch

from libragrad_fx.api import transform, unbalanced
from libragrad_fx.decide import rulebook
from libragrad_fx.errors import InputError, ModeError
from libragrad_fx.module.captured import InGraphs
from libragrad_fx.module.changes import Tree
from libragrad_fx.module.variants import Origin

AUTOGRAD = "autograd"
"""The name of the policy that changes nothing."""
Policy = str | Path | None


class _Kept(NamedTuple):
    """A captured module, and what the model was like."""

    tree: Tree
    tensors: tuple[int, ...]
    module: InGraphs


_KEPT: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, _Kept]] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()


def captured(model: torch.nn.Module, inputs: Any, policy: Policy) -> InGraphs:
    """``model`` as a captured module: itself if it is one, else its transform, which is kept.

    Args:
        policy: None is "libra" of a model, and its own of a captured module; "autograd" changes nothing.

    Raises:
        InputError: no model, or a module that was captured by another policy.
    """
    if isinstance(model, InGraphs):
        return _as_asked(model, policy)
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"attribute explains an nn.Module, got {type(model).__name__}")
    asked = "libra" if policy is None else policy
    key = AUTOGRAD if asked == AUTOGRAD else rulebook.load(asked).digest
    with _LOCK:
        found = _KEPT.get(model, {}).get(key)
        if found is not None and found.tensors == _tensors(model) and _unchanged(found.tree):
            return found.module
        made = unbalanced(model, inputs) if asked == AUTOGRAD else transform(model, inputs, policy=asked)
        if isinstance(made.origin, Origin):  # or the module would keep its key alive
            vars(made)["origin"] = Origin(made.origin.recapture.weakly())
        _KEPT.setdefault(model, {})[key] = _Kept(Tree(model), _tensors(model), made)
        return made


def _as_asked(module: Any, policy: Policy) -> InGraphs:
    made = AUTOGRAD if module.plan is None else module.plan.policy
    if policy is not None and policy != made:
        raise InputError(
            f"this module was captured by {made}: give the original model for policy={policy!r}"
        )
    return module


def _unchanged(tree: Tree) -> bool:
    try:
        tree.require_unchanged()
    except ModeError:
        return False
    return True


def _tensors(model: torch.nn.Module) -> tuple[int, ...]:
    """Which tensors a model has, its dtypes and devices, and its mode."""
    of = ([*m._parameters.values(), *m._buffers.values()] for m in model.modules())
    found = [t for tensors in of for t in tensors if t is not None]
    kinds = {hash((t.dtype, t.device)) for t in found}
    return (*map(id, found), *sorted(kinds), int(model.training))
