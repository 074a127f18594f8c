"""Backward steps that a GPU does in one kernel, as ops that a tracer sees.

Each op has a form in PyTorch's own ops, its reference: compilers fuse that, exported files hold it, and
devices without Triton run it. On an NVIDIA GPU the op is one Triton kernel (``launch``). When a device is
first used, each kernel runs there on samples, beside its reference in float64. If one fails, none is used,
and a warning says why.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from libragrad_fx.target import inexact

NAMESPACE = "libragrad_fx"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
PLAIN: dict[Any, Callable[..., torch.Tensor]] = {}
"""Each op, and its form in PyTorch's ops."""
Trial = Callable[[torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]]
TRIALS: list[Trial] = []
"""What a kernel gives on a device, and what it should."""
_NEAR = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
"""How far a kernel may be from its reference, of the largest value."""


def register(
    schema: str, run: Callable[..., Any], shapes: Callable[..., Any] | None = None
) -> torch._ops.OpOverload:  # fmt: skip
    """An op of this package. run: on every device; shapes: what a tracer sees, ``run`` too by default."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", shapes or run, lib=LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default  # type: ignore[no-any-return]


def kernel(
    schema: str, plain: Callable[..., torch.Tensor], shape: Callable[..., torch.Tensor],
    samples: Callable[[torch.Tensor], list[tuple[Any, ...]]],
    cpu: Callable[..., torch.Tensor] | None = None,
) -> Any:  # fmt: skip
    """Register an op.

    Args:
        schema: its name and arguments; the function of ``launch`` of this name is its kernel.
        plain: the same in PyTorch's ops.
        shape: an empty result, of the arguments.
        samples: arguments to try the kernel with, made of a tensor (2, 4, 32, 16).
        cpu: what runs on other devices, if not ``plain``.
    """
    op, name = register(schema, cpu or plain, shape), schema.partition("(")[0]

    def launched(*args: Any) -> torch.Tensor:
        from libragrad_fx.kernels import launch  # Triton, and only where there is a GPU

        run = getattr(launch, name) if on_gpu(args[0]) else plain
        found: torch.Tensor = run(*args)
        return found

    def trial(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        from libragrad_fx.kernels import launch

        given = samples(some(device, dtype))
        wide = [[t.double() if inexact(t) else t for t in args] for args in given]
        found = [getattr(launch, name)(*args).double().flatten() for args in given]
        return torch.cat(found), torch.cat([plain(*args).flatten() for args in wide])

    if _triton():
        LIBRARY.impl(name, launched, "CUDA")
    PLAIN[op] = plain
    TRIALS.append(trial)
    return op


def some(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(2, 4, 32, 16), numbers between -1 and 1."""
    return torch.arange(2 * 4 * 32 * 16, device=device).mul(0.7).sin().view(2, 4, 32, 16).to(dtype)


def on_gpu(x: torch.Tensor) -> bool:
    """Whether there are kernels for a tensor of this device and dtype."""
    if not (x.is_cuda and x.dtype in _NEAR and _triton()):
        return False
    device = x.device.index if x.device.index is not None else torch.cuda.current_device()
    return _is_recent(device) and works(torch.device("cuda", device), x.dtype)


@functools.cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether each kernel gives what it should on a device."""
    return passes(TRIALS, device, dtype, "its kernels")


def passes(trials: Sequence[Trial], device: torch.device, dtype: torch.dtype, what: str) -> bool:
    """Whether trials give what they should; a warning says why not."""
    why = next(filter(None, (_tried(trial, device, dtype) for trial in trials)), "")
    if why:
        warnings.warn(f"libragrad_fx runs without {what} for {device} and {dtype}: {why}", stacklevel=2)
    return not why


def _tried(trial: Trial, device: torch.device, dtype: torch.dtype) -> str:
    """Why a kernel is not to be used; empty if it works."""
    try:
        with _disable_current_modes(), torch.no_grad(), torch.autocast(device.type, enabled=False):
            found, want = (t.double() for t in trial(device, dtype))
            far = float((found - want).abs().max() / want.abs().max())
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # whatever a compiler, a driver or a device says
        return f"{type(e).__name__}: {e}"
    return "" if far <= _NEAR[dtype] else f"a kernel is {far:.1g} of its largest value away"


@functools.cache
def _is_recent(device: int) -> bool:
    """Ampere or later: their matrix units have the dtypes that the kernels multiply."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _triton() -> bool:
    return torch.version.cuda is not None and importlib.util.find_spec("triton") is not None
