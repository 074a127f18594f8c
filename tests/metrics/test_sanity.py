"""Checks that call the model: closed forms of linear ones, agreement with Quantus, Captum, SciPy and
scikit-image, and the user's model as it was."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from libragrad_fx import metrics
from libragrad_fx.errors import InputError
from libragrad_fx.metrics import compare, sanity

F64 = torch.float64
Tensor = torch.Tensor
SOME = settings(max_examples=25, deadline=None)


class Shifted(nn.Module):
    """A parameter of its own, without ``reset_parameters``."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(3, 8, 8, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        Shifted(), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 3),
    ).double().eval()  # fmt: skip


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        return (torch.autograd.grad(model(x)[:, 0].sum(), x)[0] * x.detach()).sum(1)


def edges(model: nn.Module, x: Tensor) -> Tensor:
    """Sees no model."""
    return x.diff(dim=3, prepend=x[..., :1]).abs().sum(1)


INPUTS = torch.randn(2, 3, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(1))


# --- likeness


@SOME
@given(seed=st.integers(0, 9999), n=st.integers(2, 20))
def test_correlations_are_scipys(seed: int, n: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason="of the extra evaluate")
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 3, n, dtype=F64, generator=generator).mul(2).round()
    ours = [compare.pearson(a, b), compare.spearman(a, b)]
    for i, (x, y) in enumerate(zip(a.numpy(), b.numpy(), strict=True)):
        np.testing.assert_array_equal(compare.ranks(a)[i].numpy(), stats.rankdata(x))
        if np.ptp(x) == 0 or np.ptp(y) == 0:
            assert all(bool(o[i].isnan()) for o in ours)
            continue
        assert float(ours[0][i]) == pytest.approx(stats.pearsonr(x, y).statistic)
        assert float(ours[1][i]) == pytest.approx(stats.spearmanr(x, y).statistic)


@pytest.mark.parametrize("side", [4, 7, 16])
def test_ssim_is_scikit_images(side: int) -> None:
    skimage = pytest.importorskip("skimage.metrics", reason="needs scikit-image")
    torch.manual_seed(0)
    a = torch.randn(3, side, side + 2, dtype=F64) * torch.tensor([1, 5, 0.1])[:, None, None]
    b = a + 0.3 * torch.randn(a.shape, dtype=F64)
    window = min(7, side - 1 + side % 2)
    for found, x, y in zip(compare.ssim(a, b), a.numpy(), b.numpy(), strict=True):
        want = skimage.structural_similarity(x, y, win_size=window, data_range=np.ptp([x, y]))
        assert float(found) == pytest.approx(want, abs=1e-9)
    assert bool(compare.ssim(a, a).sub(1).abs().max() < 1e-9)
    assert bool(compare.ssim(torch.ones(1, 8, 8), torch.ones(1, 8, 8)).isnan())


def test_entropy_of_a_histogram() -> None:
    stats = pytest.importorskip("scipy.stats", reason="of the extra evaluate")
    torch.manual_seed(0)
    values = torch.randn(3, 400, dtype=F64)
    want = [stats.entropy(np.histogram(v, bins=50)[0]) for v in values.numpy()]
    np.testing.assert_allclose(compare.entropy(values, 50).numpy(), want, rtol=1e-12)
    assert float(compare.entropy(torch.full((1, 9), 0.1))) == 0
    assert float(compare.entropy(torch.arange(8.0)[None], 8)) == pytest.approx(np.log(8))


# --- randomised parameters


@pytest.mark.parametrize("order", ["top", "bottom", "each"])
def test_the_model_and_the_generators_are_left_as_they_were(order: Any) -> None:
    model = small()
    before, training = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    metrics.randomisation(model, gradient, INPUTS, order=order)
    metrics.complexity_rise(model, gradient, INPUTS)
    metrics.max_sensitivity(model, gradient, INPUTS)
    metrics.sensitivity_n(lambda x: model(x)[:, 0], INPUTS, gradient(model, INPUTS), [3])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == training
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters())

    def fails(given: nn.Module, x: Tensor) -> Tensor:
        assert given is model
        return gradient(given, x)

    with pytest.raises(AssertionError):
        metrics.randomisation(model, fails, INPUTS, order=order)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_which_modules_change_and_how_many_at_once() -> None:
    model = small()
    own = {n: [*m.parameters(recurse=False)] for n, m in model.named_modules()}
    names = [n for n, p in own.items() if p]
    assert names == ["0", "1", "2", "5"]
    changed: list[list[str]] = []

    def spy(given: nn.Module, x: Tensor) -> Tensor:
        theirs = {n: [*m.parameters(recurse=False)] for n, m in given.named_modules()}
        same = {n: all(map(torch.equal, own[n], theirs[n])) for n in names}
        changed.append([n for n in names if not same[n]])
        return gradient(given, x)

    with torch.no_grad():  # a batch norm is reset to weights of 1: start elsewhere
        for p in own["2"]:
            p.uniform_(0.5, 2)
    for order, want in {
        "top": [["5"], ["2", "5"], ["1", "2", "5"], names],
        "bottom": [["0"], ["0", "1"], ["0", "1", "2"], names],
        "each": [["0"], ["1"], ["2"], ["5"]],
    }.items():
        changed.clear()
        found = metrics.randomisation(model, spy, INPUTS, order=order)  # type: ignore[arg-type]
        assert changed == [[], *want]
        assert found.names == tuple(names[::-1] if order == "top" else names)
        assert found.spearman.shape == found.ssim.shape == (4, 2)
        again = metrics.randomisation(model, spy, INPUTS, order=order)  # type: ignore[arg-type]
        assert torch.equal(again.spearman, found.spearman)


def test_blocks_are_one_step_each_and_draw_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(small()[:5], small(1)[5], Shifted()).double().eval()
    seen: dict[str, list[Tensor]] = {}

    def spy(given: nn.Module, x: Tensor) -> Tensor:
        seen.setdefault("blocks" if whole else "each", []).append(
            torch.cat([p.detach().flatten().clone() for p in given.parameters()])
        )
        return x.sum(1)

    whole = True
    found = metrics.randomisation(model, spy, INPUTS, blocks=["0"])
    assert found.names == ("2", "1", "0")
    whole = False
    apart = metrics.randomisation(model, spy, INPUTS)
    assert apart.names == ("2", "1", "0.2", "0.1", "0.0")
    assert all(map(torch.equal, seen["blocks"], [*seen["each"][:3], seen["each"][-1]]))


def test_a_parameter_without_a_reset_is_permuted() -> None:
    model = nn.Sequential(Shifted())
    seen: list[Tensor] = []

    def spy(given: nn.Module, x: Tensor) -> Tensor:
        seen.append(given.get_parameter("0.shift").detach().flatten())
        return x.sum(1)

    metrics.randomisation(model, spy, INPUTS)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0].sort().values, seen[1].sort().values)


def test_what_sees_the_model_changes_and_what_does_not_stays() -> None:
    blind = metrics.randomisation(small(), edges, INPUTS)
    assert bool((blind.spearman > 1 - 1e-12).all())
    assert bool((blind.ssim > 1 - 1e-9).all())
    seeing = metrics.randomisation(small(), gradient, INPUTS)
    assert float(seeing.spearman[-1].abs().max()) < 0.7
    assert not metrics.complexity_rise(small(), edges, INPUTS).any()


def test_one_by_one_as_in_a_batch() -> None:
    model = small()
    maps = gradient(model, INPUTS)

    def all_of(x: Tensor, m: Tensor) -> list[Tensor]:
        cascade = metrics.randomisation(model, gradient, x)
        return [
            cascade.spearman.T, cascade.ssim.T, metrics.complexity_rise(model, gradient, x),
            metrics.max_sensitivity(model, gradient, x),
            metrics.sensitivity_n(lambda v: model(v)[:, 0], x, m, [1, 5], subsets=20),
        ]  # fmt: skip

    both = all_of(INPUTS, maps)
    for i in range(2):
        for one, many in zip(all_of(INPUTS[i : i + 1], maps[i : i + 1]), both, strict=True):
            torch.testing.assert_close(one[0], many[i], rtol=1e-9, atol=1e-9)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="no order 'down'"):
        metrics.randomisation(small(), gradient, INPUTS, order="down")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="ReLU has no parameters"):
        metrics.randomisation(nn.ReLU(), edges, INPUTS)
    with pytest.raises(InputError, match=r"maps are \(B, H, W\)"):
        metrics.randomisation(small(), lambda m, x: x, INPUTS)
    with pytest.raises(InputError, match="maps hold nan or inf in samples 0, 1"):
        metrics.max_sensitivity(small(), lambda m, x: x.sum(1) * torch.nan, INPUTS)
    with pytest.raises(InputError, match=r"floating point inputs, not to torch\.int64"):
        metrics.max_sensitivity(small(), gradient, INPUTS.long())
    with pytest.raises(InputError, match="positive, not 0 and 10"):
        metrics.max_sensitivity(small(), gradient, INPUTS, radius=0)
    maps = INPUTS.sum(1)
    with pytest.raises(InputError, match="one number a sample"):
        metrics.sensitivity_n(small(), INPUTS, maps)
    with pytest.raises(InputError, match="divisors of H and W"):
        metrics.sensitivity_n(lambda x: x.sum((1, 2, 3)), INPUTS, maps[:, :3])
    with pytest.raises(InputError, match="between 1 and the 64 cells"):
        metrics.sensitivity_n(lambda x: x.sum((1, 2, 3)), INPUTS, maps, [0, 3])


# --- noise, and sensitivity-n


def test_max_sensitivity_of_a_linear_map_is_that_of_the_noise() -> None:
    """Φ(x) = x: the largest ‖δ‖ / ‖x‖ of the drawn δ. A constant map is perfectly stable."""
    noise = torch.cat([*sanity._noise(INPUTS, 0.3, 7, 2)])
    assert noise.shape == (7, 3, 8, 8)
    assert 0.29 < float(noise.abs().max()) <= 0.3
    given: dict[str, Any] = {"radius": 0.3, "samples": 7, "seed": 2}
    found = metrics.max_sensitivity(nn.Identity(), lambda m, x: x[:, 0], INPUTS, **given)
    want = noise[:, 0].flatten(1).norm(dim=1).max() / INPUTS[:, 0].flatten(1).norm(dim=1)
    torch.testing.assert_close(found, want)
    still = metrics.max_sensitivity(nn.Identity(), lambda m, x: torch.ones(len(x), 2, 2), INPUTS)
    assert still.tolist() == [0, 0]


@pytest.mark.parametrize("cell", [1, 2, 4])
def test_a_complete_map_of_a_linear_function_has_sensitivity_n_1(cell: int) -> None:
    """At every n, for pixels and for patches, from any baseline."""
    torch.manual_seed(0)
    weights, baseline = torch.randn(3, 8, 8, dtype=F64), torch.randn(3, 1, 1, dtype=F64)
    maps = (weights * (INPUTS - baseline)).sum(1)
    maps = maps.view(2, 8 // cell, cell, 8 // cell, cell).sum((2, 4))
    cells = (8 // cell) ** 2
    of = lambda x: (weights * x).sum((1, 2, 3))  # noqa: E731
    found = metrics.sensitivity_n(of, INPUTS, maps, [1, 2, cells - 1], subsets=30, baseline=baseline)
    torch.testing.assert_close(found, torch.ones(2, 3, dtype=F64))
    opposite = metrics.sensitivity_n(of, INPUTS, -maps, [2], subsets=30, baseline=baseline)
    torch.testing.assert_close(opposite, -torch.ones(2, 1, dtype=F64))
    assert bool(metrics.sensitivity_n(of, INPUTS, torch.ones_like(maps), [2]).isnan().all())


def test_sensitivity_n_by_hand() -> None:
    """All subsets of one size, counted: f = x₀ x₁ + x₂, R = (1, 2, 3) at x = 1."""
    of = lambda x: x[:, 0, 0, 0] * x[:, 0, 0, 1] + x[:, 0, 0, 2]  # noqa: E731
    x, maps = torch.ones(1, 1, 1, 3, dtype=F64), torch.tensor([[[1.0, 2, 3]]])
    found = metrics.sensitivity_n(of, x, maps, [1, 2], subsets=5000)
    assert bool(found[0, 0].isnan())  # without any one pixel the output falls by 1
    assert float(found[0, 1]) == pytest.approx(np.corrcoef([3, 4, 5], [1, 2, 2])[0, 1], abs=0.02)


def test_default_sizes() -> None:
    sizes = sanity._spaced(196)
    assert (sizes[0], sizes[-1]) == (1, 157)
    assert len(sizes) <= 16
    assert sanity._spaced(1) == [1]


# --- others


def quantus_explain(model: nn.Module, inputs: Any, targets: Any, **_: Any) -> np.ndarray:
    return gradient(model, torch.as_tensor(inputs, dtype=F64))[:, None].numpy()


class Double(nn.Module):
    """Quantus calls the model with float32."""

    def forward(self, x: Tensor) -> Tensor:
        return x.double().flatten(1)


class Known(nn.Linear):
    """Reset to weights that depend on nothing, so that both sides draw the same."""

    def reset_parameters(self) -> None:
        generator = torch.Generator().manual_seed(self.in_features)
        with torch.no_grad():
            self.weight.copy_(torch.randn(self.weight.shape, generator=generator))
            self.bias.zero_()


@pytest.fixture
def quantus() -> Any:
    return pytest.importorskip("quantus", reason="needs quantus (see CONTRIBUTING.md)")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(Double(), Known(192, 10), nn.Tanh(), Known(10, 6), nn.Tanh(), Known(6, 2))
    with torch.no_grad():
        for p in layers.parameters():
            p.uniform_(-0.5, 0.5)
    return layers.double().eval()


def theirs(metric: Any, model: nn.Module, **other: Any) -> Any:
    return metric(
        model=model, x_batch=INPUTS.numpy(), y_batch=np.zeros(2, dtype=int), device="cpu",
        explain_func=quantus_explain, **{"a_batch": None} | other,
    )  # fmt: skip


def test_the_cascade_is_quantus_mprt(quantus: Any, model: nn.Module) -> None:
    metric = quantus.MPRT(disable_warnings=True, abs=False, normalise=False)
    want = theirs(metric, model)
    ours = metrics.randomisation(model, gradient, INPUTS)
    assert ours.names == ("5", "3", "1")
    for name, found in zip(ours.names, ours.spearman, strict=True):
        np.testing.assert_allclose(found.numpy(), want[name], atol=1e-9)


def test_complexity_rise_is_quantus_efficient_mprt(quantus: Any, model: nn.Module) -> None:
    metric = quantus.EfficientMPRT(disable_warnings=True, abs=False, normalise=False)
    want = theirs(metric, model)
    np.testing.assert_allclose(metrics.complexity_rise(model, gradient, INPUTS).numpy(), want, atol=1e-9)


def test_max_sensitivity_is_quantus_and_captums_of_the_same_noise(quantus: Any, model: nn.Module) -> None:
    captum = pytest.importorskip("captum.metrics", reason="needs captum")
    drawn = [*sanity._noise(INPUTS, 0.1, 4, 0)]
    ours = metrics.max_sensitivity(model, gradient, INPUTS, radius=0.1, samples=4).numpy()
    noise = iter(drawn)
    metric = quantus.MaxSensitivity(
        nr_samples=4, disable_warnings=True,
        perturb_func=lambda arr, indices, **_: arr + next(noise).flatten(1).numpy(),
    )  # fmt: skip
    np.testing.assert_allclose(ours, theirs(metric, model), rtol=1e-9)
    want = captum.sensitivity_max(  # repeats each sample for its draws; a tuple comes in, one goes out
        lambda x: (gradient(model, x[0]),) if isinstance(x, tuple) else gradient(model, x), INPUTS,
        perturb_func=lambda x, _: x + torch.cat(drawn).repeat(2, 1, 1, 1), n_perturb_samples=4,
    )  # fmt: skip
    np.testing.assert_allclose(ours, want.numpy(), rtol=1e-6)


def test_sensitivity_1_of_a_linear_model_is_1_by_quantus_too(quantus: Any) -> None:
    """Theirs is over samples, of the most relevant pixel alone: the common case of the two numbers."""
    torch.manual_seed(0)
    x = torch.rand(6, 1, 4, 4, dtype=F64)
    model = nn.Sequential(Double(), nn.Linear(16, 2, bias=False)).double().eval()
    maps = gradient(model, x)
    metric = quantus.SensitivityN(
        n_max_percentage=1 / 16, abs=False, normalise=False, return_aggregate=False,
        perturb_baseline=0.0, disable_warnings=True,
    )  # fmt: skip
    want = metric(
        model=model, x_batch=x.numpy(), y_batch=np.zeros(6, dtype=int), a_batch=maps[:, None].numpy(),
        device="cpu", softmax=False,
    )  # fmt: skip
    np.testing.assert_allclose(want, [1], atol=1e-6)
    ours = metrics.sensitivity_n(lambda v: model(v)[:, 0], x, maps, [1])
    torch.testing.assert_close(ours, torch.ones(6, 1, dtype=F64))
