"""Sentences about a topic, and which of their words say it.

Two things of one topic and one thing of another are named: "Somebody told us about the violin, the tomato
and the drum." is about music, for "violin" and "drum".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from libragrad_fx.demo.sentences import Split, of_split
from zoo.prompts import filled

_THINGS: Mapping[str, tuple[str, ...]] = {
    "music": ("violin", "drum", "guitar", "piano", "trumpet", "choir", "melody", "orchestra", "flute"),
    "food": ("tomato", "bread", "cheese", "soup", "salad", "butter", "potato", "cake", "sausage"),
    "sport": ("football", "tennis", "goalkeeper", "athlete", "referee", "stadium", "hockey", "marathon"),
    "weather": ("rain", "snow", "storm", "thunder", "fog", "hail", "sunshine", "lightning", "frost"),
    "animals": ("horse", "rabbit", "lion", "monkey", "elephant", "fox", "bear", "wolf", "sheep"),
    "money": ("bank", "loan", "salary", "tax", "debt", "coin", "mortgage", "profit", "budget"),
    "medicine": ("doctor", "nurse", "hospital", "vaccine", "surgery", "patient", "pill", "fever"),
    "travel": ("airport", "train", "passport", "hotel", "suitcase", "ticket", "harbour", "tourist"),
}
CLASSES = (*_THINGS,)
_TEMPLATES = (
    "Somebody told us about the {one}, the {two} and the {three}.",
    "Yesterday we talked about the {one} and the {two} before the {three} was mentioned.",
    "Her letter said little of the {one}, but much of the {two} and the {three}.",
    "There was a story of the {one} and the {two}, and one of the {three}, on the first page.",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Sentence:
    """label: an index into ``CLASSES``. against: that of the topic that is named once. masks: the things of
    either, bool (N,) over characters."""

    text: str
    label: int
    against: int
    masks: Mapping[int, np.ndarray]


def sentence(split: Split, index: int, seed: int = 0) -> Sentence:
    """One sentence: the same for the same arguments. No sentence is in two splits.

    Raises:
        InputError: no such split, or a negative index or seed.
    """
    return of_split(split, index, seed, _drawn, lambda found: tuple(found.text.split()))


def _drawn(rng: np.random.Generator) -> Sentence:
    label, against = map(int, rng.choice(len(CLASSES), 2, replace=False))
    mine = rng.choice(_THINGS[CLASSES[label]], 2, replace=False)
    words = [*map(str, mine), str(rng.choice(_THINGS[CLASSES[against]]))]
    places = [str(p) for p in rng.permutation(["one", "two", "three"])]
    template, named = str(rng.choice(_TEMPLATES)), dict(zip(places, words, strict=True))
    (text, own), (_, other) = (filled(template, named, {*p}) for p in (places[:2], places[2:]))
    return Sentence(text, label, against, {label: own, against: other})
