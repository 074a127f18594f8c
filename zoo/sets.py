"""Sets of pictures and of texts that are on this machine: ``open_data("zoo.sets:photos")``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from PIL import Image

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.data import Data, Item
from libragrad_fx.extras import need
from zoo import prompts as prompting
from zoo import real
from zoo import sentences as verbs
from zoo import topics as subjects
from zoo.scenes import CLASSES, KINDS, SIZE, SPLITS, Kind, Split, normalised, scene

PHOTOS = (
    "astronaut", "brick", "chelsea", "coffee", "coins", "grass", "gravel", "horse", "hubble_deep_field",
    "immunohistochemistry", "page", "retina", "rocket", "text",
)  # fmt: skip
"""Those of scikit-image that come with it."""


@dataclasses.dataclass(frozen=True)
class Photos:
    """Photographs by name, as ``Data.get``."""

    names: tuple[str, ...]

    def __call__(self, index: int) -> Item:
        name = self.names[index]
        if name in real.PHOTOGRAPHS:
            levels = need("sklearn.datasets", "real").load_sample_image(f"{name}.jpg")
        elif name == "motorcycle":
            levels = need("skimage.data", "real").stereo_motorcycle()[0]
        else:
            levels = getattr(need("skimage.data", "real"), name)()
        levels = np.asarray(levels)
        levels = levels.astype(np.uint8) * 255 if levels.dtype == np.bool_ else levels
        return Item(name, Image.fromarray(levels).convert("RGB"))


def photos() -> Data:
    """scikit-image's and scikit-learn's photographs, without labels."""
    names = (*PHOTOS, "motorcycle", *real.PHOTOGRAPHS)
    return Data("photos", len(names), Photos(names), (), "scikit-image and scikit-learn")


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Scenes of ``zoo/scenes.py``, as ``Data.get``."""

    split: Split
    kind: Kind
    seed: int

    def __call__(self, index: int) -> Item:
        found = scene(self.split, index, self.kind, self.seed)
        name = f"{self.kind}/{self.split}/{self.seed}/{index}"
        return Item(name, Image.fromarray(found.picture), found.label, found.masks)


def scenes(split: Split = "test", count: int = 1000, kind: Kind = "scenes", seed: int = 0) -> Data:
    """The first scenes of a split, with the masks of all articles.

    Raises:
        InputError: no such split or kind.
        FileNotFoundError: Fashion-MNIST is not here; with the command.
    """
    if split not in SPLITS or kind not in KINDS:
        raise InputError(f"no scenes {kind} {split}: {', '.join(KINDS)} and {', '.join(SPLITS)} are there")
    real.require("fashion-mnist")
    origin = f"zoo/scenes.py: {kind}, {split}, seed {seed}; articles of Fashion-MNIST"
    return Data(f"{kind}-{split}", count, Scenes(split, kind, seed), CLASSES, origin)


@dataclasses.dataclass(frozen=True)
class Watermarks:
    """Scenes with a watermark, as ``Data.get``; its place is the one mask, of the class it stands for."""

    split: Split
    seed: int

    def __call__(self, index: int) -> Item:
        found = scene(self.split, index, "shortcut", self.seed)
        assert found.watermark is not None
        assert found.sign is not None
        name = f"shortcut/{self.split}/{self.seed}/{index}"
        return Item(name, Image.fromarray(found.picture), found.label, {found.sign: found.watermark})


def watermarks(split: Split = "test", count: int = 1000, seed: int = 0) -> Data:
    """The first scenes of a split with a watermark. Its class is the label's in some of them.

    Raises:
        InputError: no such split.
        FileNotFoundError: Fashion-MNIST is not here; with the command.
    """
    if split not in SPLITS:
        raise InputError(f"no split {split!r}: {', '.join(SPLITS)} are there")
    real.require("fashion-mnist")
    origin = f"zoo/scenes.py: shortcut, {split}, seed {seed}; articles of Fashion-MNIST"
    return Data(f"watermarks-{split}", count, Watermarks(split, seed), CLASSES, origin)


def steps(picture: Image.Image) -> torch.Tensor:
    """A picture as the models of ``zoo/trained.py`` take it: float32 (3, 96, 96)."""
    return normalised(np.array(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))


# --- texts


@dataclasses.dataclass(frozen=True)
class Made:
    """Texts of a split or task, as ``Data.get``."""

    make: Callable[[str, int, int], Item]
    of: str
    seed: int

    def __call__(self, index: int) -> Item:
        return self.make(self.of, index, self.seed)


def prompts(task: str, count: int = 1000, seed: int = 0) -> Data:
    """The first prompts of a task of ``zoo/prompts.py``. Their label is the next token, by name.

    Raises:
        InputError: no such task.
    """
    prompting.prompt(task, 0, seed)
    return Data(task, count, Made(_prompt, task, seed), (), f"zoo/prompts.py: {task}, seed {seed}")


def _prompt(task: str, index: int, seed: int) -> Item:
    found = prompting.prompt(task, index, seed)
    masks = {found.answer: found.evidence}
    return Item(f"{task}/{seed}/{index}", found.text, found.answer, masks, found.other)


def sentences(split: Split = "test", count: int = 1000, seed: int = 0) -> Data:
    """The first sentences of a split of ``zoo/sentences.py``, with the words that the label depends on.

    Raises:
        InputError: no such split.
    """
    verbs.sentence(split, 0, seed)
    origin = f"zoo/sentences.py: {split}, seed {seed}"
    return Data(f"sentences-{split}", count, Made(_sentence, split, seed), verbs.LABELS, origin)


def _sentence(split: str, index: int, seed: int) -> Item:
    found = verbs.sentence(cast(Split, split), index, seed)
    marks = [[mark] * len(word) for word, mark in zip(found.words, found.evidence, strict=True)]
    evidence = np.array([m for word in marks for m in (*word, False)][:-1])  # a space behind each word
    return Item(f"{split}/{seed}/{index}", " ".join(found.words), found.label, {found.label: evidence})


def topics(split: Split = "test", count: int = 1000, seed: int = 0) -> Data:
    """The first sentences of a split of ``zoo/topics.py``, with the things of both their topics.

    Raises:
        InputError: no such split.
    """
    subjects.sentence(split, 0, seed)
    origin = f"zoo/topics.py: {split}, seed {seed}"
    return Data(f"topics-{split}", count, Made(_topic, split, seed), subjects.CLASSES, origin)


def _topic(split: str, index: int, seed: int) -> Item:
    found = subjects.sentence(cast(Split, split), index, seed)
    return Item(f"{split}/{seed}/{index}", found.text, found.label, found.masks, found.against)
