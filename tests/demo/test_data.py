"""The demo's scenes and the models trained on them."""

from __future__ import annotations

import sys

import pytest
import torch

from libragrad_fx.demo import data as demo_data
from libragrad_fx.demo.data import MODELS, SIZE, demo_model_info, load_demo_model, scenes
from libragrad_fx.errors import InputError, LibraGradError

SPLITS = ("train", "test")


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_are_what_they_say(split: str) -> None:
    data = scenes(50, split, seed=3)
    assert data.images.shape == (50, 3, SIZE, SIZE)
    assert (data.images.dtype, data.labels.dtype) == (torch.float32, torch.int64)
    assert 0 <= data.images.min() <= data.images.max() <= 1
    assert set(data.labels.tolist()) <= set(range(10))
    left, top, right, bottom = data.boxes.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= SIZE).all()
    assert (bottom <= SIZE).all()
    # a one is narrow; nothing fills the picture
    assert (right - left >= 4).all()
    assert (bottom - top >= 15).all()
    assert ((right - left) * (bottom - top) < 0.8 * SIZE**2).all()


def test_scenes_depend_on_seed_and_split_alone() -> None:
    first, again = scenes(8, "train", seed=1), scenes(8, "train", seed=1)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.boxes, again.boxes)
    assert not torch.equal(first.images, scenes(8, "train", seed=2).images)
    assert not torch.equal(first.images, scenes(8, "test", seed=1).images)


def test_the_box_holds_the_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    black = torch.zeros(SIZE, SIZE, 3).numpy()
    monkeypatch.setattr(demo_data, "_clutter", lambda split, rng: black)
    data = scenes(30, "test", seed=0)
    for image, (left, top, right, bottom) in zip(data.images, data.boxes.tolist(), strict=True):
        light = image.sum(0)
        assert light[top:bottom, left:right].sum() > 0.95 * light.sum()


def test_splits_share_no_digit_and_no_photograph_column() -> None:
    train, test = (set(demo_data.split_digits(split).tolist()) for split in SPLITS)
    assert not train & test
    assert train | test == set(range(1797))
    (first, last), (start, end) = (demo_data.photo_columns(split, 640) for split in SPLITS)
    assert min(last, end) <= max(first, start)


@pytest.mark.parametrize("name", MODELS)
def test_models_are_as_good_as_they_say(name: str) -> None:
    info = demo_model_info(name)
    model = load_demo_model(name)
    assert not model.training
    assert all(p.dtype == torch.float32 for p in model.parameters())
    data = scenes(500, "test", seed=info.test_seed)
    with torch.no_grad():
        right = model(demo_data.normalise(data.images)).argmax(1) == data.labels
    assert right.double().mean().item() == pytest.approx(info.test_accuracy, abs=0.02)


def test_unknown_names() -> None:
    with pytest.raises(InputError, match="vit, mixer"):
        load_demo_model("resnet")
    with pytest.raises(InputError, match="train, test"):
        scenes(1, "validation", seed=0)  # type: ignore[arg-type]


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    demo_data._digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(LibraGradError, match=r"not installed .*: pip install .*scikit-learn"):
        scenes(1, "test", seed=0)
