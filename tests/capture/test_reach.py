"""What capture takes: habits of models that were refused, or that failed with somebody else's error."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import libragrad_fx as lg
from tests.between import Between, X, certified, fast_first, of_pairs

Tensor = torch.Tensor


class Ignores(nn.Module):
    def forward(self, x: Tensor, extra: Any) -> Tensor:
        return x * 2


class Hands(nn.Module):
    """A submodule is handed a parameter that no op reads."""

    def __init__(self, wrapped: Callable[[Any], Any]) -> None:
        super().__init__()
        self.w, self.inner, self.wrapped = nn.Parameter(torch.ones(3)), Ignores(), wrapped
        self.net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.net(x), self.wrapped(self.w))


@pytest.mark.parametrize("wrapped", [lambda w: w, lambda w: [w, w], lambda w: {"w": (w,)}])
def test_a_parameter_that_no_op_reads(wrapped: Any) -> None:
    model = Hands(wrapped)
    module = certified(model)
    seen: list[Any] = []
    module.inner.register_forward_hook(lambda m, args, y: seen.append(args[1]))
    module(X)
    leaf = torch.utils._pytree.tree_leaves(seen[0])[0]
    assert torch.equal(leaf, model.w)


def spectral(x: Tensor) -> Tensor:
    f = torch.fft.rfft(x)
    out = torch.zeros_like(f)
    out[:, :2] = f[:, :2] * 3
    return torch.fft.irfft(out, n=x.shape[-1])


def write_rows(x: Tensor) -> Tensor:
    z = of_pairs(x).clone()
    z[:, 1:3] = z[:, 0:2] * 2
    z[:, 0] *= 3
    return torch.view_as_real(z)


def write_diagonal(x: Tensor) -> Tensor:
    z = of_pairs(x)[:, :4].clone()
    z.diagonal().copy_(z[0] * 2)
    z.unsqueeze(0).diagonal(0, 1, 2)[:] += 1
    return z.real


def write_conjugate(x: Tensor) -> Tensor:
    z = of_pairs(x).clone()
    z[..., 4:] = z[..., :-4].conj()
    z.real[:, 1] = x[:, 0]
    return z.abs()


@pytest.mark.parametrize("f", fast_first([spectral, write_rows, write_diagonal, write_conjugate], 1))
def test_writes_into_parts_of_complex_tensors(f: Any) -> None:
    certified(Between(lambda y, p: f(y)))


class Wants(nn.Module):
    """``__new__`` has an argument, which no copy gives it."""

    def __new__(cls, width: int) -> Wants:
        return super().__new__(cls)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(6, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x))


class Factory(nn.Module):
    def __new__(cls, kind: str) -> Any:
        return object.__new__({"a": FirstKind, "b": SecondKind}[kind])

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)


class FirstKind(Factory):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.fc(x))


class SecondKind(Factory):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).sigmoid() * x


class Keyed(dict, nn.Module):  # type: ignore[type-arg]
    """A module that is a dictionary as well."""

    def __init__(self, *, width: int) -> None:
        nn.Module.__init__(self)
        self.fc = nn.Linear(6, width)

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.fc(x))


@pytest.mark.parametrize("inner", [
    lambda: Wants(6), lambda: Factory("a"), lambda: Factory("b"), lambda: Keyed(width=6),
])  # fmt: skip
def test_classes_that_are_made_in_their_own_way(inner: Any) -> None:
    certified(nn.Sequential(nn.Linear(6, 6), inner(), nn.Linear(6, 3)).double())


# --- what was put on an instance refers to the copy that runs (fuzz)


class Counts(nn.Module):
    """Gives another answer at each call, by what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.seen = nn.Linear(6, 3).double(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.fc(x) * self.seen


def as_closure(m: Any) -> None:
    old = m.forward
    m.forward = lambda x: old(x)


def as_nested_closure(m: Any) -> None:
    def call(x: Tensor) -> Tensor:
        def inner() -> Tensor:
            return type(m).forward(m, x)

        return inner()

    m.forward = call


def as_partial(m: Any) -> None:
    m.forward = functools.partial(type(m).forward, m)


def as_method(m: Any) -> None:
    m.forward = types.MethodType(lambda self, x: type(m).forward(self, x), m)


@pytest.mark.parametrize("patch", fast_first([as_method, as_nested_closure, as_closure, as_partial], 2))
@pytest.mark.filterwarnings("ignore::libragrad_fx.errors.CutWarning")
def test_state_behind_a_patched_forward(patch: Any) -> None:
    model = Counts()
    twin = copy.deepcopy(model)
    patch(model)
    module = lg.transform(model, X)
    assert model.seen == 0
    for _ in range(3):
        assert torch.equal(module(X), twin(X))
    assert model.seen == 0


@pytest.mark.parametrize("f", fast_first([
    lambda y, p: torch.vmap(lambda a: torch.tanh(a) * a)(y),
    lambda y, p: torch.vmap(lambda a, b: a @ b, in_dims=(0, None))(y, p.T),
    lambda y, p: torch.vmap(torch.vmap(lambda a: F.gelu(a) + 1))(y.view(2, 2, 8)),
    lambda y, p: torch.func.vmap(lambda w: F.linear(y, w[None]))(p),
], 1))  # fmt: skip
def test_maps_are_written_out(f: Any) -> None:
    assert isinstance(certified(Between(f)), torch.fx.GraphModule)


# --- messages name what a user has (E19)


class WritesData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y.data.clamp_(-1, 1)
        return y * float(y.detach().sum())


class Differentiates(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.jacrev(torch.tanh)(x[0])


class SolvesLeastSquares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.lstsq(x, x.flip(0)).solution


class Nested(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nested.to_padded_tensor(torch.nested.as_nested_tensor([x[:2], x[2:]]), 0.0)


@pytest.mark.parametrize("model", fast_first([Nested, SolvesLeastSquares, WritesData, Differentiates], 2))
def test_messages_name_nothing_of_ours(model: Any) -> None:
    with pytest.raises(lg.errors.LibraGradError) as e:
        lg.transform(model(), X)
    assert model.__name__ in str(e.value)
    for ours in ("_Piece", "given_", "held_", "still_", "lifted_tensor", "_add_batch_dim"):
        assert ours not in str(e.value)
