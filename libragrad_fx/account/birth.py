"""The check at birth: ``transform`` compares its result with the original before it returns it.

The original runs twice before it is traced. That fills its caches with real tensors, gives the reference,
and shows what a graph cannot hold (state that a forward leaves behind, Python's random numbers). The
result then runs twice on the same inputs and under the same seeds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from libragrad_fx.account.certificate import compare, rounding_of, tolerance_of
from libragrad_fx.account.ledger import ledger_and_forward
from libragrad_fx.capture.context import custom_functions
from libragrad_fx.capture.examples import without_cache
from libragrad_fx.capture.state import Snapshot, untouched
from libragrad_fx.errors import CaptureError, LibraGradError, VerificationError
from libragrad_fx.module.captured import CapturedModule, InGraphs
from libragrad_fx.module.variants import fits
from libragrad_fx.ops import insert
from libragrad_fx.target import Arguments, described, differentiable, inexact, moving, undisturbed


@dataclasses.dataclass(frozen=True)
class Reference:
    """The original's answer to the example.

    outputs:        the leaves of the first call and of the second
    differentiable: which of these required a gradient
    unfit:          why no graph can replace the model, or None
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Sequence[Any], Sequence[Any]]
    differentiable: Sequence[bool]
    unfit: str | None


def reference(model: torch.nn.Module, args: Any, kwargs: Any) -> Reference | None:
    """Run ``model`` twice as its user calls it; None if it has meta or fake tensors.

    Raises:
        CaptureError: the model fails on these inputs.
    """
    tensors = [*model.parameters(), *model.buffers(), *pytree.tree_leaves((args, kwargs))]
    if any(isinstance(t, torch.Tensor) and (t.is_meta or isinstance(t, FakeTensor)) for t in tensors):
        return None
    kwargs, _ = without_cache(model, dict(kwargs))
    try:
        drawn: list[str] = []
        first = _run(model, args, kwargs, drawn)
        between = Snapshot(model)
        second = _run(model, args, kwargs)
    except Exception as e:
        given = described((args, kwargs)) or "no tensor"
        raise CaptureError(
            f"{type(model).__name__} itself fails on the example inputs ({given}): {type(e).__name__}: {e}"
        ) from e
    unfit = None
    if state := _read(model, between.changes(), args, kwargs):
        unfit = f"each forward changes {', '.join(state[:4])}, and a graph would keep what it is now"
    elif drawn:
        unfit = f"it draws random numbers from {' and '.join(drawn)}, and a graph would keep one draw"
    elif (found := _difference(first, second)) is not None:
        unfit = f"it gives two answers for one input and one seed ({found})"
    flags = [isinstance(t, torch.Tensor) and t.requires_grad for t in first]
    kept = [*map(_detached, first)], [*map(_detached, second)]
    return Reference(tuple(args), dict(kwargs), kept, flags, unfit)


class _Watched(list[Any]):
    """A list that notes whether it was read, or changed other than by appending."""

    was_read = False


def _noting(name: str) -> Any:
    def method(self: _Watched, *args: Any) -> Any:
        self.was_read = True
        return getattr(list, name)(self, *args)

    return method


for _name in (
    "__getitem__", "__iter__", "__len__", "__contains__", "__eq__", "__add__", "__mul__",
    "__delitem__", "__setitem__", "pop", "index", "count", "copy", "clear", "remove",
):  # fmt: skip
    setattr(_Watched, _name, _noting(_name))


def _read(model: torch.nn.Module, changed: Sequence[str], args: Any, kwargs: Any) -> list[str]:
    """The changed attributes that are state: not those that a forward sets before it reads them, nor lists
    that it only appends to."""
    places = {
        f"{path}.{key}".lstrip("."): (vars(m), key)
        for path, m in model.named_modules()
        for key, value in vars(m).items()
        if type(value) is list
    }
    changed = [n for n in changed if not _is_overwritten(model, n, args, kwargs)]
    watched = {name: places[name] for name in changed if name in places}
    if not watched:
        return changed
    before = {name: holder[key] for name, (holder, key) in watched.items()}
    for holder, key in watched.values():
        holder[key] = _Watched(holder[key])
    try:
        _run(model, args, kwargs)
        idle = {n for n, (holder, key) in watched.items() if not getattr(holder[key], "was_read", True)}
    finally:
        for name, (holder, key) in watched.items():
            holder[key] = before[name]
    return [n for n in changed if n not in idle]


def _is_overwritten(model: torch.nn.Module, name: str, args: Any, kwargs: Any) -> bool:
    """Whether a forward sets an attribute before it reads it: it runs without it, and sets it."""
    path, _, key = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    for holder in (vars(module), module._buffers):
        if key in holder:
            kept = holder.pop(key)
            try:
                _run(model, args, kwargs)
            except Exception:  # it reads the attribute
                return False
            else:
                return key in holder
            finally:
                holder[key] = kept
    return False


def require_same(model: torch.nn.Module, module: torch.nn.Module, known: Reference) -> None:
    """Raise ``VerificationError`` unless ``module`` returns what the original returned, twice."""
    for time, wanted in zip(("first", "second"), known.outputs, strict=True):
        try:
            found = _run(module, known.args, known.kwargs)
        except LibraGradError:
            raise
        except Exception as e:
            raise VerificationError(
                f"the result fails where {type(model).__name__} does not: {type(e).__name__}: {e}"
            ) from e
        flags = [isinstance(t, torch.Tensor) and t.requires_grad for t in found]
        difference = _difference(wanted, found)
        if difference is not None:
            raise VerificationError(
                f"the {time} forward of the result is not that of {type(model).__name__}: {difference}."
                " Capture lost something that the model does"
                f"{f' ({known.unfit})' if known.unfit else ''}."
            )
        if flags != list(known.differentiable):
            lost = [i for i, (a, b) in enumerate(zip(known.differentiable, flags, strict=True)) if a > b]
            raise VerificationError(
                f"of {type(model).__name__}'s outputs, number {', '.join(map(str, lost or [0]))}"
                f" {'has lost its gradient' if lost else 'has a gradient that it should not have'}"
            )


def require_same_sizes(model: torch.nn.Module, module: CapturedModule, known: Reference) -> None:
    """As ``require_same``, for another length, and for a batch of one: if that differs, its guard refuses
    one."""
    _require_same_lengths(model, module, known)
    if not _same_for_one(model, module, known):
        _refuse_one(module)


def require_balanced(module: InGraphs, known: Reference) -> None:
    """Raise ``VerificationError`` unless the ledger of one backward adds up: input + bias = output."""
    made = [g.history for g in module.captured_graphs.values()]
    if any(h.plan.unbalanced or h.plan.unknown or h.gate_outputs for h in made):
        return  # it is known not to add up, or not for every output
    account, forward = ledger_and_forward(module, Arguments(known.args, known.kwargs), _everything)
    allowed = tolerance_of(forward.graphs.values(), known.args, known.kwargs, account)
    if forward.between or account.completeness_error <= allowed:
        return
    worst = account.worst(1)
    named = [f" The largest residual is {r.residual:.3g}, of {r.node} ({r.op})." for r in worst]
    raise VerificationError(
        f"the balanced backward does not close: output {account.output:.6g}, input {account.input:.6g}"
        f" and bias {account.bias:.6g} (error {account.completeness_error:.3g}, allowed {allowed:.3g})."
        f"{''.join(named)} Either a row says of its op what is not so for these inputs, or a part of the"
        " model hides its ops from the capture."
    )


def require_same_gradient(model: torch.nn.Module, plain: InGraphs, known: Reference) -> None:
    """Raise ``VerificationError`` unless autograd's gradient of the captured graphs is the model's own, for
    inputs, and for the embeddings that token ids index.

    A capture that cuts a path has the same forward, and a ledger that adds up. A user-written backward is
    not compared: the graph replaces it.
    """
    embeddings, custom = _embeddings(plain), list[str]()
    with undisturbed(model), untouched(model), custom_functions(custom):
        try:
            wanted = _gradients(model, known, embeddings)
        except Exception:  # its own backward fails, so there is nothing to compare with
            return
    if custom:
        return
    with plain.unchanged():
        found = _gradients(plain, known, embeddings)
    allowed = rounding_of(plain.captured_graphs.values(), known.args, known.kwargs)
    inputs = [f"input {i}" for i in range(len(wanted) - len(embeddings))]
    places = [*inputs, *(f"embedding {i}" for i in range(len(embeddings)))]
    for place, a, b in zip(places, wanted, found, strict=True):
        top, apart = _largest(a), _largest(a - b)
        if apart > allowed * top:
            raise VerificationError(
                f"the gradient of the captured graph is not that of {type(model).__name__}: at {place} it"
                f" is {apart:.3g} off, and {top:.3g} at most. Capture has lost or cut a path of the"
                " gradient; or the forward registers a hook on a tensor, which changes it"
            )


def _embeddings(plain: InGraphs) -> list[torch.Tensor]:
    """The float parameters of the ops at which the signal of token ids starts."""
    found: dict[int, torch.Tensor] = {}
    for graph in plain.captured_graphs.values():
        own = dict(graph.named_parameters(remove_duplicate=False))
        for node in graph.graph.nodes:
            if node.name in graph.record.starts:
                read = [own.get(str(a.target)) for a in node.all_input_nodes if a.op == "get_attr"]
                found |= {id(p): p for p in read if p is not None and inexact(p)}
    return [*found.values()]


def _gradients(
    module: torch.nn.Module, known: Reference, others: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Of all float inputs, then of ``others``; 0 where there is none."""
    flags = [t.requires_grad for t in others]
    with differentiable(), _seeded():
        call = pytree.tree_map(moving, (known.args, dict(known.kwargs)))
        leaves = [t for t in pytree.tree_leaves(call) if inexact(t)] + [*others]
        args, kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, call)
        try:
            for t in others:
                t.requires_grad_()
            total = _everything(module(*args, **kwargs))
            found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        finally:
            for t, flag in zip(others, flags, strict=True):
                t.requires_grad_(flag)
    return [g.to_dense() for g in found]


def _largest(t: torch.Tensor) -> float:
    return float(t.abs().nan_to_num(0.0, 0.0, 0.0).max()) if t.numel() else 0.0


def _everything(output: Any) -> Any:
    """A weighted sum of all differentiable outputs (the plain sum of a norm's output is 0)."""
    leaves = [t for t in pytree.tree_leaves(output) if inexact(t) and t.requires_grad]
    return sum(map(_weighted, leaves))


def _weighted(t: torch.Tensor) -> torch.Tensor:
    t = t.abs() if t.is_complex() else t
    weights = torch.arange(t.numel(), dtype=torch.float64, device=t.device).cos().view(t.shape)
    return (t.double() * weights).sum()


def _run(model: torch.nn.Module, args: Any, kwargs: Any, drawn: list[str] | None = None) -> list[Any]:
    """The leaves of a forward under grad mode, with fixed seeds and inputs that require grad.

    drawn: gets the names of the generators, other than PyTorch's, that the forward draws from
    """
    with undisturbed(model), differentiable(), _seeded(drawn):
        # copies, because a model may write into its arguments
        args, kwargs = pytree.tree_map(_given, (tuple(args), dict(kwargs)))
        return [*map(_plain, pytree.tree_leaves(model(*args, **kwargs)))]


def _given(x: Any) -> Any:
    return moving(x).clone() if isinstance(x, torch.Tensor) else x


def _plain(x: Any) -> Any:
    """A leaf of an output; for an object of another kind its type, as each call returns a new one."""
    if isinstance(
        x, (torch.Tensor, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
    ):
        return x
    return type(x)


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, torch.Tensor) else x


def _difference(a: Sequence[Any], b: Sequence[Any]) -> str | None:
    equal, distance, ulp = compare(a, b)
    if equal:
        return None
    i = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if not compare([x], [y])[0]), 0)
    texts = [_summary(x[i]) if i < len(x) else "nothing" for x in (a, b)]
    return f"{texts[0]} and {texts[1]}, {distance:.3g} apart at most, {ulp} ulp"


def _summary(x: Any) -> str:
    if not isinstance(x, torch.Tensor):
        return f"{x!r:.40}"
    norm = x.detach().abs().double().sum().item() if x.numel() and not x.is_complex() else 0.0
    return f"{tuple(x.shape)} with Σ|y| = {norm:.9g}"


@contextlib.contextmanager
def _seeded(drawn: list[str] | None = None) -> Iterator[None]:
    kept = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)  # ``undisturbed`` puts it back
    start = _generators()
    try:
        yield
        if drawn is not None:
            drawn += [name for name, state in _generators().items() if state != start[name]]
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])


def _generators() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {"random": random.getstate(), "numpy.random": (name, bytes(keys), *rest)}  # type: ignore[arg-type]


# --- other sizes: a batch of one, which export assumes not to occur, and other lengths


def _free_axes(module: CapturedModule, known: Reference) -> list[tuple[int, list[int]]]:
    """For each tensor among the leaves of a call: (its index, its free axes)."""
    guards = [n for n in module.graph.nodes if n.target is insert.guard]
    leaves = pytree.tree_leaves((known.args, dict(known.kwargs)))
    tensors = [i for i, t in enumerate(leaves) if isinstance(t, torch.Tensor)]
    if len(tensors) != len(guards):
        return []
    shapes: Any = [n.args[2] for n in guards]
    free = [[axis for axis, size in enumerate(shape) if isinstance(size, str)] for shape in shapes]
    return list(zip(tensors, free, strict=True))


def _resized(known: Reference, change: Callable[[int, torch.Tensor], torch.Tensor]) -> tuple[Any, Any]:
    leaves, spec = pytree.tree_flatten((known.args, dict(known.kwargs)))
    changed = [change(i, t) if isinstance(t, torch.Tensor) else t for i, t in enumerate(leaves)]
    return pytree.tree_unflatten(changed, spec)


def _same_for_one(model: torch.nn.Module, module: CapturedModule, known: Reference) -> bool:
    axes = dict(_free_axes(module, known))
    leaves = pytree.tree_leaves((known.args, dict(known.kwargs)))
    if all(len(leaves[i]) == 1 for i, free in axes.items() if 0 in free):
        return True  # no batch is free, or the example was a batch of one
    args, kwargs = _resized(known, lambda i, t: t[:1] if 0 in axes[i] else t)
    try:
        with untouched(model):
            wanted = _run(model, args, kwargs)
        return _difference(wanted, _run(module, args, kwargs)) is None
    except Exception:  # the model itself fails on one sample
        return False


def _require_same_lengths(model: torch.nn.Module, module: CapturedModule, known: Reference) -> None:
    """If more than the batch is free, raise ``VerificationError`` unless another size gives the same."""
    axes = {i: [a for a in free if a] for i, free in _free_axes(module, known)}
    if not any(axes.values()):
        return
    for change in (_halved, _doubled):
        args, kwargs = _resized(known, lambda i, t, by=change: by(t, axes[i]))
        if not fits(module, args, kwargs):
            continue
        try:
            with untouched(model):
                wanted = _run(model, args, kwargs)
        except Exception:  # the model does not take this size
            continue
        difference = _difference(wanted, _run(module, args, kwargs))
        if difference is None:
            return
        raise VerificationError(f"with another length it is not {type(model).__name__}: {difference}")
    raise VerificationError(f"{type(model).__name__} takes no other length to compare it for")


def _halved(t: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    for axis in axes:
        t = t.narrow(axis, 0, t.shape[axis] - t.shape[axis] // 2)
    return t


def _doubled(t: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    for axis in axes:
        t = torch.cat([t, t], axis)
    return t


def _refuse_one(module: CapturedModule) -> None:
    for graph in module.graphs():
        for node in graph.nodes:
            if node.target is insert.guard:
                node.args = (*node.args[:5], 2)
    lean = module.lean
    module.recompile()
    module._run_lean(lean)
