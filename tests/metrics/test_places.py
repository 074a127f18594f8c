"""Maps against masks: laws by Hypothesis, and agreement with scikit-learn, torchmetrics, SciPy and POT."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from libragrad_fx import metrics
from libragrad_fx.errors import InputError
from tests.metrics.drawn import cases

F64 = torch.float64
Tensor = torch.Tensor
ALL: dict[str, Callable[..., Tensor]] = {
    "segmentation_ap": metrics.segmentation_ap,
    "iou": metrics.iou,
    "iou at 0.7": lambda a, b: metrics.iou(a, b, 0.7),
    "pointing_game": metrics.pointing_game,
    "pointing_game, 2": lambda a, b: metrics.pointing_game(a, b, 2),
    "pointing_cell": metrics.pointing_cell,
    "relevance_mass": metrics.relevance_mass,
    "relevance_rank": metrics.relevance_rank,
    "precision_at_k": metrics.precision_at_k,
    "precision_at_k, 3": lambda a, b: metrics.precision_at_k(a, b, 3),
    "emd_score": metrics.emd_score,
}
ONE_IF_FULL = (
    "segmentation_ap", "iou", "pointing_game", "pointing_cell", "relevance_mass", "relevance_rank",
)  # fmt: skip
SOME = settings(max_examples=40, deadline=None)


def equal(a: Tensor, b: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=F64), rtol=0, atol=tolerance, equal_nan=True)


# --- what holds of all


@pytest.mark.parametrize("name", ALL)
@SOME
@given(case=cases())
def test_in_0_to_1_and_a_batch_is_its_samples(name: str, case: tuple[Tensor, Tensor]) -> None:
    maps, masks = case
    found = ALL[name](maps, masks)
    assert found.dtype == F64
    assert found.shape == (len(maps),)
    assert bool(((found >= 0) & (found <= 1 + 1e-12) | found.isnan()).all())
    equal(torch.cat([ALL[name](m[None], k[None]) for m, k in zip(maps, masks, strict=True)]), found)
    equal(ALL[name](maps[:, None], masks[:, None].to(torch.uint8)), found)
    equal(ALL[name](3 * maps, masks), found)


@pytest.mark.parametrize("name", ALL)
def test_perfect_empty_full_and_no_maps(name: str) -> None:
    masks = torch.zeros(3, 4, 6, dtype=torch.bool)
    masks[0, 1:3, 2:4] = True
    masks[2] = True
    maps = 0.1 * masks
    found = ALL[name](maps, masks)
    perfect = 4 / 24 if name == "iou at 0.7" else 1  # of 24 pixels 8 are taken, the eighth is 0, and 20 are
    assert float(found[0]) == pytest.approx(perfect)
    assert math.isnan(found[1])
    if name in ONE_IF_FULL:
        assert float(found[2]) == 1
    assert ALL[name](maps[:0], masks[:0]).shape == (0,)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.bool])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    maps, masks = torch.randn(3, 5, 5).mul(4).to(dtype), torch.rand(3, 5, 5) < 0.4
    equal(ALL[name](maps, masks.float()), ALL[name](maps.double(), masks))


def test_maps_that_need_a_gradient() -> None:
    maps, masks = torch.randn(2, 4, 4, requires_grad=True), torch.eye(4).expand(2, 4, 4)
    assert not any(of(maps, masks).requires_grad for of in ALL.values())


@pytest.mark.parametrize("name", ALL)
def test_bad_input_is_named(name: str) -> None:
    maps, masks = torch.zeros(3, 4, 4), torch.ones(3, 4, 4)
    maps[1, 2, 2] = torch.nan
    maps[2, 0, 0] = torch.inf
    with pytest.raises(InputError, match="nan or inf in samples 1, 2 of 3"):
        ALL[name](maps, masks)
    maps = torch.zeros(3, 4, 4)
    if name != "pointing_cell":  # whose masks are larger
        with pytest.raises(InputError, match=r"maps are \(3, 4, 4\) and masks \(3, 8, 8\).*enlarged"):
            ALL[name](maps, torch.ones(3, 8, 8))
    with pytest.raises(InputError, match="sample 0 holds other values"):
        ALL[name](maps, masks * torch.tensor([2, 1, 0])[:, None, None])
    with pytest.raises(InputError, match=r"maps are \(B, H, W\) or"):
        ALL[name](maps[0], masks[0])
    with pytest.raises(InputError, match="not ndarray"):
        ALL[name](maps.numpy(), masks)
    with pytest.raises(InputError, match=r"real numbers .* not torch"):
        ALL[name](maps.to(torch.complex64), masks)


# --- average precision


@settings(max_examples=15, deadline=None)
@given(case=cases())
def test_ap_is_scikit_learns_and_torchmetrics(case: tuple[Tensor, Tensor]) -> None:
    sklearn, torchmetrics = (
        pytest.importorskip(n, reason="of the extra evaluate")
        for n in ("sklearn.metrics", "torchmetrics.functional.classification")
    )
    maps, masks = case
    found = metrics.segmentation_ap(maps, masks)
    pairs = [*zip(masks.flatten(1), maps.flatten(1), strict=True)]
    equal(found, [sklearn.average_precision_score(k.numpy(), m.numpy()) for k, m in pairs])
    # torchmetrics takes scores outside of [0, 1] for logits, and computes in float32
    shares = [(m - m.min()) / (m.max() - m.min()).clamp(min=1e-9) for _, m in pairs]
    others = [
        torchmetrics.binary_average_precision(s, k.long())
        for s, (k, _) in zip(shares, pairs, strict=True)
    ]
    equal(found, torch.stack(others), 1e-6)


@SOME
@given(case=cases(), power=st.sampled_from([1 / 3, 3, 5]), shift=st.integers(-3, 3))
def test_ap_depends_on_the_order_alone(
    case: tuple[Tensor, Tensor], power: float, shift: int
) -> None:
    """Monotone maps: a power with its sign, and a shift. So do the IoUs and the pointing game."""
    maps, masks = case
    maps = maps.mul(64).round() / 64  # no two values that rounding could join
    other = maps.sign() * maps.abs() ** power + shift
    for name in ("segmentation_ap", "iou", "iou at 0.7", "pointing_game"):
        equal(ALL[name](other, masks), ALL[name](maps, masks))


def test_ap_of_noise_is_the_share_of_the_mask() -> None:
    torch.manual_seed(0)
    masks = torch.zeros(200, 30, 30, dtype=torch.bool)
    masks[:, :15, :12] = True
    found = metrics.segmentation_ap(torch.rand(200, 30, 30), masks)
    assert float(found.mean()) == pytest.approx(0.2, abs=1e-2)
    equal(metrics.segmentation_ap(torch.zeros(2, 30, 30), masks[:2]), [0.2, 0.2])


def test_enlarged_as_the_protocol_says() -> None:
    """A call by scale factor, without alignment of corners."""
    torch.manual_seed(0)
    maps = torch.randn(2, 1, 4, 5, dtype=F64)
    found = metrics.enlarged(maps, (56, 70))
    theirs = torch.nn.functional.interpolate(maps, scale_factor=14, mode="bicubic", align_corners=False)
    equal(found, theirs[:, 0])
    assert metrics.enlarged(maps[:0], 56).shape == (0, 56, 56)
    equal(metrics.enlarged(torch.full((1, 3, 3), 2.0), 9), torch.full((1, 9, 9), 2.0))
    with pytest.raises(InputError, match="is smaller"):
        metrics.enlarged(maps, (56, 4))


# --- IoU


@SOME
@given(case=cases())
def test_the_best_iou_is_that_of_some_threshold(case: tuple[Tensor, Tensor]) -> None:
    maps, masks = case
    for found, m, k in zip(metrics.iou(maps, masks), maps, masks, strict=True):
        ious = [float(((m >= t) & k).sum() / ((m >= t) | k).sum()) for t in m.unique()]
        assert float(found) == pytest.approx(max(ious), abs=1e-6)


@SOME
@given(case=cases(), quantile=st.sampled_from([0, 0.1, 0.29, 0.5, 0.7, 0.9, 1]))
def test_iou_at_a_quantile(case: tuple[Tensor, Tensor], quantile: float) -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="of the extra evaluate")
    maps, masks = case
    n = maps[0].numel()
    at = maps.flatten(1).sort(1).values[:, min(int(quantile * n + 1e-9), n - 1)]
    want = [
        sklearn.jaccard_score(k.flatten().numpy(), (m >= t).flatten().numpy())
        for m, k, t in zip(maps, masks, at, strict=True)
    ]
    equal(metrics.iou(maps, masks, quantile), want)
    assert bool((metrics.iou(maps, masks, quantile) <= metrics.iou(maps, masks) + 1e-12).all())


def test_how_many_pixels_a_quantile_takes() -> None:
    maps, masks = torch.arange(100.0).view(1, 10, 10), torch.ones(1, 10, 10)
    for quantile, taken in [(0, 100), (0.29, 71), (0.9, 10), (0.95, 5), (1, 1)]:
        assert float(metrics.iou(maps, masks, quantile)) == pytest.approx(taken / 100)
    with pytest.raises(InputError, match="between 0 and 1, not 90"):
        metrics.iou(maps, masks, 90)


# --- the most relevant pixels


def test_a_cell_hits_what_any_of_its_pixels_hits() -> None:
    """By loops over pixels; 7 rows of 3 cells, 4 columns of 4: rows 2 and 4 are in two cells."""
    torch.manual_seed(0)
    cells, masks = torch.rand(40, 3, 4).mul(4).round(), torch.rand(40, 7, 4) < 0.15
    masks[:2] = False
    masks[1, 2, 0] = True
    cells[0], cells[1] = 1, torch.zeros(3, 4)
    cells[1, 0, 0] = cells[1, 2, 3] = 1
    found = metrics.pointing_cell(cells, masks)
    assert math.isnan(found[0])
    assert float(found[1]) == 0.5  # one of two that are most relevant
    for one, m, k in zip(found[1:], cells[1:], masks[1:], strict=True):
        hits = []
        for i, j in (m == m.max()).nonzero().tolist():
            above, below = math.floor(i * 7 / 3), math.ceil((i + 1) * 7 / 3)
            hits.append(any(bool(k[y, j]) for y in range(above, below)))
        assert math.isnan(one) if not k.any() else float(one) == pytest.approx(sum(hits) / len(hits))
    with pytest.raises(InputError, match=r"\(8, 4\) cells are smaller than the pixels"):
        metrics.pointing_cell(torch.zeros(1, 8, 4), masks[:1])


def test_pointing_within_a_tolerance() -> None:
    maps, masks = torch.zeros(1, 9, 9), torch.zeros(1, 9, 9)
    maps[0, 1, 1], masks[0, 4, 5] = 1, 1  # 3 down, 4 to the right: 5 pixels
    assert [float(metrics.pointing_game(maps, masks, t)) for t in (0, 4, 5, 20)] == [0, 0, 1, 1]
    maps[0, 4, 5] = 1  # one of two most relevant pixels
    assert float(metrics.pointing_game(maps, masks)) == 0.5
    with pytest.raises(InputError, match="not -1"):
        metrics.pointing_game(maps, masks, -1)


@SOME
@given(case=cases(), tolerance=st.integers(0, 4))
def test_pointing_by_distances(case: tuple[Tensor, Tensor], tolerance: int) -> None:
    maps, masks = case
    for found, m, k in zip(metrics.pointing_game(maps, masks, tolerance), maps, masks, strict=True):
        most = (m == m.max()).nonzero().double()
        near = torch.cdist(most, k.nonzero().double()).amin(1) <= tolerance
        assert float(found) == pytest.approx(float(near.double().mean()))


@SOME
@given(case=cases())
def test_all_mass_in_the_mask_is_1_and_inside_and_outside_add_up(case: tuple[Tensor, Tensor]) -> None:
    maps, masks = case
    maps = maps.abs() + 0.1
    equal(metrics.relevance_mass(maps * masks, masks), torch.ones(len(maps)))
    equal(metrics.relevance_rank(maps * masks, masks), torch.ones(len(maps)))
    masks[:, -1, -1] = False
    both = metrics.relevance_mass(maps, masks) + metrics.relevance_mass(maps, ~masks)
    equal(both, torch.ones(len(maps)))


def test_negative_relevance_is_dropped_taken_or_squared() -> None:
    maps = torch.tensor([[[3.0, -1.0], [1.0, -2.0]]])
    masks = torch.tensor([[[1, 1], [0, 0]]])
    poolings: list[Any] = ["positive", "absolute", "squared"]
    found = [float(metrics.relevance_mass(maps, masks, pooling=p)) for p in poolings]
    assert found == pytest.approx([3 / 4, 4 / 7, 10 / 15])
    ranked = [float(metrics.relevance_rank(maps, masks, pooling=p)) for p in poolings]
    assert ranked == [0.5, 0.5, 0.5]
    assert float(metrics.relevance_rank(maps, 1 - masks)) == 0.5
    for of in (metrics.relevance_mass, metrics.relevance_rank, metrics.precision_at_k, metrics.emd_score):
        with pytest.raises(InputError, match="no pooling 'sum'"):
            of(maps, masks, pooling="sum")  # type: ignore[arg-type]


def test_nothing_positive() -> None:
    maps, masks = -torch.rand(1, 3, 3), torch.eye(3)[None]
    assert math.isnan(metrics.relevance_mass(maps, masks))
    assert float(metrics.relevance_rank(maps, masks)) == pytest.approx(1 / 3)  # any 3 of 9, of which 3 hit
    assert float(metrics.precision_at_k(maps, masks, pooling="positive")) == 0
    assert math.isnan(metrics.emd_score(maps, masks, pooling="positive"))


@SOME
@given(case=cases(most=4), k=st.integers(1, 4))
def test_equal_pixels_count_by_their_expectation(case: tuple[Tensor, Tensor], k: int) -> None:
    """The mean over random orders of pixels that are ranked without ties."""
    maps, masks = case
    maps = maps.abs().round() + 1
    torch.manual_seed(0)
    shaken = maps + torch.rand(1000, *maps.shape, dtype=F64) * 1e-3
    ordered = metrics.precision_at_k(shaken.flatten(0, 1), masks.repeat(1000, 1, 1), k)
    off = ordered.view(1000, -1).mean(0) - metrics.precision_at_k(maps, masks, k)
    assert float(off.abs().max()) < 0.08
    equal(metrics.precision_at_k(maps, masks), metrics.relevance_rank(maps, masks, pooling="absolute"))


def test_precision_takes_no_zeros() -> None:
    """The authors' code: the k largest absolute values that are not 0; hits are divided by k."""
    maps = torch.tensor([[[0.0, -2.0, 0.0], [0.0, 1.0, 0.0]]])
    masks = torch.tensor([[[1, 1, 0], [1, 0, 0]]])
    assert float(metrics.precision_at_k(maps, masks)) == pytest.approx(1 / 3)
    assert float(metrics.precision_at_k(maps, masks, 1)) == 1
    with pytest.raises(InputError, match="between 1 and the 6 pixels"):
        metrics.precision_at_k(maps, masks, 7)


def test_a_suppressor_costs() -> None:
    """x₁ = z + d and x₂ = d: the best weights are (1, -1), and half of the map lies on the suppressor x₂,
    which knows nothing about z. The pattern cov(x, z) has no such half (Haufe et al. 2014)."""
    truth = torch.tensor([[[1, 0, 0]]])
    weights, pattern = torch.tensor([[[1.0, 0, -1]]]), torch.tensor([[[1.0, 0, 0]]])
    assert float(metrics.precision_at_k(weights, truth)) == 0.5
    assert float(metrics.emd_score(weights, truth)) == 0.5
    assert float(metrics.relevance_mass(weights, truth)) == 1  # which drops the negative does not see it
    assert [float(of(pattern, truth)) for of in (metrics.precision_at_k, metrics.emd_score)] == [1, 1]


# --- transport


@SOME
@given(case=cases())
def test_emd_of_equal_distributions_is_1(case: tuple[Tensor, Tensor]) -> None:
    _, masks = case
    equal(metrics.emd_score(masks * 0.3, masks), torch.ones(len(masks)))


def test_emd_of_points_is_their_distance() -> None:
    maps, masks = torch.zeros(1, 5, 9), torch.zeros(1, 5, 9)
    maps[0, 0, 0], masks[0, 3, 4] = -2, 1
    equal(metrics.emd_score(maps, masks), [1 - 5 / math.hypot(4, 8)])
    maps[0, 0, 0], maps[0, 4, 8], masks[0, 3, 4], masks[0, 0, 0] = 0, 1, 0, 1
    equal(metrics.emd_score(maps, masks), [0])  # from corner to corner


@SOME
@given(case=cases())
def test_emd_on_a_line_is_scipys(case: tuple[Tensor, Tensor]) -> None:
    stats = pytest.importorskip("scipy.stats", reason="of the extra evaluate")
    maps, masks = (t.flatten(1)[:, None] for t in case)
    maps = maps.abs() + 0.01
    n = maps.shape[2]
    want = [
        1 - stats.wasserstein_distance(range(n), range(n), m[0].numpy(), k[0].double().numpy()) / (n - 1)
        for m, k in zip(maps, masks, strict=True)
    ]
    equal(metrics.emd_score(maps, masks), want, 1e-9)


@SOME
@given(case=cases())
def test_emd_is_that_of_the_whole_plan(case: tuple[Tensor, Tensor]) -> None:
    """What map and mask share is left in place; POT's plan of everything costs the same."""
    ot = pytest.importorskip("ot", reason="POT, of the extra evaluate")
    maps, masks = case
    where = np.argwhere(np.ones(maps.shape[1:]))
    cost = np.linalg.norm(where[:, None] - where[None], axis=-1)
    for found, m, k in zip(metrics.emd_score(maps + 0.25, masks), maps + 0.25, masks, strict=True):
        a, b = m.abs().flatten().numpy(), k.double().flatten().numpy()
        want = 1 - ot.emd2(a / a.sum(), b / b.sum(), cost) / cost.max()
        assert float(found) == pytest.approx(want, abs=1e-9)


def test_emd_on_a_grid_and_of_large_maps() -> None:
    torch.manual_seed(0)
    maps, masks = torch.rand(1, 200, 200), torch.zeros(1, 200, 200)
    masks[0, 40:90, 60:150] = 1
    with pytest.raises(InputError, match="pass grid="):
        metrics.emd_score(maps, masks)
    fine = metrics.emd_score(maps, masks, grid=(20, 20))
    sums = maps.double().view(1, 20, 10, 20, 10).sum((2, 4))
    assert float(fine) == pytest.approx(float(metrics.emd_score(sums, masks[:, ::10, ::10])), abs=1e-8)
    coarse = metrics.emd_score(maps, masks, grid=(10, 10))
    assert float((fine - coarse).abs()) < 0.05
    with pytest.raises(InputError, match="does not divide"):
        metrics.emd_score(maps, masks, grid=(30, 30))


# --- Quantus


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("PointingGame", "pointing_game"),
        ("RelevanceMassAccuracy", "relevance_mass"),
        ("RelevanceRankAccuracy", "relevance_rank"),
        ("TopKIntersection", "precision_at_k, 3"),
    ],
)
def test_quantus_says_the_same_of_positive_maps_without_ties(name: str, ours: str) -> None:
    quantus = pytest.importorskip("quantus", reason="needs quantus (see CONTRIBUTING.md)")
    torch.manual_seed(0)
    maps, masks = torch.rand(6, 8, 8, dtype=F64) + 0.01, torch.rand(6, 8, 8) < 0.3
    options = {"k": 3} if name == "TopKIntersection" else {}
    metric = getattr(quantus, name)(normalise=False, disable_warnings=True, **options)
    theirs = metric(
        model=None, x_batch=np.zeros((6, 3, 8, 8)), y_batch=np.zeros(6, dtype=int),
        a_batch=maps[:, None].numpy(), s_batch=masks[:, None].numpy(),
    )  # fmt: skip
    equal(ALL[ours](maps, masks), np.asarray(theirs, dtype=float))
