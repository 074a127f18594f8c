"""Signed maps as pictures.

Colours are ColorBrewer's red-blue: zero is white, and lightness falls evenly to both sides. A map is
multiplied onto its image in pale grey: zero leaves the image as it is, and darker means stronger.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from libragrad_fx.extras import need

COLOURS = "RdBu_r"
CLIPPED = 0.99  # the scale ends at this quantile of |values|, so that outliers do not wash out the rest
PALED = 0.3  # under a map, the darkest place of an image is this much darker than its lightest
_FILTERS = {"smooth": Image.Resampling.BICUBIC, "nearest": Image.Resampling.NEAREST}


def shared_scale(*maps: np.ndarray) -> float:
    """The end of a colour scale that all ``maps`` share: positive, also for maps of zeros."""
    tops = [np.quantile(np.abs(m), CLIPPED) or np.abs(m).max() for m in maps]
    return float(max(tops)) or 1.0


def upsample(
    values: np.ndarray, size: tuple[int, int], how: Literal["smooth", "nearest"] = "smooth"
) -> np.ndarray:
    """(h, w) -> (H, W) = ``size``, float32."""
    image = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(image.resize((size[1], size[0]), _FILTERS[how]))


def colours(values: np.ndarray, scale: float) -> np.ndarray:
    """A signed map as colours: (..., 4) in [0, 1]; zero is white, ``±scale`` the darkest."""
    palette = need("matplotlib", "demo").colormaps[COLOURS]
    return palette(np.clip(values / (2 * scale) + 0.5, 0, 1))


def overlay(
    image: np.ndarray,
    values: np.ndarray,
    scale: float,
    how: Literal["smooth", "nearest"] = "smooth",
) -> np.ndarray:
    """A signed map (h, w) over an image (H, W, 3) in [0, 1]; same range and shape as the image."""
    grey = image @ np.array([0.299, 0.587, 0.114])
    grey = 1 - PALED * (grey.max() - grey) / (np.ptp(grey) or 1)
    return colours(upsample(values, image.shape[:2], how), scale)[..., :3] * grey[..., None]


def enlarged(image: np.ndarray, times: int, box: Sequence[int] | None = None) -> Image.Image:
    """An image (H, W, 3) in [0, 1] with square pixels; ``box`` (left, top, right, bottom) outlined."""
    whole = Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8))
    whole = whole.resize((whole.width * times, whole.height * times), Image.Resampling.NEAREST)
    if box is not None:
        left, top, right, bottom = (int(v) * times for v in box)
        draw = ImageDraw.Draw(whole)
        draw.rectangle((left - 1, top - 1, right, bottom), outline=(0, 0, 0))
        draw.rectangle((left, top, right - 1, bottom - 1), outline=(255, 255, 255))
    return whole


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def legend(width: int = 256, height: int = 1) -> Image.Image:
    """The colour scale, from the most negative on the left to the most positive."""
    row = colours(np.linspace(-1, 1, width), 1.0)[None, :, :3]
    return Image.fromarray((np.repeat(row, height, 0) * 255).round().astype(np.uint8))


# inches of a figure, from the left and from the bottom; a panel is a square of side _SIDE
_SIDE, _GAP, _MARGIN, _FOOT, _HEAD = 3.4, 0.15, 0.2, 0.95, 0.85


def figure(image: np.ndarray, maps: Sequence[tuple[str, np.ndarray]], title: str, note: str = "") -> Any:
    """A matplotlib figure: the image, then each (caption, map) over it, on one signed scale.

    Its size depends only on the number of maps. A caption may have two lines.
    """
    matplotlib = need("matplotlib", "demo")
    n = len(maps) + 1
    width, height = 2 * _MARGIN + n * _SIDE + (n - 1) * _GAP, _FOOT + _SIDE + _HEAD
    sheet = need("matplotlib.figure", "demo").Figure((width, height), dpi=120, facecolor="white")
    scale = shared_scale(*(m for _, m in maps))

    def place(left: float, bottom: float, w: float, h: float) -> Any:
        return sheet.add_axes((left / width, bottom / height, w / width, h / height))

    drawn = [("input", image), *((caption, overlay(image, m, scale)) for caption, m in maps)]
    for i, (caption, picture) in enumerate(drawn):
        axis = place(_MARGIN + i * (_SIDE + _GAP), _FOOT, _SIDE, _SIDE)
        axis.imshow(picture.clip(0, 1), interpolation="nearest")
        axis.set_title(caption, fontsize=9, loc="left", color="#333333")
        axis.set_axis_off()
    key = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(-scale, scale), COLOURS)
    bar = place(_MARGIN + _SIDE + _GAP, _FOOT - 0.3, _SIDE * 0.9, 0.12)
    sheet.colorbar(key, cax=bar, orientation="horizontal", format="%.2g").outline.set_visible(False)
    bar.tick_params(labelsize=8)
    bar.set_xlabel("against the class  –  attribution  –  for the class", fontsize=8)
    sheet.text(_MARGIN / width, 1 - 0.28 / height, title, fontsize=12)
    sheet.text(_MARGIN / width, 0.15 / height, note, fontsize=8, color="#666666")
    return sheet
