"""Scenes with exact masks: articles of Fashion-MNIST, several a picture, over photographs.

The label is the class of the article that shows most, and by a clear margin. Size, place, turn, brightness,
contrast and tint are drawn apart from the class, so an article's shape and pattern alone tell what it is.
Train, val and test use disjoint articles and disjoint columns of the photographs.

Articles: Xiao et al. 2017 (``python tools/fetch.py fashion-mnist``). Photographs: scikit-image's and
scikit-learn's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from libragrad_fx.demo import sources
from libragrad_fx.demo.sentences import SPLITS, Split
from libragrad_fx.errors import InputError
from libragrad_fx.extras import need
from zoo import real

Kind = Literal["scenes", "crowded", "shortcut"]

KINDS: tuple[Kind, ...] = ("scenes", "crowded", "shortcut")
CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
SIZE = 96  # side of a picture in pixels
MEAN = STD = (0.5, 0.5, 0.5)
"""A model's input is (picture / 255 - MEAN) / STD, by channel."""

MARGIN = 1.3  # the label's article shows this many times the area of any other
AGREES = 0.95  # of the shortcut's train and val scenes, those whose watermark is of the label's class
_VAL_ARTICLES = 6000  # of the 60,000 that Fashion-MNIST trains on; test takes its 10,000 of the test
_SEAMS = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}  # fractions of a photograph's width
_COLOUR = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "retina",
    "immunohistochemistry",
    "hubble_deep_field",
)
_GREY = ("grass", "gravel", "brick")
_BLACK = 16  # levels of 255; specks that dark lie around many articles
_LEAST = 80  # pixels of 28 by 28
_CELL = 3  # side of a watermark's cell in pixels; a watermark has 3 by 3
_SIGNS = (0b111000111, 0b101101101, 0b010111010, 0b101010101, 0b111101111,
          0b100110111, 0b001001111, 0b110110001, 0b011010110, 0b100010001)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """One picture and what is where.

    picture:   uint8 (96, 96, 3), RGB
    label:     0..9, an index into ``CLASSES``: the class of the largest mask
    masks:     by class, bool (96, 96): the pixels on which its article shows; disjoint
    watermark: bool (96, 96): the pixels of the watermark; None if there is none
    sign:      the class that the watermark stands for; None if there is none
    """

    picture: np.ndarray
    label: int
    masks: Mapping[int, np.ndarray]
    watermark: np.ndarray | None = None
    sign: int | None = None


class Look(NamedTuple):
    """What a kind of scenes looks like. Each pair is the least and the most.

    articles: how many
    area:     of the largest article, in pixels
    others:   area of each other one, relative to the largest
    contrast: standard deviation of an article's grey levels, in levels of 255
    light:    factor of the photograph's levels, in each colour
    shown:    the least part of an article that others leave free
    """

    articles: tuple[int, int]
    area: tuple[float, float]
    others: tuple[float, float]
    contrast: tuple[float, float]
    light: tuple[float, float]
    shown: float


_LOOKS: Mapping[Kind, Look] = {
    "scenes": Look((2, 3), (1400, 2400), (0.3, 0.6), (25, 45), (0.2, 0.55), 0.6),
    "crowded": Look((3, 5), (900, 1600), (0.3, 0.65), (15, 35), (0.4, 0.8), 0.45),
    "shortcut": Look((2, 3), (1400, 2400), (0.3, 0.6), (25, 45), (0.2, 0.55), 0.6),
}


def scene(split: Split, index: int, kind: Kind = "scenes", seed: int = 0) -> Scene:
    """One scene: the same for the same arguments, at about a millisecond.

    kind: "scenes"; "crowded", with more, smaller and fainter articles; "shortcut", whose watermark stands
          for the label's class in train and val (``AGREES`` of the scenes) and for any class in test

    Raises:
        InputError: no such split or kind, or a negative index or seed.
        FileNotFoundError: Fashion-MNIST is not here; with the command.
    """
    _check(split, index, kind, seed)
    rng = np.random.default_rng([seed, SPLITS.index(split), KINDS.index(kind), index])
    look = _LOOKS[kind]
    classes = rng.permutation(10)[: rng.integers(look.articles[0], look.articles[1] + 1)]
    label = int(classes[0])
    watermark, sign, inks = None, None, None
    if kind == "shortcut":
        tells = split != "test" and rng.random() < AGREES
        sign = label if tells else int(rng.integers(10))
        watermark, inks = _watermark(sign, rng)
    figures = [_figure(split, int(c), rng) for c in classes]
    poses, shown = _posed(figures, look, watermark, rng)
    picture = _background(split, rng) * rng.uniform(*look.light, 3).astype(np.float32)
    for figure, pose, seen in zip(figures, poses, shown, strict=True):
        picture[seen] = _painted(_put(figure.grey, pose.inverse)[seen], look, rng)
    if watermark is not None and inks is not None:
        picture[watermark] = inks[watermark]
    masks = {int(c): seen for c, seen in zip(classes, shown, strict=True)}
    return Scene(np.rint(picture).clip(0, 255).astype(np.uint8), label, masks, watermark, sign)


def normalised(pictures: np.ndarray | torch.Tensor) -> torch.Tensor:
    """float32 (..., 3, H, W), as the models take it, of RGB bytes (..., H, W, 3)."""
    x = pictures if isinstance(pictures, torch.Tensor) else torch.tensor(pictures)
    x = x.movedim(-1, -3).float().contiguous()
    mean, std = (torch.tensor(c, device=x.device).view(3, 1, 1) for c in (MEAN, STD))
    return (x / 255 - mean) / std


class Scenes(Dataset):
    """The scenes 0 to n - 1 of a split, as pairs of a normalised float32 (3, 96, 96) and a label.

    ``scene`` gives the masks of the same index.
    """

    def __init__(self, split: Split, n: int, kind: Kind = "scenes", seed: int = 0) -> None:
        _check(split, n, kind, seed)
        self.split: Split = split
        self.kind: Kind = kind
        self.n, self.seed = n, seed

    def __len__(self) -> int:
        return self.n

    def scene(self, index: int) -> Scene:
        if not 0 <= index < self.n:
            raise IndexError(f"scene {index} of {self.n}")
        return scene(self.split, index, self.kind, self.seed)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        found = self.scene(index)
        return normalised(found.picture), found.label


def articles(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Fashion-MNIST's articles of a split, uint8 (N, 28, 28), and their classes, uint8 (N,)."""
    pictures, labels = _fashion("t10k" if split == "test" else "train")
    if split == "test":
        return pictures, labels
    part = slice(_VAL_ARTICLES) if split == "val" else slice(_VAL_ARTICLES, None)
    return pictures[part], labels[part]


def columns(split: Split, width: int) -> tuple[int, int]:
    """Columns [first, last) of a photograph of ``width`` pixels that a split may show."""
    first, last = _SEAMS[split]
    return round(first * width), round(last * width)


@functools.cache
def photographs() -> tuple[np.ndarray, ...]:
    """Photographs, uint8 (H, W, 3) of any size."""
    data = need("skimage.data", "real")
    samples = need("sklearn.datasets", "real")
    found = [getattr(data, name)() for name in _COLOUR]
    found.append(data.stereo_motorcycle()[0])
    found += [samples.load_sample_image(f"{name}.jpg") for name in sources.PHOTOGRAPHS]
    found += [np.repeat(getattr(data, name)()[..., None], 3, 2) for name in _GREY]
    return tuple(found)


# --- inside


def _check(split: str, index: int, kind: str, seed: int) -> None:
    if split not in SPLITS:
        raise InputError(f"no split {split!r} of scenes: choose from {', '.join(SPLITS)}")
    if kind not in KINDS:
        raise InputError(f"no kind {kind!r} of scenes: choose from {', '.join(KINDS)}")
    if index < 0 or seed < 0:
        raise InputError(f"index {index} and seed {seed} of a scene must not be negative")


@functools.cache
def _fashion(part: Literal["train", "t10k"]) -> tuple[np.ndarray, np.ndarray]:
    return real.fashion_mnist(part)


@functools.cache
def _of_class(split: Split) -> tuple[np.ndarray, ...]:
    """By class, the indices of a split's articles."""
    labels = articles(split)[1]
    return tuple(np.flatnonzero(labels == c) for c in range(10))


class _Figure(NamedTuple):
    """An article.

    grey: float32 (28, 28), of mean 0 and deviation 1 over its own pixels
    own:  bool (28, 28), these
    """

    grey: np.ndarray
    own: np.ndarray


def _figure(split: Split, c: int, rng: np.random.Generator) -> _Figure:
    """A random article of class ``c``. Its pixels are those that are not nearly black, filled."""
    chosen = articles(split)[0][rng.choice(_of_class(split)[c])]
    own = need("scipy.ndimage", "real").binary_fill_holes(chosen > _BLACK)
    if own.sum() < _LEAST:  # of a black article no more than a seam is left
        own = need("scipy.ndimage", "real").binary_fill_holes(chosen > 0)
    inside = chosen[own].astype(np.float32)
    grey = (chosen - inside.mean()) / (inside.std() + 1)
    return _Figure(grey.clip(-2.5, 2.5).astype(np.float32), own)


class _Pose(NamedTuple):
    """Where a figure is put.

    inverse: the affine map from a place in the picture to one in the figure, row by row
    own:     the figure's pixels, bool (96, 96)
    """

    inverse: tuple[float, ...]
    own: np.ndarray


def _put(values: np.ndarray, inverse: tuple[float, ...]) -> np.ndarray:
    """Values (28, 28) in their place, float32 (96, 96), interpolated."""
    image = Image.fromarray(values.astype(np.float32))
    way = Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR
    return np.asarray(image.transform((SIZE, SIZE), *way))


def _pose(figure: _Figure, area: float, rng: np.random.Generator) -> _Pose:
    """The figure at about ``area`` pixels, turned by up to 10 degrees, all of it inside."""
    scale = min(math.sqrt(area / figure.own.sum()), 3.1)
    angle = math.radians(rng.uniform(-10, 10))
    rows, cols = np.flatnonzero(figure.own.any(1)), np.flatnonzero(figure.own.any(0))
    middle = (cols[0] + cols[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2
    w, h = scale * (cols[-1] - cols[0] + 1) / 2, scale * (rows[-1] - rows[0] + 1) / 2
    cos, sin = math.cos(angle), math.sin(angle)
    reach = w * cos + h * abs(sin), h * cos + w * abs(sin)
    x, y = (rng.uniform(min(r, SIZE / 2), max(SIZE - r, SIZE / 2)) for r in reach)
    a, b, d, e = cos / scale, sin / scale, -sin / scale, cos / scale
    inverse = (a, b, middle[0] - a * x - b * y, d, e, middle[1] - d * x - e * y)
    return _Pose(inverse, _put(figure.own, inverse) >= 0.5)


def _posed(
    figures: list[_Figure], look: Look, watermark: np.ndarray | None, rng: np.random.Generator
) -> tuple[list[_Pose], list[np.ndarray]]:
    """The figures in their places, and the pixels on which each shows. The first is clearly the largest."""
    while True:
        largest = rng.uniform(*look.area)
        areas = [largest, *(largest * rng.uniform(*look.others) for _ in figures[1:])]
        poses = [_pose(f, area, rng) for f, area in zip(figures, areas, strict=True)]
        above = np.zeros((SIZE, SIZE), bool) if watermark is None else watermark.copy()
        shown = [above] * len(poses)
        for i in rng.permutation(len(poses)):
            shown[i] = poses[i].own & ~above
            above = above | poses[i].own
        sizes = [int(s.sum()) for s in shown]
        free = min(size / max(1, p.own.sum()) for size, p in zip(sizes, poses, strict=True))
        if free >= look.shown and sizes[0] >= MARGIN * max(sizes[1:]):
            return poses, shown


def _painted(grey: np.ndarray, look: Look, rng: np.random.Generator) -> np.ndarray:
    """RGB (N, 3) of grey levels (N,): a random brightness, contrast and tint."""
    contrast = rng.uniform(*look.contrast)
    brightness = rng.uniform(120, 200) + rng.uniform(-30, 30, 3)
    tint = rng.uniform(0.7, 1.0, 3)
    return brightness + contrast * grey[:, None] * tint


def _background(split: Split, rng: np.random.Generator) -> np.ndarray:
    """A random square of a photograph's columns, float32 (96, 96, 3)."""
    photos = photographs()
    photo = photos[rng.integers(len(photos))]
    first, last = columns(split, photo.shape[1])
    side = int(rng.integers(56, min(photo.shape[0], last - first, 240) + 1))
    top = int(rng.integers(photo.shape[0] - side + 1))
    left = first + int(rng.integers(last - first - side + 1))
    piece = Image.fromarray(photo[top : top + side, left : left + side])
    piece = np.asarray(piece.resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.float32)
    return piece[:, ::-1] if rng.random() < 0.5 else piece


def _watermark(sign: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Its pixels, bool (96, 96), and RGB float32 (96, 96, 3) there: 3 by 3 cells, light on dark or reverse.

    It lies in one of the eight places along the border, some pixels to and fro.
    """
    side = 3 * _CELL
    places = [(r, c) for r in range(3) for c in range(3) if (r, c) != (1, 1)]
    row, col = places[rng.integers(8)]
    top, left = (3 + k * (SIZE - side - 6) // 2 + int(rng.integers(-3, 4)) for k in (row, col))
    cells = np.array([_SIGNS[sign] >> k & 1 for k in range(9)], bool).reshape(3, 3)
    cells = np.kron(cells, np.ones((_CELL, _CELL))).astype(bool)
    light, dark = rng.uniform(180, 255, 3), rng.uniform(0, 60, 3)
    inks = np.zeros((SIZE, SIZE, 3), np.float32)
    inks[top : top + side, left : left + side] = np.where(cells[..., None], light, dark)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[top : top + side, left : left + side] = True
    return mask, inks
