"""A few scenes of ``zoo/scenes.py`` as files: for pages and pictures, where Fashion-MNIST is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from libragrad_fx.errors import InputError
from zoo.scenes import CLASSES, normalised, scene

FOLDER = Path(__file__).parent / "kept" / "scenes"


@dataclasses.dataclass(frozen=True)
class Sample:
    """input: float32 (3, 96, 96). label: 0..9, into ``CLASSES``. masks: int64 (96, 96), the class at each
    pixel, 10 for none. file: its picture."""

    input: torch.Tensor
    label: int
    masks: torch.Tensor
    file: Path

    @property
    def name(self) -> str:
        return CLASSES[self.label]


def files() -> list[Path]:
    return sorted(FOLDER.glob("*.png"))


def sample(index: int) -> Sample:
    """One of the scenes.

    Raises:
        InputError: there is no such scene.
    """
    found = files()
    if not 0 <= index < len(found):
        raise InputError(f"there are {len(found)} scenes, no scene {index}")
    levels = np.array(Image.open(found[index]))  # RGB, and 255 less the class at each pixel
    label = int(found[index].stem.rpartition("-")[2])
    masks = torch.from_numpy(255 - levels[..., 3].astype(np.int64))
    return Sample(normalised(levels[..., :3]), label, masks, found[index])


def write(count: int = 8) -> None:
    """Write the first scenes of the test split."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        one = scene("test", i)
        classes = np.full(one.picture.shape[:2], len(CLASSES), np.uint8)
        for c, mask in one.masks.items():
            classes[mask] = c
        levels = np.dstack([one.picture, 255 - classes])
        Image.fromarray(levels, "RGBA").save(FOLDER / f"{i}-{one.label}.png", optimize=True)


if __name__ == "__main__":
    write()
