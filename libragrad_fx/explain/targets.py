"""Targets as people mean them: the model's own answer, a word, one answer against another, a likeness."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from libragrad_fx.attribution import Attribution
from libragrad_fx.attribution.similarity import unit
from libragrad_fx.errors import InputError, TargetWarning
from libragrad_fx.explain.inputs import Batch
from libragrad_fx.models import index_of, label_of
from libragrad_fx.target import (  # fmt: skip
    Target,
    differentiable,
    dot,
    first_tensor,
    inexact,
    moving,
    select_each,
)

_CURVED = 1e-2  # half precision rounds a sum of outputs by less


@dataclasses.dataclass(frozen=True)
class Against:
    """The number of one target less that of another, sample by sample."""

    target: Target
    other: Target

    def __call__(self, output: Any) -> torch.Tensor:
        return select_each(output, self.target) - select_each(output, self.other)


@dataclasses.dataclass(frozen=True)
class Span:
    """The logit of where an answer starts, and of where it ends, in the outputs ``start_logits`` and
    ``end_logits`` (B, T): for each sample the two tokens."""

    tokens: Sequence[tuple[int, int]]

    def __call__(self, output: Any) -> torch.Tensor:
        first, last = ([t[i] for t in self.tokens] for i in (0, 1))
        return select_each(output.start_logits, first) + select_each(output.end_logits, last)


@dataclasses.dataclass(frozen=True)
class Likeness:
    """``scale`` times the cosine between two vectors of the output, of which only the first is explained.

    Both are (B, D), and parts of the output: its fields, keys or indices. What the second is made of counts
    as constant: a product of two values would count the cosine twice. LibraGrad explains CLIP's pictures
    so, with a scale of 100.

    Args:
        of: the part that is explained (``"image_embeds"``, or of a plain tuple 0).
        to: the part that it is compared with (``"text_embeds"``).

    Raises:
        InputError: when it is called: no such part, or no vectors of one size.
    """

    of: str | int
    to: str | int
    scale: float = 100.0

    def __call__(self, output: Any) -> torch.Tensor:
        a, b = (_part(output, name) for name in (self.of, self.to))
        if a.ndim != 2 or a.shape != b.shape:
            raise InputError(
                f"a likeness is of vectors (B, D), two and two: {self.of} is {tuple(a.shape)},"
                f" {self.to} is {tuple(b.shape)}"
            )
        return self.scale * (unit(a) * unit(b).detach()).sum(-1)


def _part(output: Any, name: str | int) -> torch.Tensor:
    """A tensor of the output, by key, field or index."""
    if isinstance(output, Mapping):
        found = output.get(name)
    elif isinstance(name, str):
        found = getattr(output, name, None)
    else:
        found = output[name] if isinstance(output, Sequence) and name < len(output) else None
    if not isinstance(found, torch.Tensor):
        parts = list(output) if isinstance(output, Mapping) else getattr(output, "_fields", ())
        known = f"; it has {', '.join(map(str, parts))}" if parts else ""
        raise InputError(f"the output has no {name}{known}")
    return found


# --- from what is asked to what ``select_each`` takes


def of_samples(target: Target, batch: Batch) -> Any:
    """The target of a batch's samples: a list or tensor has an entry for each sample of all."""
    if isinstance(target, Against):
        return Against(of_samples(target.target, batch), of_samples(target.other, batch))
    arrays = isinstance(target, (torch.Tensor, np.ndarray)) and target.ndim
    if batch.size == batch.whole or not (isinstance(target, list) or arrays):
        return target
    mine: Any = target
    if len(mine) != batch.whole:
        raise InputError(f"{len(mine)} targets for {batch.whole} samples")
    return mine[batch.first : batch.first + batch.size]


def resolved(model: Any, batch: Batch, output: Any, targets: Sequence[Target]) -> list[Target]:
    """None becomes the model's own answers, in falling order; words and names become indices."""
    own = iter(_own_answers(batch, output, sum(t is None for t in targets)))
    return [next(own) if t is None else _meant(model, batch, output, t) for t in targets]


def _own_answers(batch: Batch, output: Any, count: int) -> list[Target]:
    """The ``count`` largest answers of each sample: of a classifier (B, K) its classes, of a language model
    (B, T, vocabulary) on texts the next tokens, the best span; [None] for one number a sample.

    Raises:
        InputError: the output has more dimensions, or fewer entries.
    """
    if count == 0:
        return []
    if hasattr(output, "start_logits"):
        if count > 1:
            raise InputError("a span has one best answer")
        return [_best_span(batch, output)]
    y = first_tensor(output)
    if y.ndim == 0 or y.numel() == y.shape[0]:
        return [None] * count
    ends = _ends(batch, y)
    if ends is not None:
        y = torch.stack([y[b, i] for b, i in enumerate(ends)])
    if y.ndim != 2:
        raise InputError(f"the output has shape {tuple(y.shape)}: say which target to explain")
    if count > y.shape[1]:
        raise InputError(f"the output has {y.shape[1]} entries: there are no {count} largest")
    require_answers(y)
    best = y.topk(count, 1).indices.T.tolist()
    places = [()] * y.shape[0] if ends is None else [(i,) for i in ends]
    return [[(*place, k) for place, k in zip(places, ks, strict=True)] for ks in best]


def require_answers(y: torch.Tensor) -> None:
    """Raise ``InputError`` if an output has no largest entry, because it is nan."""
    if bool(y.isnan().any()):
        raise InputError("the model answers nan: there is nothing to explain")


def _best_span(batch: Batch, output: Any) -> Span:
    """For each sample the start and the end, not before it, with the largest sum of logits."""
    scores = output.start_logits.detach()[:, :, None] + output.end_logits.detach()[:, None, :]
    whole = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).tril(-1), -torch.inf)
    if batch.last is not None:
        for i, last in enumerate(batch.last):
            whole[i, :, last + 1 :] = -torch.inf
    width = whole.shape[2]
    return Span([divmod(int(i), width) for i in whole.flatten(1).argmax(1)])


def _ends(batch: Batch, y: torch.Tensor) -> tuple[int, ...] | None:
    """The last token of each text, if ``y`` holds next tokens (B, T, vocabulary)."""
    return batch.last if is_nexts(y, batch.vocabulary) else None


def is_nexts(y: torch.Tensor, vocabulary: int) -> bool:
    """Whether outputs are next tokens (B, T, V). vocabulary: the tokenizer's, 0 if there is none."""
    return y.ndim == 3 and y.shape[2] >= vocabulary > 0


def _meant(model: Any, batch: Batch, output: Any, target: Target) -> Target:
    """A target with words and names as indices; of a language model a number is a next token."""
    if isinstance(target, Against):
        return Against(*(_meant(model, batch, output, t) for t in (target.target, target.other)))
    listed = isinstance(target, list)
    each = target if listed else [target]
    if callable(target) or not all(isinstance(t, (str, int)) and not isinstance(t, bool) for t in each):
        return target
    ends = _ends(batch, first_tensor(output))
    if ends is None and not any(isinstance(t, str) for t in each):
        return target
    indices = [class_of(model, batch, t, ends is not None) if isinstance(t, str) else t for t in each]
    if ends is None:
        return indices if listed else indices[0]
    indices = indices if listed else indices * len(ends)
    if len(indices) != len(ends):
        raise InputError(f"{len(indices)} targets for {len(ends)} texts")
    return [*zip(ends, indices, strict=True)]


def class_of(model: Any, batch: Batch, name: str, token: bool) -> int:
    """The class of that name, or the token.

    Raises:
        InputError: it is several tokens, or a model without a class of that name.
    """
    if not token:
        return index_of(model, name)
    ids = batch.ids(name) if batch.ids is not None else []
    if len(ids) != 1:
        raise InputError(
            f"the target {name!r} is {len(ids)} tokens of this model; give one (its first, or an index)"
        )
    return ids[0]


def warn_if_curved(output: Any, target: Target) -> None:
    """Warn if f is not ⟨y, ∂f/∂y⟩ over the outputs y: no map of a probability, or of a cosine between two
    outputs, adds up to it, however balanced the model."""
    if not callable(target):
        return
    with differentiable():
        own = pytree.tree_map(moving, output)
        f = select_each(own, target).sum()
        leaves = [t for t in pytree.tree_leaves(own) if inexact(t)]
        grads = torch.autograd.grad(f, leaves, allow_unused=True)
    owed = sum(dot(t.detach(), g) for t, g in zip(leaves, grads, strict=True) if g is not None)
    said = f.item()
    if abs(owed - said) > _CURVED * max(abs(owed), abs(said)):
        warnings.warn(
            f"the target {_called(target)} is {said:.4g}, and what it takes from the outputs adds up to"
            f" {owed:.4g}: so does a complete map. Explain logits, or let the model compute the rest",
            TargetWarning,
            stacklevel=4,
        )


# --- names


def named(model: Any, batch: Batch, found: Attribution, asked: Target) -> Attribution:
    """With what is known about the batch: pictures, pieces of texts, and what its targets are called."""
    against = isinstance(asked, Against)
    parts = [_each(t, batch.size) for t in ((asked.target, asked.other) if against else (asked,))]
    texts = [
        " against ".join(_said(model, batch, t) for t in sample) for sample in zip(*parts, strict=True)
    ]
    whose = tuple(zip(*parts, strict=True)) if against else tuple(parts[0])
    about = {"tokens": batch.tokens, "pictures": batch.pictures, "target": whose, "labels": tuple(texts)}
    return dataclasses.replace(found, **about)


def _each(target: Target, size: int) -> list[Any]:
    """A target sample by sample, as plain data."""
    if isinstance(target, Span):
        return list(target.tokens)
    if callable(target):
        return [_called(target)] * size
    if hasattr(target, "tolist"):
        target = target.tolist()
    return [
        _called(t) if callable(t) else t for t in (target if isinstance(target, list) else [target] * size)
    ]


def _called(target: Any) -> str:
    if isinstance(target, Likeness):
        return f"{target.scale:g} cos({target.of}, {target.to})"
    return str(getattr(target, "__name__", type(target).__name__))


def _said(model: Any, batch: Batch, target: Any) -> str:
    """What one sample's target is called; empty where nothing is known."""
    if isinstance(target, str):
        return target
    index = target[-1] if isinstance(target, tuple) and target else target
    if isinstance(index, bool) or not isinstance(index, int):
        return ""
    if isinstance(target, tuple) and len(target) == 2 and batch.piece is not None:
        return batch.piece(index) if index >= 0 else ""
    return label_of(model, index)
