"""Shared by every ``torch.autograd.Function`` here: a cheap call, and which gradients are wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_is_compiling, _transforms_active = (  # bound once: each attribute lookup costs at every call
    torch.compiler.is_compiling, torch._C._are_functorch_transforms_active,
)  # fmt: skip
_mode, _TRACED = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.PROXY  # type: ignore[attr-defined]
same = torch.ops.aten.alias.default
"""A view of a tensor; unlike ``view_as`` it keeps the strides of axes of size 1 as well."""


def watched() -> bool:
    """Whether a compiler, a tracer or ``torch.func`` is active, and not autograd alone."""
    return _is_compiling() or _transforms_active() or _mode(_TRACED) is not None


def traced() -> bool:
    """Whether ``make_fx`` traces plain autograd: no compiler is active, and no ``torch.func``."""
    return not _is_compiling() and not _transforms_active() and _mode(_TRACED) is not None


def eager_or_traced(g: torch.Tensor) -> bool:
    """Whether plain autograd runs or is traced, and ``g`` is one tensor: a compiler fuses an op's written
    form, and ``vmap`` would loop over its kernel."""
    one = traced() or not watched()
    return one and not torch._C._functorch.is_legacy_batchedtensor(g)  # type: ignore[attr-defined]


def quick(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply``, but cheaper in plain eager mode.

    ``torch.func`` needs the form with ``setup_context``. For that form PyTorch binds the arguments
    to a signature in Python at every call, which costs more than a small layer norm.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = function.forward(*inputs)
        function.setup_context(ctx, inputs, output)
        return output

    body = {"forward": forward, "setup_context": torch.autograd.Function.setup_context}
    body = {name: staticmethod(method) for name, method in body.items()}
    plain: Any = type(function.__name__, (function,), body)

    def apply(*inputs: Any) -> Any:
        return (function if watched() else plain).apply(*inputs)

    return apply


def linked(x: Any) -> Any:
    """A view of ``x`` if it is a leaf: ``wanted`` can ask the engine about the view's node only."""
    if not isinstance(x, torch.Tensor) or not x.requires_grad or not x.is_leaf:
        return x
    return x if torch.compiler.is_compiling() else same(x)


def note_tensors(ctx: Any, inputs: Sequence[Any]) -> None:
    """Note for ``wanted`` which inputs are tensors: only those have an edge in ``next_functions``."""
    if sum(ctx.needs_input_grad) > 1:
        ctx.tensors = [isinstance(x, torch.Tensor) for x in inputs]


def wanted(ctx: Any) -> Sequence[bool]:
    """For each input of a backward node: whether this backward pass needs its gradient.

    ``needs_input_grad`` only says which inputs require grad: every parameter does, even if only the
    gradient of the model's input is asked for.
    """
    needs: Sequence[bool] = ctx.needs_input_grad
    if sum(needs) == 1:  # otherwise this backward would not run
        return needs
    edges = None if torch.compiler.is_compiling() else getattr(ctx, "next_functions", None)
    if edges is None or len(edges) != sum(ctx.tensors):
        return needs
    nodes = iter(edges)
    asked = [_runs(next(nodes)[0]) if is_tensor else False for is_tensor in ctx.tensors]
    return tuple(n and a for n, a in zip(needs, asked, strict=True))


def _runs(node: Any) -> bool:
    try:
        return node is None or torch._C._will_engine_execute_node(node)
    except RuntimeError:  # PyTorch does not answer for a leaf
        return True
