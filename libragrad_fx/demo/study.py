"""One model, explained plain and balanced on some inputs: where the page's maps and numbers come from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

import libragrad_fx as lg
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.viz import heatmap

METHODS = {"input_x_gradient": "Input×Gradient", "fullgrad_plus": "FullGrad+"}
SIDES = ("plain", "balanced")
Truth = Callable[[np.ndarray, int], float]
"""Of a map, and the sample that it is of: the share of its red that falls on what is known to count."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One method on one side, for every sample.

    maps:   (B, h, w), or (B, N) over tokens
    errors: (B,) how far each is from the sum that it promises, as a share of that sum
    shares: (B,) by ``Truth``; nan where nothing is known
    """

    maps: np.ndarray
    errors: np.ndarray
    shares: np.ndarray


@dataclasses.dataclass(frozen=True)
class Study:
    """One model on all samples; ``results`` by (method, side).

    by_block: the mean of ``shares`` of the balanced Input×Gradient at the input of the first block, and at
              the input of the last; nan without that method
    """

    title: str
    probabilities: np.ndarray
    answers: tuple[int, ...]
    results: Mapping[tuple[str, str], Measured]
    by_block: tuple[float, float]
    certificate: lg.Certificate
    plan: lg.Plan


def unknown(values: np.ndarray, sample: int) -> float:
    """The ``Truth`` of inputs of which none is known."""
    return math.nan


def study(
    title: str, model: torch.nn.Module, x: torch.Tensor, truth: Truth = unknown,
    methods: Sequence[str] = (*METHODS,), proved: int = 8, answers: Sequence[int] = (),
) -> Study:  # fmt: skip
    """Explain one answer on every sample, with each method on both sides.

    Args:
        answers: which; () for the model's own.
        proved: of the first so many samples the certificate is made, for it takes a ledger.
    """
    two = x[:2]  # a module that is made of them takes any number, and its checks at birth take less time
    sides = {"plain": lg.trace(model, two), "balanced": lg.transform(model, two)}
    with torch.no_grad():
        logits = model(x).double()
    asked = list(answers) or logits.argmax(1).tolist()
    results = {
        (method, side): measured(gm, x, asked, method, truth)
        for method in methods
        for side, gm in sides.items()
    }
    balanced = sides["balanced"]
    by_block = [math.nan, math.nan]
    if "input_x_gradient" in methods:
        last = measured(balanced, x, asked, "input_x_gradient", truth, block=-1)
        by_block = [float(m.shares.mean()) for m in (results["input_x_gradient", "balanced"], last)]
    return Study(
        title=title,
        probabilities=logits.softmax(1).max(1).values.numpy(),
        answers=tuple(asked),
        results=results,
        by_block=(by_block[0], by_block[1]),
        certificate=lg.verify(model, balanced, x[:proved], asked[:proved]),
        plan=balanced.plan,
    )


def measured(
    gm: CapturedModule, x: torch.Tensor, answers: Sequence[int], method: str, truth: Truth, block: int = 0
) -> Measured:
    """block: where Input×Gradient looks, at whose input."""
    layers = [lg.blocks(gm)[block]] if method == "input_x_gradient" else None
    found = lg.attribute(gm, x, list(answers), method=method, layers=layers)
    maps = found.values.numpy()
    errors = found.completeness_error / found.expected.abs()
    return Measured(maps, errors.numpy(), np.array([truth(m, i) for i, m in enumerate(maps)]))


def share_in_box(values: np.ndarray, box: Sequence[int], side: int) -> float:
    """The share of a map's positive part in a box of pixels; a patch's value is spread over its pixels."""
    positive = heatmap.upsample(values.clip(min=0), (side, side), "nearest").astype(np.float64)
    left, top, right, bottom = box
    return float(positive[top:bottom, left:right].sum() / (positive.sum() or 1.0))


def share_of_words(values: np.ndarray, evidence: Sequence[bool]) -> float:
    """The share of the positive part of a map (N,) on the words of evidence; those behind are padding."""
    positive = values.clip(min=0)
    return float(positive[: len(evidence)][list(evidence)].sum() / (positive.sum() or 1.0))
