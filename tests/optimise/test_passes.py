"""The optimiser is a list of passes: each changes something, and each may be left out."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import libragrad_fx as lg
from libragrad_fx.errors import InputError
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.optimise.passes import PASSES, explain
from libragrad_fx.rewrite.erase import erase, spell
from libragrad_fx.stages import Decision, balance, decide

NAMES = [p.name for p in PASSES]


class Block(nn.Module):
    """Something for every pass: a fused projection, a gated MLP, a mask, a scan, a product, one token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Conv1d(3, 64, 3, padding=1), nn.LayerNorm(64)
        self.qkv, self.drop = nn.Linear(64, 192), nn.Dropout(0.1)
        self.gate, self.up, self.down = (nn.Linear(64, 256), nn.Linear(64, 256), nn.Linear(256, 64))
        self.step, self.head = nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.embed(x)).transpose(1, 2)[:]
        n = x.shape[1]
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        x = x + self.drop(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        steps = [self.step(x[:, i]) * x[:, i] for i in range(8)]
        x = x + F.pad(torch.stack(steps, 1), (0, 0, 0, n - 8))
        x = x * torch.sigmoid(x)
        x = x + self.down(F.silu(self.gate(self.norm(x))) * self.up(x))
        return self.head(x[:, -1])


@functools.cache
def subject() -> tuple[nn.Module, torch.Tensor]:
    return Block().double().eval(), torch.randn(2, 3, 200, dtype=torch.float64)


def gradient(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(module(x)[:, 1].sum(), x)[0]


@functools.cache
def decided() -> Decision:
    """What no pass has a part in, once for all."""
    return decide(*subject())


def made(
    off: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[CapturedModule, nn.Module, torch.Tensor]:
    monkeypatch.setenv("LIBRAGRAD_PASSES_OFF", ",".join(off))
    return balance(decided()), *subject()


@functools.cache
def balanced() -> torch.Tensor:
    """The gradient by the whole graph, which no pass has seen."""
    model, x = subject()
    module = lg.transform(model, x)
    module.recompile()
    return gradient(module, x)


@pytest.mark.parametrize(
    "off",
    [(), NAMES, *(pytest.param((n,), marks=pytest.mark.slow) for n in NAMES)],
    ids=lambda off: "-".join(off) or "none",
)
def test_a_pass_can_be_left_out(off: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, model, x = made(off, monkeypatch)
    assert torch.equal(module(x), model(x))
    torch.testing.assert_close(gradient(module, x), balanced(), rtol=1e-12, atol=1e-14)
    assert [o.name for o in module.history.passes] == [n for n in NAMES if n not in off]
    assert spell(erase(module.lean)) == module.history.original  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_each_pass_by_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, model, x = made([n for n in NAMES if n != name], monkeypatch)
    (outcome,) = module.history.passes
    assert outcome.changed, "it does nothing here"
    assert torch.equal(module(x), model(x))
    torch.testing.assert_close(gradient(module, x), balanced(), rtol=1e-12, atol=1e-14)
    assert lg.verify(model, module, x, lambda y: y[0, 1]).ok


def test_what_was_done_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIBRAGRAD_DEBUG", "passes")
    model, x = subject()
    module = lg.transform(model, x)
    said = explain(module.history.passes)
    assert capsys.readouterr().out.strip() == said
    for step in PASSES:
        assert f"{step.name} " in said
        assert step.does in said
    assert explain(pickle.loads(pickle.dumps(module)).history.passes) == said


def test_a_no_has_a_reason() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    module = lg.transform(model, torch.randn(2, 6, dtype=torch.float64))
    noes = {o.name: o.noes for o in module.history.passes}
    assert set(noes["features"].values()) == {"all its features get a gradient"}
    assert list(noes["memory"].values()) == [
        "its operand is not new memory, or the backward reads it"
    ]


def test_a_pass_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBRAGRAD_PASSES_OFF", "token, tokens")
    with pytest.raises(InputError, match="no pass tokens; there are dropouts, token"):
        lg.transform(*subject())
