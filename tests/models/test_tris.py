"""XAI-TRIS's pictures: drawn anew from their seed, with the truth where the signal is and nowhere else."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libragrad_fx.errors import InputError
from zoo import sets, tris

pytest.importorskip("scipy", reason="of the extra evaluate")

SIDES = (64, 8)
SCENARIOS = get_args(tris.Scenario)


def backgrounds() -> tuple[str, ...]:
    try:
        import skimage  # noqa: F401
    except ImportError:
        return ("white", "correlated")
    return get_args(tris.Background)


@settings(max_examples=40, deadline=None)
@given(
    index=st.integers(0, 10**6), scenario=st.sampled_from(SCENARIOS), side=st.sampled_from(SIDES),
    background=st.sampled_from(backgrounds()), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_same_from_the_same_seed(
    index: int, scenario: tris.Scenario, side: int, background: tris.Background, seed: int
) -> None:
    one, again = (tris.sample(index, scenario, background, side, seed) for _ in range(2))
    other = tris.sample(index, scenario, background, side, seed + 1)
    assert np.array_equal(one.picture, again.picture)
    assert np.array_equal(one.mask, again.mask)
    assert not np.array_equal(one.picture, other.picture)
    assert one.label == index % 2
    assert one.picture.shape == one.mask.shape == (side, side)
    assert np.abs(one.picture).max() <= 1
    assert 0 < one.mask.sum() < side * side / 2


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("side", SIDES)
def test_the_signal_is_in_the_mask(scenario: tris.Scenario, side: int) -> None:
    draw = np.random.default_rng(0)
    shapes = set()
    for i in range(40):
        signal, mask = tris._signal(draw, scenario, side, i % 2)
        assert np.abs(signal[~mask]).max() < tris._SEEN
        cells = 4 if scenario == "translations_rotations" else 8  # of both where places are fixed
        cell = tris._cell(scenario, side)
        assert mask.sum() >= cells * cell**2 if cell > 3 else mask.sum() == cells
        shapes.add(mask.tobytes())
    assert (len(shapes) > 10) is (scenario == "translations_rotations")


@pytest.mark.parametrize("side", SIDES)
def test_no_pixel_alone_says_the_class_of_xor(side: int) -> None:
    """Each tetromino has both signs in both classes; their product says the class."""
    draw = np.random.default_rng(1)
    found = [np.stack([tris._signal(draw, "xor", side, label)[0] for _ in range(40)]) for label in (0, 1)]
    at = tuple(int(v) for v in np.argwhere(tris._fixed(side)[0] > 0.9)[0])
    other = tuple(int(v) for v in np.argwhere(tris._fixed(side)[1] > 0.9)[0])
    for label, signals in enumerate(found):
        first, second = (np.sign(signals[:, y, x]) for y, x in (at, other))
        assert set(first) == set(second) == {-1, 1}
        assert set(first * second) == {1 - 2 * label}


@pytest.mark.parametrize("side", SIDES)
def test_backgrounds_vary_by_one_and_only_one_kind_goes_with_its_neighbours(side: int) -> None:
    draw = np.random.default_rng(2)
    for background, together in (("white", False), ("correlated", True)):
        noise = np.stack([tris._noise(draw, background, side) for _ in range(400)])  # type: ignore[arg-type]
        assert abs(float(np.square(noise).mean()) - 1) < 0.15
        near = np.corrcoef(noise[:, 2, 2], noise[:, 2, 3])[0, 1]
        assert (near > 0.8) if together else (abs(near) < 0.2)


def test_sums_and_products_as_they_are_defined() -> None:
    """Of the same draw: noise comes first, then the signal."""
    for scenario in ("linear", "multiplicative"):
        found = tris.sample(5, scenario, "white", 8, seed=3)  # type: ignore[arg-type]
        draw = np.random.default_rng([3, 5])
        noise = tris._noise(draw, "white", 8)
        signal, _ = tris._signal(draw, scenario, 8, 1)  # type: ignore[arg-type]
        assert set(np.unique(signal)) == {0, 1}
        want = {
            "linear": 0.18 * 8 * signal / 2 + 0.82 * noise,  # four pixels: the norm of the signal is 2
            "multiplicative": (1 - 0.7 * signal) * noise,
        }[scenario]
        np.testing.assert_allclose(found.picture, (want / 5).clip(-1, 1), atol=1e-12)


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="no pictures of circles on white"):
        tris.sample(0, "circles")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="64 or 8 pixels along a side, not 32"):
        sets.tris(side=32)


def test_a_set_of_them() -> None:
    data = sets.tris("translations_rotations", "white", count=10)
    item, found = data.get(3), tris.sample(3, "translations_rotations", "white", seed=tris.SEEDS["test"])
    assert not isinstance(item.content, str)
    assert np.array_equal(item.masks[1], found.mask)
    assert data.classes == ("T", "L")
    x = sets.tris_steps(item.content).numpy()
    assert x.shape == (3, 64, 64)
    np.testing.assert_allclose(x[0], found.picture, atol=1 / 127)
    np.testing.assert_allclose(tris.normalised([found])[0], x, atol=1e-6)
