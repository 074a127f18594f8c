"""The backward of a norm, and of GELU with its gate held: one pass each."""

from __future__ import annotations

import math

import torch

from libragrad_fx.kernels import kernel


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _norm_gradient(
    g: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor, centred: bool
) -> torch.Tensor:
    u = wide(g) if weight is None else wide(g) * weight
    if centred:
        u = u - u.mean(-1, keepdim=True)
    return (u * rstd).to(g.dtype)


norm_gradient = kernel(
    "norm_gradient(Tensor g, Tensor? weight, Tensor rstd, bool centred) -> Tensor",
    _norm_gradient, lambda g, *_: g.new_empty(g.shape),
    lambda x: [(x, x[0, 0, 0] + 2, wide(x[..., :1]) + 2, centred) for centred in (True, False)],
)  # fmt: skip
"""The gradient of the input of a norm over the last axis, from rstd (..., 1)."""


def _gelu_gate(g: torch.Tensor, x: torch.Tensor, approximate: str) -> torch.Tensor:
    at = wide(x)
    if approximate == "tanh":
        gate = torch.sigmoid(math.sqrt(8 / math.pi) * (at + 0.044715 * at**3))
    else:
        gate = 0.5 + 0.5 * torch.erf(at * math.sqrt(0.5))
    return (g * gate).to(x.dtype)


gelu_gate = kernel(
    "gelu_gate(Tensor g, Tensor x, str approximate) -> Tensor",
    _gelu_gate,
    lambda g, x, _: torch.empty_like(x),
    lambda x: [(x, 3 * x.flip(-1), how) for how in ("none", "tanh")],
)
"""g times the gate of GELU, gelu(x) / x."""
