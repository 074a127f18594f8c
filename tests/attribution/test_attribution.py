"""Attribution: completeness by method, positions for every shape, targets as in Captum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import libragrad_fx as lg
from libragrad_fx.attribution import maps
from libragrad_fx.errors import InputError
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.target import select_each
from tests.attribution.once import traced, transformed

F64 = torch.float64


@pytest.fixture(scope="module")
def pair() -> tuple[CapturedModule, CapturedModule, torch.Tensor]:
    return transformed(), traced(), torch.randn(3, 3, 32, 32, dtype=F64)


def test_fullgrad_plus_is_complete_when_balanced(pair: tuple) -> None:
    balanced, plain, x = pair
    targets = [1, 2, 3]
    att = lg.attribute(balanced, x, targets)
    assert att.values.shape == (3, 4, 4)
    assert att.prefix is not None
    assert att.prefix.shape == (3, 1)
    assert att.layers == ("blocks.0", "blocks.1", "blocks.2")
    assert torch.equal(att.output, balanced(x)[[0, 1, 2], targets].detach())
    assert float(att.completeness_error.max()) <= 1e-12
    assert float(lg.attribute(plain, x, targets).completeness_error.max()) > 1e-2


@pytest.mark.slow
def test_a_batch_is_its_samples(pair: tuple) -> None:
    balanced, _, x = pair
    for method in lg.attribution.METHODS.keys() - {"random"}:  # which draws for each sample
        whole = lg.attribute(balanced, x, 2, method=method)
        for i in range(3):
            single = lg.attribute(balanced, x[i : i + 1], 2, method=method)
            torch.testing.assert_close(whole.values[i], single.values[0], rtol=1e-10, atol=1e-12)


def test_fullgrad_plus_against_its_definition(pair: tuple) -> None:
    """Σ_l Σ_c h_l g_l by hooks on the balanced module, and bias maps by the parameters' gradients."""
    balanced, _, x = pair
    inputs: list[torch.Tensor] = []
    handles = [
        balanced.get_submodule(f"blocks.{i}").register_forward_hook(
            lambda _m, args, _o: inputs.append(args[0])
        )
        for i in range(3)
    ]
    logits = balanced(x)
    for handle in handles:
        handle.remove()
    biases = [p for n, p in balanced.named_parameters() if _behind_the_embedding(n)]
    grads = torch.autograd.grad(logits[:, 2].sum(), [*inputs, *biases], allow_unused=True)
    maps_ = sum((h * g).sum(-1) for h, g in zip(inputs, grads[:3], strict=True))
    added = sum((b * g).sum() for b, g in zip(biases, grads[3:], strict=True) if g is not None)
    att = lg.attribute(balanced, x, 2)
    total = att.values.sum() + att.prefix.sum() + att.unplaced.sum()
    torch.testing.assert_close(total, maps_.sum() + added, rtol=1e-10, atol=1e-12)


def _behind_the_embedding(name: str) -> bool:
    return name.endswith("bias") and not name.startswith("patch_embed")


def test_input_x_gradient_at_a_layer(pair: tuple) -> None:
    balanced, _, x = pair
    pixels = lg.attribute(balanced, x, 0, method="input_x_gradient", resolution="pixels")
    assert pixels.values.shape == (3, 32, 32)
    first = lg.attribute(balanced, x, 0, method="input_x_gradient")
    assert first.layers == ("blocks.0",)
    tokens = lg.attribute(balanced, x, 0, method="input_x_gradient", layers=["blocks.1"])
    assert tokens.values.shape == (3, 4, 4)


def test_bad_requests_say_what_there_is(pair: tuple) -> None:
    balanced, _, x = pair
    with pytest.raises(InputError, match="There are random, gradient, input_x_gradient"):
        lg.attribute(balanced, x, 0, method="scorecam")
    with pytest.raises(InputError, match=r"blocks\.0"):
        lg.attribute(balanced, x, 0, layers=["blocks.9"])
    with pytest.raises(InputError, match="does not fit output"):
        lg.attribute(balanced, x, 7)


def test_captured_values_do_not_leak_grad(pair: tuple) -> None:
    balanced, _, x = pair
    lg.attribute(balanced, x, 0)
    assert not x.requires_grad
    assert all(p.grad is None for p in balanced.parameters())


# --- targets


@pytest.mark.parametrize(
    "target",
    [2, torch.tensor(2), [2, 2], torch.tensor([2, 2]), (2,), [(2,), (2,)], lambda y: y[:, 2]],
    ids=["int", "0-d", "list", "1-d", "tuple", "tuples", "callable"],
)
def test_targets_as_in_captum(target: object) -> None:
    y = torch.arange(10.0).reshape(2, 5)
    assert select_each(y, target).tolist() == [2.0, 7.0]


def test_targets_of_more_dimensions() -> None:
    y = torch.arange(24.0).reshape(2, 3, 4)
    assert select_each(y, (1, 2)).tolist() == [6.0, 18.0]
    assert select_each(y, [(0, 1), (2, 3)]).tolist() == [1.0, 23.0]
    assert select_each({"logits": y[:, 0]}, 1).tolist() == [1.0, 13.0]
    with pytest.raises(InputError, match="2 indices"):
        select_each(y, 1)
    with pytest.raises(InputError, match="3 targets for a batch of 2"):
        select_each(y, [1, 2, 3])


# --- positions


@given(
    prefix=st.integers(0, 5),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    width=st.integers(1, 7),
)
@settings(max_examples=50, deadline=None)
def test_token_layouts_are_found(prefix: int, grid: tuple[int, int], width: int) -> None:
    h, w = grid
    image, tokens = (h * 8, w * 8), prefix + h * w
    where = maps.guessed("x", (2, tokens, width), [(2, 3, *image), (2, width, h, w)], image)
    part = maps.Part("x", (h, w), tuple(range(prefix, tokens)))
    assert where == maps.Layout(tokens, (part,), tuple(range(prefix)))
    term = torch.randn(2, tokens, width, dtype=F64)
    placed = maps.place(term, [where], "x", image)
    total = placed.maps["x"].sum() + (placed.prefix.sum() if placed.prefix is not None else 0)
    torch.testing.assert_close(total, term.sum())
    torch.testing.assert_close(placed.maps["x"].flatten(1), term[:, prefix:].sum(2))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_adding_maps_keeps_their_totals(h: int, w: int, times: int) -> None:
    coarse = torch.randn(2, h, w, dtype=F64)
    fine = torch.randn(2, h * times, w * times, dtype=F64)
    total = maps.add([coarse, fine])
    assert total.shape == fine.shape
    torch.testing.assert_close(total.sum(), coarse.sum() + fine.sum())


def test_windows_and_shared_terms_are_split_by_sample() -> None:
    windows = torch.arange(12.0).reshape(6, 2)  # two samples of three windows
    assert maps.by_sample(windows, maps.Rows(0, 3), 2).sum((1, 2)).tolist() == [15.0, 51.0]
    shared = torch.ones(4)
    assert maps.by_sample(shared, None, 2).sum(1).tolist() == [2.0, 2.0]
    first = torch.arange(6.0).reshape(3, 2)
    assert maps.by_sample(first, maps.Rows(1, 1), 2).sum(1).tolist() == [6.0, 9.0]
    tokens = torch.arange(6.0).reshape(6, 1)  # three tokens of two samples each
    assert maps.by_sample(tokens, maps.Rows(0, 1), 2)[..., 0].tolist() == [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
