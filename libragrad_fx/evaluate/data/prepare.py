"""A sample as a model wants it: its picture and its masks, resized and cut alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from PIL import Image

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.data.items import Item
from libragrad_fx.explain.pixels import Pixels, pixels

Steps = Callable[[Image.Image], torch.Tensor]


@functools.lru_cache(maxsize=16)
def geometry(steps: Steps) -> Pixels:
    """How a preprocessing resizes and cuts. It is tried on some pictures, which takes seconds, once.

    Raises:
        InputError: in a way that masks cannot follow.
    """
    try:
        return pixels(steps)
    except InputError as e:
        raise InputError(f"masks cannot follow this model's preprocessing of pictures: {e}") from e


def prepared(
    item: Item, steps: Steps, way: Pixels | None = None
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """The tensor (3, H, W) of a picture, and its masks by class: bool (H, W).

    Masks are resized by the nearest pixel to each new pixel's centre (torch's "nearest-exact") and cut like
    the picture (LibraGrad's protocol of segmentation).

    Args:
        steps: the model's own preprocessing.
        way: its ``geometry``, if it is known already.

    Raises:
        InputError: the sample is a text, or masks cannot follow ``steps``.
    """
    if isinstance(item.content, str):
        raise InputError(f"{item.id} is a text, and this model takes pictures")
    x = steps(item.content)
    if not item.masks:
        return x, {}
    way = way or geometry(steps)
    if tuple(x.shape[-2:]) != way.size:
        raise InputError(
            f"{item.id} becomes {tuple(x.shape[-2:])}, and others {way.size}: masks cannot follow"
        )
    return x, {c: torch.from_numpy(way.mask(mask)) for c, mask in item.masks.items()}


def covering(masks: Mapping[int, torch.Tensor], least: float = 0.05) -> dict[int, torch.Tensor]:
    """The masks that cover at least a share of the transformed picture; 5 % in LibraGrad's protocol."""
    return {c: mask for c, mask in masks.items() if int(mask.sum()) / mask.numel() >= least}


def largest(masks: Mapping[int, torch.Tensor]) -> int | None:
    """The class of the largest mask, the lower index of equal ones; None if there is no mask.

    It is both mask and target in LibraGrad's protocol of segmentation.
    """
    return min(masks, key=lambda c: (-int(masks[c].sum()), c), default=None)
