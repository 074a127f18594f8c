"""The product of two values; each gets half of its gradient (method: the product rule)."""

from __future__ import annotations

import torch
from torch.fx import Node

from libragrad_fx.ops.twin import Grads, twin

aten = torch.ops.aten


def _halved(needs: frozenset[str], g: torch.Tensor, *, self: torch.Tensor, other: torch.Tensor) -> Grads:
    nothing = g.new_zeros(())  # addcmul(0, g, b) computes g b / 2 in one pass

    def half(of: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        dx = torch.addcmul(nothing, g, by, value=0.5)
        return dx if dx.shape == of.shape else dx.sum_to_size(of.shape)

    return {
        "self": half(self, other) if "self" in needs else None,
        "other": half(other, self) if "other" in needs else None,
    }


halved_mul = twin(aten.mul.Tensor, _halved, saves=("self", "other"), name="halved_mul")
halved_mul.__module__ = __name__  # where a pickle finds it


def is_real_product(node: Node) -> bool:
    """Whether a node is the elementwise product of two real values."""
    return node.target is aten.mul.Tensor and not node.meta["val"].is_complex()
