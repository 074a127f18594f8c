"""Backward steps that a GPU does in one kernel, as ops that a tracer sees.

Each op has a form in PyTorch's own ops, its reference: compilers fuse that, exported files hold it, and
devices without Triton run it. On an NVIDIA GPU the op is one Triton kernel (``launch``).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "libragrad_fx"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
PLAIN: dict[Any, Callable[..., torch.Tensor]] = {}
"""Each op, and its form in PyTorch's ops."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def kernel(
    schema: str, plain: Callable[..., torch.Tensor], shape: Callable[..., torch.Tensor],
    cpu: Callable[..., torch.Tensor] | None = None,
) -> Any:  # fmt: skip
    """Register an op.

    Args:
        schema: its name and arguments; the function of ``launch`` of this name is its kernel.
        plain: the same in PyTorch's ops.
        shape: an empty result, of the arguments.
        cpu: what runs on other devices, if not ``plain``.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)

    def launched(*args: Any) -> torch.Tensor:
        from libragrad_fx.kernels import launch  # Triton, and only where there is a GPU

        found: torch.Tensor = getattr(launch, name)(*args)
        return found

    LIBRARY.impl(name, cpu or plain, "CompositeExplicitAutograd")
    if _triton():
        LIBRARY.impl(name, launched, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", shape, lib=LIBRARY)
    op = getattr(torch.ops.libragrad_fx, name).default
    PLAIN[op] = plain
    return op


def on_gpu(x: torch.Tensor) -> bool:
    """Whether there are kernels for a tensor of this device and dtype."""
    return x.is_cuda and x.dtype in _DTYPES and _triton() and _is_recent(x.device.index or 0)


@functools.cache
def _is_recent(device: int) -> bool:
    """Ampere or later: their matrix units have the dtypes that the kernels multiply."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _triton() -> bool:
    return torch.version.cuda is not None and importlib.util.find_spec("triton") is not None
