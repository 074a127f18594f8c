"""The demo's pictures and trained models, all of it offline.

A scene is one of scikit-learn's handwritten digits pasted on a piece of one of scikit-learn's two
photographs. Where the digit lies is known, so one can measure how much of an attribution map falls
on it. Test scenes use digits and parts of the photographs that no training scene used.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from libragrad_fx.errors import InputError
from libragrad_fx.extras import need
from libragrad_fx.viz.heatmap import to_image

Split = Literal["train", "test"]

SIZE = 48  # side of a scene in pixels
MEAN = (0.5, 0.5, 0.5)  # a model's input is (image - MEAN) / STD, by channel
STD = (0.5, 0.5, 0.5)
MODELS = ("vit", "mixer")
ASSETS = importlib.resources.files("libragrad_fx") / "assets"
"""The weights that come with this package."""

_SPLITS: tuple[Split, ...] = ("train", "test")
_TEST_DIGITS = 360  # of 1797
_SEAM = 0.4  # photographs: test crops lie left of this fraction of the width, train crops right
_PAD = 2  # empty cells around a digit's 8x8, so that its ink fades out inside the resampled area
_INK = 0.5  # opacity from which a pixel counts as ink, for the box


@dataclasses.dataclass(frozen=True, eq=False)
class Scenes:
    """``n`` digits on clutter.

    images: float32 ``(n, 3, SIZE, SIZE)``, RGB in [0, 1], not normalised
    labels: int64 ``(n,)``, 0..9
    boxes: int64 ``(n, 4)``, the ink's ``left, top, right, bottom`` in pixels, right and bottom
        exclusive
    """

    images: torch.Tensor
    labels: torch.Tensor
    boxes: torch.Tensor


@dataclasses.dataclass(frozen=True)
class DemoModel:
    """Where a shipped model comes from. ``test_accuracy`` is in [0, 1]."""

    name: str
    architecture: str  # a class of timm.models
    kwargs: Mapping[str, Any]
    test_accuracy: float
    test_scenes: int  # the accuracy was measured on scenes(test_scenes, "test", test_seed)
    test_seed: int
    seed: int
    versions: Mapping[str, str]
    command: str


def scenes(n: int, split: Split, seed: int) -> Scenes:
    """``n`` random scenes of a split. The same arguments give the same pictures."""
    _check_split(split)
    rng = np.random.default_rng([seed, _SPLITS.index(split)])
    digits, labels = _digits()
    chosen = rng.choice(split_digits(split), size=n)
    images = np.empty((n, SIZE, SIZE, 3), np.float32)
    boxes = np.empty((n, 4), np.int64)
    for i, index in enumerate(chosen):
        ink, boxes[i] = _pose(digits[index], rng)
        clutter = _clutter(split, rng)
        images[i] = clutter + ink[:, :, None] * (_colour(rng) - clutter)
    return Scenes(
        torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))),
        torch.from_numpy(labels[chosen]),
        torch.from_numpy(boxes),
    )


def split_digits(split: Split) -> np.ndarray:
    """Indices into ``load_digits`` that a split may use: int64, disjoint between the splits."""
    _check_split(split)
    # A fixed shuffle: the digits come in runs by writer, so a cut in their order would be uneven.
    order = np.random.default_rng(0).permutation(len(_digits()[1]))
    return order[:_TEST_DIGITS] if split == "test" else order[_TEST_DIGITS:]


def photo_columns(split: Split, width: int) -> tuple[int, int]:
    """Columns ``[first, last)`` of a photograph of ``width`` pixels that a split may crop from."""
    _check_split(split)
    seam = round(width * _SEAM)
    return (0, seam) if split == "test" else (seam, width)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """RGB in [0, 1], ``(..., 3, H, W)``, normalised for the demo models."""
    mean, std = (torch.tensor(c, dtype=images.dtype).view(3, 1, 1) for c in (MEAN, STD))
    return (images - mean.to(images.device)) / std.to(images.device)


def load_demo_model(name: str) -> torch.nn.Module:
    """A shipped model, in eval mode.

    It takes float32 ``(n, 3, SIZE, SIZE)``, normalised, and returns logits ``(n, 10)``.
    """
    info = demo_model_info(name)
    model = build_model(info.architecture, info.kwargs)
    with importlib.resources.as_file(_asset(name)) as path:
        model.load_state_dict(_tensors(path))
    return model.eval()


def vit() -> torch.nn.Module:
    """On the command line: ``libragrad_fx.demo:vit``."""
    return load_demo_model("vit")


def mixer() -> torch.nn.Module:
    return load_demo_model("mixer")


def as_pictures(images: torch.Tensor) -> list[Image.Image]:
    """RGB in [0, 1], ``(n, 3, H, W)``, as pictures."""
    return [to_image(image.numpy()) for image in images.permute(0, 2, 3, 1)]


def demo_model_info(name: str) -> DemoModel:
    """The facts in the metadata of the weight file."""
    with importlib.resources.as_file(_asset(name)) as path, safe_open(path, "pt") as file:
        about = file.metadata()
    return DemoModel(
        name=name,
        architecture=about["architecture"],
        kwargs=json.loads(about["kwargs"]),
        test_accuracy=float(about["test_accuracy"]),
        test_scenes=int(about["test_scenes"]),
        test_seed=int(about["test_seed"]),
        seed=int(about["seed"]),
        versions=json.loads(about["versions"]),
        command=about["command"],
    )


def build_model(architecture: str, kwargs: Mapping[str, Any]) -> torch.nn.Module:
    """A freshly initialised model of a class of ``timm.models``.

    ``timm.create_model`` would not do: its mixers fix their patch size, and its names promise 224 pixels.
    """
    model = getattr(need("timm.models", "demo"), architecture)(**kwargs)
    # as on timm's own models, so that ``infer_inputs`` finds the input size, and pictures are not cropped
    model.pretrained_cfg = {"input_size": (3, SIZE, SIZE), "mean": MEAN, "std": STD, "crop_pct": 1.0}
    return model


def _check_split(split: str) -> None:
    if split not in _SPLITS:
        raise InputError(f"no split named {split!r}; choose one of: {', '.join(_SPLITS)}")


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Ink float32 ``(1797, 8, 8)`` in [0, 1] and labels int64 ``(1797,)``."""
    data = need("sklearn.datasets", "demo").load_digits()
    return (data.images / 16).astype(np.float32), data.target.astype(np.int64)


@functools.cache
def _photos() -> tuple[Image.Image, ...]:
    """china.jpg and flower.jpg, RGB, 640 x 427 pixels."""
    photos = need("sklearn.datasets", "demo").load_sample_images().images
    return tuple(Image.fromarray(photo) for photo in photos)


def _pose(digit: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, ...]]:
    """The digit at a random place, size and tilt: opacity float32 ``(SIZE, SIZE)``, and its box."""
    side = rng.uniform(24, 36)  # of the digit's 8x8, in pixels
    tilt = rng.uniform(-0.2, 0.2)  # radians
    cos, sin = math.cos(tilt), math.sin(tilt)
    reach = side / 2 * (cos + abs(sin))  # half the side of the upright square around it
    x, y = rng.uniform(reach, SIZE - reach, size=2)
    step = 8 / side  # cells a pixel
    middle = 4 + _PAD
    cells = Image.fromarray(np.pad(digit, _PAD))
    # PIL wants the map from a pixel of the result to a place in the source
    inverse = (
        *(step * cos, step * sin, middle - step * (cos * x + sin * y)),
        *(-step * sin, step * cos, middle - step * (-sin * x + cos * y)),
    )
    soft = cells.transform((SIZE, SIZE), Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC)
    # an edge about one pixel wide at half ink: a stroke instead of a blur
    ink = np.clip((np.asarray(soft) - 0.3) / 0.4, 0, 1)
    rows, columns = np.flatnonzero((ink > _INK).any(1)), np.flatnonzero((ink > _INK).any(0))
    return ink, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def _clutter(split: Split, rng: np.random.Generator) -> np.ndarray:
    """A dimmed piece of a photograph: float32 ``(SIZE, SIZE, 3)`` in [0, 1]."""
    photo = _photos()[rng.integers(len(_photos()))]
    first, last = photo_columns(split, photo.width)
    side = int(rng.integers(64, 193))
    left = int(rng.integers(first, last - side + 1))
    top = int(rng.integers(0, photo.height - side + 1))
    box = (left, top, left + side, top + side)
    piece = photo.resize((SIZE, SIZE), Image.Resampling.BOX, box)
    if rng.random() < 0.5:
        piece = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(piece, np.float32) / 255 * np.float32(rng.uniform(0.35, 0.7))


def _colour(rng: np.random.Generator) -> np.ndarray:
    """A light colour of random tint: float32 ``(3,)``."""
    return rng.uniform(0.65, 1, size=3).astype(np.float32) ** np.float32(rng.uniform(0.3, 1.2))


def _asset(name: str) -> Any:
    if name not in MODELS:
        raise InputError(f"no demo model named {name!r}; choose one of: {', '.join(MODELS)}")
    return ASSETS / f"{name}.safetensors"


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
