"""Signed maps as pictures.

Colours are ColorBrewer's red-blue: lightness falls evenly to both sides of a white zero. A map lies
over its image by multiplication, so zero leaves the (paled, grey) image alone.
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
CLIPPED = 0.99  # the scale ends at this quantile of |values|: single outliers would wash out the rest
_FILTERS = {"smooth": Image.Resampling.BICUBIC, "nearest": Image.Resampling.NEAREST}


def shared_scale(*maps: np.ndarray) -> float:
    """The value at the end of a colour scale that all ``maps`` share: positive, also for zeros."""
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
    image: np.ndarray, values: np.ndarray, scale: float, how: Literal["smooth", "nearest"] = "smooth"
) -> np.ndarray:
    """A signed map (h, w) over an image (H, W, 3) in [0, 1]; same range and shape as the image."""
    grey = 0.55 + 0.45 * (image @ np.array([0.299, 0.587, 0.114]))
    return colours(upsample(values, image.shape[:2], how), scale)[..., :3] * grey[..., None]


def enlarged(image: np.ndarray, times: int, box: Sequence[int] | None = None) -> Image.Image:
    """An image (H, W, 3) in [0, 1] with square pixels; ``box`` (left, top, right, bottom) outlined."""
    whole = Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8))
    whole = whole.resize((whole.width * times, whole.height * times), Image.Resampling.NEAREST)
    if box is not None:
        left, top, right, bottom = (int(v) * times for v in box)
        draw = ImageDraw.Draw(whole)
        draw.rectangle((left - 1, top - 1, right, bottom), outline=(0, 0, 0), width=3)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=(255, 255, 255), width=1)
    return whole


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def legend(width: int = 256, height: int = 1) -> Image.Image:
    """The colour scale, from the most negative on the left to the most positive."""
    row = colours(np.linspace(-1, 1, width), 1.0)[None, :, :3]
    return Image.fromarray((np.repeat(row, height, 0) * 255).round().astype(np.uint8))


def figure(
    image: np.ndarray, maps: Sequence[tuple[str, np.ndarray]], title: str, note: str = ""
) -> Any:
    """A matplotlib figure: the image, then each (caption, map) over it, on one signed scale.

    Its size depends on the number of maps alone.
    """
    matplotlib = need("matplotlib", "demo")
    n = len(maps) + 1
    sheet = need("matplotlib.figure", "demo").Figure(
        figsize=(3.6 * n, 4.9), dpi=120, layout="constrained", facecolor="white"
    )
    scale = shared_scale(*(m for _, m in maps))
    axes = sheet.subplots(1, n, squeeze=False)[0]
    drawn = [("input", image), *((caption, overlay(image, m, scale)) for caption, m in maps)]
    for axis, (caption, picture) in zip(axes, drawn, strict=True):
        axis.imshow(picture.clip(0, 1), interpolation="nearest")
        axis.set_title(caption, fontsize=10, loc="left", color="#333333")
        axis.set_axis_off()
    key = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(-scale, scale), COLOURS)
    bar = sheet.colorbar(key, ax=list(axes[1:]), orientation="horizontal", fraction=0.05, pad=0.03)
    bar.set_label("against the class   –   attribution   –   for the class", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    sheet.suptitle(title, fontsize=12, x=0.01, ha="left")
    if note:
        sheet.supxlabel(note, fontsize=8, color="#666666", x=0.01, ha="left")
    return sheet
