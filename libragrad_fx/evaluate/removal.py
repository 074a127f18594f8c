"""What a model answers when parts of a picture's object, or objects around it, are left out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.data import Parts, geometry
from libragrad_fx.evaluate.subject import Subject
from libragrad_fx.metrics.faithfulness import two_sided
from libragrad_fx.metrics.parts import Removed, subsets
from libragrad_fx.target import first_tensor


def removed(subject: Subject, given: Sequence[Parts | None], labels: Sequence[int | None]) -> Removed:
    """2^P + O forwards of a batch. Outputs are logits; a sample without a label has label 0.

    Raises:
        InputError: a picture without parts, or pictures of one set whose parts differ.
    """
    parts = [one for one in given if one is not None]
    if not parts or len(parts) < len(labels):
        raise InputError(
            "the pictures have no parts that can be left out: the metric parts is for sets whose items have"
            " them (evaluate.data.Item.parts), as zoo.sets:articles"
        )
    first = parts[0]
    for one in parts:
        if not np.array_equal(one.variants, first.variants) or len(one.objects) != len(first.objects):
            raise InputError("pictures of one set have parts of one table of variants, and as many objects")
    count, objects = len(first.masks), len(first.objects)
    every, all_objects = subsets(count).numpy(), np.ones(objects, bool)

    def answers(shown: np.ndarray, others: np.ndarray) -> torch.Tensor:
        return _answers(subject, [one.draw(shown, others) for one in parts])

    table = [answers(shown, all_objects) for shown in every]
    cleared = [answers(every[-1], left) for left in ~np.eye(objects, dtype=bool)]
    way, device = geometry(subject.steps), subject.device

    def placed(masks: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.stack([torch.stack([torch.from_numpy(way.mask(m)) for m in of]) for of in masks]).to(
            device
        )

    return Removed(
        torch.from_numpy(first.variants.astype(np.int64)).to(device),
        torch.tensor([label or 0 for label in labels], device=device),
        torch.stack(table, 1),
        torch.stack(cleared, 1),
        placed([one.masks for one in parts]),
        placed([one.objects for one in parts]),
    )


def _answers(subject: Subject, pictures: Sequence[Image.Image]) -> torch.Tensor:
    with torch.no_grad():
        inputs = subject.batch([subject.steps(picture) for picture in pictures])
        return two_sided(first_tensor(subject.module(inputs))).double().detach()
