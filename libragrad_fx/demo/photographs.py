"""Photographs and a real vision transformer, and what to ask of a model that has no classes."""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from PIL import Image
from torch import nn

from libragrad_fx.demo import sources
from libragrad_fx.extras import need

SIDE = 224  # pixels that the model sees
SHOWN = 448  # pixels on the page
OF_SKIMAGE = ("astronaut", "chelsea", "coffee", "rocket")
"""In color, and in scikit-image's own package: nothing is downloaded."""


def photographs() -> dict[str, Image.Image]:
    """scikit-learn's two and, where scikit-image is installed, four of its own, by name; square."""
    found = {n: need("sklearn.datasets", "demo").load_sample_image(f"{n}.jpg") for n in sources.PHOTOGRAPHS}
    if importlib.util.find_spec("skimage") is not None:
        pictures = need("skimage.data", "real")
        found |= {name: getattr(pictures, name)() for name in OF_SKIMAGE}
    return {name: middle(levels) for name, levels in found.items()}


def middle(levels: np.ndarray) -> Image.Image:
    """The largest square in the middle of a picture (H, W, 3), as ``SHOWN`` times ``SHOWN``."""
    whole = Image.fromarray(np.ascontiguousarray(levels))
    side = min(whole.size)
    left, top = (whole.width - side) // 2, (whole.height - side) // 2
    box = (left, top, left + side, top + side)
    return whole.crop(box).resize((SHOWN, SHOWN), Image.Resampling.BICUBIC)


def against_the_others(features: torch.Tensor) -> torch.Tensor:
    """(K, C) -> (K, C): of each row, the direction from the mean of the other rows to it, of length one."""
    return nn.functional.normalize(features - features.mean(0), dim=1)


def recognising(encoder: nn.Module, x: torch.Tensor) -> nn.Sequential:
    """The encoder with a linear head that was not trained: logit k says how far a picture's features lie in
    the direction from the other pictures of ``x`` to picture k."""
    with torch.no_grad():
        rows = against_the_others(encoder(x))
    head = nn.Linear(rows.shape[1], len(rows), bias=False)
    head.weight = nn.Parameter(rows)
    return nn.Sequential(encoder, head).eval()
