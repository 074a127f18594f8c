"""Every architecture family of the paper, at full depth, against an independent reference."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

import libragrad_fx as lg
from libragrad_fx.errors import ModeError
from libragrad_fx.module.captured import CapturedModule
from tests.between import fast_first
from tests.models import reference as ref

TARGET = 3
SLOW = [pytest.param(f, id=f[0], marks=pytest.mark.slow) for f in (*ref.DEEP, *ref.VARIANTS)]
FAST = ("vit",)  # the rest is slow; gated MLPs by formula: ``tests/decide/test_policies.py``
ROWS = [
    pytest.param(f, id=f[0], marks=() if f[0] in FAST else pytest.mark.slow) for f in ref.FAMILIES
] + SLOW


@dataclasses.dataclass
class Case:
    model: torch.nn.Module
    gm: CapturedModule
    x: torch.Tensor


@pytest.fixture(scope="module", params=ROWS)
def case(request: pytest.FixtureRequest) -> Case:
    """A family's model, randomised, in float64, and its transform."""
    _, name, kwargs = request.param
    model = ref.create(name, **kwargs).double()
    ref.randomise(model, seed=0)
    size = ref_size(model)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Case(model, lg.transform(model, x), x)


def ref_size(model: Any) -> tuple[int, int]:
    """(H, W) that the model was built for."""
    embed = getattr(model, "patch_embed", None) or model.stem
    return tuple(embed.img_size)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", fast_first([torch.float64, torch.bfloat16, torch.float32], 1), ids=str)
def test_forward_is_equal_to_the_bit(case: Case, dtype: torch.dtype) -> None:
    model = copy.deepcopy(case.model).to(dtype)
    x = case.x.to(dtype).requires_grad_()
    try:
        gm = copy.deepcopy(case.gm).to(dtype)
    except ModeError:  # the graph holds casts: it is captured anew, as the error says
        gm = lg.transform(model, x.detach())
    assert torch.equal(gm(x), model(x))


def test_every_node_is_balanced(case: Case) -> None:
    certificate = lg.verify(case.model, case.gm, case.x, target=TARGET)
    scale = max(1.0, abs(certificate.output))
    assert certificate.ok, str(certificate)
    assert certificate.completeness_error <= 1e-9 * scale
    assert certificate.worst_residual <= 1e-9 * scale


def test_gradients_are_the_reference(case: Case) -> None:
    """Input and every parameter, from an implementation that shares nothing with the compiler."""
    expected = ref.reference(case.model, case.x, TARGET)
    x = case.x.clone().requires_grad_()
    logits = case.gm(x)
    parameters = dict(case.gm.named_parameters())
    grads = torch.autograd.grad(
        logits[:, TARGET].sum(), [x, *parameters.values()], allow_unused=True
    )
    largest = max(float(g.abs().max()) for g in (expected.grad_input, *expected.grads.values()))
    assert _relative_error(grads[0], expected.grad_input, largest) <= 1e-10
    for (name, p), g in zip(parameters.items(), grads[1:], strict=True):
        got = torch.zeros_like(p) if g is None else g
        assert _relative_error(got, expected.grads[name], largest) <= 1e-10, name


def test_completeness_by_parameters(case: Case) -> None:
    """|Σ x·∂f/∂x + Σ b·∂f/∂b - f|, with b the additive parameters, named independently."""
    x = case.x.clone().requires_grad_()
    f = case.gm(x)[:, TARGET].sum()
    additive = {name for name, _ in ref.additive_parameters(case.model)}
    biases = [p for n, p in case.gm.named_parameters() if n in additive]
    grads = torch.autograd.grad(f, [x, *biases], allow_unused=True)
    total = sum((a * g).sum() for a, g in zip([x, *biases], grads, strict=True) if g is not None)
    assert abs(total - f) <= 1e-9 * max(1, abs(f))


def _relative_error(got: torch.Tensor, expected: torch.Tensor, largest: float) -> float:
    """Against the tensor's own scale; where that is rounding (a gradient that is zero by symmetry,
    such as a bias in front of a centring norm), against the largest gradient of the model."""
    scale = float(expected.abs().max())
    return float((got - expected).abs().max()) / (scale if scale > 1e-12 * largest else largest)
