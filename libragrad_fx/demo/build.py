"""Builds the page of ``libragrad demo``: two trained models, plain and balanced, on test scenes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import PurePath

import numpy as np
import torch

import libragrad_fx as lg
from libragrad_fx.demo import data as demo_data
from libragrad_fx.extras import need
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.types import Action, Edit
from libragrad_fx.viz import heatmap
from libragrad_fx.viz.page import Example, Page, Panel, Section, Summary, percent, render

METHODS = {"input_x_gradient": "Input×Gradient", "fullgrad_plus": "FullGrad+"}
SIDES = ("plain", "balanced")
TITLES = {"vit": "Vision transformer", "mixer": "MLP-Mixer"}
MEASURED = 64  # test scenes behind the summary; the first of them are shown
SEED = 1
_TIMES = 4  # screen pixels for each pixel of a scene
_COLUMNS = [(name, side) for name in METHODS.values() for side in SIDES]


@dataclasses.dataclass(frozen=True)
class Measured:
    """One method on one side, for every scene: maps (B, h, w), errors and shares (B,)."""

    maps: np.ndarray
    errors: np.ndarray
    shares: np.ndarray


@dataclasses.dataclass(frozen=True)
class Study:
    """One model on all scenes; ``results`` by (method, side)."""

    name: str
    probabilities: np.ndarray
    scores: np.ndarray
    answers: tuple[int, ...]
    results: Mapping[tuple[str, str], Measured]
    certificate: lg.Certificate
    plan: lg.Plan


def page(shown: int, say: Callable[[str], None] = lambda text: None) -> str:
    """The page as HTML, with ``shown`` pictures for each model. ``say`` gets progress messages."""
    for package in ("jinja2", "sklearn", "timm"):
        need(package, "demo")  # fail before the work, not after it
    scenes = demo_data.scenes(MEASURED, "test", SEED)
    studies = []
    for name in demo_data.MODELS:
        say(f"{TITLES[name]}: {MEASURED} scenes")
        studies.append(study(name, scenes))
    say("drawing")
    return render(describe(studies, scenes, shown), _COLUMNS)


def study(name: str, scenes: demo_data.Scenes) -> Study:
    """Explain a model's own answer on every scene, with each method on both sides."""
    model = demo_data.load_demo_model(name)
    x = demo_data.normalise(scenes.images)
    sides = {"plain": lg.trace(model, x), "balanced": lg.transform(model, x)}
    with torch.no_grad():
        logits = model(x)
    answers = logits.argmax(1).tolist()
    results = {
        (method, side): _measure(gm, x, answers, method, scenes.boxes)
        for method in METHODS
        for side, gm in sides.items()
    }
    return Study(
        name=name,
        probabilities=logits.double().softmax(1).max(1).values.numpy(),
        scores=logits.double().max(1).values.numpy(),
        answers=tuple(answers),
        results=results,
        certificate=lg.verify(model, sides["balanced"], x, answers),
        plan=sides["balanced"].plan,
    )


def _measure(
    gm: CapturedModule, x: torch.Tensor, answers: list[int], method: str, boxes: torch.Tensor
) -> Measured:
    layers = lg.blocks(gm)[:1] if method == "input_x_gradient" else None
    found = lg.attribute(gm, x, answers, method=method, layers=layers)
    maps = found.values.numpy()
    shares = [share_in_box(m, b, demo_data.SIZE) for m, b in zip(maps, boxes.tolist(), strict=True)]
    return Measured(maps, found.completeness_error.numpy(), np.array(shares))


def share_in_box(values: np.ndarray, box: list[int], side: int) -> float:
    """The share of a map's positive part in a box of pixels; a patch's value is spread over its pixels."""
    positive = heatmap.upsample(values.clip(min=0), (side, side), "nearest").astype(np.float64)
    left, top, right, bottom = box
    return float(positive[top:bottom, left:right].sum() / (positive.sum() or 1.0))


# --- into words and pictures


def describe(studies: list[Study], scenes: demo_data.Scenes, shown: int) -> Page:
    left, top, right, bottom = scenes.boxes.unbind(1)
    chance = float(((right - left) * (bottom - top)).double().mean()) / demo_data.SIZE**2
    return Page(
        title="Where does the answer come from?",
        lede=_LEDE,
        reading=_READING,
        legend=heatmap.data_uri(heatmap.legend()),
        measured=(
            f"Means over {len(scenes.labels)} test scenes. What is explained is the model's own answer."
        ),
        certified=f"Of all {len(scenes.labels)} scenes at once: the output is the sum of their scores.",
        summary=tuple(_summary(s, m, chance) for s in studies for m in METHODS),
        models=tuple(_section(s, scenes, shown) for s in studies),
        footer=_footer(studies[0].certificate),
    )


def _summary(found: Study, method: str, chance: float) -> Summary:
    plain, balanced = (found.results[method, side] for side in SIDES)
    errors = (float(plain.errors.mean()), float(balanced.errors.mean()))
    shares = (float(plain.shares.mean()), float(balanced.shares.mean()))
    return Summary(TITLES[found.name], METHODS[method], errors, shares, chance)


def _section(found: Study, scenes: demo_data.Scenes, shown: int) -> Section:
    info = demo_data.demo_model_info(found.name)
    made = found.plan
    return Section(
        title=TITLES[found.name],
        about=(
            f"{info.architecture} of timm, trained on such scenes; it reads"
            f" {percent(info.test_accuracy, 1)} of {info.test_scenes} test scenes"
            " correctly. The pictures below are simply the first of those measured."
        ),
        examples=tuple(_example(found, scenes, i) for i in range(shown)),
        certificate=str(found.certificate),
        certified=found.certificate.ok,
        plan=tuple((e.node, e.module, action(e), e.rule, e.reason) for e in made.edits),
        notes=(*map(str, made.unknown), *map(str, made.unbalanced), *made.notes),
    )


def _example(found: Study, scenes: demo_data.Scenes, i: int) -> Example:
    image, box = scenes.images[i].permute(1, 2, 0).numpy(), scenes.boxes[i].tolist()
    large = np.asarray(heatmap.enlarged(image, _TIMES)) / 255
    results = [found.results[method, side] for method in METHODS for side in SIDES]
    return Example(
        picture=heatmap.data_uri(heatmap.enlarged(image, _TIMES, box)),
        label=int(scenes.labels[i]),
        answer=found.answers[i],
        probability=float(found.probabilities[i]),
        score=float(found.scores[i]),
        panels=tuple(
            Panel(_drawn(large, r.maps[i], box), float(r.errors[i]), float(r.shares[i])) for r in results
        ),
    )


def _drawn(large: np.ndarray, values: np.ndarray, box: list[int]) -> str:
    over = heatmap.overlay(large, values, heatmap.shared_scale(values))
    return heatmap.data_uri(heatmap.enlarged(over, 1, [v * _TIMES for v in box]))


def action(edit: Edit) -> str:
    """An edit in a few words."""
    what = ", ".join(edit.operands) or "output"
    if edit.action is Action.SCALE:
        return f"scale {what} by {edit.factor:g}"
    return f"{edit.action} {what}" if edit.operands else edit.action.replace("_", " ")


def _footer(certificate: lg.Certificate) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in certificate.versions.items())
    return (
        f"Made by libragrad demo with {versions}. Digits and photographs come with scikit-learn."
        f" Policy {PurePath(certificate.policy).name}, rules {certificate.digest[:12]}."
    )


_LEDE = (
    "Two small networks, a vision transformer and an MLP-Mixer, learned to read a handwritten digit"
    " pasted on a piece of a photograph. Of each answer we ask: which parts of the picture speak for"
    " it, and which against it? Where the digit lies is known, so one can see whether an explanation"
    " finds it.",
    "Plain and balanced maps come from the same network with the same weights and, to the last bit,"
    " the same output. Only the backward pass differs: PyTorch's own gradient for the plain map, the"
    " balanced one of LibraGrad for the other.",
)

_READING = (
    (
        "Colours",
        "Red speaks for the answer, blue against it; where the grey picture shows through, nothing is"
        " said. Every map has a scale of its own, so compare patterns and signs, not strengths. A map has"
        " one value for each patch of pixels and is drawn smoothly (bicubic). The frame is the digit's"
        " true box.",
    ),
    (
        "Completeness error",
        "An explanation shares a score (the logit of the answer) out over the picture and the network's"
        " biases. The error is how much of the score it invents or loses, in units of the score; zero is"
        " exact. Input×Gradient, taken at the first block, leaves the biases out, so even balanced it"
        " misses what they contribute; FullGrad+ counts them.",
    ),
    (
        "Red in the box",
        "The part of all red that falls into the digit's box, a patch that the box cuts counted by area."
        " Red strewn evenly over the picture would reach the last column of the table.",
    ),
    (
        "Input×Gradient and FullGrad+",
        "Two ways to turn a gradient into a map. The first multiplies what enters the first block by its"
        " gradient; the second adds that up over all blocks, and every bias times its gradient.",
    ),
)
