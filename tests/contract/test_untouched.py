"""The user's model is byte for byte what it was: after success, a refusal, a crash in the middle."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.errors import CaptureError, InputError, UnknownOpError


def noted(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    """A hook that changes nothing."""


class Model(nn.Module):
    """Shared weights, buffers, attributes that forward writes, a hook that the first one puts on a part (as
    transformers does), and a way to fail."""

    def __init__(self, fail: str = "") -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.second = self.first
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.fail, self.seen, self.last = fail, [], None
        self.named, self.watched = OrderedDict(first=1, last=None), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.watched:
            self.watched = bool(self.norm.register_forward_hook(noted))
        h = self.norm(self.first(x)) * self.frozen
        self.seen.append(h)
        self.last = self.named["last"] = h
        if self.fail == "crash":
            raise ValueError("in the middle")
        if self.fail == "unknown":
            h = torch.linalg.matrix_exp(torch.diag_embed(h)).sum(-1)
        return self.second(torch.nn.functional.gelu(h))


def snapshot(model: nn.Module) -> list[Any]:
    """Identity, bytes, flags and attributes of everything in the model."""
    found: list[Any] = []
    for name, m in model.named_modules():
        attributes = {k: id(v) for k, v in vars(m).items()}
        inner = {k: [id(x) for x in (v.values() if isinstance(v, dict) else v)]
                 for k, v in vars(m).items() if isinstance(v, (dict, list))}  # fmt: skip
        found.append((name, type(m), attributes, inner, m.training))
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        data = t.detach().clone().numpy().tobytes()
        found.append((name, id(t), t.requires_grad, t.dtype, t.grad is None, data))
    return found


def surroundings() -> tuple[Any, ...]:
    fast = torch.backends.mha.get_fastpath_enabled()
    return torch.is_grad_enabled(), fast, torch.get_rng_state().numpy().tobytes()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("fail", "error"), [("", None), ("unknown", UnknownOpError), ("crash", CaptureError)]
)
def test_transform(fail: str, error: type[Exception] | None, training: bool) -> None:
    model, x = Model(fail).train(training), torch.randn(3, 4)
    before, around = snapshot(model), surroundings()
    if error is None:
        gm = lg.transform(model, x)
        lg.verify(model, gm, x, target=1) if not training else None
        model.seen.clear()
        model.last = model.named["last"] = None
        assert [s[:2] for s in snapshot(model)] == [s[:2] for s in before]
    else:
        with pytest.raises(error):
            lg.transform(model, x)
        assert snapshot(model) == before
        assert surroundings() == around
    assert not x.requires_grad


def test_transform_alone_changes_nothing() -> None:
    model, x = Model().eval(), torch.randn(3, 4)
    before, around = snapshot(model), surroundings()
    lg.transform(model, x)
    lg.plan(model, x)
    lg.audit(model, x, target=1)
    assert snapshot(model) == before
    assert not model.norm._forward_hooks
    assert [*model.named] == ["first", "last"]
    assert surroundings() == around


def test_bad_input() -> None:
    model = Model().eval()
    before = snapshot(model)
    with pytest.raises(InputError):
        lg.transform(model, {"y": torch.randn(3, 4)})
    with pytest.raises(CaptureError):
        lg.transform(model, torch.randn(3, 5))
    assert snapshot(model) == before


def test_a_crash_says_what_the_model_said() -> None:
    with pytest.raises(CaptureError, match="in the middle"):
        lg.transform(Model("crash").eval(), torch.randn(3, 4))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("make", [
    pytest.param(_encoder, marks=pytest.mark.slow),
    pytest.param(
        lambda: nn.Sequential(nn.Linear(16, 16), nn.GRUCell(16, 16), nn.LayerNorm(16)),
        marks=pytest.mark.slow,
    ),
    lambda: nn.Sequential(nn.Unflatten(1, (1, 16)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.SiLU()),
])  # fmt: skip
def test_a_model_serves_while_it_is_traced(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(2, 4, 16) if isinstance(model, nn.TransformerEncoder) else torch.randn(2, 16)
    x.requires_grad_()
    wanted, wrong, over = [model(x).detach()], list[Any](), threading.Event()
    # torch.export turns oneDNN off for the whole process while it traces: another rounding of convolutions
    with torch.backends.mkldnn.flags(enabled=False):
        wanted.append(model(x).detach())

    def serve() -> None:
        while not over.is_set():
            try:
                y = model(x)
                if type(y) is not torch.Tensor or not any(torch.equal(y.detach(), w) for w in wanted):
                    wrong.append(y)
            except Exception as e:
                wrong.append(e)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(2):
            lg.transform(model, x.detach())
    finally:
        over.set()
        thread.join()
    assert wrong == []
