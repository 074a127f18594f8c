"""Nodes that return an argument unchanged: the only nodes that a rewrite may *insert* into a graph."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.node import has_side_effect
from torch.utils import _pytree as pytree

from libragrad_fx.errors import GuardError, InputError, ModeError
from libragrad_fx.graph.notes import note
from libragrad_fx.kernels import LIBRARY, register
from libragrad_fx.ops.function import quick, same

stop = torch.ops.aten.detach.default
"""Cuts the gradient of one operand. ``detach`` is an ATen op, so it survives every transformation."""


LEAN = "lean"
"""The ``rule`` on nodes that the optimiser inserts or replaces."""


class _Scale(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, factor: float, *sources: torch.Tensor) -> torch.Tensor:
        return same(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.factor, ctx.sources = inputs[1], len(inputs) - 2
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor | None) -> Any:
        return _times(g, ctx.factor), None, *[None] * ctx.sources


_scaled = quick(_Scale)


def _times(g: torch.Tensor | None, factor: float) -> torch.Tensor | None:
    return None if g is None or factor == 0 else g * factor


# a custom op may not return its argument, so while exporting (only then) scaling copies
_scale_op = register(
    "scale(Tensor x, float factor, Tensor[] sources) -> Tensor", lambda x, factor, sources: x.clone()
)
torch.library.register_autograd(
    _scale_op,
    lambda ctx, g: (_times(g, ctx.kept[0]), None, [None] * ctx.kept[1]),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "kept", (inputs[1], len(inputs[2]))),
    lib=LIBRARY,
)


def scale(x: torch.Tensor, factor: float, *sources: torch.Tensor) -> torch.Tensor:
    """``x`` itself (a view); the backward multiplies its gradient by ``factor``.

    The result requires a gradient if ``x`` or one of ``sources`` does; ``sources`` get none. With factor 0
    nothing is sent on, even if the gradient is infinite.
    """
    if torch.compiler.is_exporting():
        return _scale_op(x, factor, sources)  # type: ignore[no-any-return]
    return _scaled(x, factor, *sources)  # type: ignore[no-any-return]


def is_scale(node: torch.fx.Node) -> bool:
    """Whether ``node`` is a gradient scale that a rewrite inserted."""
    return node.target is scale and note(node).rule != ""


def is_end(node: torch.fx.Node) -> bool:
    """Whether ``node`` sends no gradient on: a stop, or a scale by zero."""
    return node.target is stop or (is_scale(node) and not node.args[1])


cut = register("cut(Tensor x) -> Tensor", lambda x: x.clone())
"""Capture's ``stop`` until writes in place are gone: ``detach`` is an alias, which PyTorch takes again
after a write, and the gradient of what was written would end there."""


observe = register("observe(Tensor[] xs, str[] places, int call) -> ()", lambda xs, places, call: None)
"""Capture's mark on the tensors of one module call; ``places`` says which argument or output each is.
It does nothing."""
has_side_effect(observe)


def probe(*args: Any, _args: tuple[Any, ...] | None = None, _output: Any = None, **kwargs: Any) -> Any:
    """The forward of a shell module, called at the end of a module call so that hooks see it.

    A pre-hook that swaps an argument would be ignored by a captured graph, so it is refused.
    """
    if _args is None:
        raise ModeError(
            "a submodule of a transformed model computes nothing when it is called alone: its ops are"
            " inlined in the graph. Call the original's submodule, or transform that."
        )
    given, captured = pytree.tree_leaves(args), pytree.tree_leaves(_args)
    if len(given) != len(captured) or any(
        a is not b for a, b in zip(given, captured, strict=True) if isinstance(b, torch.Tensor)
    ):
        raise ModeError(
            "a forward pre-hook changed the arguments of a submodule of a transformed model. The "
            "submodule's ops are inlined in the graph, so the change cannot take effect; register "
            "a forward hook on the module that produces the tensor instead. In Captum, it is a layer "
            "method with attribute_to_layer_input=True (explain the output of the layer before), or a "
            "method that rewrites the backward by module type (guided backpropagation, deconvolution, "
            "DeepLift), which the original model is for."
        )
    return _output


def leaf(structure: Any, index: int) -> Any:
    """Leaf ``index`` of a structure, in pytree order."""
    return pytree.tree_leaves(structure)[index]


def probed(node: torch.fx.Node) -> Any:
    """The node (or structure of nodes) that a probe returns, or that a ``leaf`` of one is; None for any
    other node."""
    if node.target is leaf:
        return leaf(node.args[0].kwargs["_output"], node.args[1])  # type: ignore[union-attr,arg-type]
    return node.kwargs.get("_output") if node.op == "call_module" else None


_AGAIN = "For such a call transform(model, inputs) again with an example of it."


def dtype_name(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def guard(x: Any, path: str, shape: tuple[int | str, ...], dtype: str, mode: Any, least: int = 1) -> Any:
    """``x`` itself, if it fits what was captured; otherwise an error that says what does not fit.

    shape: an ``int`` is a fixed size, a ``str`` a free one (``sizes`` checks conditions on those).
    dtype: its name, without ``torch.``
    mode: (the module's training flag now, the flag at capture).
    least: the smallest batch. Export assumes free sizes of 2 or more; a model may branch on one sample.
        ``birth`` compares a batch of one with the model, and sets 2 here if it differs.
    """
    if not isinstance(x, torch.Tensor):
        raise GuardError(f"{path} must be a tensor, as it was at capture; got {type(x).__name__}. {_AGAIN}")
    if x.is_nested:
        raise InputError(f"{path} is a nested tensor; it was captured with one shape: pad it")
    if dtype_name(x) != dtype:
        raise GuardError(f"{path} was captured as {dtype}, got {dtype_name(x)}. {_AGAIN}")
    if len(x.shape) != len(shape) or any(
        got != want if isinstance(want, int) else got < (2 if axis else least)
        for axis, (got, want) in enumerate(zip(x.shape, shape, strict=False))
    ):
        raise GuardError(
            f"{path} was captured with shape ({', '.join(map(str, shape))}), got {tuple(x.shape)}."
            " Dimensions in letters are free from 2 on; for another shape call transform(model, inputs)"
            " again with an example of it."
        )
    now, captured = mode
    if now is not captured:
        named = {True: "train", False: "eval"}
        raise ModeError(
            f"the graph was captured in {named[captured]} mode and is called in {named[now]} mode:"
            f" call .{named[captured]}() on it, or transform the model in {named[now]} mode"
        )
    if not torch.compiler.is_compiling() and torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
        raise ModeError(
            "forward-mode AD through a balanced graph is not defined: LibraGrad is a rule for the"
            " backward pass. Use reverse mode (torch.autograd.grad, torch.func.grad or vjp)."
        )
    return x


def constant(x: Any, path: str, captured: Any) -> Any:
    """``x`` itself, if it equals the value that capture made part of the graph."""
    if x is not captured and not (type(x) is type(captured) and x == captured):
        raise GuardError(
            f"{path} was {captured!r} at capture and is part of the graph; got {x!r:.80}."
            f" Call transform(model, inputs) again with an example of {path}."
        )
    return x


def structure(x: Any, path: str, captured: str) -> Any:
    """``x`` itself, if its containers are as at capture: types, lengths, keys and their order."""
    now = outline(tuple(x) if path.startswith("*") else x)  # fx.Interpreter passes *args as a list
    if now != captured:
        raise GuardError(
            f"{path} was {captured} at capture, where * is a leaf; got {now}. Call"
            f" transform(model, inputs) again with an example of it."
        )
    return x


def outline(x: Any) -> str:
    """The containers of ``x`` as text: ``list[*, dict(a, b)[*, *]]``."""
    return _outlined(pytree.tree_structure(x))


def _outlined(spec: pytree.TreeSpec) -> str:
    if spec.is_leaf():
        return "*"
    context = "" if spec.context is None else f"({_context(spec.context)})"
    return f"{spec.type.__name__}{context}[{', '.join(map(_outlined, spec.children()))}]"  # type: ignore[union-attr]


def _context(context: Any) -> str:
    if isinstance(context, (list, tuple)):
        return ", ".join(map(_context, context))
    return context.__name__ if isinstance(context, type) else repr(context)


@functools.cache
def _condition(text: str, names: tuple[str, ...]) -> Callable[..., bool]:
    """``text`` as a function of ``names``."""
    return eval(f"lambda {', '.join(names)}: {text}", {"math": math, "torch": torch})  # type: ignore[no-any-return]


def sizes(
    conditions: tuple[str, ...], names: tuple[str, ...], labels: tuple[str, ...], *values: int
) -> None:
    """Raises ``GuardError`` unless all conditions that export found on free sizes hold.

    names, values: the symbols in the conditions, and their sizes in this call
    labels: the names that an error uses for them
    """
    for text in conditions:
        if not _condition(text, names)(*values):
            said = functools.reduce(
                lambda t, pair: re.sub(rf"\b{pair[0]}\b", pair[1], t),
                zip(names, labels, strict=True), text,
            )  # fmt: skip
            known = ", ".join(f"{n} = {v}" for n, v in zip(labels, values, strict=True))
            raise GuardError(
                f"the graph was captured for sizes with {said}, and is called with {known}. Call"
                " transform(model, inputs) again with an example of that size."
            )
