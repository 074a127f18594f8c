"""Shells: modules of the same class, with the same attributes and parameters, whose ops are in the graph.

A probe node at the end of each call passes the true arguments and output to hooks.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils import _pytree as pytree

from libragrad_fx.errors import ModeError
from libragrad_fx.ops import insert

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that Python code made


class Structure(torch.nn.Module):
    """Puts tensors back into a structure that generated code cannot spell (a dataclass: ModelOutput)."""

    def __init__(self, spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, *leaves: Any) -> Any:
        return pytree.tree_unflatten(list(leaves), self.spec)


def _refuse_backward_hook(*_: Any, **__: Any) -> Any:
    raise ModeError(
        "a submodule of a transformed model has no backward of its own: its ops are inlined in the"
        " graph. Methods that rewrite the backward by module type (guided backpropagation,"
        " deconvolution, DeepLift, LRP composites) would be silently wrong here, so they are refused;"
        " use the original model for them, or a tensor hook on the module's output."
    )


CALLED = ("forward", "__call__", "_call_impl", "_compiled_call_impl", "_wrapped_call_impl")
"""Attributes by which an instance may override its class's call (``compile()``, a patched ``forward``).
Capture has traced the override; the result is called through its graph."""

REFUSED = ("register_full_backward_hook", "register_full_backward_pre_hook", "register_backward_hook")


def shell_tree(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """A shell for every submodule, by ``id`` of the original. Parameters and buffers are shared."""
    shells = {id(m): _shell(m) for m in model.modules() if m is not model}
    for m in model.modules():
        if m is not model:
            children = {k: None if c is None else shells[id(c)] for k, c in m._modules.items()}
            shells[id(m)].__dict__["_modules"] = children
    return shells


def _shell(module: torch.nn.Module) -> torch.nn.Module:
    # skip the class's own ``__new__``, which may want arguments
    builtin: Any = next(c for c in type(module).__mro__ if not c.__flags__ & _HEAP_TYPE)
    shell = builtin.__new__(type(module))
    blank = torch.nn.Module()
    state = {k: copy.copy(v) if isinstance(v, (dict, set)) else v for k, v in vars(module).items()}
    shell.__dict__.update(state)
    shell.__dict__.update({k: v for k, v in vars(blank).items() if "hooks" in k})
    for name in CALLED:
        shell.__dict__.pop(name, None)
    shell.__dict__["forward"] = insert.probe
    shell.__dict__.update(dict.fromkeys(REFUSED, _refuse_backward_hook))
    return shell
