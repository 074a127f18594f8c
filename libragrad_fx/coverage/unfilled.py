"""Builds models without drawing their random weights: 7 billion parameters take no memory."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_LARGE = 1 << 16


class unfilled(TorchDispatchMode):
    """Skips filling large tensors with random numbers, and later writes into these tensors.

    The system allots no memory that is never written, so a model of any size can be built, captured and
    analysed. Its numbers mean nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.skipped: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rpartition(".")[0]
        if name.endswith("_") and args and isinstance(args[0], torch.Tensor):
            key = args[0].untyped_storage()._cdata
            draws = torch.Tag.nondeterministic_seeded in func.tags
            if key in self.skipped or (draws and args[0].numel() > _LARGE):
                self.skipped.add(key)
                return args[0]
        return func(*args, **(kwargs or {}))
