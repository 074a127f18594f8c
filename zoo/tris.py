"""XAI-TRIS: tetrominoes on noise, made so that it is known which pixels say the class. Clark et al. 2024.

Pictures are grey, 64 x 64 or 8 x 8. The class is which tetromino is there, a T or an L, or (``xor``)
whether the two have the same sign.

| scenario | how the tetrominoes are put on the background |
|---|---|
| ``linear`` | added, each at a place of its own |
| ``multiplicative`` | the background is dimmed there |
| ``translations_rotations`` | added, at any place, in any of four turns |
| ``xor`` | both added: of one sign in class 0, of two in class 1 |

The truth F⁺ of a picture are the pixels of its tetromino; but where places are fixed, those of both, for
the absence of one says as much as the presence of the other. With the backgrounds ``correlated`` and
``photographs``, pixels outside of F⁺ are suppressors: a model may use them to cancel the noise inside, and
by themselves they say nothing about the class. ``white`` has none.

Patterns, places, smoothing and shares of the signal are those of the authors' configuration. Here each
sample is drawn by itself. So signal and noise are divided by the norms that they have on average, not by
those of the whole set, and a picture is cut at five standard deviations of its noise, not divided by the
largest value of the set. ``photographs`` are random cuts of scikit-image's, in the place of ImageNet's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image

from libragrad_fx.errors import InputError
from libragrad_fx.extras import need

Scenario = Literal["linear", "multiplicative", "translations_rotations", "xor"]
Background = Literal["white", "correlated", "photographs"]
PHOTOS = (
    "astronaut",
    "brick",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "rocket",
)
CLASSES = ("T", "L")
XOR_CLASSES = ("same sign", "other sign")
PATTERNS = np.array([[[1, 0], [1, 1], [1, 0]], [[1, 0], [1, 0], [1, 1]]], float)
PLACES = ((1, 1), (4, 5))  # of the upper left corner, on a grid of 8 x 8
SHARES: dict[tuple[int, str], tuple[float, float, float]] = {
    (64, "linear"): (0.03, 0.02, 0.06), (64, "multiplicative"): (0.2, 0.65, 0.2),
    (64, "translations_rotations"): (0.575, 0.375, 0.03), (64, "xor"): (0.35, 0.15, 0.13),
    (8, "linear"): (0.18, 0.0125, 0.15), (8, "multiplicative"): (0.7, 0.1, 0.3),
    (8, "translations_rotations"): (0.65, 0.2, 0.5), (8, "xor"): (0.35, 0.15, 0.25),
}  # fmt: skip
"""α, by side and scenario, of each background."""
SEEDS = {"train": 0, "val": 1, "test": 2}
_SMOOTHING = {64: 10, 8: 3}  # of the correlated background: standard deviation in pixels
_EDGE = 1.5  # of the Gaussian that blurs large patterns
_SEEN = 0.05  # of a blurred pattern: pixels that count
_CUT = 5  # standard deviations of the background


class Sample(NamedTuple):
    """picture: float64 (side, side) in [-1, 1]; mask: bool (side, side), F⁺."""

    picture: np.ndarray
    label: int
    mask: np.ndarray


def sample(
    index: int, scenario: Scenario = "linear", background: Background = "white", side: int = 64,
    seed: int = 0,
) -> Sample:  # fmt: skip
    """Sample ``index`` of a set; labels are 0 and 1 in turn.

    Raises:
        InputError: no such scenario, background or side.
    """
    if scenario not in get_args(Scenario) or background not in get_args(Background):
        known = ", ".join((*get_args(Scenario), *get_args(Background)))
        raise InputError(f"no pictures of {scenario} on {background}: {known} are there")
    if side not in _SMOOTHING:
        raise InputError(f"pictures have 64 or 8 pixels along a side, not {side}")
    draw, label = np.random.default_rng([seed, index]), index % 2
    share = SHARES[side, scenario][get_args(Background).index(background)]
    noise = _noise(draw, background, side)
    signal, mask = _signal(draw, scenario, side, label)
    if scenario == "multiplicative":
        x = (1 - share * signal) * noise
    else:
        x = share * side * signal / _size(scenario, side) + (1 - share) * noise
    return Sample((x / _CUT).clip(-1, 1), label, mask)


def normalised(found: Sequence[Sample]) -> torch.Tensor:
    """Pictures as models take them: float32 (B, 3, side, side), thrice the same, in steps of a byte."""
    levels = np.stack([(127.5 * (1 + one.picture)).round() for one in found])
    return torch.from_numpy(levels / 127.5 - 1).float()[:, None].expand(-1, 3, -1, -1)


# --- the signal


def _signal(
    draw: np.random.Generator, scenario: Scenario, side: int, label: int
) -> tuple[np.ndarray, np.ndarray]:
    """(side, side) and F⁺."""
    if scenario == "translations_rotations":
        cell, pattern = _cell(scenario, side), np.rot90(PATTERNS[label], int(draw.integers(4)))
        y, x = (draw.integers(side - cell * n + 1) for n in pattern.shape)
        found = _put(pattern, cell, side, int(y), int(x))
        return found, np.asarray(found >= _SEEN)
    both = _fixed(side)
    mask = np.asarray((both >= _SEEN).any(0))
    if scenario != "xor":
        return both[label], mask
    first = draw.choice((-1, 1))
    return first * both[0] + (first if label == 0 else -first) * both[1], mask


def _cell(scenario: Scenario, side: int) -> int:
    """Pixels along the side of one of a tetromino's four squares."""
    return max(1, side // (16 if scenario == "translations_rotations" else 8))


def _put(pattern: np.ndarray, cell: int, side: int, y: int, x: int) -> np.ndarray:
    """(side, side): a pattern with its upper left corner at (y, x), its edges blurred if it is large."""
    large, found = np.kron(pattern, np.ones((cell, cell))), np.zeros((side, side))
    found[y : y + large.shape[0], x : x + large.shape[1]] = large
    blur = _gaussian(side, _EDGE)
    return blur @ found @ blur.T if cell > 3 else found


@functools.cache
def _fixed(side: int) -> np.ndarray:
    """(2, side, side): T and L at their places."""
    cell = side // 8
    pairs = zip(PATTERNS, PLACES, strict=True)
    return np.stack([_put(pattern, cell, side, cell * y, cell * x) for pattern, (y, x) in pairs])


@functools.cache
def _size(scenario: Scenario, side: int) -> float:
    """The norm of a signal: the root of the mean square over both classes."""
    found = _fixed(side)
    if scenario == "translations_rotations":
        found = np.stack([_put(p, _cell(scenario, side), side, side // 2, side // 2) for p in PATTERNS])
    squares = np.square(found).sum((1, 2))
    return float(np.sqrt(squares.sum() if scenario == "xor" else squares.mean()))


# --- the background


def _noise(draw: np.random.Generator, background: Background, side: int) -> np.ndarray:
    """(side, side), of mean 0 and, on average over pixels, variance 1."""
    if background == "photographs":
        return _cut(draw, side)
    white = draw.standard_normal((side, side))
    if background == "white":
        return white
    matrix = _gaussian(side, _SMOOTHING[side])
    return matrix @ white @ matrix.T * side / np.square(matrix).sum()


@functools.cache
def _gaussian(side: int, deviation: float) -> np.ndarray:
    """(side, side): what blurs a column; beyond the edges it is mirrored."""
    return need("scipy.ndimage", "evaluate").gaussian_filter1d(np.eye(side), deviation, axis=0)


def _cut(draw: np.random.Generator, side: int) -> np.ndarray:
    """A random square of a photograph, at least 64 pixels wide."""
    grey = _photograph(int(draw.integers(len(PHOTOS))))
    size = int(draw.integers(64, min(grey.size) + 1))
    x, y = (int(draw.integers(n - size + 1)) for n in grey.size)
    levels = np.asarray(grey.resize((side, side), box=(x, y, x + size, y + size)), float)
    return (levels - levels.mean()) / max(float(levels.std()), 1.0)


@functools.cache
def _photograph(index: int) -> Image.Image:
    """In grey."""
    levels = np.asarray(getattr(need("skimage.data", "real"), PHOTOS[index])())
    levels = levels.astype(np.uint8) * 255 if levels.dtype == np.bool_ else levels
    return Image.fromarray(levels).convert("L")
