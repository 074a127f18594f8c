"""A preprocessing is read from what it does to pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from libragrad_fx.errors import InputError
from libragrad_fx.explain.pixels import FILTERS, Pixels, pixels

MEAN = ((-2.0, -1.5, -1.75), (4.0, 4.5, 4.25))
PHOTO = Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 131, 3), np.uint8))


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(
    ("size", "scaled", "way"),
    [
        ((48, 48), (48, 48), "edge"),
        ((48, 48), (55, 55), "edge"),
        ((64, 48), (64, 48), "squash"),
        ((48, 48), (56, 56), "squash"),
        ((40, 60), (40, 60), "cover"),
    ],
)
def test_numbers_come_back(size: Any, scaled: Any, way: Any, filter: str) -> None:
    wanted = Pixels(size, scaled, way, filter, False, *MEAN)
    found = pixels(wanted)
    assert (found.size, found.scaled, found.way, found.filter) == (size, scaled, way, filter)
    torch.testing.assert_close(found(PHOTO), wanted(PHOTO))


def test_one_channel() -> None:
    wanted = Pixels((28, 28), (28, 28), "cover", "bicubic", False, (0.0,), (1.0,))
    assert pixels(wanted) == wanted


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "swin_t"])
def test_of_torchvision(name: str) -> None:
    steps = pytest.importorskip("torchvision.models").get_model_weights(name).DEFAULT.transforms()
    torch.testing.assert_close(pixels(steps)(PHOTO), steps(PHOTO))


@pytest.mark.parametrize("given", [{"crop_pct": 0.9}, {"crop_pct": 1.0, "crop_mode": "squash"},
                                   {"crop_pct": 0.875, "interpolation": "bilinear"}])  # fmt: skip
def test_of_timm(given: dict[str, Any]) -> None:
    data = pytest.importorskip("timm.data")
    steps = data.create_transform(**{"input_size": (3, 224, 224), "interpolation": "bicubic", **given})
    torch.testing.assert_close(pixels(steps)(PHOTO), steps(PHOTO))


def test_given_pictures_are_tried_too() -> None:
    red = lambda p: PLAIN(p) if p.getpixel((0, 0)) != (255, 0, 0) else -PLAIN(p)  # noqa: E731
    assert pixels(red) == PLAIN
    with pytest.raises(InputError, match="levels of 255 away"):
        pixels(red, [Image.new("RGB", (50, 50), (255, 0, 0))])


def test_of_hugging_face() -> None:
    """Their tensors are resized otherwise than pictures: by some levels of 255."""
    transformers = pytest.importorskip("transformers")
    made = transformers.ViTImageProcessor(size={"height": 64, "width": 64})
    steps = lambda picture: made(images=picture, return_tensors="pt")["pixel_values"][0]  # noqa: E731
    torch.testing.assert_close(pixels(steps)(PHOTO), steps(PHOTO), atol=2.1 / 127.5, rtol=0)


PLAIN = Pixels((48, 48), (48, 48), "edge", "bicubic", False, *MEAN)


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        (lambda p: PLAIN(ImageOps.mirror(p)), "right of a picture"),
        (lambda p: PLAIN(p).exp(), "levels of 255 away"),
        (lambda p: PLAIN(p) * 0, "white becomes what black becomes"),
        (lambda p: PLAIN(p)[None], "gives tensors"),
        (lambda p: PLAIN(p)[[0, 0, 0]], "levels of 255 away"),
        (lambda p: PLAIN(ImageOps.autocontrast(p)), "levels of 255 away"),
        (lambda p: PLAIN(p.resize((p.width, min(p.height, 3 * p.width)))), "levels of 255 away"),
    ],
)
def test_what_is_not_so_is_refused(steps: Callable[[Image.Image], torch.Tensor], says: str) -> None:
    with pytest.raises(InputError, match=says):
        pixels(steps)
