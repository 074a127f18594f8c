"""A program leaves Python, or at least this package: files that PyTorch loads by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from libragrad_fx.errors import InputError
from libragrad_fx.extras import writing
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.ops.attention import additive, attention_value, repeated, summed
from libragrad_fx.optimise.execute import attribute
from libragrad_fx.programs.flat import Flat

Tensor = torch.Tensor


def value_gradient(
    g: torch.Tensor, query: torch.Tensor, key: torch.Tensor, attn_mask: torch.Tensor | None,
    lse: torch.Tensor, is_causal: bool, scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """dV, written out in plain ops on all query rows at once, for those who have only PyTorch's."""
    heads, wide = query.shape[1] // key.shape[1], lse.dtype
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query.to(wide) @ repeated(key, heads).to(wide).transpose(-2, -1) * scale
    mask = additive(attn_mask, lse)
    if mask is not None:
        scores = scores + mask
    if is_causal:
        rows = torch.arange(query.shape[2], device=g.device)[:, None]
        scores = scores.masked_fill(rows < torch.arange(key.shape[2], device=g.device), -math.inf)
    p = torch.exp(scores - lse.masked_fill(lse == -math.inf, math.inf)[..., None])
    return summed(p.transpose(-2, -1) @ g.to(wide), heads)


class _Plain(torch.fx.Interpreter):
    """Runs a graph with our ops as what they are made of, so that only PyTorch's remain."""

    def call_function(self, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        plain: Any = _MADE_OF.get(target, target)
        return super().call_function(plain, args, kwargs)


_MADE_OF = {attention_value: value_gradient}


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
            return tuple(_Plain(self.made.graph).run(*state, *given))


def exported(
    made: Flat, module: CapturedModule, tensors: Sequence[Tensor], free: Mapping[int, set[int]]
) -> torch.export.ExportedProgram:
    """The program as ``torch.export`` knows it, for any batch of more than one where that is free."""
    batch, given = Dim("batch", min=2), [*tensors]
    serves = {} if made.batch else free
    dims = [{a: batch for a in serves.get(id(t), ()) if t.shape[a] > 1} for t in tensors]
    if made.indexed:
        given.append(made.index(None, tuple(tensors)))
        dims.append({0: batch} if any(dims) else {})
    shapes = (tuple(dims),)
    return torch.export.export(Standalone(made, module).eval(), tuple(given), dynamic_shapes=shapes)


def save(
    path: Path, made: Flat, module: CapturedModule, tensors: Sequence[Tensor], free: Mapping[int, set[int]]
) -> Path:
    if path.suffix != ".pt2":
        raise InputError(f"a program is saved as .pt2, got {path.name!r}")
    with writing(path):
        torch.export.save(exported(made, module, tensors, free), path)
    return path
