"""The target objects of pytorch-grad-cam: each a function of one sample's output."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import libragrad_fx as lg
from libragrad_fx.errors import InputError
from libragrad_fx.target import select_each
from tests.interop.matrix import small_vit

targets = pytest.importorskip(
    "pytorch_grad_cam.utils.model_targets", reason="needs grad-cam (extra: dev)"
)


def test_one_object_a_sample() -> None:
    model, x = small_vit()
    gm = lg.transform(model, x)
    objects = [targets.ClassifierOutputTarget(1), targets.ClassifierOutputSoftmaxTarget(3)]
    found = lg.attribute(gm, x, objects, method="input_x_gradient")
    alone = [lg.attribute(gm, x[i : i + 1], [t], method="input_x_gradient") for i, t in enumerate(objects)]
    torch.testing.assert_close(found.values, torch.cat([a.values for a in alone]), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.output[0], model(x)[0, 1])
    same = [targets.ClassifierOutputTarget(i) for i in (1, 3)]
    assert torch.equal(lg.attribute(gm, x, same).values, lg.attribute(gm, x, [1, 3]).values)
    assert lg.verify(model, gm, x, same).ok


def test_of_one_number_a_sample() -> None:
    y = torch.tensor([[1.0], [-2.0]])
    signs = [targets.BinaryClassifierOutputTarget(i) for i in (0, 1)]
    assert select_each(y, signs).tolist() == [-1.0, -2.0]
    assert select_each(y[:, 0], signs).tolist() == [-1.0, -2.0]


def test_of_a_map() -> None:
    y = torch.arange(16.0).reshape(2, 2, 2, 2)
    mask = np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32)
    each = [targets.SemanticSegmentationTarget(i, mask) for i in (0, 1)]
    assert select_each(y, each).tolist() == [3.0, 12.0 + 15.0]


def test_of_a_detector() -> None:
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [4.0, 4.0, 8.0, 8.0]])
    entry = {"boxes": boxes, "labels": torch.tensor([1, 2]), "scores": torch.tensor([0.5, 0.25])}
    each = [targets.FasterRCNNBoxScoreTarget([i + 1], boxes[i : i + 1].numpy()) for i in (0, 1)]
    assert select_each([entry, entry], each).tolist() == [1.5, 1.25]


@pytest.mark.parametrize(
    ("objects", "match"),
    [
        ([targets.ClassifierOutputTarget(1)], "1 target callables for a batch of 2"),
        ([targets.RawScoresOutputTarget()] * 2, "each gives one number for its sample; got 5"),
        ([targets.ClassifierOutputTarget(1), 2], "does not fit"),
    ],
)
def test_what_does_not_fit_is_refused(objects: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        select_each(torch.randn(2, 5), objects)
