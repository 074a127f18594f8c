"""Twins: functions whose forward calls an ATen op unchanged and whose backward is ours.

No single PyTorch primitive works everywhere. A ``torch.autograd.Function`` in ``setup_context`` form works
in eager mode, ``torch.compile`` and ``torch.func``, but ``torch.export`` silently drops its backward. A
``torch.library`` custom op survives export, but fails under ``vmap(grad)``. So a twin is a small
dispatcher: the Function normally, the custom op while exporting. Neither has a forward-mode rule: both
raise an error.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from libragrad_fx.graph.schema import signature
from libragrad_fx.kernels import LIBRARY, register
from libragrad_fx.ops.binding import binding
from libragrad_fx.ops.function import linked, note_tensors, wanted, watched

Grads = Mapping[str, "torch.Tensor | Sequence[torch.Tensor] | None"]
Vjp = Callable[..., Grads]
Run = Callable[[Sequence[Any]], tuple[Any, Sequence[Any]]]
Save = Callable[[Any, Sequence[Any], bool], None]
Pull = Callable[[Any, Sequence[Any], frozenset[str]], Grads]


def made_once(make: Callable[..., Any]) -> Callable[..., Any]:
    """``make``, which makes a twin, with results kept. One call at a time: a name is registered once."""
    kept, lock = functools.cache(make), threading.Lock()

    @functools.wraps(make)
    def call(*given: Any) -> Any:
        with lock:
            return kept(*given)

    return call


def twin(
    op: torch._ops.OpOverload,
    vjp: Vjp,
    *,
    saves: Sequence[str],
    extras: Sequence[str] = (),
    if_params: Sequence[str] = (),
    compact: Sequence[str] = (),
    name: str | None = None,
    forward: Callable[..., Any] | None = None,
    over: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """The balanced twin of ``op``: same schema, same forward kernel, backward ``vjp``.

    vjp:        called as ``vjp(needs, g, **saved)``. ``needs``: names of the arguments whose gradient is
                wanted. ``g``: the gradient of the output, a tuple for several outputs. ``saved``: every
                non-tensor argument, and the saved tensors. Returns gradients by argument name.
    saves:      names of the tensors to save: arguments, extras, or ``"result"`` for the output.
    forward:    computes the same bits as ``op`` from the same arguments; ``op`` itself by default.
    extras:     names of the tensors that ``forward`` returns after the op's output, for ``vjp`` alone;
                one that ``saves`` names may be None.
    if_params:  names of tensors saved only if an argument other than the first, a parameter, needs a
                gradient; None is saved otherwise.
    compact:    names of tensors saved as a copy if they are views, so that the larger tensor is freed.
    over:       as ``forward``, but may write over its first argument. The twin then has a second form,
                ``twin.over``, for calls whose first argument has no other reader.
    """
    made = _Form(op, name or op._schema.name.split("::")[1], vjp, tuple(saves), tuple(extras),
                 tuple(if_params), tuple(compact))  # fmt: skip
    run = forward or binding(op) or op
    watched_by = _function(made, run), _custom_op(made, forward or op)
    call = _caller(made, _eager(made, run), *watched_by)
    if over is not None:
        call.over = _caller(made, _eager(made, over), *watched_by)  # type: ignore[attr-defined]
    return call


@dataclasses.dataclass(frozen=True)
class _Form:
    """The arguments of ``twin``, and its op's schema as plain tuples, because Dynamo knows no schema."""

    op: torch._ops.OpOverload
    label: str
    vjp: Vjp
    saves: tuple[str, ...]
    extras: tuple[str, ...]
    if_params: tuple[str, ...]
    compact: tuple[str, ...]

    @property
    def plain(self) -> tuple[str, ...]:
        """Names of the non-tensor arguments."""
        return tuple(a.name for a in self.op._schema.arguments if "Tensor" not in str(a.type))

    @property
    def lists(self) -> bool:
        """Whether an argument is a list of tensors."""
        return "Tensor[]" in str(self.op._schema)


def _caller(form: _Form, eager: Any, function: Any, custom: Any) -> Callable[..., Any]:
    """The function that a graph calls: it runs a Function, the custom op while exporting, or, without
    grad mode, ``op`` itself."""
    op, lists, several = form.op, form.lists, bool(form.extras)
    names, _, defaults = signature(op)

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting():
            return custom(*args, **kwargs)[0] if several else custom(*args, **kwargs)
        if not torch.is_grad_enabled():
            return op(*args, **kwargs)
        values = [*args, *defaults[len(args) :]]
        if kwargs:
            values = [kwargs.get(n, v) for n, v in zip(names, values, strict=True)]
        if not lists and not watched():
            return eager(*map(linked, values))
        flat, spec = pytree.tree_flatten(values) if lists else (values, None)
        out = function(spec, *map(linked, flat))
        return out[0] if several else out

    call.__name__ = call.__qualname__ = form.label
    call.__doc__ = f"Balanced twin of ``{op}`` (arguments {', '.join(names)})."
    call.aten_op = op  # type: ignore[attr-defined]
    return call


def _saver(form: _Form) -> Save:
    """Returns ``save(ctx, values, others)``. values: the arguments, the result, the extras, and None.

    Tensors go through ``save_for_backward``, so views and vmap work.
    """
    names, _, _ = signature(form.op)
    place = {n: i for i, n in enumerate((*names, "result", *form.extras))}
    every = [place[n] for n in form.saves]
    few = [-1 if n in form.if_params else place[n] for n in form.saves]  # the last is None
    alone = [i for i, n in enumerate(form.saves) if n in form.compact]
    plain = [place[n] for n in form.plain]
    lists = form.lists

    def save(ctx: Any, values: Sequence[Any], others: bool) -> None:
        kept: Any = [values[i] for i in (every if others else few)]
        for i in alone:
            kept[i] = _alone(kept[i])
        if lists:
            kept, ctx.layout = pytree.tree_flatten(kept)
        ctx.plain = [values[i] for i in plain]
        ctx.save_for_backward(*kept)

    return save


def _alone(x: torch.Tensor) -> torch.Tensor:
    """``x``, or a copy of it if it is only a part of its storage; a tracer has no storage to save."""
    if watched() or x.untyped_storage().nbytes() == x.nbytes:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _puller(form: _Form) -> Pull:
    """Calls ``vjp`` on what was saved."""
    vjp, keys, lists = form.vjp, (*form.saves, *form.plain), form.lists

    def pull(ctx: Any, g: Sequence[Any], needs: frozenset[str]) -> Grads:
        kept = ctx.saved_tensors
        if lists:
            kept = pytree.tree_unflatten(kept, ctx.layout)
        saved = dict(zip(keys, (*kept, *ctx.plain), strict=True))
        upstream = g[0] if len(g) == 1 else tuple(g)
        if not torch._C._is_any_autocast_enabled():
            return vjp(needs, upstream, **saved)
        # the backward uses the dtypes of its forward, even if .backward() is called under autocast
        device = next((t.device.type for t in g if t is not None), "cpu")
        with torch.autocast(device, enabled=False):
            return vjp(needs, upstream, **saved)

    return pull


def times_(x: torch.Tensor, y: Any) -> torch.Tensor:
    """``x * y``, in place in ``x``, which has no other reader: allocating a tensor costs more than the
    product. Where that may not be, it allocates."""
    return x * y if allocates(y) else x.mul_(y)


def allocates(y: Any) -> bool:
    """Whether an op with an operand ``y`` may not write over another one. A tracer wants ops without side
    effects. Under ``torch.func``, and autograd's ``is_grads_batched``, ``y`` may be a batch of tensors."""
    if watched():
        return True
    return isinstance(y, torch.Tensor) and torch._C._functorch.is_legacy_batchedtensor(y)  # type: ignore[attr-defined]


def minus_(x: torch.Tensor, y: Any, alpha: float = 1.0) -> torch.Tensor:
    """``x - alpha * y``, in place in ``x``, as ``times_``."""
    if allocates(y):
        return torch.sub(x, y, alpha=alpha)
    return x.sub_(y, alpha=alpha)


def spent() -> bool:
    """Whether saved tensors are freed after this backward (no ``retain_graph``), so may be overwritten."""
    if torch.is_grad_enabled() or watched():
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined,no-any-return]


def _parts(form: _Form, run: Callable[..., Any]) -> tuple[tuple[str, ...], Run, Save, Pull]:
    """What both Functions are made of: the op's argument names; a function that calls ``run`` on values in
    that order and returns (result, extras); the saver; the puller."""
    names, keyword, _ = signature(form.op)
    count, several = len(names) - len(keyword), bool(form.extras)

    def both(values: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        named = dict(zip(keyword, values[count:], strict=True)) if keyword else {}
        out = run(*values[:count], **named)
        return (out[0], out[1:]) if several else (out, ())

    return names, both, _saver(form), _puller(form)


def _eager(form: _Form, run: Callable[..., Any]) -> Any:
    """The Function for plain eager mode, for an op without lists of tensors. It returns no extras, and has
    the old form, ``forward(ctx, ...)``: for ``setup_context``, PyTorch binds the arguments to a signature
    in Python at every call, which costs more than a small layer norm."""
    names, both, save, pull = _parts(form, run)

    def forward(ctx: Any, *values: Any) -> Any:
        result, more = both(values)
        note_tensors(ctx, values)
        save(ctx, (*values, result, *more, None), True in ctx.needs_input_grad[1:])
        return result

    def backward(ctx: Any, *g: Any) -> Any:
        grads = pull(ctx, g, frozenset(itertools.compress(names, wanted(ctx))))
        return tuple(map(grads.get, names))

    body = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"Balanced_{form.label}", (torch.autograd.Function,), body)
    return function.apply


def _function(form: _Form, run: Callable[..., Any]) -> Any:
    names, both, save, pull = _parts(form, run)
    extras = len(form.extras)

    def values_of(spec: pytree.TreeSpec | None, flat: Sequence[Any]) -> Sequence[Any]:
        return flat if spec is None else pytree.tree_unflatten(flat, spec)

    class Balanced(torch.autograd.Function):
        """The arguments of ``op``, flattened; the first is the spec that restores its lists, or None."""

        generate_vmap_rule = True

        @staticmethod
        def forward(spec: pytree.TreeSpec | None, *flat: Any) -> Any:
            result, more = both(values_of(spec, flat))
            return (result, *more) if extras else result

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.spec = inputs[0]
            note_tensors(ctx, inputs)
            values, others = values_of(ctx.spec, inputs[1:]), any(ctx.needs_input_grad[2:])
            save(ctx, (*values, *_outputs(ctx, output, extras), None), others)

        @staticmethod
        def backward(ctx: Any, *g: Any) -> Any:
            if g[0] is None and extras:
                return None, *[None] * (len(ctx.needs_input_grad) - 1)
            asked = values_of(ctx.spec, wanted(ctx)[1:])
            needs = {n for n, a in zip(names, asked, strict=True) if any(pytree.tree_leaves(a))}
            grads = pull(ctx, g[: len(g) - extras], frozenset(needs))
            leaves = [None]
            for name, a in zip(names, asked, strict=True):
                got, blank = grads.get(name), [None] * len(pytree.tree_leaves(a))
                leaves += blank if got is None else pytree.tree_leaves(got)
            return tuple(leaves)

    Balanced.__name__ = Balanced.__qualname__ = f"Balanced_{form.label}"
    return Balanced.apply


def _outputs(ctx: Any, output: Any, extras: int) -> tuple[Any, ...]:
    """The result and the extras, which have no gradient."""
    if not extras:
        return (output,)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # otherwise autograd allocates zeros as the gradient of each
    return tuple(output)


def _custom_op(form: _Form, run: Callable[..., Any]) -> Any:
    save, pull, extras = _saver(form), _puller(form), len(form.extras)
    schema = str(form.op._schema)
    arguments, returns = schema[schema.index("(") :].split(" -> ")
    if extras:
        returns = f"({', '.join([returns, *['Tensor'] * extras])})"
    custom = register(f"{form.label}{arguments} -> {returns}", run)
    names, keyword, _ = signature(form.op)
    positional = names[: len(names) - len(keyword)]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any, keyword_only_inputs: Any = None) -> None:
        values = (*inputs, *((keyword_only_inputs or {}).get(k) for k in keyword))
        save(ctx, (*values, *_outputs(ctx, output, extras), None), True)

    def backward(ctx: Any, *g: Any) -> Any:
        wanted = dict(zip(positional, ctx.needs_input_grad, strict=False))
        needs = frozenset(k for k, w in wanted.items() if (any(w) if isinstance(w, list) else w))
        grads = {} if g[0] is None else pull(ctx, g[: len(g) - extras], needs)
        return tuple(grads.get(n) for n in positional)

    torch.library.register_autograd(custom, backward, setup_context=setup, lib=LIBRARY)
    return custom
