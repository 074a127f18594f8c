"""A captured container is indexed, counted and iterated over like the original."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.errors import ModeError

X = torch.randn(2, 4, dtype=torch.float64)


class Named(nn.ModuleDict):
    """Its output is no tuple, list or dict, so the result has a submodule of its own."""

    def forward(self, x: torch.Tensor) -> torch.return_types.max:
        return self["b"](self["a"](x)).max(1)


def test_a_sequential() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 3)).double()
    gm = lg.transform(model, X)
    for made in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), lg.trace(model, X)):
        assert len(made) == 3
        assert [*made] == [made.get_submodule(str(i)) for i in range(3)]
        assert made[-1] is made[2]
        assert type(made[2]) is nn.Linear
        assert [*made[1:]] == [made[1], made[2]]
        with pytest.raises(IndexError):
            made[3]
        with pytest.raises(ModeError, match="computes nothing when it is called alone"):
            made[1:](X)
    assert gm[0].weight is model[0].weight
    seen = []
    gm[1].register_forward_hook(lambda *_: seen.append(1))
    gm(X)
    assert seen == [1]


def test_a_dictionary() -> None:
    gm = lg.transform(Named({"a": nn.Linear(4, 4), "b": nn.Linear(4, 3)}).double(), X)
    assert gm(X).values.shape == (2,)
    assert [*gm] == [*gm.keys()] == ["a", "b"]
    assert [*gm.values()] == [gm["a"], gm["b"]] == [m for _, m in gm.items()]
    assert "a" in gm
    assert len(gm) == 2


class Empty(nn.ModuleList):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale if not len(self) else x


def test_a_module_is_true_whatever_its_length() -> None:
    gm = lg.transform(Empty(), X)
    assert len(gm) == 0
    assert gm


def test_a_model_that_is_no_container_has_no_length() -> None:
    gm = lg.transform(nn.Linear(4, 3).double(), X)
    for call in (len, iter, lambda m: m[0]):
        with pytest.raises(TypeError):
            call(gm)
