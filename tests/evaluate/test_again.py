"""What a config can ask beside faithfulness: places, randomised parameters, noise, sets of cells."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch

import libragrad_fx as lg
from libragrad_fx import metrics
from libragrad_fx.errors import InputError
from libragrad_fx.evaluate import Config, evaluate
from libragrad_fx.evaluate.again import AGAIN
from libragrad_fx.evaluate.config import (
    MaxSensitivitySpec,
    MethodSpec,
    PlacesSpec,
    RandomisationSpec,
    SensitivityNSpec,
)
from libragrad_fx.evaluate.inputs import Pictures
from libragrad_fx.evaluate.measures import METRICS, Case, Logit, on_grid
from libragrad_fx.evaluate.subject import Identity, Subject, hashed
from libragrad_fx.metrics import compare, sanity
from tests.evaluate import small

Tensor = torch.Tensor
GRADIENT = MethodSpec(method="input_x_gradient")


class Linear(torch.nn.Module):
    """Logits that are linear in the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3 * 24 * 24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


@functools.cache
def double() -> torch.nn.Module:
    return copy.deepcopy(small.vit()).double().eval()


def case_of(module: torch.nn.Module, masks: Any = ({}, {})) -> Case:
    cpu, nobody = torch.device("cpu"), Identity("", "", "")
    subject = Subject(module, Pictures(small.steps), cpu, torch.float64, nobody)
    drawn = torch.Generator().manual_seed(3)
    inputs = torch.randn(2, 3, 24, 24, dtype=torch.float64, generator=drawn)
    return Case(subject, ["a", "b"], inputs, [0, 1], masks)


def asked(name: str, case: Case, spec: Any, method: MethodSpec = GRADIENT, policy: str = "libra") -> Any:
    """By measure, the numbers of the samples."""
    classes = torch.tensor([0, 2])

    def explain(other: Case, known: Tensor) -> Any:
        return other.attribution(method, policy, known, spec.scalar)

    found = explain(case, classes)
    rows = (
        METRICS[name](case, found, classes, spec)
        if name in METRICS
        else AGAIN[name](case, found, classes, spec, explain)
    )
    by: dict[str, list[float]] = {}
    for row in rows:
        by.setdefault(row.measure, []).append(row.value)
    return by


# --- places


@pytest.mark.slow
def test_a_mask_smaller_than_a_token_is_found_by_its_cell() -> None:
    """One pixel at the corner of the most relevant cell: the most relevant pixel of the enlarged map is
    elsewhere in the cell."""
    masks: list[dict[int, Tensor]] = []
    plain = case_of(double())
    found = plain.attribution(GRADIENT, "libra", torch.tensor([0, 2]), "probability").values
    for values, target in zip(found, (0, 2), strict=True):
        at = int(values.flatten().argmax())
        mask = torch.zeros(24, 24, dtype=torch.bool)
        mask[8 * (at // 3) + 7, 8 * (at % 3)] = True
        masks.append({target: mask})
    case = case_of(double(), masks)
    one = asked("places", case, PlacesSpec(least=0, emd=12))
    assert one["pointing_cell"] == [1, 1]
    assert one["pointing"] == [0, 0]
    assert asked("places", case, PlacesSpec(least=0, tolerance=12))["pointing"] == [1, 1]
    maps = metrics.enlarged(found, 24)
    inside = torch.stack([m[t] for m, t in zip(masks, (0, 2), strict=True)])
    assert one["precision"] == metrics.precision_at_k(maps, inside).tolist()
    assert one["emd"] == metrics.emd_score(maps, inside, grid=(12, 12)).tolist()
    ten = asked("places", case, PlacesSpec(least=0, k=10))
    assert ten["precision"] == metrics.precision_at_k(maps, inside, 10).tolist()
    assert "emd" not in ten
    with pytest.raises(InputError, match=r"a grid of \(7, 7\) does not divide"):
        asked("places", case, PlacesSpec(least=0, emd=7))


# --- randomised parameters


def test_each_step_is_the_map_of_a_model_with_those_weights() -> None:
    """By autograd and a hook, without a capture. The user's model, and what is kept of it, stay."""
    case, spec = case_of(double()), RandomisationSpec(scalar="logit", seed=5)
    size, classes = case.inputs.shape[1:], torch.tensor([0, 2])
    before, kept = hashed(case.subject.module), case.subject.captured(size, "autograd")
    first = case.attribution(GRADIENT, "autograd", classes, "logit").values
    found = asked("randomisation", case, spec, policy="autograd")

    def plain(model: Any, x: Tensor) -> Tensor:
        given: list[Tensor] = []
        handle = model.blocks.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        scalars = Logit(classes)(model(x))
        handle.remove()
        product = given[0] * torch.autograd.grad(scalars.sum(), given[0])[0]
        return product.sum(2)[:, 1:].unflatten(1, (3, 3)).detach()

    paths = ["blocks.0", "blocks.1"]
    want = metrics.randomisation(case.subject.module, plain, case.inputs, blocks=paths, seed=5)
    assert want.names == ("head", "norm", "blocks.1", "blocks.0", "patch_embed.proj", "")
    for i in range(6):
        assert found[f"spearman@{i}"] == pytest.approx(want.spearman[i].tolist())
        assert found[f"ssim@{i}"] == pytest.approx(want.ssim[i].tolist(), abs=1e-9)
    assert found["spearman"] == pytest.approx(want.spearman.mean(0).tolist())
    assert found["ssim"] == pytest.approx(want.ssim.mean(0).tolist(), abs=1e-9)
    assert min(found["spearman@0"]) < 0.999
    rise = metrics.complexity_rise(case.subject.module, plain, case.inputs, seed=5)
    assert found["complexity_rise"] == pytest.approx(rise.tolist())
    assert hashed(case.subject.module) == before
    assert case.subject.captured(size, "autograd") is kept
    assert torch.equal(case.attribution(GRADIENT, "autograd", classes, "logit").values, first)


@pytest.mark.slow
def test_a_capture_that_is_written_over_is_one_made_anew() -> None:
    """Under libra, after the last step of the cascade."""
    case = case_of(double())
    found = asked("randomisation", case, RandomisationSpec(scalar="logit", seed=5))
    *_, (_, changed) = sanity._steps(case.subject.module, "top", (), 5)
    model, other = (
        lg.attribute(m, case.inputs, Logit(torch.tensor([0, 2])), method="input_x_gradient").values
        for m in (case.subject.module, changed)
    )
    likeness = compare.spearman(model.flatten(1), other.flatten(1))
    assert found["spearman@5"] == pytest.approx(likeness.tolist())


@pytest.mark.slow
def test_a_map_that_sees_no_model_stays_the_same() -> None:
    found = asked("randomisation", case_of(double()), RandomisationSpec(), MethodSpec(method="random"))
    assert found["spearman"] == pytest.approx([1, 1])
    assert found["complexity_rise"] == pytest.approx([0, 0])


def test_a_copy_has_the_weights_and_buffers_that_are_given() -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)).double().eval()
    subject = case_of(module).subject
    other = copy.deepcopy(module)
    with torch.no_grad():
        for tensor in [*other.parameters(), other[1].running_mean]:
            tensor.add_(1)
    twin = subject.with_weights(other)
    assert hashed(twin.module) == hashed(other) != hashed(module)
    again = subject.with_weights(module)
    assert again is twin
    assert hashed(twin.module) == hashed(module)


# --- noise, and sets of cells


def test_max_sensitivity_is_that_of_maps_captured_anew() -> None:
    case, spec = case_of(double()), MaxSensitivitySpec(scalar="logit", radius=0.1, samples=3, seed=1)

    def anew(model: torch.nn.Module, x: Tensor) -> Tensor:
        return lg.attribute(model, x, Logit(torch.tensor([0, 2])), method="input_x_gradient").values

    want = metrics.max_sensitivity(case.subject.module, anew, case.inputs, radius=0.1, samples=3, seed=1)
    assert asked("max_sensitivity", case, spec)["max_sensitivity"] == pytest.approx(want.tolist())
    assert float(want.min()) > 1e-4


def test_sums_of_a_linear_model_are_its_drops() -> None:
    """Sensitivity-n is 1 for all n; the cells are the pixels, for want of tokens."""
    torch.manual_seed(0)
    case = case_of(Linear().double().eval())
    found = asked("sensitivity_n", case, SensitivityNSpec(ratios=(0.1, 0.5), subsets=5), policy="autograd")
    assert [*found] == ["correlation", "correlation@0.1", "correlation@0.5"]
    assert all(v == pytest.approx([1, 1]) for v in found.values())
    random = asked("sensitivity_n", case, SensitivityNSpec(subsets=5), MethodSpec(method="random"))
    assert max(random["correlation"]) < 0.9


def test_cells_of_sets_are_tokens() -> None:
    case, spec = case_of(double()), SensitivityNSpec(ratios=(0.3,), subsets=4, seed=2)
    found = asked("sensitivity_n", case, spec)
    maps = case.attribution(GRADIENT, "libra", torch.tensor([0, 2]), "logit")
    scalar = Logit(torch.tensor([0, 2]))
    want = metrics.sensitivity_n(
        lambda x: scalar(case.subject.module(x)), case.inputs, on_grid(maps, (3, 3)), [2], subsets=4, seed=2
    )
    assert found["correlation"] == found["correlation@0.3"] == want[:, 0].tolist()


# --- from a config


def test_a_config_asks_for_them_and_one_that_fails_stands_alone(tmp_path: Path) -> None:
    given = small.config(
        small.pictures(tmp_path / "d", 3), methods=["input_x_gradient"], batch=3,
        metrics={
            "places": {"emd": 5}, "randomisation": {"order": "each"}, "max_sensitivity": {"samples": 1},
            "sensitivity_n": {"subsets": 3, "ratios": [0.5]},
        },
    )  # fmt: skip
    file = evaluate(Config.of(given), tmp_path / "out")
    assert file is not None
    rows = parquet.read_table(file).to_pylist()
    failed = [r for r in rows if r["error"]]
    assert {r["metric"] for r in failed} == {"places"}
    assert len(failed) == 3
    assert all("grid of (5, 5) does not divide" in r["error"] for r in failed)
    drawn = {(r["measure"], r["how"]) for r in rows if r["metric"] == "randomisation"}
    assert {("spearman@0", "0"), ("spearman@1", "4"), ("spearman", "")} <= drawn
    assert {r["measure"] for r in rows if r["metric"] == "max_sensitivity"} == {"max_sensitivity"}
    assert sum(r["measure"] == "correlation" for r in rows) == 3
