"""Keeps the number of samples free while a program is traced, where PyTorch reads it without need."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten
EXACT = "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"
RESIZING = (
    *EXACT, "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)  # fmt: skip
"""Ops that resize a picture; each has a gradient of the same name and ``_backward``."""
_RESIZES = {getattr(aten, name) for name in RESIZING}
_GRADIENTS = {getattr(aten, f"{name}_backward").default for name in RESIZING}
_CONVOLUTIONS = aten.convolution.default, aten.convolution_backward.default
_FORMATS = torch.contiguous_format, torch.channels_last, torch.channels_last_3d


class Fakes(FakeTensorMode):
    """Fake tensors, of any batch also behind a convolution, and in the backward of what resizes a picture.

    For the strides of a convolution's result, PyTorch asks which kernel would run. Some run for less than
    16 samples only; their strides are the same. Of a resized picture's gradient it has the shape in C++,
    where sizes are numbers.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As it is, those two without a guard on sizes."""
        if func in _GRADIENTS:
            return self._resized(func, *args)
        with _unguarded(self.shape_env) if func in _CONVOLUTIONS else contextlib.nullcontext():
            return super().__torch_dispatch__(func, types, args, kwargs)

    def _resized(
        self, func: Any, gradient: torch.Tensor, size: Any, shape: Any, *rest: Any
    ) -> torch.Tensor:
        """The gradient of a picture of this shape (B, C, ...), which was resized."""
        with _unguarded(self.shape_env):
            sizes, strides = ([*map(int, x)] for x in (gradient.shape, gradient.stride()))
            like = torch.empty_strided(sizes, strides, dtype=gradient.dtype, device="meta")
            found = func(like, size, [*map(int, shape)], *rest)
        form = next(f for f in _FORMATS if found.is_contiguous(memory_format=f))
        with self:
            return torch.empty(shape, dtype=found.dtype, device=gradient.device, memory_format=form)


class _Resizing(TorchFunctionMode):
    """An op that resizes a picture stays this op. PyTorch's Python kernels make it of other ops, which
    round otherwise. Its C++ reads all sizes, but uses only those of the picture."""

    def __init__(self, sizes: ShapeEnv) -> None:
        super().__init__()
        self._sizes = sizes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As it is, what resizes without Python kernels, and without a guard on sizes."""
        if getattr(func, "overloadpacket", None) not in _RESIZES:
            return func(*args, **kwargs or {})
        with _unguarded(self._sizes), torch._C._DisablePythonDispatcher():
            return func(*args, **kwargs or {})


def _unguarded(sizes: Any) -> Any:
    return sizes.suppress_guards()


@contextlib.contextmanager
def shapes(sizes: ShapeEnv, python: bool) -> Iterator[None]:
    """How a trace finds the shapes of results.

    Args:
        python: by PyTorch's Python kernels. More of these leave a size free; some are made of other ops,
            which round otherwise.
    """
    with _Resizing(sizes), enable_python_dispatcher() if python else contextlib.nullcontext():
        yield
