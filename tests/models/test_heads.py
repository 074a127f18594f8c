"""Heads on frozen features, and the sets of pictures that are on this machine."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import libragrad_fx as lg
from libragrad_fx.demo import sources
from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.data import Data, Item, open_data, selected
from libragrad_fx.models import transform_of
from zoo import heads, sets

linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
REAL = pytest.mark.skipif(bool(sources.missing("dinov2")), reason=sources.missing("dinov2"))
LACK = sources.missing("fashion-mnist")
FASHION = pytest.mark.skipif(bool(LACK), reason=LACK)


def clouds(classes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Forty points a class, of unequal scales and far from zero."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor(classes).repeat_interleave(40)
    centres = torch.randn(5, 12, generator=generator) * 3
    x = centres[labels] + torch.randn(len(labels), 12, generator=generator)
    return x * torch.logspace(-2, 2, 12) + 50, labels


@pytest.mark.parametrize("classes", [[0, 1, 2], [0, 1], [1, 3, 4], [2, 0]])
def test_a_head_is_logistic_regression_on_standardised_features(classes: list[int]) -> None:
    """Its optimum: the residuals of each class, times the features, are the penalty's gradient."""
    x, labels = clouds(classes)
    found = heads.fitted(x, labels, 5)
    z = (x.double() - x.double().mean(0)) / x.double().std(0)
    weight, seen = found["weight"].double() * x.double().std(0), sorted(classes)
    logits = x.double() @ found["weight"].double().T + found["bias"].double()
    residual = torch.softmax(logits[:, seen], 1) - torch.nn.functional.one_hot(
        torch.searchsorted(torch.tensor(seen), labels)
    )
    gradient = residual.T @ z
    strength = -float((gradient * weight[seen]).sum() / weight[seen].square().sum())
    scale = 2.0 if len(seen) == 2 else 1.0  # of two classes one row is penalised, twice as long as either
    assert sum(abs(strength * c / scale - 1) < 0.05 for c in heads.STRENGTHS) == 1
    assert float(residual.sum(0).abs().max()) < 0.05
    assert bool((logits.argmax(1) == labels).float().mean() > 0.9)
    unseen = [c for c in range(5) if c not in seen]
    assert not bool(torch.isin(logits.argmax(1), torch.tensor(unseen)).any())


def test_photographs_are_there_by_name() -> None:
    pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    data = pickle.loads(pickle.dumps(open_data("zoo.sets:photos")))
    found = [data.get(i) for i in range(data.count)]
    assert {"astronaut", "china", "motorcycle"} <= {item.id for item in found}
    assert len(selected(data, None, 0).ids) == data.count
    for item in found:
        assert np.asarray(item.content).max() > 128, item.id


@FASHION
def test_scenes_are_a_set() -> None:
    data = open_data({"load": "zoo.sets:scenes", "args": {"count": 5, "kind": "crowded"}})
    first, again = data.get(3), pickle.loads(pickle.dumps(data)).get(3)
    assert first.id == "crowded/test/0/3"
    assert np.array_equal(np.asarray(first.content), np.asarray(again.content))
    assert first.label == max(first.masks, key=lambda c: int(first.masks[c].sum()))
    assert data.classes[0] == "T-shirt"
    with pytest.raises(InputError, match="no scenes scenes tomorrow"):
        sets.scenes("tomorrow")  # pyright: ignore[reportArgumentType]


def unlabelled(i: int) -> Item:
    return Item(str(i), sets.photos().get(i).content)


@REAL
@pytest.mark.slow
def test_a_classifier_of_two_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on crops of two, it knows them; features are kept; its balanced map is complete."""
    monkeypatch.setattr(heads, "folder", lambda: tmp_path)
    model = heads.trained(Data("crops", 12, crop, ("china", "flower")))
    assert len([*tmp_path.glob("features/crops-0-*.safetensors")]) == 1
    monkeypatch.setattr(sources, "dinov2", lambda: 1 / 0)
    x, labels = heads.features(Data("crops", 12, crop, ("china", "flower")))
    assert bool((model.head(x).argmax(1) == labels).all())
    monkeypatch.undo()
    picture = transform_of(model)(crop(1).content)[None]  # pyright: ignore[reportArgumentType]
    assert torch.equal(model(picture).argmax(1), torch.tensor([1]))
    found = lg.attribute(model, picture, method="fullgrad_plus")
    assert abs(float(found.completeness_error)) < 1e-3
    monkeypatch.setattr(heads, "folder", lambda: tmp_path)
    with pytest.raises(InputError, match="a head needs a label of every sample"):
        heads.trained(Data("photos", 2, unlabelled))


def crop(i: int) -> Item:
    whole = sets.photos()
    names = [*sets.PHOTOS, "motorcycle", *sources.PHOTOGRAPHS]
    picture = whole.get(names.index(sources.PHOTOGRAPHS[i % 2])).content
    assert not isinstance(picture, str)
    left = 20 * (i // 2)
    return Item(str(i), picture.crop((left, 0, left + 400, 400)), i % 2)
