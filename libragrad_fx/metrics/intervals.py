"""How sure is a mean? Intervals over images, paired differences, and several seeds of a model.

Values are tensors (n,), one number an image, as the metrics return them. An interval is of the mean over
images like these, at the scale of the values: scale the values and the interval scales with them. (The
released tables of LibraGrad take the variance of ten fold means for that of the mean, and scale it by 100
where 100² is due.)
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from libragrad_fx.errors import InputError
from libragrad_fx.extras import need

Missing = Literal["error", "omit"]
_MOST_BCA = 5000  # values; BCa's jackknife takes n² steps, and by then it corrects little
_AT_ONCE = 10**6  # resampled values in memory


class Interval(NamedTuple):
    """A mean and where it may lie.

    level:    how often such intervals hold the true mean
    n:        values that count, images where there are several seeds
    left_out: values that were nan
    method:   "bca", "percentile", "wilson", "constant" or "crossed"
    """

    mean: float
    low: float
    high: float
    level: float
    n: int
    left_out: int
    method: str


class Paired(NamedTuple):
    """Two sides that saw the same images.

    difference:         of the means, first minus second, with its interval
    wins, ties, losses: images where the first is larger, equal, smaller
    p:                  of the two-sided sign-flip test: how often a mean difference at least as large as
                        this shows up if the sign of each image's difference is a coin's
    """

    difference: Interval
    wins: int
    ties: int
    losses: int
    p: float


def interval(
    values: torch.Tensor,
    *,
    level: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
    missing: Missing = "error",
) -> Interval:
    """The mean of values (n,) with a confidence interval over images.

    Bootstrap by images, bias-corrected and accelerated (BCa, Efron 1987; ``scipy.stats.bootstrap``), by
    percentiles beyond 5,000 values. Values that are all 0 or 1 have Wilson's score interval (1927), which
    is right for 1,000 successes in a row, too. Other values that do not vary have no width ("constant").

    Args:
        missing: what to do about nan: refuse, or leave those values out and count them.

    Raises:
        InputError: fewer than two values, inf, nan if they are not to be left out, or a level outside of
            (0, 1).
        LibraGradError: SciPy is not installed.
    """
    found, left_out = _present(_array(values, 1), missing)
    return _interval(found, left_out, level, resamples, seed)


def paired(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    level: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
    missing: Missing = "error",
) -> Paired:
    """Compare two sides (n,) image by image: a - b.

    The interval is that of ``interval`` for the differences. The test flips signs at random; it is exact
    where 2^n is at most ``resamples``, and otherwise counts the observed signs among the drawn ones, so
    that p is never 0 (Phipson and Smyth 2010).

    Args:
        missing: what to do about an image that is nan on one side: refuse, or leave it out on both.

    Raises:
        InputError: as ``interval``; or another number of values on the other side.
    """
    first, second = _array(a, 1), _array(b, 1)
    if first.shape != second.shape:
        raise InputError(
            f"paired values are of the same images, not {len(first)} and {len(second)} of them"
        )
    difference, left_out = _present(first - second, missing)
    p = _sign_flip(difference, resamples, seed)
    won, lost = int((difference > 0).sum()), int((difference < 0).sum())
    found = _interval(difference, left_out, level, resamples, seed, shares=False)
    return Paired(found, won, len(difference) - won - lost, lost, p)


def crossed(values: torch.Tensor, *, level: float = 0.95, missing: Missing = "error") -> Interval:
    """The mean of values (seeds, n): n images, each seen by every one of several trained models.

    For the mean over new images *and* new seeds, which are random effects of a two-way layout. The mean
    square of the seeds, M_s / (seeds · n), and that of the images without the rest, (M_i - M_rest) /
    (seeds · n), are squared standard errors; each is taken times the square of its own t, and half of the
    width is the root of the sum (Zou and Donner 2008). In the tests' simulations with 2, 3 and 5 seeds
    these intervals hold the mean at least as often as they say. With two or three seeds they are wide, for
    good reason: a bootstrap of three seeds has two thirds of the variance, and one of images alone says
    nothing about another seed. For this one set of models, use ``interval(values.mean(0))``. A difference
    of two sides: ``crossed(a - b)``.

    Args:
        missing: what to do about an image that is nan for a seed: refuse, or leave it out for all.

    Raises:
        InputError: fewer than two seeds or images; else as ``interval``.
    """
    table = _array(values, 2)
    if len(table) < 2:
        raise InputError("one seed says nothing about others: pass two or more, or interval(values[0])")
    found, left_out = _present(table, missing)
    _checked(level)
    seeds, n = found.shape
    mean = found.mean()
    by_seed, by_image = found.mean(1) - mean, found.mean(0) - mean
    rest = found - mean - by_seed[:, None] - by_image
    of_seeds = n * (by_seed**2).sum() / (seeds - 1)
    of_images = seeds * (by_image**2).sum() / (n - 1)
    of_rest = (rest**2).sum() / ((seeds - 1) * (n - 1))
    t = need("scipy.stats", "evaluate").t
    seed_t, image_t = t.ppf((1 + level) / 2, seeds - 1), t.ppf((1 + level) / 2, n - 1)
    half = math.sqrt((seed_t**2 * of_seeds + image_t**2 * max(of_images - of_rest, 0)) / (seeds * n))
    return Interval(float(mean), float(mean - half), float(mean + half), level, n, left_out, "crossed")


def _array(values: torch.Tensor, axes: int) -> np.ndarray:
    if not isinstance(values, torch.Tensor) or values.ndim != axes or values.is_complex():
        shape = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise InputError(
            f"values are a tensor of real numbers {('(n,)', '(seeds, n)')[axes - 1]}, not {shape}"
        )
    found = values.detach().double().cpu().numpy()
    if np.isinf(found).any():
        raise InputError("values hold inf: a mean of them says nothing")
    return found


def _present(values: np.ndarray, missing: Missing) -> tuple[np.ndarray, int]:
    """The values without images that are nan, and how many those are."""
    absent = np.isnan(np.atleast_2d(values)).any(0)
    if missing not in ("error", "omit"):
        raise InputError(f"missing is 'error' or 'omit', not {missing!r}")
    if absent.any() and missing == "error":
        raise InputError(
            f"{absent.sum()} of {absent.size} values are nan, the first number {absent.argmax()}: "
            "missing='omit' leaves them out and counts them"
        )
    found = values[..., ~absent]
    if found.shape[-1] < 2:
        raise InputError(f"{found.shape[-1]} values have no interval: two or more are needed")
    return found, int(absent.sum())


def _checked(level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"a level is between 0 and 1, as 0.95, not {level}")


def _interval(
    values: np.ndarray, left_out: int, level: float, resamples: int, seed: int, shares: bool = True
) -> Interval:
    _checked(level)
    stats, n, mean = need("scipy.stats", "evaluate"), len(values), float(values.mean())
    if shares and np.isin(values, (0, 1)).all():
        method, (low, high) = "wilson", stats.binomtest(int(values.sum()), n).proportion_ci(level, "wilson")
    elif values.min() == values.max():
        method, low, high = "constant", mean, mean
    else:
        method = "bca" if n <= _MOST_BCA else "percentile"
        low, high = _bootstrap(stats, values, method, level, resamples, seed)
    return Interval(mean, float(low), float(high), level, n, left_out, method)


def _bootstrap(
    stats: Any, values: np.ndarray, method: str, level: float, resamples: int, seed: int
) -> tuple[float, float]:
    if resamples < 100:
        raise InputError(f"{resamples} resamples say little about an interval: 1,000 or more")
    return stats.bootstrap(
        (values,),
        np.mean,
        method=method,
        confidence_level=level,
        n_resamples=resamples,
        batch=max(1, _AT_ONCE // len(values)),
        rng=np.random.default_rng(seed),
    ).confidence_interval


def _sign_flip(difference: np.ndarray, resamples: int, seed: int) -> float:
    """The two-sided p of a mean of 0, over signs. Equal sums count as at least as large, up to rounding."""
    n = len(difference)
    least = abs(difference.sum()) - 1e-12 * np.abs(difference).sum()
    if 2**n <= resamples:
        bits = np.arange(2**n)[:, None] >> np.arange(n) & 1
        return float((np.abs((2 * bits - 1) @ difference) >= least).mean())
    rng, extreme, left = np.random.default_rng(seed), 0, resamples
    while left:
        rows = min(left, max(1, _AT_ONCE // n))
        signs = 2 * rng.integers(0, 2, (rows, n), dtype=np.int8) - 1
        extreme += int((np.abs(signs.astype(float) @ difference) >= least).sum())
        left -= rows
    return (extreme + 1) / (resamples + 1)
