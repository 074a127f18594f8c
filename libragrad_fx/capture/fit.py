"""Refuses models that cannot be captured, before anything is run."""

from __future__ import annotations

from typing import Any

import torch

from libragrad_fx.errors import CaptureError, ExportError
from libragrad_fx.module.captured import CapturedModule


def require_fit(model: torch.nn.Module) -> None:
    """Raise ``CaptureError`` if no way of capture works, ``ExportError`` if only one graph does not."""
    _refuse_unfit(model)
    _refuse_hooks(model)


def _refuse_unfit(model: torch.nn.Module) -> None:
    """Refuse modules that are uninitialised, scripted, lazy or captured already."""
    name = type(model).__name__
    if "_modules" not in vars(model) and not isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(f"{name}.__init__ never called super().__init__(): it is no module yet")
    for path, m in model.named_modules():
        if isinstance(m, torch.jit.ScriptModule):
            raise CaptureError(
                f"{path or name} is a ScriptModule, whose code PyTorch does not show: transform the"
                " Python module that it was made of"
            )
        if isinstance(m, CapturedModule):
            raise CaptureError(
                f"submodule {path!r} is a captured module already: transform the whole of the original"
                " model, or call the transformed part from outside"
            )
    tensors = (*model.named_parameters(), *model.named_buffers())
    if lazy := [k for k, t in tensors if torch.nn.parameter.is_lazy(t)]:
        raise CaptureError(
            f"{', '.join(lazy[:4])}: uninitialised parameters of lazy modules; run the model once first"
        )


def library(thing: Any) -> str:
    """The top-level package that a class or a function comes from."""
    return (getattr(thing, "__module__", None) or "").partition(".")[0]


def _refuse_hooks(model: torch.nn.Module) -> None:
    """Refuse hooks, except those that a library puts on its own modules, which are traced."""

    def hooked(*kinds: str) -> list[str]:
        return [
            name or "(root)"
            for name, m in model.named_modules()
            for kind in kinds
            if any(library(h) != library(type(m)) for h in getattr(m, kind).values())
        ]

    def named(found: list[str]) -> str:
        return f"{', '.join(found[:8])}{' …' if len(found) > 8 else ''}"

    if found := hooked("_backward_hooks", "_backward_pre_hooks"):
        raise CaptureError(
            f"these modules have backward hooks: {named(found)}. The balanced backward does not pass"
            " modules but ops, so they would not be called. Remove them and transform again."
        )
    if found := hooked("_forward_hooks", "_forward_pre_hooks"):
        raise ExportError(
            f"these modules have hooks: {named(found)}. A hook is Python that a graph cannot hold: remove"
            " them, transform, and register them on the result, where forward hooks fire as on the"
            " model. (Old-style weight_norm and spectral_norm are hooks too: use"
            " torch.nn.utils.parametrizations, or remove_weight_norm.)"
        )
