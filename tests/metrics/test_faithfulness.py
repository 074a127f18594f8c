"""Faithfulness: which cells stay, and what the measures are of models that are known."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from libragrad_fx.errors import InputError
from libragrad_fx.metrics import faithfulness as f
from libragrad_fx.perturb import masked

F64 = torch.float64


def maps(batch: int, n: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n, generator=draw) for _ in range(batch)]).double() - n / 3


# --- which cells stay


@settings(deadline=None)
@given(n=st.integers(1, 40), batch=st.integers(1, 4), seed=st.integers(0, 99))
def test_cells_are_ranked_by_relevance(n: int, batch: int, seed: int) -> None:
    found = f.ranked(maps(batch, n, seed), seed)
    assert torch.equal(found, maps(batch, n, seed).argsort(1, descending=True))
    grid = maps(batch, 2 * n, seed)
    assert torch.equal(f.ranked(grid.view(batch, 2, n)), f.ranked(grid))


@settings(deadline=None)
@given(n=st.integers(1, 60), values=st.integers(1, 4), seed=st.integers(0, 99))
def test_ties_are_drawn(n: int, values: int, seed: int) -> None:
    """In falling order of relevance; among equals in one order for all maps, which the seed changes."""
    draw = torch.Generator().manual_seed(seed)
    given = torch.randint(values, (2, n), generator=draw).double()
    found = f.ranked(given, seed)
    assert torch.equal(found.sort(1).values, torch.arange(n).expand(2, -1))
    assert bool((given.gather(1, found).diff(dim=1) <= 0).all())
    assert torch.equal(f.ranked(torch.zeros(2, n), seed)[0], f.ranked(torch.ones(2, n), seed)[1])


def test_the_place_of_ties_has_no_say() -> None:
    """Of a map of zeros each cell comes first as often as any other."""
    first = torch.stack([f.ranked(torch.zeros(1, 4), seed)[0, 0] for seed in range(400)])
    assert float((first.bincount(minlength=4) - 100).abs().max()) < 40


@settings(deadline=None)
@given(n=st.integers(1, 300), tenths=st.integers(0, 10), seed=st.integers(0, 9))
def test_as_many_stay_as_the_protocol_says(n: int, tenths: int, seed: int) -> None:
    """MIF takes floor(r N), LIF keeps floor((1 - r) N), in whole numbers (method of LibraGrad's code)."""
    order = f.ranked(maps(2, n, seed))
    mif, lif = (f.staying(order, tenths / 10, how) for how in ("mif", "lif"))
    assert mif.shape[1] == n - tenths * n // 10
    assert lif.shape[1] == (10 - tenths) * n // 10
    assert torch.equal(mif, order[:, tenths * n // 10 :].sort(1).values)
    assert torch.equal(lif, order[:, : (10 - tenths) * n // 10].sort(1).values)


def test_end_points() -> None:
    order = f.ranked(maps(2, 7))
    for how in ("mif", "lif"):
        assert torch.equal(f.staying(order, 0, how), torch.arange(7).expand(2, -1))
        assert f.staying(order, 1, how).shape == (2, 0)
    assert torch.equal(f.staying(order, 0.9, "mif"), order[:, -1:])
    assert torch.equal(f.staying(order, 0.85, "lif"), order[:, :1])


# --- measures of a model that is known: class c's logit is the sum of what is seen times its weights


class Sums:
    """Logits (B, classes) of cells: sums of weights (classes, N) over those that stay."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def __call__(self, cells: Tensor) -> Tensor:
        on = torch.zeros(len(cells), self.weights.shape[1], dtype=F64).scatter_(1, cells, 1.0)
        return on @ self.weights.T

    def clean(self, batch: int) -> Tensor:
        return self(torch.arange(self.weights.shape[1]).expand(batch, -1))


def test_curves_of_a_sum() -> None:
    """Class 0 sums weights of the cells that are seen, and the map is those weights."""
    weights = torch.tensor([[4.0, 1, 3, 2, 0], [0, 0, 0, 0, 5]], dtype=F64)
    model = Sums(weights)
    of = f.curves(model, model.clean(2), f.ranked(weights[:1].expand(2, -1)), (0.2, 0.4, 0.6))
    assert of.ratios == (0.2, 0.4, 0.6)
    assert of.mif[0, :, 0].tolist() == [6, 3, 1]
    assert of.lif[0, :, 0].tolist() == [10, 9, 7]
    assert of.mif[0, :, 1].tolist() == [5, 5, 5]
    assert of.lif[0, :, 1].tolist() == [0, 0, 0]
    target = torch.tensor([0, 1])
    assert f.agreement(of.mif, target).tolist() == [[1, 0, 0], [0, 1, 1]]
    assert f.agreement(of.lif, target).tolist() == [[1, 1, 1], [0, 0, 0]]
    assert f.logit_drop(of.clean, of.mif, target).tolist() == [[4, 7, 9], [0, 0, 0]]
    found = f.scores(of, target)
    assert found["mif_accuracy"].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert found["lif_accuracy"].tolist() == pytest.approx([1, 0])
    assert found["srg"].tolist() == pytest.approx([2 / 3, -2 / 3])
    assert found["mif_logit"].tolist() == pytest.approx([20 / 3, 0])
    assert found["lif_logit"].tolist() == pytest.approx([-4 / 3, -5])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), batch=st.integers(1, 3), classes=st.integers(2, 4), n=st.integers(5, 20))
def test_measures_by_hand(seed: int, batch: int, classes: int, n: int) -> None:
    """From their definitions, sample by sample in Python's own numbers."""
    draw = torch.Generator().manual_seed(seed)
    model = Sums(torch.randn(classes, n, generator=draw, dtype=F64))
    target = torch.randint(classes, (batch,), generator=draw)
    order = f.ranked(torch.randn(batch, n, generator=draw, dtype=F64))
    of = f.curves(model, model.clean(batch), order)
    found = f.scores(of, target)

    def p(logits: list[float], c: int) -> float:
        return math.exp(logits[c]) / sum(map(math.exp, logits))

    for i, c in enumerate(target.tolist()):
        clean = model.clean(1)[0].tolist()
        mif = [model(f.staying(order, r, "mif"))[i].tolist() for r in f.RATIOS]
        lif = [model(f.staying(order, r, "lif"))[i].tolist() for r in f.RATIOS]
        hits = [[max(range(classes), key=z.__getitem__) == c for z in zs] for zs in (mif, lif)]
        drops = [[p(clean, c) - p(z, c) for z in zs] for zs in (mif, lif)]
        logs = [[math.log(p(clean, c) / p(z, c)) for z in zs] for zs in (mif, lif)]
        want = {
            "mif_accuracy": 1 - sum(hits[0]) / 9, "lif_accuracy": sum(hits[1]) / 9,
            "mif_aopc": sum(drops[0]) / 9, "lif_aopc": -sum(drops[1]) / 9,
            "mif_log_odds": sum(logs[0]) / 9, "lif_log_odds": -sum(logs[1]) / 9,
            "mif_logit": sum(clean[c] - z[c] for z in mif) / 9,
            "lif_logit": sum(z[c] - clean[c] for z in lif) / 9,
            "srg": (sum(hits[1]) - sum(hits[0])) / 9, "srg_aopc": (sum(drops[0]) - sum(drops[1])) / 9,
        }  # fmt: skip
        assert {k: float(v[i]) for k, v in found.items()} == pytest.approx(want, abs=1e-12)


@settings(deadline=None)
@given(z=st.lists(st.floats(-30, 30), min_size=1, max_size=5))
def test_one_logit_is_that_of_two_classes(z: list[float]) -> None:
    """p of class 1 is the sigmoid of z."""
    logits = torch.tensor(z, dtype=F64)[:, None]
    found = f.two_sided(logits)
    torch.testing.assert_close(found.softmax(1)[:, 1], logits[:, 0].sigmoid(), rtol=1e-12, atol=1e-15)
    clean, target = torch.zeros(len(z), 2, dtype=F64), torch.ones(len(z), dtype=torch.int64)
    drop = f.probability_drop(clean, found[:, None], target)[:, 0]
    torch.testing.assert_close(drop, 0.5 - logits[:, 0].sigmoid(), rtol=1e-12, atol=1e-12)
    assert f.agreement(found[:, None], target)[:, 0].tolist() == [float(v > 0) for v in z]


def test_curves_of_one_logit() -> None:
    model = Sums(torch.tensor([[3.0, -1, -1]], dtype=F64))
    of = f.curves(model, model.clean(2), f.ranked(torch.tensor([[3.0, -1, -2]]).expand(2, -1)), (0.34,))
    assert of.clean.tolist() == [[0, 1], [0, 1]]
    assert of.mif[0].tolist() == [[0, -2]]
    assert of.lif[0].tolist() == [[0, 3]]
    assert f.scores(of, torch.tensor([1, 0]))["srg"].tolist() == [1, -1]


def test_log_odds_do_not_underflow() -> None:
    clean, logits = torch.tensor([[0.0, 0]]), torch.tensor([[[0.0, 5000]]])
    assert float(f.log_odds(clean, logits, torch.tensor([0]))) == pytest.approx(5000 - math.log(2))


def test_the_best_map_of_a_sum_has_the_largest_gain() -> None:
    """Among all orders of the cells, that of the weights: SRG of logits is what a map can gain."""
    model = Sums(torch.tensor([[2.0, -1, 0.5, 1]], dtype=F64))
    orders = torch.tensor([*itertools.permutations(range(4))])
    of = f.curves(model, model.clean(len(orders)), orders, (0.25, 0.5, 0.75))
    found = f.scores(of, torch.ones(len(orders), dtype=torch.int64))
    gain = found["mif_logit"] + found["lif_logit"]
    assert orders[gain.argmax()].tolist() == [0, 3, 2, 1]
    assert orders[gain.argmin()].tolist() == [1, 2, 3, 0]
    torch.testing.assert_close(gain.max(), -gain.min())


# --- bad input


def test_maps_without_an_order() -> None:
    wrong = torch.zeros(3, 2, 2)
    wrong[1, 0, 0] = torch.nan
    with pytest.raises(InputError, match="sample 1"):
        f.ranked(wrong)
    with pytest.raises(InputError, match="grid"):
        f.ranked(torch.zeros(3))


@pytest.mark.parametrize(("ratio", "how"), [(-0.1, "mif"), (1.1, "lif"), (math.nan, "mif"), (0.5, "best")])
def test_shares_and_orders_that_are_none(ratio: float, how: Any) -> None:
    with pytest.raises(InputError, match=r"share|order"):
        f.staying(torch.arange(4)[None], ratio, how)


def test_answers_that_do_not_fit() -> None:
    model = Sums(torch.randn(3, 5, dtype=F64))
    order, clean = f.ranked(torch.randn(2, 5)), model.clean(2)
    with pytest.raises(InputError, match="no shares"):
        f.curves(model, clean, order, ())
    with pytest.raises(InputError, match="2 samples, the clean logits of 3"):
        f.curves(model, model.clean(3), order)
    with pytest.raises(InputError, match=r"\(2, 3\) of the whole"):
        f.curves(lambda cells: model(cells)[:, :2], clean, order)
    with pytest.raises(InputError, match=r"without 0.1 of the cells, mif, are nan in samples 0, 1"):
        f.curves(lambda cells: model(cells) * torch.nan, clean, order)
    with pytest.raises(InputError, match="of the whole input are nan in sample 1"):
        f.curves(model, clean * torch.tensor([[1], [torch.nan]]), order)
    with pytest.raises(InputError, match=r"B, classes"):
        f.two_sided(torch.zeros(2, 3, 4))
    of = f.curves(model, clean, order)
    for target in ([0, 3], [-1, 0], [0, 1, 2], [0.0, 1.0], [[0, 1]]):
        with pytest.raises(InputError, match=r"target|classes"):
            f.scores(of, torch.tensor(target))
        with pytest.raises(InputError, match=r"target|classes"):
            f.agreement(of.mif, torch.tensor(target))


# --- others


class Pixels(nn.Module):
    """Logits of pictures, in the dtype that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3 * 36, generator=draw) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.weight.T).tanh() * 3


def pictures(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow  # imports alone take seconds
def test_probabilities_are_quantus_pixel_flipping() -> None:
    """Pixel by pixel in falling order, black: the probability of the target behind each step."""
    quantus = pytest.importorskip("quantus", reason="needs quantus (see CONTRIBUTING.md)")
    model, x, target = Pixels().eval(), pictures(), torch.tensor([2, 0, 1])
    relevance = maps(3, 36).view(3, 6, 6)
    metric = quantus.PixelFlipping(
        features_in_step=4, abs=False, normalise=False, perturb_baseline=0.0, disable_warnings=True,
        perturb_func=lambda arr, indices, **_: zeros(arr, indices),
    )  # fmt: skip
    want = metric(
        model=model, x_batch=x.numpy(), y_batch=target.numpy(), a_batch=relevance[:, None].numpy(),
        device="cpu", softmax=True,
    )  # fmt: skip
    steps = [k / 36 for k in range(4, 37, 4)]
    without = lambda cells: model(masked(x, cells, (6, 6), "zero")).detach()  # noqa: E731
    of = f.curves(without, model(x).detach(), f.ranked(relevance), steps)
    ours = of.clean.softmax(1).gather(1, target[:, None]) - f.probability_drop(of.clean, of.mif, target)
    np.testing.assert_allclose(ours.numpy(), np.array(want)[:, 2::3], atol=1e-6)


def zeros(arr: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Quantus gives one map to all three channels: a step there is one channel of four pixels."""
    found = arr.copy()
    np.put_along_axis(found, indices, 0.0, 1)
    return found


@pytest.mark.slow
def test_a_step_is_roads_of_pytorch_grad_cam() -> None:
    """The drop of the target's logit without the most relevant fifth, and without the least."""
    road = pytest.importorskip("pytorch_grad_cam.metrics.road", reason="needs grad-cam")
    metrics = pytest.importorskip(
        "pytorch_grad_cam.metrics.perturbation_confidence", reason="needs grad-cam"
    )
    model, x, target = Pixels().eval(), pictures(1)[..., :5], torch.tensor([2])
    model.weight = nn.Parameter(model.weight[:, :90])
    relevance = maps(1, 30).view(1, 6, 5)
    imputer = road.NoisyLinearImputer(noise=0.0)
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    without = lambda cells: model(imputer(x[0], shown(cells)[0])[None]).detach()  # noqa: E731
    of = f.curves(without, model(x).detach(), f.ranked(relevance), (0.2,))
    for order, logits in (("Most", of.mif), ("Least", of.lif)):
        remove = getattr(metrics, f"Remove{order}RelevantFirst")(80, imputer)  # what is above goes
        theirs = metrics.PerturbationConfidenceMetric(remove)
        want = theirs(x, relevance.numpy(), [ClassifierOutputTarget(2)], model)
        np.testing.assert_allclose(-f.logit_drop(of.clean, logits, target)[:, 0].numpy(), want, atol=1e-5)


def shown(cells: Tensor) -> Tensor:
    return torch.zeros(len(cells), 30).scatter_(1, cells, 1.0).view(-1, 6, 5)
