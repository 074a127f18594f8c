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
from torch.utils import _pytree as pytree

from libragrad_fx.ops.binding import binding
from libragrad_fx.ops.function import linked, note_tensors, quick, wanted, watched

NAMESPACE = "libragrad_fx"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

Grads = Mapping[str, "torch.Tensor | Sequence[torch.Tensor] | None"]
Vjp = Callable[..., Grads]
Save = Callable[[Any, dict[str, Any], Any, bool], None]
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
    over: Callable[..., Any] | None = None,
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
    over:       as ``forward``, and may write over its first argument. The twin has a second form then,
                ``twin.over``, for where nobody else reads that.
    """
    label = name or op._schema.name.split("::")[1]
    plain = [a.name for a in op._schema.arguments if "Tensor" not in str(a.type)]
    lists = "Tensor[]" in str(op._schema)
    save = _saver(tuple(saves), tuple(extras), tuple(for_others), tuple(compact), plain, lists)
    pull = _puller(vjp, len(extras), lists)
    custom = _custom_op(op, label, forward or op, save, pull, len(extras))
    run = forward or binding(op) or op

    def caller(run: Callable[..., Any]) -> Any:
        function = _function(op, label, run, save, pull)
        return _caller(op, label, function, custom, bool(extras))

    call = caller(run)
    if over is not None:
        call.over = caller(lambda *a, **k: (run if watched() else over)(*a, **k))
    return call  # type: ignore[no-any-return]


def _caller(
    op: torch._ops.OpOverload, label: str, function: Any, custom: Any, several: bool
) -> Callable[..., Any]:
    """What stands in a graph: the Function, or the custom op while exporting, or ``op`` itself."""
    # plain tuples: Dynamo traces this function and does not know what a schema is
    names, _, defaults = _signature(op)
    lists = "Tensor[]" in str(op._schema)

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting():
            return custom(*args, **kwargs)[0] if several else custom(*args, **kwargs)
        if not torch.is_grad_enabled():
            return op(*args, **kwargs)
        values = [*args, *defaults[len(args) :]]
        if kwargs:
            values = [kwargs.get(n, v) for n, v in zip(names, values, strict=True)]
        flat, spec = pytree.tree_flatten(values) if lists else (values, None)
        out = function(spec, *map(linked, flat))
        return out[0] if several else out

    call.__name__ = call.__qualname__ = label
    call.__doc__ = f"Balanced twin of ``{op}`` (arguments {', '.join(names)})."
    call.aten_op = op  # type: ignore[attr-defined]
    return call


def _saver(
    saves: Sequence[str], extras: Sequence[str], for_others: Sequence[str], compact: Sequence[str],
    plain: Sequence[str], lists: bool,
) -> Save:  # fmt: skip
    """Keeps what the backward reads; tensors through ``save_for_backward``, so views and vmap work."""
    absent = dict.fromkeys(saves)

    def save(ctx: Any, values: dict[str, Any], output: Any, others: bool) -> None:
        if extras:
            output, *more = output
            ctx.mark_non_differentiable(*more)
            ctx.set_materialize_grads(False)  # or each gets a gradient of zeros, filled in
            values.update(zip(extras, more, strict=True))
        values["result"] = output
        names = [n for n in saves if values[n] is not None and (others or n not in for_others)]
        kept: Any = [_alone(values[n]) if n in compact else values[n] for n in names]
        if lists:
            kept, ctx.layout = pytree.tree_flatten(kept)
        ctx.names = names
        ctx.given = {**absent, **{k: values[k] for k in plain}}
        ctx.save_for_backward(*kept)

    return save


def _alone(x: torch.Tensor) -> torch.Tensor:
    """``x`` in memory that holds nothing else."""
    if x.untyped_storage().nbytes() == x.nbytes:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _puller(vjp: Vjp, extras: int, lists: bool) -> Pull:
    """Calls ``vjp`` on what was saved."""

    def pull(ctx: Any, g: Sequence[Any], needs: frozenset[str]) -> Grads:
        kept = ctx.saved_tensors
        if lists:
            kept = pytree.tree_unflatten(kept, ctx.layout)
        saved = {**ctx.given, **dict(zip(ctx.names, kept, strict=True))}
        if extras and g[0] is None:
            return {}
        upstream = g[0] if len(g) == extras + 1 else tuple(g[: len(g) - extras])
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
    if torch._C._are_functorch_transforms_active():
        return torch.sub(x, y, alpha=alpha)
    return x.sub_(y, alpha=alpha)


def spent() -> bool:
    """Whether what a node saved is let go behind its backward, so that it may be written over."""
    if torch.is_grad_enabled() or watched():
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined,no-any-return]


def _function(
    op: torch._ops.OpOverload, label: str, run: Callable[..., Any], save: Save, pull: Pull
) -> Any:
    names, keyword, _ = _signature(op)
    count = len(names) - len(keyword)

    def values_of(spec: pytree.TreeSpec | None, flat: Sequence[Any]) -> Sequence[Any]:
        return flat if spec is None else pytree.tree_unflatten(flat, spec)

    class Balanced(torch.autograd.Function):
        """Its first argument: how the others, flat, make up those of ``op``, where some are lists."""

        generate_vmap_rule = True

        @staticmethod
        def forward(spec: pytree.TreeSpec | None, *flat: Any) -> Any:
            values = values_of(spec, flat)
            if not keyword:
                return run(*values)
            return run(*values[:count], **dict(zip(keyword, values[count:], strict=True)))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.spec = inputs[0]
            note_tensors(ctx, inputs)
            values = dict(zip(names, values_of(ctx.spec, inputs[1:]), strict=True))
            save(ctx, values, output, any(ctx.needs_input_grad[2:]))

        @staticmethod
        def backward(ctx: Any, *g: Any) -> Any:
            asked = values_of(ctx.spec, wanted(ctx)[1:])
            if ctx.spec is None:
                grads = pull(ctx, g, frozenset(itertools.compress(names, asked)))
                return None, *map(grads.get, names)
            needs = {n for n, a in zip(names, asked, strict=True) if any(pytree.tree_leaves(a))}
            grads = pull(ctx, g, frozenset(needs))
            leaves = [None]
            for name, a in zip(names, asked, strict=True):
                got, blank = grads.get(name), [None] * len(pytree.tree_leaves(a))
                leaves += blank if got is None else pytree.tree_leaves(got)
            return tuple(leaves)

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
