"""Twins: functions whose forward calls an ATen op unchanged and whose backward is ours.

No single PyTorch primitive survives everything. A ``torch.autograd.Function`` in ``setup_context``
form works in eager, ``torch.compile`` and ``torch.func``, but ``torch.export`` erases its backward
without a word; a ``torch.library`` custom op survives export, but fails under ``vmap(grad)``. So a
twin is a small dispatcher: the Function normally, the custom op while exporting. Neither has a
forward-mode rule: both refuse.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from libragrad_fx.ops.binding import binding
from libragrad_fx.ops.function import linked, note_tensors, quick, wanted

NAMESPACE = "libragrad_fx"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

Grads = Mapping[str, "torch.Tensor | Sequence[torch.Tensor] | None"]
Vjp = Callable[..., Grads]
Save = Callable[[Any, Mapping[str, Any], Any, bool], None]
Pull = Callable[[Any, Sequence[Any], frozenset[str]], Grads]


def twin(
    op: torch._ops.OpOverload,
    vjp: Vjp,
    *,
    saves: Sequence[str],
    extras: Sequence[str] = (),
    for_others: Sequence[str] = (),
    compact: Sequence[str] = (),
    name: str | None = None,
    forward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """The balanced twin of ``op``: same schema, same forward kernel, backward ``vjp``.

    vjp:        called as ``vjp(needs, g, **saved)`` with ``needs`` the names of arguments whose
                gradient is wanted, ``g`` the gradient of the output (a tuple for several outputs)
                and ``saved`` every non-tensor argument plus the tensors named in ``saves``
                (``"result"`` is the output). Returns gradients by argument name.
    saves:      names of the tensor arguments that the backward reads; anything else is not kept.
    forward:    computes the same bits as ``op`` from the same arguments; ``op`` itself by default.
    extras:     names of what ``forward`` returns behind the op's output, for ``vjp`` alone; one that
                ``saves`` names may be None.
    for_others: what is saved only where an argument beside the first needs a gradient.
    compact:    what is saved as a copy where it is part of something larger, which is then let go.
    """
    label = name or op._schema.name.split("::")[1]
    plain = [a.name for a in op._schema.arguments if "Tensor" not in str(a.type)]
    save = _saver(tuple(saves), tuple(extras), tuple(for_others), tuple(compact), plain)
    pull = _puller(vjp, tuple(saves), len(extras))
    custom = _custom_op(op, label, forward or op, save, pull, len(extras))
    function = _function(op, label, forward or binding(op) or op, save, pull)
    # plain tuples: Dynamo traces this function and does not know what a schema is
    names, _, defaults = _signature(op)
    several = bool(extras)
    lists = "Tensor[]" in str(op._schema)

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting():
            return custom(*args, **kwargs)[0] if several else custom(*args, **kwargs)
        if not torch.is_grad_enabled():
            return op(*args, **kwargs)
        values = [*args, *defaults[len(args) :]]
        if kwargs:
            values = [kwargs.get(n, v) for n, v in zip(names, values, strict=True)]
        sizes, flat = _flatten(values) if lists else (None, map(linked, values))
        out = function(sizes, *flat)
        return out[0] if several else out

    call.__name__ = call.__qualname__ = label
    call.__doc__ = f"Balanced twin of ``{op}`` (arguments {', '.join(names)})."
    call.aten_op = op  # type: ignore[attr-defined]
    return call


def _saver(
    saves: Sequence[str], extras: Sequence[str], for_others: Sequence[str], compact: Sequence[str],
    plain: Sequence[str],
) -> Save:  # fmt: skip
    """Keeps what the backward reads; tensors through ``save_for_backward``, so views and vmap work."""

    def save(ctx: Any, values: Mapping[str, Any], output: Any, others: bool) -> None:
        if extras:
            output, *more = output
            ctx.mark_non_differentiable(*more)
            ctx.set_materialize_grads(False)  # or each gets a gradient of zeros, filled in
            values = {**values, **dict(zip(extras, more, strict=True))}
        kept: list[torch.Tensor] = []
        layout = []
        for name in saves:
            value = output if name == "result" else values[name]
            if value is None or (name in for_others and not others):
                continue
            if isinstance(value, torch.Tensor):
                kept.append(_alone(value) if name in compact else value)
                layout.append((name, -1))
            else:
                kept.extend(value)
                layout.append((name, len(value)))
        ctx.layout = layout
        ctx.plain = {k: values[k] for k in plain}
        ctx.save_for_backward(*kept)

    return save


def _alone(x: torch.Tensor) -> torch.Tensor:
    """``x`` in memory that holds nothing else."""
    if x.untyped_storage().nbytes() == x.nbytes:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _puller(vjp: Vjp, saves: Sequence[str], extras: int) -> Pull:
    """Calls ``vjp`` on what was saved."""

    def pull(ctx: Any, g: Sequence[Any], needs: frozenset[str]) -> Grads:
        saved: dict[str, Any] = {**dict.fromkeys(saves), **ctx.plain}
        flat = iter(ctx.saved_tensors)
        for name, size in ctx.layout:
            saved[name] = next(flat) if size < 0 else [next(flat) for _ in range(size)]
        g = g[: len(g) - extras]
        if extras and g[0] is None:
            return {}
        upstream = g[0] if len(g) == 1 else tuple(g)
        if not torch._C._is_any_autocast_enabled():
            return vjp(needs, upstream, **saved)
        # a backward runs in the dtypes that its forward chose, whatever surrounds .backward()
        device = next((t.device.type for t in g if t is not None), "cpu")
        with torch.autocast(device, enabled=False):
            return vjp(needs, upstream, **saved)

    return pull


def _signature(
    op: torch._ops.OpOverload,
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Any, ...]]:
    """Argument names in schema order, the keyword-only ones (they are last), and all defaults."""
    arguments = op._schema.arguments
    return (
        tuple(a.name for a in arguments),
        tuple(a.name for a in arguments if a.kwarg_only),
        tuple(a.default_value if a.has_default_value() else None for a in arguments),
    )


def bind(
    op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments of a call by schema name, defaults filled in, in schema order."""
    names, _, defaults = _signature(op)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {n: given.get(n, d) for n, d in zip(names, defaults, strict=True)}


def times_(x: torch.Tensor, y: Any) -> torch.Tensor:
    """``x * y`` in the memory of ``x``, which nobody else reads: a new tensor costs more than the
    product. Under ``vmap`` it is a new one, as ``y`` may have more elements there."""
    return x * y if torch._C._are_functorch_transforms_active() else x.mul_(y)


def minus_(x: torch.Tensor, y: Any, alpha: float = 1.0) -> torch.Tensor:
    """``x - alpha * y`` in the memory of ``x``, as ``times_``."""
    watched = torch._C._are_functorch_transforms_active()
    return torch.sub(x, y, alpha=alpha) if watched else x.sub_(y, alpha=alpha)


def _flatten(values: Sequence[Any]) -> tuple[tuple[int, ...], list[Any]]:
    """Lists of tensors one by one; sizes: how many, -1 for what is no list."""
    sizes = tuple(len(v) if _is_tensors(v) else -1 for v in values)
    flat: list[Any] = []
    for v in values:
        flat.extend(map(linked, v)) if _is_tensors(v) else flat.append(linked(v))
    return sizes, flat


def _is_tensors(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(v, torch.Tensor) for v in value)
    )


def _function(
    op: torch._ops.OpOverload, label: str, run: Callable[..., Any], save: Save, pull: Pull
) -> Any:
    names, keyword, _ = _signature(op)
    count = len(names) - len(keyword)

    def unflatten(sizes: Sequence[int] | None, flat: Sequence[Any]) -> dict[str, Any]:
        if sizes is None:
            return dict(zip(names, flat, strict=True))
        values: dict[str, Any] = {}
        at = 0
        for name, size in zip(names, sizes, strict=True):
            values[name] = flat[at] if size < 0 else list(flat[at : at + size])
            at += max(size, 1) if size != 0 else 0
        return values

    class Balanced(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(sizes: tuple[int, ...] | None, *flat: Any) -> Any:
            values = flat if sizes is None else list(unflatten(sizes, flat).values())
            if not keyword:
                return run(*values)
            return run(*values[:count], **dict(zip(keyword, values[count:], strict=True)))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.sizes = inputs[0]
            note_tensors(ctx, inputs)
            save(ctx, unflatten(inputs[0], inputs[1:]), output, any(ctx.needs_input_grad[2:]))

        @staticmethod
        def backward(ctx: Any, *g: Any) -> Any:
            asked = wanted(ctx)[1:]
            if ctx.sizes is None:
                grads = pull(ctx, g, frozenset(itertools.compress(names, asked)))
                return None, *map(grads.get, names)
            asked = unflatten(ctx.sizes, asked)
            needs = frozenset(k for k, w in asked.items() if (any(w) if isinstance(w, list) else w))
            grads = pull(ctx, g, needs)
            out: list[Any] = [None]
            for name, size in zip(names, ctx.sizes, strict=True):
                got = grads.get(name)
                if size < 0:
                    out.append(got)
                else:
                    out.extend([None] * size if got is None else got)
            return tuple(out)

    Balanced.__name__ = Balanced.__qualname__ = f"Balanced_{label}"
    return quick(Balanced)


def _custom_op(
    op: torch._ops.OpOverload, label: str, run: Callable[..., Any], save: Save, pull: Pull, extras: int
) -> Any:  # fmt: skip
    schema = str(op._schema)
    arguments, returns = schema[schema.index("(") :].split(" -> ")
    if extras:
        returns = f"({', '.join([returns, *['Tensor'] * extras])})"
    LIBRARY.define(f"{label}{arguments} -> {returns}")
    qualified = f"{NAMESPACE}::{label}"
    torch.library.impl(qualified, "CompositeExplicitAutograd", lib=LIBRARY)(run)
    torch.library.register_fake(qualified, run, lib=LIBRARY)
    names, keyword, _ = _signature(op)
    positional = names[: len(names) - len(keyword)]

    def setup(
        ctx: Any, inputs: tuple[Any, ...], output: Any, keyword_only_inputs: Any = None
    ) -> None:
        values = dict(zip(positional, inputs, strict=True))
        values |= {k: (keyword_only_inputs or {}).get(k) for k in keyword}
        save(ctx, values, output, True)

    def backward(ctx: Any, *g: Any) -> Any:
        wanted = dict(zip(positional, ctx.needs_input_grad, strict=False))
        needs = frozenset(k for k, w in wanted.items() if (any(w) if isinstance(w, list) else w))
        grads = pull(ctx, g, needs)
        return tuple(grads.get(n) for n in positional)

    torch.library.register_autograd(qualified, backward, setup_context=setup, lib=LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), label).default
