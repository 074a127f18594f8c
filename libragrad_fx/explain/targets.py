"""Targets as people mean them: the model's own answer, one answer against another; and their names."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from libragrad_fx.attribution import Attribution
from libragrad_fx.errors import InputError
from libragrad_fx.explain.inputs import Batch
from libragrad_fx.models import label_of
from libragrad_fx.target import Target, first_tensor, select_each


@dataclasses.dataclass(frozen=True)
class Contrast:
    """The number of one target less that of another, sample by sample."""

    target: Target
    against: Target

    def __call__(self, output: Any) -> torch.Tensor:
        return select_each(output, self.target) - select_each(output, self.against)

    @property
    def __name__(self) -> str:
        return f"{self.target} against {self.against}"


def contrast(target: Target, against: Target) -> Contrast:
    """Raises ``InputError`` without a target: the model's own answer is not known before it answers."""
    if target is None:
        raise InputError("against needs a target to compare with: target=3, against=5")
    return Contrast(target, against)


def own_answers(model: Any, batch: Batch, output: Any, count: int) -> list[Target]:
    """The ``count`` largest answers of each sample: of a classifier (B, K) its classes, of a language model
    (B, T, vocabulary) on texts the next tokens. [None] for one number a sample.

    Raises:
        InputError: the output has more dimensions, or fewer entries.
    """
    if count == 0:
        return []
    y = first_tensor(output)
    if y.ndim == 0 or y.numel() == y.shape[0]:
        return [None] * count
    rows: list[tuple[int, ...]] = [()] * y.shape[0]
    if y.ndim == 3 and batch.last is not None and y.shape[2] == batch.vocabulary:
        rows = [(i,) for i in batch.last]
        y = torch.stack([y[(b, *row)] for b, row in enumerate(rows)])
    if y.ndim != 2:
        raise InputError(f"the output has shape {tuple(y.shape)}: say which target to explain")
    if count > y.shape[1]:
        raise InputError(f"the output has {y.shape[1]} entries: there are no {count} largest")
    if bool(y.isnan().any()):
        raise InputError("the model answers nan: there is nothing to explain")
    best = y.topk(count, 1).indices.T.tolist()
    return [[(*row, k) for row, k in zip(rows, ks, strict=True)] for ks in best]


def named(model: Any, batch: Batch, found: Attribution) -> Attribution:
    """With what is known about the batch: the pieces of its texts, and the names of its targets."""
    labels = tuple(_label(model, batch, t) for t in found.target)
    return dataclasses.replace(found, tokens=batch.tokens, labels=labels)


def _label(model: Any, batch: Batch, target: Any) -> str:
    index = target[-1] if isinstance(target, tuple) and target else target
    if isinstance(index, bool) or not isinstance(index, int):
        return ""
    if isinstance(target, tuple) and len(target) == 2 and batch.piece is not None:
        return batch.piece(index)
    return label_of(model, index)
