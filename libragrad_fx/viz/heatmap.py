"""Maps as pictures: scaled, coloured (``palette``), and laid over what the model saw.

A map is multiplied onto its picture in pale grey: zero leaves the picture as it is, darker means stronger.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, ImageDraw

from libragrad_fx.errors import InputError
from libragrad_fx.viz.palette import colours

QUANTILE = 0.99  # the scale ends at this quantile of |values|, so that outliers do not wash out the rest
COVER = 0.7  # how far the picture fades under a map: of 0, it keeps its contrast, of 1 it is gone
Sign = Literal["all", "positive", "negative", "absolute_value"]
Way = Literal["blended_heat_map", "heat_map", "original_image", "masked_image", "alpha_scaling"]
WAYS: tuple[str, ...] = get_args(Way)
_FILTERS = {"smooth": Image.Resampling.BICUBIC, "nearest": Image.Resampling.NEAREST}
_MOST_FRAMES = 8
_LEAST = 200  # screen pixels: a smaller picture is drawn with larger pixels, so that its map is smooth


# --- scaling


def signed_part(values: np.ndarray, sign: Sign) -> np.ndarray:
    """What of a map is shown; of one sign, as positive numbers."""
    parts = {"all": lambda v: v, "positive": lambda v: v.clip(min=0),
             "negative": lambda v: (-v).clip(min=0), "absolute_value": np.abs}  # fmt: skip
    if sign not in parts:
        raise InputError(f"sign is one of {', '.join(parts)}; got {sign!r}")
    return parts[sign](values)


def shared_scale(*maps: np.ndarray, quantile: float = QUANTILE) -> float:
    """The end of a colour scale that all ``maps`` share: positive, also for maps of zeros or of nan."""
    found = [np.abs(m[np.isfinite(m)]) for m in maps]
    tops = [np.quantile(m, quantile) or m.max() for m in found if m.size]
    return float(max(tops, default=0.0)) or 1.0


def upsample(
    values: np.ndarray, size: tuple[int, int], how: Literal["smooth", "nearest"] = "smooth"
) -> np.ndarray:
    """(h, w) -> (H, W) = ``size``, float32."""
    image = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(image.resize((size[1], size[0]), _FILTERS[how]))


def as_picture(values: np.ndarray) -> np.ndarray:
    """A map of any shape as one of a picture (H, W): frames or slices in a row, with gaps of nan.

    At most eight are taken, evenly spaced; further axes in front are frames of frames.
    """
    if values.ndim < 2:
        return values.reshape(1, -1)
    if values.ndim == 2:
        return values
    frames = values.reshape(-1, *values.shape[-2:])
    chosen = frames[np.unique(np.linspace(0, len(frames) - 1, _MOST_FRAMES).round().astype(int))]
    gap = np.full((frames.shape[1], max(1, frames.shape[2] // 16)), np.nan)
    parts = [part for frame in chosen for part in (frame, gap)]
    return np.concatenate(parts[:-1], 1)


# --- drawing


def drawn(
    values: np.ndarray,
    image: np.ndarray | None,
    scale: float,
    signed: bool = True,
    way: Way = "blended_heat_map",
    cover: float = COVER,
) -> np.ndarray:
    """A map as a picture (H, W, 3) in [0, 1]; of the size of ``image`` (H, W, 3), or a multiple.

    Args:
        way: a ``method`` of Captum's ``visualize_image_attr``.
        cover: how far the picture fades under the map.
    """
    if way not in WAYS:
        raise InputError(f"a picture is drawn by one of {', '.join(WAYS)}; got {way!r}")
    if values.ndim != 2 or image is None:  # frames, or nothing to lay it on
        return colours(as_picture(values), scale, signed)
    image = larger(image)
    if way == "original_image":
        return image
    if way == "blended_heat_map":
        return overlay(image, values, scale, signed=signed, cover=cover)
    smooth = upsample(values, image.shape[:2])
    if way == "heat_map":
        return colours(smooth, scale, signed)
    seen = np.nan_to_num(np.abs(smooth) / scale).clip(0, 1)[..., None]
    return image * seen if way == "masked_image" else image * seen + 1 - seen


def larger(image: np.ndarray) -> np.ndarray:
    """A small picture (H, W, 3) with larger pixels."""
    times = -(-_LEAST // min(image.shape[:2]))
    return image.repeat(times, 0).repeat(times, 1)


def overlay(
    image: np.ndarray,
    values: np.ndarray,
    scale: float,
    signed: bool = True,
    cover: float = COVER,
) -> np.ndarray:
    """A map (h, w) over an image (H, W, 3) in [0, 1]; same range and shape as the image."""
    grey = image @ np.array([0.299, 0.587, 0.114])
    grey = 1 - (1 - cover) * (grey.max() - grey) / (np.ptp(grey) or 1)
    return colours(upsample(values, image.shape[:2]), scale, signed) * grey[..., None]


def to_image(image: np.ndarray) -> Image.Image:
    """An array (H, W, 3) in [0, 1] as a picture."""
    return Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8))


def enlarged(image: np.ndarray, times: int, box: Sequence[int] | None = None) -> Image.Image:
    """An image (H, W, 3) in [0, 1] with square pixels; ``box`` (left, top, right, bottom) outlined."""
    whole = to_image(image)
    whole = whole.resize((whole.width * times, whole.height * times), Image.Resampling.NEAREST)
    if box is not None:
        left, top, right, bottom = (int(v) * times for v in box)
        draw = ImageDraw.Draw(whole)
        draw.rectangle((left - 1, top - 1, right, bottom), outline=(0, 0, 0))
        draw.rectangle((left, top, right - 1, bottom - 1), outline=(255, 255, 255))
    return whole


def data_uri(image: Image.Image, form: Literal["PNG", "WEBP"] = "PNG", **options: Any) -> str:
    """options: of Pillow's ``save``."""
    buffer = io.BytesIO()
    image.save(buffer, form, **({"optimize": True} | options))
    return f"data:image/{form.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def legend(width: int = 256, signed: bool = True) -> Image.Image:
    """The colour scale, from the most negative (or zero) on the left to the most positive."""
    return to_image(colours(np.linspace(-1 if signed else 0, 1, width), 1.0, signed)[None])
