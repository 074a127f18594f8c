"""How a model wants its pictures, as numbers: found by showing its own preprocessing a few pictures.

Libraries hold it as code of their own. Whoever has no Python (a page in a browser) needs it as data.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps

from libragrad_fx.errors import InputError

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX,
}  # fmt: skip
Way = Literal["edge", "squash", "cover"]
_WIDE = 1024  # pixels of the ramp
_MOST = 2  # levels of 255: resizing a tensor rounds otherwise than resizing a picture


@dataclasses.dataclass(frozen=True)
class Pixels:
    """From a picture to a tensor (C, H, W): resized, cut at its middle, each channel scaled and shifted.

    size:   (H, W) of the tensor
    scaled: (H, W) before the cut
    way:    how it is resized. "edge": its proportions stay, its shorter side becomes that of ``scaled``.
            "squash": to ``scaled``. "cover": what fits ``scaled`` is cut out first
    filter: of Pillow's, one of ``FILTERS``
    floor:  whether an odd rest of the cut goes behind; else Python's ``round`` decides
    shift:  (C,) what black becomes
    gain:   (C,) what white becomes, less ``shift``
    """

    size: tuple[int, int]
    scaled: tuple[int, int]
    way: Way
    filter: str
    floor: bool
    shift: tuple[float, ...]
    gain: tuple[float, ...]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """float32 (C, H, W)."""
        levels = torch.from_numpy(np.array(self.cut(self.resized(image)), np.float64))
        levels = levels.reshape(*self.size, len(self.gain)) / 255
        found = levels * torch.tensor(self.gain).double() + torch.tensor(self.shift).double()
        return found.permute(2, 0, 1).float().contiguous()

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """bool (H, W) of ``size``: a mask of a picture, bool (H, W), goes the picture's way, by the nearest
        pixel to each new one's centre."""
        levels = Image.fromarray(mask.astype(np.uint8) * 255)
        cut = self.cut(self.resized(levels, Image.Resampling.NEAREST))
        return np.array(cut.convert("L")) > 127

    def resized(self, image: Image.Image, how: Image.Resampling | None = None) -> Image.Image:
        """The picture before the cut: resized once more, it stays as it is. ``how``: by another filter."""
        image = image.convert("L" if len(self.gain) == 1 else "RGB")
        (height, width), how = self.scaled, FILTERS[self.filter] if how is None else how
        if self.way == "cover":
            return ImageOps.fit(image, (width, height), how)
        if self.way == "edge":
            side, (w, h) = min(self.scaled), image.size
            width, height = (side, int(side * h / w)) if w <= h else (int(side * w / h), side)
        return image.resize((width, height), how)

    def cut(self, image: Image.Image) -> Image.Image:
        """The middle of a resized picture, of ``size``."""
        (height, width), half = self.size, int if self.floor else round
        left, top = half((image.width - width) / 2), half((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))


def pixels(steps: Callable[[Image.Image], torch.Tensor], also: Sequence[Image.Image] = ()) -> Pixels:
    """What a preprocessing does, as numbers. ``also``: more pictures that they must hold for.

    Raises:
        InputError: it is none that ``Pixels`` describes.
    """
    black, white = (steps(Image.new("RGB", (_WIDE, _WIDE), c)) for c in ("black", "white"))
    shape = tuple(black.shape)
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise _unlike(f"it gives tensors {shape}")
    size = (shape[1], shape[2])
    shift, whole = (t.double().flatten(1).median(1).values.cpu() for t in (black, white))
    if not bool((whole != shift).all()):
        raise _unlike("white becomes what black becomes")
    scaled = _scaled(steps, shift, whole - shift, size)
    numbers = tuple(shift.tolist()), tuple((whole - shift).tolist())
    trials = [*_trials(*scaled), *also]
    wanted = [steps(t) for t in trials]
    unit = (whole - shift).abs().view(-1, 1, 1) / 255

    def far(found: Pixels) -> float:
        pairs = zip(trials, wanted, strict=True)
        return max(float(((found(t) - w.cpu()).abs() / unit).max()) for t, w in pairs)

    tried = (
        Pixels(size, before, way, name, floor, *numbers)
        for before, way, name, floor in _candidates(size, scaled)
    )
    best = min(tried, key=far)
    if (distance := far(best)) > _MOST:
        raise _unlike(f"resizing and cutting at the middle is {distance:.0f} levels of 255 away")
    return best


def _candidates(size: tuple[int, int], scaled: tuple[int, int]) -> Iterator[tuple[Any, ...]]:
    """What may come between ``size`` and the numbers; ``scaled``: of a square picture."""
    ways = [
        (scaled, "squash"),
        *[(scaled, "edge")] * (scaled[0] == scaled[1]),
        *[(size, "cover")] * ({*scaled} == {max(size)}),
    ]
    for way, name, floor in itertools.product(ways, FILTERS, (False, True)):
        yield *way, name, floor


def _scaled(steps: Any, shift: torch.Tensor, gain: torch.Tensor, size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) that a square picture is resized to, from what becomes of two ramps."""
    noise = np.random.default_rng(0).random((_WIDE, _WIDE))  # so that rounding has no pattern
    ramp = (np.linspace(0, 254, _WIDE) + noise).astype(np.uint8)
    found = []
    for axis, side, levels in ((1, size[0], ramp.T), (2, size[1], ramp)):
        made = steps(Image.fromarray(np.ascontiguousarray(levels)).convert("RGB")).double().cpu()
        made = ((made - shift.view(-1, 1, 1)) / gain.view(-1, 1, 1)).mean((0, 3 - axis)).numpy()
        inner = made[side // 8 : side - side // 8]  # at the edges a filter sees less
        slope = float(np.polyfit(np.arange(len(inner)), inner, 1)[0]) if len(inner) > 1 else 0.0
        if not slope > 0:
            raise _unlike("what is right of a picture, or below, is not so in the tensor")
        found.append(round(254 / 255 * _WIDE / (_WIDE - 1) / slope))
    return found[0], found[1]


def _trials(height: int, width: int) -> Iterator[Image.Image]:
    """Pictures of noise: a wide one that is made smaller, a high one that is made larger, a strip of each
    direction; and a pale one, each channel in its own range, for whatever stretches contrasts."""
    draw = np.random.default_rng(0).integers
    sizes = (1.3, 1.9), (0.8, 0.6), (1.1, 5.0), (4.5, 0.9)
    for h, w in sizes:
        yield Image.fromarray(draw(0, 256, (int(h * height) + 1, int(w * width) + 1, 3), np.uint8))
    pale = draw(0, 60, (int(1.3 * height) + 1, int(1.9 * width) + 1, 3), np.uint8)
    yield Image.fromarray(pale + np.array([60, 90, 120], np.uint8))


def _unlike(why: str) -> InputError:
    return InputError(f"this model's preprocessing of pictures is none that a page can do: {why}")
