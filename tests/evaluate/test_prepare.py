"""Masks go the way of their pictures: the same resize and cut, each pixel from the nearest."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.data import Item, covering, geometry, largest, prepared
from libragrad_fx.evaluate.data.prepare import Steps
from libragrad_fx.explain.pixels import Pixels

transforms = pytest.importorskip("torchvision.transforms", reason="torchvision is not installed")
EDGE = Pixels((14, 14), (16, 16), "edge", "bicubic", False, (0.0,) * 3, (1.0,) * 3)
SQUASH = dataclasses.replace(EDGE, way="squash", scaled=(14, 14))
SIZES = st.integers(1, 60)


def near(new: int, old: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest old pixel to each new one's centre, and whether it is the only one."""
    places = [Fraction(2 * i + 1, 2) * old / new for i in range(new)]
    return np.array([int(p) for p in places]), np.array([p.denominator != 1 for p in places])


@settings(deadline=None)
@given(SIZES, SIZES, st.integers(0, 99))
def test_each_pixel_is_the_nearest(high: int, wide: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((high, wide)) < 0.5
    (rows, row_sure), (cols, col_sure) = near(14, high), near(14, wide)
    found = SQUASH.mask(mask)
    sure = np.ix_(row_sure, col_sure)
    assert np.array_equal(found[sure], mask[np.ix_(rows, cols)][sure])


@settings(deadline=None)
@given(st.integers(14, 60), st.integers(14, 60), st.integers(0, 99))
def test_of_odd_scales_it_is_what_torch_calls_nearest_exact(high: int, wide: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((high, wide)) < 0.5
    sure = np.ix_(near(14, high)[1], near(14, wide)[1])
    x = torch.from_numpy(mask)[None, None].float()
    wanted = torch.nn.functional.interpolate(x, (14, 14), mode="nearest-exact")[0, 0].bool().numpy()
    assert np.array_equal(SQUASH.mask(mask)[sure], wanted[sure])


def preset(**options: object) -> Steps:
    resize = transforms.Resize(interpolation=transforms.InterpolationMode.BICUBIC, **options)
    last = transforms.Normalize(0.5, 0.5)
    return transforms.Compose([resize, transforms.CenterCrop(28), transforms.ToTensor(), last])


@pytest.mark.parametrize("steps", [preset(size=32), preset(size=(28, 28))], ids=["cut", "squashed"])
@pytest.mark.parametrize("size", [(60, 40), (41, 90), (200, 28)])
def test_a_mask_stays_on_its_thing(steps: Steps, size: tuple[int, int]) -> None:
    """A picture that is its own mask, white on black: where the tensor is clearly white or black, so is the
    mask. They may differ at an edge, where the picture's filter mixes both."""
    y, x = np.ogrid[: size[1], : size[0]]
    inside = (x / size[0] - 0.4) ** 2 + (y / size[1] - 0.6) ** 2 < 0.06
    image = Image.fromarray((inside * 255).astype(np.uint8)).convert("RGB")
    tensor, masks = prepared(Item("a", image, 3, {3: inside, 4: ~inside}), steps)
    assert masks[3].dtype == torch.bool
    assert masks[3].shape == tensor.shape[1:] == (28, 28)
    assert bool((masks[3] ^ masks[4]).all())
    white, black = tensor[0] > 0.98, tensor[0] < -0.98
    assert int(white.sum()) > 20
    assert int(black.sum()) > 20
    assert bool(masks[3][white].all())
    assert not bool(masks[3][black].any())


def test_timm_s_own_steps() -> None:
    data = pytest.importorskip("timm.data", reason="timm is not installed")
    steps = data.create_transform((3, 56, 56), interpolation="bicubic", crop_pct=0.875)
    way = geometry(steps)
    assert (way.size, way.scaled, way.way) == ((56, 56), (64, 64), "edge")
    assert geometry(steps) is way  # tried once
    left = np.zeros((64, 128), bool)
    left[:, :64] = True  # the cut is at columns 36 to 92
    _, masks = prepared(Item("a", Image.new("RGB", (128, 64)), 0, {0: left}), steps, way)
    assert masks[0][:, :28].all()
    assert not masks[0][:, 28:].any()


def test_steps_that_masks_cannot_follow() -> None:
    flipped = transforms.Compose([preset(size=28), transforms.RandomHorizontalFlip(p=1.0)])
    item = Item("a", Image.new("RGB", (30, 30)), 0, {0: np.ones((30, 30), bool)})
    with pytest.raises(InputError, match="masks cannot follow this model's preprocessing"):
        prepared(item, flipped)
    tensor, masks = prepared(dataclasses.replace(item, masks={}), flipped)
    assert tensor.shape == (3, 28, 28)
    assert masks == {}
    with pytest.raises(InputError, match="a becomes"):
        prepared(item, preset(size=32), EDGE)
    with pytest.raises(InputError, match="b is a text"):
        prepared(Item("b", "words"), flipped)


@given(st.dictionaries(st.integers(0, 9), st.integers(0, 100), max_size=5), st.integers(0, 100))
def test_small_masks_are_dropped_and_the_largest_is_found(areas: dict[int, int], percent: int) -> None:
    masks = {c: torch.arange(100).view(10, 10) < n for c, n in areas.items()}
    kept = covering(masks, percent / 100)
    assert set(kept) == {c for c, n in areas.items() if n >= percent}
    found = largest(masks)
    if found is None:
        assert not areas
    else:
        assert areas[found] == max(areas.values())
        assert found == min(c for c, n in areas.items() if n == areas[found])
