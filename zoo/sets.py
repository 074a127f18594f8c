"""Sets of pictures and of texts that are on this machine: ``open_data("zoo.sets:photos")``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from PIL import Image

from libragrad_fx.demo import sentences as verbs
from libragrad_fx.demo import sources
from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.data import Data, Item, Parts
from libragrad_fx.extras import need
from zoo import articles as insects
from zoo import prompts as prompting
from zoo import topics as subjects
from zoo import tris as tetrominoes
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
        if name in sources.PHOTOGRAPHS:
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
    names = (*PHOTOS, "motorcycle", *sources.PHOTOGRAPHS)
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
    sources.require("fashion-mnist")
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
    sources.require("fashion-mnist")
    origin = f"zoo/scenes.py: shortcut, {split}, seed {seed}; articles of Fashion-MNIST"
    return Data(f"watermarks-{split}", count, Watermarks(split, seed), CLASSES, origin)


@dataclasses.dataclass(frozen=True)
class Articles:
    """Insects of ``zoo/articles.py``, as ``Data.get``."""

    seen: insects.Scenes
    variants: torch.Tensor
    name: str

    def __call__(self, index: int) -> Item:
        one = self.seen[index : index + 1]
        where, around = (found[0].numpy() for found in (insects.masks(one), insects.object_masks(one)))
        kinds, draw = self.variants.numpy(), functools.partial(_insect, insects.painter(one))
        whole = draw(np.ones(len(where), bool), np.ones(len(around), bool))
        label = int(one.labels[0])
        parts = Parts(kinds, where, around, draw)
        return Item(f"{self.name}/{index}", whole, label, {label: np.asarray(where.any(0))}, parts=parts)


def _insect(paint: insects.Painter, parts: np.ndarray, objects: np.ndarray) -> Image.Image:
    x = paint(torch.from_numpy(parts)[None], torch.from_numpy(objects)[None])[0]
    return Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy())


def articles(classes: int = 20, count: int = 1000, seed: int = 0) -> Data:
    """Insects whose five parts, and six objects around them, can be left out. The mask is of all parts.

    Args:
        classes: how many there are; they do not depend on ``seed``.
        seed: of poses, grounds and objects. Another ``count`` is another draw.

    Raises:
        InputError: another number of classes than 5 to 500.
    """
    variants = insects.classes(classes)
    name = f"articles/{classes}/{count}/{seed}"
    get = Articles(insects.scenes(variants, count, seed), variants, name)
    names = tuple(map(str, range(classes)))
    return Data("articles", count, get, names, f"zoo/articles.py: {classes} classes, seed {seed}")


@dataclasses.dataclass(frozen=True)
class Tris:
    """Tetrominoes of ``zoo/tris.py``, as ``Data.get``."""

    scenario: tetrominoes.Scenario
    background: tetrominoes.Background
    side: int
    seed: int

    def __call__(self, index: int) -> Item:
        found = tetrominoes.sample(index, self.scenario, self.background, self.side, self.seed)
        grey = Image.fromarray((127.5 * (1 + found.picture)).round().astype(np.uint8))
        name = f"tris/{self.scenario}/{self.background}/{self.side}/{self.seed}/{index}"
        return Item(name, grey.convert("RGB"), found.label, {found.label: found.mask})


def tris(
    scenario: tetrominoes.Scenario = "xor",
    background: tetrominoes.Background = "correlated",
    side: int = 64,
    count: int = 1000,
    seed: int = tetrominoes.SEEDS["test"],
) -> Data:
    """XAI-TRIS: tetrominoes with F⁺ as the mask. The seed of the test set is that of no training.

    Raises:
        InputError: no such scenario, background or side.
    """
    get = Tris(scenario, background, side, seed)
    get(0)
    names = tetrominoes.XOR_CLASSES if scenario == "xor" else tetrominoes.CLASSES
    origin = f"zoo/tris.py: {scenario} on {background}, {side} x {side}, seed {seed}"
    return Data(f"tris-{scenario}-{background}-{side}", count, get, names, origin)


def tris_steps(picture: Image.Image) -> torch.Tensor:
    """A picture as the models of ``data="tris"`` in ``zoo/trained.py`` take it: (3, 64, 64) in [-1, 1]."""
    small = picture.resize((64, 64), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small, np.float32)).permute(2, 0, 1) / 127.5 - 1


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
    """The first sentences of a split of ``libragrad_fx/demo/sentences.py``, with the words that the label
    depends on.

    Raises:
        InputError: no such split.
    """
    verbs.sentence(split, 0, seed)
    origin = f"libragrad_fx.demo.sentences: {split}, seed {seed}"
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
