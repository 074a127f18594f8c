"""Inputs and targets as users give them: from an output and a target to one number per sample."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from libragrad_fx.errors import InputError

Target = Any


def described(value: Any) -> str:
    """The tensors of a structure: ``float32 (2, 3, 32, 32), int64 (2, 8)``."""
    found = [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
    sizes = ("nested" if t.is_nested else tuple(t.shape) for t in found)
    return ", ".join(f"{t.dtype} {s}".removeprefix("torch.") for t, s in zip(found, sizes, strict=True))


def select(output: Any, target: Target) -> torch.Tensor:
    """The scalar to differentiate: the sum over the batch of each sample's target."""
    return select_each(output, target).sum()


def select_each(output: Any, target: Target) -> torch.Tensor:
    """The numbers to explain, one per sample: (B,).

    Args:
        output: a tensor (B, ...), or a structure whose first floating-point tensor is taken (the
            field ``logits`` where there is one).
        target: as in Captum: an int, a tuple (for outputs of more dimensions), a 0-d or 1-d tensor
            or list with one entry a sample, a list of tuples; None for outputs of shape (B,) or
            (B, 1); a callable from the whole output to scalars; or a list of callables, one a sample,
            each from its sample's output to a number (the targets of pytorch-grad-cam). A sample's output
            is its part of the tensor above, or its mapping where the model returns a list of these.

    Raises:
        InputError: the target does not fit the output.
    """
    if callable(target):
        return _called(output, target)
    if isinstance(target, list) and target and all(map(callable, target)):
        return _called_each(output, target)
    y = first_tensor(output)
    if not y.is_floating_point():
        raise InputError(
            f"the output is {y.dtype}: only a real number can be explained, by a target callable that"
            " makes one of it (of a complex output its abs, or a part)"
        )
    batch = y.shape[0] if y.ndim else 1
    if batch == 0:
        raise InputError("the batch is empty: there is nothing to explain")
    if target is None:
        if y.numel() != batch:
            raise InputError(f"the output has shape {tuple(y.shape)}: say which target to explain")
        return y.reshape(batch)
    if y.ndim == 0:
        raise InputError("the output is one number: its target is None")
    return torch.stack([y[(i, *row)] for i, row in enumerate(rows_of(target, tuple(y.shape)))])


def rows_of(target: Any, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The indices of each sample's target in an output of ``shape``, behind the batch axis.

    Raises:
        InputError: the target does not fit.
    """
    try:
        return _rows(target, shape)
    except (IndexError, TypeError, OverflowError) as e:
        raise InputError(f"target {target!r:.200} does not fit output {shape}: {e}") from e


def _called(output: Any, target: Any) -> torch.Tensor:
    """The callable's result, if it is a tensor of numbers with a gradient."""
    chosen = target(output)
    if not isinstance(chosen, torch.Tensor) or not chosen.is_floating_point():
        what = chosen.dtype if isinstance(chosen, torch.Tensor) else type(chosen).__name__
        raise InputError(f"the target callable must return a floating-point tensor, got {what}")
    if chosen.numel() == 0:
        raise InputError("the target callable returned nothing to explain: an empty tensor")
    leaves = (t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor))
    if not chosen.requires_grad and any(t.requires_grad for t in leaves):
        raise InputError("what the target callable returned has no gradient to the model's output")
    return chosen.reshape(-1)


def _called_each(output: Any, targets: list[Any]) -> torch.Tensor:
    """The number that each callable gives for its sample."""
    detected = isinstance(output, list) and all(isinstance(entry, Mapping) for entry in output)
    samples = output if detected else torch.atleast_1d(first_tensor(output))
    if len(samples) != len(targets):
        raise InputError(f"{len(targets)} target callables for a batch of {len(samples)}")
    found = [_called(sample, target) for sample, target in zip(samples, targets, strict=True)]
    if more := next((len(each) for each in found if len(each) > 1), None):
        raise InputError(f"of a list of target callables each gives one number for its sample; got {more}")
    return torch.cat(found)


def _rows(target: Any, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The indices of each sample's target, behind the batch axis."""
    if isinstance(target, torch.Tensor) and target.is_meta:
        raise TypeError("it is on meta and holds no numbers")
    if isinstance(target, (torch.Tensor, np.ndarray)):
        target = target.tolist()
    if isinstance(target, tuple) or hasattr(target, "__index__"):
        target = [target] * shape[0]
    if not isinstance(target, list):
        raise TypeError("give an int, a tuple, or a list or tensor with one entry a sample")
    if len(target) != shape[0]:
        raise IndexError(f"{len(target)} targets for a batch of {shape[0]}")
    rows = [tuple(t) if isinstance(t, (tuple, list)) else (t,) for t in target]
    for row in rows:
        if len(row) != len(shape) - 1:
            raise IndexError(f"need {len(shape) - 1} indices a sample")
        for index, size in zip(row, shape[1:], strict=True):
            if isinstance(index, bool) or not hasattr(index, "__index__"):
                raise TypeError(f"{index!r} is no index")
            if not -size <= operator.index(index) < size:
                raise IndexError(f"index {index} is out of range for {size} entries")
    return [tuple(map(operator.index, row)) for row in rows]


def first_tensor(output: Any) -> torch.Tensor:
    """The tensor of an output structure that is explained: ``logits``, else the first float leaf."""
    if isinstance(output, torch.Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    leaves = pytree.tree_leaves(output)
    for t in leaves:
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            return t
    raise InputError(f"the output ({type(output).__name__}) holds no floating-point tensor to explain")


def largest(output: Any) -> Target:
    """The largest entry of each sample's output, as a target; None if there is one number per sample.

    Raises:
        InputError: the output is on meta.
    """
    y = first_tensor(output)
    if y.is_meta:
        raise InputError("the model is on meta: it has no weights to explain")
    if y.ndim == 0 or y.numel() == y.shape[0] or not y.is_floating_point():
        return None
    places = y.flatten(1).argmax(1)
    return [tuple(int(i[0]) for i in torch.unravel_index(p[None], y.shape[1:])) for p in places]


def middle(output: Any) -> torch.Tensor:
    """(B,): the entry in the middle of each sample's output, whatever its shape."""
    y = first_tensor(output)
    y = y.reshape(y.shape[0], -1)
    return y[:, y.shape[1] // 2]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Inputs of a call with both kinds of arguments."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as (args, kwargs); tensors made in inference mode are copied, to be differentiable."""
    if isinstance(inputs, Arguments):
        return as_call(inputs.args)[0], as_call(inputs.kwargs)[1]
    if any(isinstance(t, torch.Tensor) and t.is_inference() for t in pytree.tree_leaves(inputs)):
        inputs = pytree.tree_map_only(torch.Tensor, lambda t: t.clone() if t.is_inference() else t, inputs)
    if isinstance(inputs, Mapping):
        if odd := [k for k in inputs if not isinstance(k, str)]:
            raise InputError(f"keyword arguments are named by text, not {odd[0]!r}")
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def inexact(x: Any) -> bool:
    """Whether ``x`` is a tensor of a dtype that has gradients: floating point or complex."""
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())


def moving(x: Any) -> Any:
    """A copy of ``x`` as a leaf that requires grad; ``x`` itself if it can have no gradient."""
    return x.detach().clone().requires_grad_() if inexact(x) else x


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a·b elementwise in float64. A complex number counts as its two parts, as in its gradient."""
    if a.is_complex() or b.is_complex():
        return (a.to(torch.complex128).conj() * b).real
    return a.double() * b.double()


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """⟨a, b⟩ accumulated in float64; an element without gradient counts 0, even if it is infinite."""
    products = product(a, b)
    total = float(products.sum())
    if math.isnan(total):  # a pool's padding of -inf, a mask: inf times 0
        total = float(products.masked_fill_((a == 0) | (b == 0), 0.0).sum())
    return total


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Grad mode on and inference mode off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """The casts of a surrounding autocast are not the model's."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def undisturbed(module: torch.nn.Module) -> Iterator[None]:
    """Restore afterwards the buffers that a forward writes (statistics, counters) and the random state."""
    kept = [(b, b.detach().clone()) for b in module.buffers() if not b.is_inference()]
    devices = {b.device.index for b in module.buffers() if b.is_cuda}
    devices |= {p.device.index for p in module.parameters() if p.is_cuda}
    with torch.random.fork_rng(list(devices)):
        try:
            yield
        finally:
            for buffer, before in kept:
                buffer.data.copy_(before)  # ``.data``: batch norm's kernel bumps no version either
