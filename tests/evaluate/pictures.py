"""Small pictures and masks in files, for sets that the tests make themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (12, 8), mode: str = "RGB") -> Image.Image:
    """Noise of (W, H)."""
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(levels).convert(mode)


def put(file: Path, image: Image.Image, **options: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **options)
    return file


def mask(values: np.ndarray) -> Image.Image:
    """Grey levels, or values above 255 coded as R + 256 G + 65536 B."""
    if values.max() < 256:
        return Image.fromarray(values.astype(np.uint8))
    return Image.fromarray(np.stack([values >> 8 * k & 255 for k in range(3)], -1).astype(np.uint8))
