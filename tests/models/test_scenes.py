"""Scenes: reproducible, exact in their masks, disjoint between splits, labelled by shape alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from libragrad_fx.demo import sources
from libragrad_fx.errors import InputError
from zoo import scenes
from zoo.scenes import AGREES, KINDS, MARGIN, SPLITS, Kind, Split

LACK = sources.missing("fashion-mnist")
pytestmark = pytest.mark.skipif(not sources.fetched("fashion-mnist"), reason=LACK)
pytest.importorskip("skimage", reason="scikit-image is not installed: pip install scikit-image")

asked = given(st.sampled_from(SPLITS), st.integers(0, 10**9), st.sampled_from(KINDS), st.integers(0, 5))


@settings(max_examples=40, deadline=None)
@asked
def test_the_label_is_of_the_largest_mask(split: Split, index: int, kind: Kind, seed: int) -> None:
    one = scenes.scene(split, index, kind, seed)
    sizes = {c: int(mask.sum()) for c, mask in one.masks.items()}
    largest = sizes.pop(one.label)
    assert largest >= MARGIN * max(sizes.values())
    assert min(sizes.values()) > 0


@settings(max_examples=40, deadline=None)
@asked
def test_masks_are_disjoint(split: Split, index: int, kind: Kind, seed: int) -> None:
    one = scenes.scene(split, index, kind, seed)
    layers = [*one.masks.values()] + ([] if one.watermark is None else [one.watermark])
    assert np.sum(layers, axis=0).max() == 1


@settings(max_examples=20, deadline=None)
@asked
def test_reproducible(split: Split, index: int, kind: Kind, seed: int) -> None:
    first, second = (scenes.scene(split, index, kind, seed) for _ in range(2))
    np.testing.assert_array_equal(first.picture, second.picture)
    assert first.label == second.label
    other = scenes.scene(split, index + 1, kind, seed)
    assert not np.array_equal(first.picture, other.picture)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_exactly_what_was_pasted(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a background of a colour that no paint has, the masks are what is not background."""
    bare = np.full((scenes.SIZE, scenes.SIZE, 3), -1.0, np.float32)
    monkeypatch.setattr(scenes, "_background", lambda split, rng: bare.copy())
    monkeypatch.setattr(scenes, "_painted", lambda grey, look, rng: np.full((len(grey), 3), 200.0))
    for index in range(20):
        one = scenes.scene("train", index, kind)
        layers = [*one.masks.values()] + ([] if one.watermark is None else [one.watermark])
        pasted = (one.picture > 0).any(-1)
        inside = np.any(layers, axis=0)
        assert not (pasted & ~inside).any()
        if one.watermark is None:  # a watermark has black inks as well
            np.testing.assert_array_equal(pasted, inside)


def test_splits_share_no_article_and_no_column_of_a_photograph() -> None:
    pictures = [{p.tobytes() for p in scenes.articles(split)[0]} for split in ("train", "val")]
    assert not pictures[0] & pictures[1]
    assert np.shares_memory(scenes.articles("test")[0], scenes._fashion("t10k")[0])
    for width in (p.shape[1] for p in scenes.photographs()):
        taken = [set(range(*scenes.columns(split, width))) for split in SPLITS]
        assert sum(map(len, taken)) == len(set.union(*taken)) == width


def test_backgrounds_stay_in_their_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Photographs whose columns tell their split by a colour of their own."""
    photo = np.zeros((200, 500, 3), np.uint8)
    for level, split in enumerate(SPLITS):
        photo[:, slice(*scenes.columns(split, 500)), level] = 255
    monkeypatch.setattr(scenes, "photographs", lambda: (photo,))
    for level, split in enumerate(SPLITS):
        for seed in range(10):
            piece = scenes._background(split, np.random.default_rng(seed))
            bright = piece.max((0, 1)) > piece.min((0, 1)).min() + 100
            assert [*np.flatnonzero(bright)] == [level]


@pytest.mark.slow
def test_watermarks_tell_the_class_in_training_alone() -> None:
    n = 200
    parts: dict[Split, float] = {"train": AGREES + (1 - AGREES) / 10, "test": 0.1}
    for split, expected in parts.items():
        drawn = [scenes.scene(split, i, "shortcut") for i in range(n)]
        agree = np.mean([one.sign == one.label for one in drawn])
        assert abs(agree - expected) < 4 * (expected * (1 - expected) / n) ** 0.5
        masks = [one.watermark for one in drawn if one.watermark is not None]
        assert {int(m.sum()) for m in masks} == {81}
        assert len({m.tobytes() for m in masks}) > n / 3  # many places
    assert all(scenes.scene("train", i).watermark is None for i in range(5))


def test_signs_differ_also_when_light_and_dark_are_swapped() -> None:
    signs = scenes._SIGNS
    assert len({*signs, *(0b111111111 ^ s for s in signs)}) == 2 * len(signs)


def test_a_crowd_has_more_and_smaller_articles() -> None:
    few, many = ([scenes.scene("test", i, kind) for i in range(40)] for kind in ("scenes", "crowded"))
    assert {len(one.masks) for one in few} == {2, 3}
    assert {len(one.masks) for one in many} == {3, 4, 5}
    area_few, area_many = (np.mean([one.masks[one.label].sum() for one in s]) for s in (few, many))
    assert area_many < 0.75 * area_few


@pytest.mark.slow
def test_labels_are_even_and_apart_from_size_and_brightness() -> None:
    drawn = [scenes.scene("train", i) for i in range(400)]
    labels = np.array([one.label for one in drawn])
    counts = np.bincount(labels, minlength=10)
    assert ((counts - 40) ** 2 / 40).sum() < 30  # chi squared with 9 degrees: 27.9 in 1 of 1,000
    size = np.array([one.masks[one.label].sum() for one in drawn], float)
    light = np.array([one.picture[one.masks[one.label]].mean() for one in drawn])
    for value in (size, light):
        between = sum(c * (value[labels == k].mean() - value.mean()) ** 2 for k, c in enumerate(counts))
        assert between / (value.var() * len(value)) < 0.06  # of the variance, by class; 0.023 by chance


def test_dataset() -> None:
    data = scenes.Scenes("val", 3, "crowded", seed=2)
    x, label = data[1]
    one = scenes.scene("val", 1, "crowded", 2)
    assert len(data) == 3
    assert (x.shape, x.dtype, label) == ((3, 96, 96), torch.float32, one.label)
    torch.testing.assert_close(x, torch.from_numpy(one.picture).permute(2, 0, 1) / 127.5 - 1)
    with pytest.raises(IndexError, match="scene 3 of 3"):
        data[3]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(InputError, match="no split 'dev'"):
        scenes.scene("dev", 0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no kind 'easy'"):
        scenes.scene("val", 0, "easy")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="must not be negative"):
        scenes.scene("val", -1)
