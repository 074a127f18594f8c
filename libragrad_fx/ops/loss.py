"""Losses of logits, as Hugging Face models return them when they are given labels.

Cross entropy is linear in the log-probabilities, ``log_softmax(x) = x - logsumexp(x)``; the logsumexp is
held, as by the twin of ``log_softmax``. Binary cross entropy is a function of each logit: its secant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from libragrad_fx.ops.activation import secant_slope
from libragrad_fx.ops.twin import Grads, twin

aten = torch.ops.aten
_NONE, _MEAN = 0, 1


def of_log_probabilities(
    p: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, reduction: int, ignore_index: int,
    label_smoothing: float,
) -> torch.Tensor:  # fmt: skip
    """Cross entropy as a linear function of log-probabilities (N, C, ...), as PyTorch defines it."""
    axis = 1 if p.ndim > 1 else 0
    each = p if weight is None else p * weight.view(-1, *[1] * (p.ndim - axis - 1))
    count = p.shape[axis]
    if target.is_floating_point():  # a distribution for each sample
        smoothed = target * (1 - label_smoothing) + label_smoothing / count
        loss, total = -(each * smoothed).sum(axis), max(p.numel() // count, 1)
    else:
        kept = target != ignore_index
        one = F.nll_loss(p, target, weight, ignore_index=ignore_index, reduction="none")
        loss = (1 - label_smoothing) * one
        loss = loss - torch.where(kept, each.sum(axis), 0.0) * (label_smoothing / count)
        weights = torch.ones_like(loss) if weight is None else weight[target.where(kept, 0)]
        total = (weights * kept).sum()
    if reduction == _NONE:
        return loss
    return loss.sum() / total if reduction == _MEAN else loss.sum()


def _cross_entropy(
    needs: frozenset[str], g: torch.Tensor, *, self: torch.Tensor, target: torch.Tensor,
    weight: torch.Tensor | None, **how: Any,
) -> Grads:  # fmt: skip
    return {"self": torch.func.vjp(lambda p: of_log_probabilities(p, target, weight, **how), self)[1](g)[0]}


def _binary(
    needs: frozenset[str], g: torch.Tensor, *, self: torch.Tensor, target: torch.Tensor,
    weight: torch.Tensor | None, pos_weight: torch.Tensor | None, reduction: int,
) -> Grads:  # fmt: skip
    def each(x: torch.Tensor) -> torch.Tensor:
        return aten.binary_cross_entropy_with_logits.default(x, target, weight, pos_weight, _NONE)

    factor = 1.0 if pos_weight is None else 1 + (pos_weight - 1) * target
    limit = (1 - target - factor / 2) * (1.0 if weight is None else weight)
    slope = secant_slope(self, each(self), each(torch.zeros_like(self)), limit)
    return {"self": slope * g / (self.numel() if reduction == _MEAN else 1)}


cross_entropy_loss = twin(
    aten.cross_entropy_loss.default, _cross_entropy, saves=("self", "target", "weight")
)
binary_cross_entropy_with_logits = twin(
    aten.binary_cross_entropy_with_logits.default, _binary,
    saves=("self", "target", "weight", "pos_weight"),
)  # fmt: skip
