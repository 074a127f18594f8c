"""Metrics that explain again: another model, another picture, another class.

They get what other metrics get (``measures``), and ``explain``: the same method under the same policy, of
another case and other classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from libragrad_fx.attribution import Attribution, blocks
from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.config import MaxSensitivitySpec, PartsSpec, RandomisationSpec
from libragrad_fx.evaluate.measures import Case, Row, on_grid, rows
from libragrad_fx.metrics import enlarged, sanity
from libragrad_fx.metrics import parts as protocol
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.module.walk import path_of

Tensor = torch.Tensor
Explain = Callable[[Case, Tensor], Attribution]
"""From a case and the classes (B,) to explain."""


def randomisation(
    case: Case, found: Attribution, classes: Tensor, spec: RandomisationSpec, explain: Explain
) -> Iterator[Row]:
    """Likeness to the maps of a model whose parameters are drawn anew, step by step. It should be small.

    | measure | what it says |
    |---|---|
    | ``spearman``, ``ssim`` | means over the steps |
    | ``spearman@i``, ``ssim@i`` | after step i, from 0; ``how`` names what was drawn last |
    | ``complexity_rise`` | efficient MPRT: how much more complex the map of a random model is |
    """

    def maps(model: torch.nn.Module, inputs: Tensor) -> Tensor:
        if model is case.subject.module:
            return found.values
        return explain(dataclasses.replace(case, subject=case.subject.with_weights(model)), classes).values

    model, inputs = case.subject.module, case.inputs
    each = sanity.randomisation(model, maps, inputs, order=spec.order, blocks=_blocks(case), seed=spec.seed)
    for name, likeness in (("spearman", each.spearman), ("ssim", each.ssim)):
        yield from rows(name, likeness.mean(0), classes)
        for i, (step, values) in enumerate(zip(each.names, likeness, strict=True)):
            yield from rows(f"{name}@{i}", values, classes, step)
    rise = sanity.complexity_rise(model, maps, inputs, bins=spec.bins, seed=spec.seed)
    yield from rows("complexity_rise", rise, classes)


def _blocks(case: Case) -> list[str]:
    """The paths of the model's repeated blocks; none of a model that is not one graph."""
    module = case.module
    return [path_of(call) for call in blocks(module)] if isinstance(module, CapturedModule) else []


def max_sensitivity(
    case: Case, found: Attribution, classes: Tensor, spec: MaxSensitivitySpec, explain: Explain
) -> Iterator[Row]:
    """``max_sensitivity``: the largest change of the map under noise, relative to the map.

    Raises:
        InputError: of texts, whose ids take no noise.
    """
    if len(case.size) == 1:
        raise InputError("the tokens of a text take no noise: max_sensitivity is of pictures")

    def maps(model: torch.nn.Module, inputs: Tensor) -> Tensor:
        if inputs is case.inputs:
            return found.values
        return explain(dataclasses.replace(case, inputs=inputs), classes).values

    values = sanity.max_sensitivity(
        case.subject.module, maps, case.inputs, radius=spec.radius, samples=spec.samples, seed=spec.seed
    )
    yield from rows("max_sensitivity", values, classes)


def parts(
    case: Case, found: Attribution, classes: Tensor, spec: PartsSpec, explain: Explain
) -> Iterator[Row]:
    """FunnyBirds' scores of each picture (``metrics.parts``), from 2^P + O forwards of the batch, shared by
    methods and policies, and maps of the prediction and of two rivals.

    | measure | score |
    |---|---|
    | ``csdc@t``, ``preservation@t``, ``deletion@t``, ``distractibility@t`` | at the threshold t |
    | ``csdc``, ``preservation``, ``deletion``, ``distractibility`` | means over the thresholds |
    | ``background_independence``, ``single_deletion``, ``target_sensitivity`` | they have no threshold |

    The paper takes the one threshold that is best on average over the pictures: ``metrics.parts.scores``.
    """
    size = (case.inputs.shape[-2], case.inputs.shape[-1])
    seen = case.removed

    def maps(targets: Tensor) -> Tensor:
        one = found if torch.equal(targets, classes) else explain(case, targets)
        return enlarged(on_grid(one, one.grid or ()), size)

    shares = protocol.thresholds(spec.thresholds)
    numbers = protocol.measured(seen, maps, shares, margin=spec.margin)
    for name, key in _SCORES.items():
        values = numbers[key]
        if values.ndim == 1:
            yield from rows(name, values, classes)
            continue
        yield from rows(name, values.mean(1), classes)
        for i, share in enumerate(shares.tolist()):
            yield from rows(f"{name}@{share:.3g}", values[:, i], classes)


_SCORES = {
    "csdc": "csdc", "preservation": "pc", "deletion": "dc", "distractibility": "distracted",
    "background_independence": "independent", "single_deletion": "deleted",
    "target_sensitivity": "sensitive",
}  # fmt: skip
AGAIN: Mapping[str, Callable[[Case, Attribution, Tensor, Any, Explain], Iterator[Row]]] = {
    "randomisation": randomisation, "max_sensitivity": max_sensitivity, "parts": parts,
}  # fmt: skip
