"""What a method leaves behind when it fails half-way: nothing.

Captum's three modes (it works, the target is bad, the model crashes) and two more, for every method.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.attribution import METHODS
from libragrad_fx.errors import LibraGradError
from tests.between import fast_first, fast_of
from tests.contract.test_untouched import snapshot, surroundings
from tests.interop.matrix import small_vit

Tensor = torch.Tensor


def crash(*_: Any) -> Any:
    raise ZeroDivisionError("half-way")


def crash_behind(output: Tensor) -> Tensor:
    """A target that crashes in the backward."""
    y = output[:, 1] * 1
    y.register_hook(crash)
    return y


def hooks(model: nn.Module) -> list[list[int]]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [[*getattr(m, kind)] for m in model.modules() for kind in kinds]


def state(model: nn.Module, gm: nn.Module, x: Tensor) -> list[Any]:
    """All of the model and its input; of the graph, which keeps what it compiled, hooks and modes."""
    grads = [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()]
    own = (id(x), x.requires_grad, x.grad is None, x.is_leaf, x._version, x.tolist(), x._backward_hooks)
    modes = [m.training for m in gm.modules()]
    return [snapshot(model), hooks(model), hooks(gm), modes, grads, own, surroundings()]


TARGETS: dict[str, tuple[Any, Any]] = {
    "works": (1, None),
    "a bad target": (99, LibraGradError),
    "a target crashes": (crash, ZeroDivisionError),
    "a sample's target crashes": ([lambda y: y[1], crash], ZeroDivisionError),
    "the backward crashes": (crash_behind, ZeroDivisionError),
}


FAST = ("works", "a bad target", "the backward crashes")
HOW = pytest.mark.parametrize("how", fast_of(TARGETS, FAST))


@pytest.fixture(scope="module", params=fast_first(["transform", "trace"], 1))
def case(request: Any) -> tuple[nn.Module, Any, Tensor]:
    model, x = small_vit()
    for i, p in enumerate(model.parameters()):  # what a user has going on: frozen, and half-trained
        p.requires_grad_(i % 3 != 0)
        p.grad = torch.ones_like(p) if i % 2 else None
    return model, getattr(lg, request.param)(model, x), x


@HOW
def test_attribute(how: str, case: Any) -> None:
    model, gm, x = case
    target, error = TARGETS[how]
    x = x.clone().requires_grad_(gm.plan is None)
    before = state(model, gm, x)
    for method in METHODS:
        attempt(lambda m=method: lg.attribute(gm, x, target, method=m, steps=2), error)
    assert state(model, gm, x) == before


def attempt(call: Callable[[], Any], error: Any) -> None:
    if error is None:
        call()
        return
    with pytest.raises(error):
        call()


@HOW
def test_the_other_doors(how: str, case: Any) -> None:
    model, gm, x = case
    target, error = TARGETS[how]
    before = state(model, gm, x)
    attempt(lambda: lg.audit(gm, x, target), error)
    attempt(lambda: lg.quantus_explain(gm, x, target), error)
    attempt(lambda: lg.quantus_explain(model, x, target), error)
    attempt(lambda: lg.verify(model, gm, x, target), error if gm.plan else LibraGradError)
    lg.reshape_transform(gm)
    assert state(model, gm, x) == before


def left(model: nn.Module) -> list[Any]:
    parameters = [(id(p), p.requires_grad, p.grad) for p in model.parameters()]
    return [hooks(model), parameters, [m.training for m in model.modules()]]


class Crashing(nn.Module):
    """Crashes in the forward from the ``calls``-th call on, or in the backward."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.calls, self.seen = calls, [0]

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        self.seen[0] += 1
        if self.seen[0] > self.calls:
            crash()
        return self.last(h).mean(1)


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_model_that_crashes(calls: int) -> None:
    model, x = Crashing(calls).eval(), torch.randn(2, 5, 4)
    for call in (
        lambda: lg.transform(model, x),
        lambda: lg.trace(model, x),
        lambda: lg.quantus_explain(model, x, [1, 2]),
        lambda: lg.audit(model, x, 1),
    ):
        model.seen[0] = 0
        before = left(model)
        with contextlib.suppress(LibraGradError, ZeroDivisionError):
            call()
        assert left(model) == before
        assert not x.requires_grad
        assert x.grad is None


def test_a_hook_that_crashes(case: Any) -> None:
    """A user's own hook, on a submodule of the graph."""
    model, gm, x = case
    handle = gm.get_submodule("blocks.1").register_forward_hook(crash)
    before = state(model, gm, x)
    with pytest.raises(ZeroDivisionError):
        gm(x)
    for method in METHODS:
        attempt(lambda m=method: lg.attribute(gm, x, 1, method=m, steps=2), ZeroDivisionError)
    assert state(model, gm, x) == before
    handle.remove()
    assert gm(x).isfinite().all()
