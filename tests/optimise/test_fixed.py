"""What depends on no input and no parameter is computed once, and nobody can tell."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import libragrad_fx as lg
from tests.between import fast_first

F64 = torch.float64


def ran(gm: nn.Module, x: torch.Tensor) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as events:
        gm(x)
    return {e.key for e in events.key_averages()}


class Positions(nn.Module):
    """A bias by relative position, from an index that is written in place (as BEiT's and Swin's are)."""

    def __init__(self, side: int = 3) -> None:
        super().__init__()
        self.side = side
        self.table = nn.Parameter(torch.randn((2 * side - 1) ** 2, dtype=F64))
        self.inner = nn.Linear(4, 4, dtype=F64)

    def index(self) -> torch.Tensor:
        grid = torch.stack(torch.meshgrid([torch.arange(self.side)] * 2, indexing="ij")).flatten(1)
        relative = (grid[:, :, None] - grid[:, None]).permute(1, 2, 0).contiguous()
        relative += self.side - 1
        relative[..., 0] *= 2 * self.side - 1
        return relative.sum(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.table[self.index().flatten()].unflatten(0, (self.side**2, -1))
        y = self.inner(x)
        return torch.softmax(y @ y.mT + bias, -1) @ y


def tokens(side: int = 3) -> torch.Tensor:
    return torch.randn(2, side**2, 4, dtype=F64)


def test_a_table_of_positions_is_made_once() -> None:
    model, x = Positions(), tokens()
    gm = lg.transform(model, x, check=False)  # the check would run it
    for runs in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert {"aten::arange", "aten::stack", "aten::sub"} <= ran(runs, x)
        assert not {"aten::arange", "aten::stack", "aten::sub"} & ran(runs, x)
        assert torch.equal(runs(x), model(x))
    with torch.no_grad():
        model.table.mul_(2)
    assert torch.equal(gm(x), model(x))
    assert lg.verify(model, gm, x, target=(0, 1)).ok


@pytest.mark.slow
def test_a_large_table_is_let_go() -> None:
    model, x = Positions(17), tokens(17)
    gm = lg.transform(model, x)
    gm(x)
    assert "aten::sub" in ran(gm, x)
    assert "aten::arange" not in ran(gm, x)
    assert torch.equal(gm(x), model(x))


@pytest.mark.parametrize(
    "taken",
    [lambda t, x: t[1:], lambda t, x: t.type_as(x), lambda t, x: torch.einsum("i->i", t)],
    ids=["a view", "a cast that casts nothing", "a product with nothing"],
)
def test_what_the_user_gets_is_not_shared(taken: Any) -> None:
    class Returned(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            table = torch.arange(3.0, dtype=F64) * 2
            return x.tanh() * table, taken(table, x)

    x = torch.randn(2, 3, dtype=F64)
    gm = lg.transform(Returned(), x)
    gm(x)[1].zero_()
    for mine, theirs in zip(gm(x), Returned()(x), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
def test_no_mode_of_the_first_call_outlives_it() -> None:
    model, x = Positions(), tokens()
    want = torch.autograd.grad(lg.transform(model, x)(z := x.clone().requires_grad_()).sum(), z)[0]
    for mode in (torch.inference_mode(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True)):
        gm = lg.transform(model, x)
        with mode:
            gm(x)
        z = x.clone().requires_grad_()
        assert torch.equal(torch.autograd.grad(gm(z).sum(), z)[0], want)


def test_autocast_of_the_first_call_does_not_outlive_it() -> None:
    class Outer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            steps = torch.linspace(0.1, 0.7, 3)[:, None]
            return x * (steps @ steps.mT)

    x = torch.randn(2, 3, 3)
    gm = lg.transform(Outer(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gm(x), Outer()(x))
    assert torch.equal(gm(x), Outer()(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gm(x), Outer()(x))


def test_the_default_dtype_of_the_first_call_does_not_outlive_it() -> None:
    class Ramp(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.arange(4.0) / 3

    x = torch.randn(2, 4, dtype=F64)
    gm = lg.transform(Ramp(), x)
    gm(x)
    torch.set_default_dtype(F64)
    try:
        assert torch.equal(gm(x), Ramp()(x))
    finally:
        torch.set_default_dtype(torch.float32)


def test_it_follows_to_another_device() -> None:
    gm = lg.transform(copy.deepcopy(Positions()), tokens())
    gm(tokens())
    assert gm.to("meta")(tokens().to("meta")).is_meta


def test_chance_is_drawn_at_every_call() -> None:
    class Noise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand(3, dtype=F64)

    x = torch.randn(2, 3, dtype=F64)
    gm = lg.transform(Noise(), x)
    assert not torch.equal(gm(x), gm(x))


@pytest.mark.parametrize("batched", fast_first([True, False], 1))
def test_under_func_and_compile(batched: bool) -> None:
    model, x = Positions(), tokens()
    gm = lg.transform(model, x)
    want = gm(x)
    if batched:
        torch.testing.assert_close(torch.func.vmap(lambda z: gm(z[None])[0])(x), want)
    else:
        torch._dynamo.reset()
        compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), want)
