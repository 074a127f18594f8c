"""Two readings of the gradient at the pixels, as methods of an evaluation. They test a guess of
``docs/results.md``: that the sign of a gradient, summed over channels, is no share of the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Scalar = Callable[[Any], torch.Tensor]


def gradient_sum(module: torch.nn.Module, inputs: torch.Tensor, scalar: Scalar) -> torch.Tensor:
    """The gradient (B, C, H, W), summed over channels: (B, H, W), signed."""
    return _gradient(module, inputs, scalar).sum(1)


def gradient_norm(module: torch.nn.Module, inputs: torch.Tensor, scalar: Scalar) -> torch.Tensor:
    """Its norm over channels: (B, H, W), not negative."""
    return _gradient(module, inputs, scalar).norm(dim=1)


def _gradient(module: torch.nn.Module, inputs: torch.Tensor, scalar: Scalar) -> torch.Tensor:
    x = inputs.detach().requires_grad_()
    return torch.autograd.grad(scalar(module(x)).sum(), x)[0]
