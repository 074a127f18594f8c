"""Each fill against a closed form, and the cells of a picture against its pixels."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from libragrad_fx.errors import InputError
from libragrad_fx.perturb import masked, pixels
from libragrad_fx.perturb.pixels import Fill

F64 = torch.float64
FILLS = get_args(Fill)


@pytest.fixture
def noiseless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "_NOISE", 0.0)


def pictures(batch: int = 2, h: int = 12, w: int = 8, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, h, w, generator=draw, dtype=F64)


def cells(*rows: list[int]) -> Tensor:
    return torch.tensor([*rows], dtype=torch.int64)


# --- cells and pixels


@settings(deadline=None)
@given(h=st.integers(1, 9), w=st.integers(1, 9), tall=st.integers(0, 30), wide=st.integers(0, 30))
def test_each_pixel_is_in_the_cell_of_its_centre(h: int, w: int, tall: int, wide: int) -> None:
    """In whole numbers: pixel y is in cell floor((y + 1/2) h / height)."""
    size = (h + tall, w + wide)
    every = torch.arange(h * w)[:, None]
    on = pixels.visible(every, (h, w), size)
    assert torch.equal(on.sum(0), torch.ones(size, dtype=torch.int64))  # one cell each
    assert bool(on.flatten(1).any(1).all())  # and none is empty
    inside = lambda c, n, side: [i for i in range(side) if (2 * i + 1) * n // (2 * side) == c]  # noqa: E731
    for c in range(h):
        rows = on[c * w : (c + 1) * w].any(0).any(1)
        assert rows.nonzero()[:, 0].tolist() == inside(c, h, size[0])
    for c in range(w):
        columns = on[c::w].any(0).any(0)
        assert columns.nonzero()[:, 0].tolist() == inside(c, w, size[1])


def test_a_grid_of_patches_is_the_patches() -> None:
    on = pixels.visible(cells([0, 4], [5, 1]), (3, 2), (12, 8))
    want = torch.zeros(2, 12, 8, dtype=torch.bool)
    want[0, :4, :4] = want[0, 8:, :4] = want[1, 8:, 4:] = want[1, :4, 4:] = True
    assert torch.equal(on, want)


@pytest.mark.parametrize("fill", FILLS)
@given(seed=st.integers(0, 99), keep=st.integers(0, 6), batch=st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_what_is_seen_stays_and_samples_are_apart(fill: Fill, seed: int, keep: int, batch: int) -> None:
    x, draw = pictures(batch, seed=seed), torch.Generator().manual_seed(seed)
    shown = torch.stack([torch.randperm(6, generator=draw)[:keep] for _ in range(batch)])
    before, found = x.clone(), masked(x, shown, (3, 2), fill)
    on = pixels.visible(shown, (3, 2), (12, 8))[:, None].expand_as(x)
    assert torch.equal(found[on], x[on])
    assert torch.equal(x, before)
    assert bool(found.isfinite().all())
    alone = torch.cat([masked(x[[i]], shown[[i]], (3, 2), fill) for i in range(batch)])
    torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-12)
    assert torch.equal(found, masked(x, shown.flip(1), (3, 2), fill))


@pytest.mark.parametrize("fill", FILLS)
def test_all_cells_are_the_picture_itself(fill: Fill) -> None:
    x = pictures()
    assert torch.equal(masked(x, torch.arange(6).expand(2, -1), (3, 2), fill), x)
    ones = torch.ones(1, 3, 1, 1)
    assert torch.equal(masked(ones, cells([0]), (1, 1), fill), ones)


# --- closed forms


def hidden(x: Tensor, shown: Tensor, fill: Fill, grid: tuple[int, int] = (3, 2), **more: Any) -> Tensor:
    """What stands in, (B, C, H, W), and nan where the picture is seen."""
    on = pixels.visible(shown, grid, x.shape[-2:])[:, None]
    return torch.where(on, torch.nan, masked(x, shown, grid, fill, **more))


def test_zero_and_mean() -> None:
    x, shown = pictures(), cells([1, 2], [0, 5])
    gone = hidden(x, shown, "zero")
    assert bool((gone[~gone.isnan()] == 0).all())
    gone = hidden(x, shown, "mean")
    mean = x.flatten(2).mean(2)[..., None, None].expand_as(x)
    torch.testing.assert_close(gone[~gone.isnan()], mean[~gone.isnan()], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fill", ["mean", "blur", "inpaint"])
def test_of_a_constant_a_constant(fill: Fill, noiseless: None) -> None:
    x = torch.tensor([1.5, -2.0, 0.25], dtype=F64)[:, None, None].expand(2, 3, 12, 8)
    for shown in (cells([1, 2], [0, 5]), torch.zeros(2, 0, dtype=torch.int64)):
        torch.testing.assert_close(masked(x, shown, (3, 2), fill), x, rtol=1e-12, atol=1e-12)


def test_a_blur_is_the_gaussian_of_the_whole_picture() -> None:
    """Its weights by hand, in a picture of one bright pixel, far from the borders."""
    x = torch.zeros(1, 1, 33, 49, dtype=F64)
    x[..., 16, 24] = 1
    sigma, reach = 33 / 8, 8  # two deviations
    line = torch.exp(-torch.arange(-reach, reach + 1, dtype=F64) ** 2 / (2 * sigma**2))
    want = torch.zeros(33, 49, dtype=F64)
    want[16 - reach : 17 + reach, 24 - reach : 25 + reach] = torch.outer(line, line) / line.sum() ** 2
    found = masked(x, torch.zeros(1, 0, dtype=torch.int64), (3, 7), "blur")
    torch.testing.assert_close(found[0, 0], want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 2), (3, 5), (7, 2)])
@pytest.mark.parametrize("fill", FILLS)
def test_small_pictures(size: tuple[int, int], fill: Fill) -> None:
    x = torch.rand(1, 2, *size, dtype=F64)
    found = masked(x, cells([0]), (1, size[1]), fill)
    assert bool(found.isfinite().all())
    assert float((found - x).abs().max()) <= 1.1


def test_inpainting_continues_a_ramp(noiseless: None) -> None:
    """Weights are alike on both sides: a linear ramp is the solution inside of a picture."""
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
    ramp = torch.stack([y, 2 * x - y, 3 - x]).double()[None]
    around = [c for c in range(25) if c not in (6, 7, 12, 17, 18)]
    found = masked(ramp, cells(around), (5, 5), "inpaint")
    torch.testing.assert_close(found, ramp, rtol=1e-9, atol=1e-9)


def test_inpainting_solves_its_equation(noiseless: None) -> None:
    """At borders too: a pixel is the mean of its neighbours in the picture, sides counted twice."""
    x, shown = pictures(1), cells([1, 4])
    found = masked(x, shown, (3, 2), "inpaint")[0]
    kernel = torch.tensor([[1.0, 2, 1], [2, 0, 2], [1, 2, 1]], dtype=F64)[None, None]
    sums = torch.nn.functional.conv2d(found[:, None], kernel, padding=1)[:, 0]
    weights = torch.nn.functional.conv2d(torch.ones(1, 1, 12, 8, dtype=F64), kernel, padding=1)[0, 0]
    on = pixels.visible(shown, (3, 2), (12, 8))[0]
    torch.testing.assert_close(found[:, ~on], (sums / weights)[:, ~on], rtol=1e-9, atol=1e-9)


def test_the_noise_of_inpainting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each picture has the same, of a size that is said, and a seed changes it."""
    x, shown = pictures(2, 60, 60), cells([0], [0])
    noisy, other = (masked(x, shown, (3, 3), "inpaint", seed) for seed in (0, 1))
    monkeypatch.setattr(pixels, "_NOISE", 0.0)
    noise = noisy - masked(x, shown, (3, 3), "inpaint")
    torch.testing.assert_close(noise[0], noise[1], rtol=0, atol=1e-12)
    assert float(noise[:, :, 20:].std()) == pytest.approx(0.01, rel=0.05)
    assert bool((noise[:, :, :20, :20] == 0).all())
    assert not torch.equal(noisy, other)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_dtype_stays(fill: Fill, dtype: torch.dtype) -> None:
    x = pictures().to(dtype).requires_grad_()
    found = masked(x, cells([1], [2]), (3, 2), fill)
    assert found.dtype == dtype
    want = masked(x.detach().double(), cells([1], [2]), (3, 2), fill)
    torch.testing.assert_close(found.detach().double(), want, rtol=0, atol=8 * torch.finfo(dtype).eps)


# --- bad input


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pictures": torch.zeros(3, 12, 8)}, "B, C, H, W"),
        ({"pictures": torch.zeros(2, 3, 12, 8, dtype=torch.uint8)}, "floating point"),
        ({"pictures": torch.full((2, 3, 12, 8), torch.nan)}, "nan"),
        ({"pictures": torch.zeros(3, 3, 12, 8)}, "of 2 pictures, got 3"),
        ({"cells": cells([0])}, "of 1 pictures, got 2"),
        ({"cells": torch.zeros(2, 1)}, "int64"),
        ({"cells": torch.zeros(2, dtype=torch.int64)}, "int64"),
        ({"cells": cells([0], [6])}, "0 to 5"),
        ({"cells": cells([0], [-1])}, "0 to 5"),
        ({"grid": (13, 2)}, "does not fit"),
        ({"grid": (0, 2)}, "does not fit"),
        ({"grid": (6,)}, "does not fit"),
        ({"grid": (1, 3, 2)}, "does not fit"),
        ({"fill": "black"}, "zero, mean, blur, inpaint"),
    ],
)  # fmt: skip
def test_bad_input_is_said(given: dict[str, Any], said: str) -> None:
    good = {"pictures": pictures(), "cells": cells([0], [1]), "grid": (3, 2), "fill": "mean"}
    with pytest.raises(InputError, match=said):
        masked(**{**good, **given})


# --- others


def test_the_imputation_is_that_of_its_authors(noiseless: None) -> None:
    """As pytorch-grad-cam has it, from their code."""
    road = pytest.importorskip("pytorch_grad_cam.metrics.road", reason="needs grad-cam")
    x = pictures(1).float()
    for shown in (cells([1, 4]), cells([0]), cells([0, 1, 2, 3, 4])):
        on = pixels.visible(shown, (3, 2), (12, 8))[0]
        want = road.NoisyLinearImputer(noise=0.0)(x[0], on.float())
        torch.testing.assert_close(masked(x, shown, (3, 2), "inpaint")[0], want, rtol=1e-5, atol=1e-5)
