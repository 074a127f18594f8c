"""A program leaves Python, or at least this package: files that PyTorch loads by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.export import Dim

from libragrad_fx.errors import InputError
from libragrad_fx.extras import writing
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.optimise.execute import attribute
from libragrad_fx.programs.flat import Axes, Flat
from libragrad_fx.programs.modes import Plain

Tensor = torch.Tensor


class Standalone(torch.nn.Module):
    """A flat graph and its tensors as a module: called as ``(*inputs, target)``."""

    def __init__(self, made: Flat, module: CapturedModule) -> None:
        super().__init__()
        self.made, self.count = made, len(made.paths)
        for i, path in enumerate(made.paths):
            self.register_buffer(f"t{i}", attribute(module, path).detach())

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        state = [self.get_buffer(f"t{i}") for i in range(self.count)]
        with torch.no_grad():
            return tuple(Plain(self.made.graph).run(*state, *given))


def exported(
    made: Flat, module: CapturedModule, tensors: Sequence[Tensor], free: Sequence[Axes]
) -> torch.export.ExportedProgram:
    """The program as ``torch.export`` knows it, for any batch of more than one where that is free."""
    batch, given = Dim("batch", min=2), [*tensors]
    serves = [()] * len(given) if made.batch or not free else free
    dims = [dict.fromkeys((a for a in axes if t.shape[a] > 1), batch)
            for t, axes in zip(given, serves, strict=True)]  # fmt: skip
    if made.indexed:
        given.append(made.index(None, tuple(tensors)))
        dims.append({0: batch} if any(dims) else {})
    shapes = (tuple(dims),)
    return torch.export.export(Standalone(made, module).eval(), tuple(given), dynamic_shapes=shapes)


def save(
    path: Path, made: Flat, module: CapturedModule, tensors: Sequence[Tensor], free: Sequence[Axes]
) -> Path:
    if path.suffix != ".pt2":
        raise InputError(f"a program is saved as .pt2, got {path.name!r}")
    with writing(path):
        torch.export.save(exported(made, module, tensors, free), path)
    return path
