"""Intervals hold the mean as often as they say; tests are those of SciPy; nothing is left out in
silence."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from libragrad_fx.errors import InputError
from libragrad_fx.metrics import Interval, completeness, crossed, interval, paired
from tests.between import fast_first

F64 = torch.float64
Tensor = torch.Tensor
pytest.importorskip("scipy.stats", reason="of the extra evaluate")


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape)


def skewed(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.exponential(size=shape) - 1


def covered(drawn: np.ndarray, of: Callable[[Tensor], Interval], truth: float = 0.0) -> float:
    """The share of the rows whose interval holds the truth."""
    found = [of(torch.from_numpy(row)) for row in drawn]
    return float(np.mean([i.low <= truth <= i.high for i in found]))


# --- coverage. Of 250 intervals at 95 % that are right, fewer than 91 % hold once in 300 tries


@pytest.mark.parametrize("draw", [normal, skewed])
def test_of_100_intervals_95_hold_the_mean(draw: Callable[..., np.ndarray]) -> None:
    drawn = draw(np.random.default_rng(0), 250, 100)
    assert 0.91 <= covered(drawn, lambda v: interval(v, resamples=500)) <= 0.98
    assert 0.73 <= covered(drawn[:150], lambda v: interval(v, level=0.8, resamples=500)) <= 0.88


@pytest.mark.slow
@pytest.mark.parametrize("draw", [normal, skewed])
def test_of_1000_intervals_950_hold_the_mean(draw: Callable[..., np.ndarray]) -> None:
    drawn = draw(np.random.default_rng(0), 2000, 300)
    assert 0.935 <= covered(drawn, interval) <= 0.965


def test_the_released_recipe_holds_the_mean_half_of_the_time() -> None:
    """The variance of ten fold means, of values times 100, scaled by 100 (method §3.4): a third of the
    width."""
    drawn = normal(np.random.default_rng(0), 250, 100)
    folds = drawn.reshape(250, 10, 10).mean(2).var(1)
    half, means = 1.96 * np.sqrt(100 * folds), 100 * drawn.mean(1)
    assert 0.4 < np.mean(np.abs(means) <= half) < 0.6
    assert covered(drawn, lambda v: interval(100 * v, resamples=500)) > 0.91


@pytest.mark.parametrize(("share", "n"), [(0.9, 50), (0.5, 20), (0.98, 200)])
def test_shares_have_wilsons_interval(share: float, n: int) -> None:
    drawn = (np.random.default_rng(0).random((400, n)) < share).astype(float)
    assert 0.92 <= covered(drawn, interval, share) <= 0.995
    assert interval(torch.from_numpy(drawn[0])).method == "wilson"


def test_a_thousand_successes_are_not_certainty() -> None:
    found = interval(torch.ones(1000))
    assert (found.mean, found.high) == (1, 1)
    assert found.low == pytest.approx(1000 / (1000 + 1.959964**2))


@pytest.mark.parametrize("seeds", fast_first([3, 2, 5], 1))
@pytest.mark.parametrize("between", [0.0, 0.5])
def test_new_seeds_and_new_images(seeds: int, between: float) -> None:
    """A bootstrap of the images says nothing about another seed, and fails where seeds differ."""
    rng = np.random.default_rng(seeds)
    drawn = normal(rng, 1000, 1, 80) + between * normal(rng, 1000, seeds, 1) + normal(rng, 1000, seeds, 80)
    assert 0.94 <= covered(drawn, crossed) <= 0.995
    if between:
        images = covered(drawn[:200], lambda v: interval(v.mean(0), resamples=200))
        flat = covered(drawn[:200], lambda v: interval(v.flatten(), resamples=200))
        assert max(images, flat) < 0.8


def test_crossed_is_the_t_interval_if_images_do_not_matter() -> None:
    """Values (seeds, n) that are the same for all images: t with seeds - 1 degrees of freedom."""
    stats = pytest.importorskip("scipy.stats")
    values = torch.tensor([1.0, 2, 4])
    found = crossed(values[:, None].expand(3, 7))
    low, high = stats.t.interval(0.95, 2, 7 / 3, stats.sem([1, 2, 4]))
    assert (found.low, found.high) == pytest.approx((low, high))
    images = crossed(torch.arange(9.0).expand(4, 9))  # and of images, if seeds do not
    assert (images.low, images.high) == pytest.approx(stats.t.interval(0.95, 8, 4, stats.sem(range(9))))
    values = torch.tensor([[0.0, 2, 4], [1, 2, 6]])  # mean squares: seeds 1.5, images 10.5, rest 0.5
    found, t = crossed(values), [stats.t.ppf(0.975, n) for n in (1, 2)]
    assert found.mean - found.low == pytest.approx(((1.5 * t[0] ** 2 + 10 * t[1] ** 2) / 6) ** 0.5)
    same = crossed(torch.full((3, 5), 0.1))
    assert (same.low, same.high) == pytest.approx((0.1, 0.1))


# --- one side


def test_scaled_values_have_scaled_intervals_and_a_seed_fixes_them() -> None:
    torch.manual_seed(0)
    values = torch.rand(200, dtype=F64) ** 3
    found, hundred = interval(values), interval(100 * values)
    assert tuple(hundred[:3]) == pytest.approx([100 * v for v in found[:3]])
    assert interval(values) == found
    assert interval(values, seed=1) != found
    assert found.low < found.mean < found.high
    assert (found.level, found.n, found.left_out, found.method) == (0.95, 200, 0, "bca")
    assert interval(values, level=0.99).low < found.low
    assert interval(values.float().requires_grad_()).mean == pytest.approx(found.mean)


def test_many_values_take_percentiles() -> None:
    torch.manual_seed(0)
    found = interval(torch.randn(5001), resamples=500)
    assert found.method == "percentile"
    assert found.high - found.low == pytest.approx(2 * 1.96 / 5001**0.5, rel=0.15)


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.sampled_from([-3.0, 0.0, 0.25, 1.0, 1.0, 50.0]), min_size=2, max_size=12))
def test_few_values_with_ties_have_an_interval_around_the_mean(values: list[float]) -> None:
    for found in (interval(torch.tensor(values), resamples=200), interval(torch.tensor(values) * 1e-9)):
        slack = 1e-12 * abs(found.mean) + 1e-30
        assert found.low <= found.mean + slack
        assert found.high >= found.mean - slack


def test_what_does_not_vary_has_no_width() -> None:
    assert interval(torch.full((9,), 0.3, dtype=F64))[:3] == (0.3, 0.3, 0.3)
    assert interval(torch.full((9,), 0.3)).method == "constant"


def test_nan_is_refused_or_counted() -> None:
    values = torch.tensor([0.1, math.nan, 0.5, 0.4, math.nan])
    with pytest.raises(InputError, match="2 of 5 values are nan, the first number 1: missing='omit'"):
        interval(values)
    found = interval(values, missing="omit")
    assert (found.n, found.left_out) == (3, 2)
    assert found == interval(values[[0, 2, 3]])._replace(left_out=2)
    both = paired(values, torch.tensor([0.0, 0, math.nan, 0, 0]), missing="omit")
    assert (both.difference.n, both.difference.left_out, both.wins) == (2, 3, 2)
    table = torch.rand(3, 6)
    table[1, 2] = math.nan
    with pytest.raises(InputError, match="1 of 6 values are nan"):
        crossed(table)
    left = crossed(table, missing="omit")
    assert (left.n, left.left_out) == (5, 1)
    assert left.mean == pytest.approx(float(table[:, [0, 1, 3, 4, 5]].mean()))


def test_bad_input() -> None:
    good = torch.rand(9)
    with pytest.raises(InputError, match="1 values have no interval"):
        interval(good[:1])
    with pytest.raises(InputError, match="inf"):
        interval(torch.tensor([1.0, math.inf]))
    with pytest.raises(InputError, match="inf"):  # whose difference is nan
        paired(torch.tensor([1.0, math.inf]), torch.tensor([1.0, math.inf]), missing="omit")
    with pytest.raises(InputError, match=r"\(n,\), not \(3, 3\)"):
        interval(good.view(3, 3))
    with pytest.raises(InputError, match=r"0\.95, not 95"):
        interval(good, level=95)
    with pytest.raises(InputError, match=r"0\.95, not 95"):
        crossed(good.view(3, 3), level=95)
    with pytest.raises(InputError, match="not 9 and 8"):
        paired(good, good[:8])
    with pytest.raises(InputError, match="'error' or 'omit'"):
        interval(good, missing="drop")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="10 resamples"):
        interval(good, resamples=10)
    with pytest.raises(InputError, match="one seed says nothing"):
        crossed(good[None])


# --- two sides


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999), n=st.integers(2, 9))
def test_small_samples_have_scipys_exact_p(seed: int, n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, n, dtype=F64, generator=generator).mul(2).round() / 2
    found = paired(a, b, resamples=1000)
    difference = (a - b).numpy()
    want = stats.permutation_test(
        (difference,), np.mean, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert found.p == pytest.approx(min(want, 1))
    assert found.wins == int((a > b).sum())
    assert found.ties == int((a == b).sum())
    assert found.wins + found.ties + found.losses == n
    assert found.difference.mean == pytest.approx(float((a - b).mean()), abs=1e-15)


def test_p_of_noise_is_even_and_of_a_difference_small() -> None:
    rng = np.random.default_rng(0)
    same = [paired(*torch.from_numpy(normal(rng, 2, 40)), resamples=400).p for _ in range(200)]
    assert 0.02 <= np.mean(np.array(same) <= 0.05) <= 0.09
    assert 0.4 < np.median(same) < 0.6
    a, b = torch.from_numpy(normal(rng, 2, 200))
    assert paired(a + 1, b, resamples=999).p == 1 / 1000  # the least there is
    assert paired(a, a).p == 1


def test_the_pair_is_narrower_than_its_sides() -> None:
    torch.manual_seed(0)
    image = torch.randn(300)  # easy and hard ones: the same for both
    a, b = image + 0.05 * torch.randn(300) + 0.02, image + 0.05 * torch.randn(300)
    found = paired(a, b).difference
    alone = interval(a)
    assert found.low > 0
    assert found.high - found.low < (alone.high - alone.low) / 8
    reverse = paired(b, a)
    assert reverse.difference.mean == pytest.approx(-found.mean)
    assert (reverse.wins, reverse.losses) == (paired(a, b).losses, paired(a, b).wins)


def test_wins_alone_are_no_share() -> None:
    """Differences of hits are -1, 0 and 1; where none is -1 they are still differences."""
    found = paired(torch.tensor([1.0, 1, 1, 0]), torch.tensor([0.0, 1, 0, 0]))
    assert found.difference.method == "bca"
    assert (found.wins, found.ties, found.losses) == (2, 2, 0)


# --- completeness


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_completeness_is_the_difference_at_each_layer(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    totals = torch.randn(3, 4, dtype=F64, generator=generator)
    expected = torch.randn(3, dtype=F64, generator=generator)
    found = completeness(totals, expected)
    torch.testing.assert_close(found.error + expected[:, None], totals)
    torch.testing.assert_close(found.absolute, found.error.abs())
    torch.testing.assert_close(found.relative * expected[:, None].abs(), found.absolute)
    one = completeness(totals[:, 2], expected)
    assert all(torch.equal(a, b[:, 2]) for a, b in zip(one, found, strict=True))
    assert not completeness(expected, expected).absolute.any()


def test_completeness_of_zero_and_of_bad_input() -> None:
    found = completeness(torch.tensor([0.0, 1.0]), torch.zeros(2)).relative
    assert math.isnan(found[0])
    assert math.isinf(found[1])
    with pytest.raises(InputError, match=r"totals are \(B,\) or \(B, layers\)"):
        completeness(torch.zeros(2), torch.zeros(3))
    with pytest.raises(InputError, match="totals hold nan or inf in sample 1 of 2"):
        completeness(torch.tensor([0, math.nan]), torch.zeros(2))
