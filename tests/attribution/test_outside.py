"""Methods that look at the inputs alone, on models that are not one graph."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.attribution import METHODS
from libragrad_fx.errors import InputError
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.pieces.dynamo import CutModule
from libragrad_fx.pieces.tape import TapeModule
from tests.between import fast_first
from tests.samples import randn

Tensor = torch.Tensor
OUTSIDE = ("random", "gradient", "input_x_gradient", "smoothgrad", "integrated_gradients")
pytestmark = pytest.mark.filterwarnings("ignore::libragrad_fx.errors.CutWarning")


class Net(nn.Module):
    """A function in one graph, in several (it asks for a value), or recorded (control flow as an op)."""

    def __init__(self, stem: nn.Module, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head, self.how = stem, nn.Linear(6, 3), how
        for p in self.parameters():
            nn.init.normal_(p)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        if self.how == "recorded":
            h = torch.cond(h.sum() < 1e9, lambda h: h.relu(), lambda h: h.tanh(), (h,))
        else:
            h = h.relu()
        if self.how == "cut" and h.sum() > 1e9:
            h = h * 2
        channels = 1 if hasattr(self.stem, "kernel_size") else h.ndim - 1
        return self.head(h.movedim(channels, -1).flatten(1, -2).sum(1)).tanh()


KINDS = {"cut": CutModule, "recorded": TapeModule}
INPUTS = {
    "picture": (lambda: nn.Conv2d(3, 6, 3), randn(2, 3, 6, 5)),
    "ids": (lambda: nn.Embedding(9, 6), torch.arange(10).view(2, 5) % 7),
    "series": (lambda: nn.Conv1d(3, 6, 3), randn(2, 3, 7)),
    "tokens": (lambda: nn.Linear(4, 6), randn(2, 5, 4)),
}
EACH = [("cut", "ids"), ("cut", "picture"), ("recorded", "ids"), ("recorded", "picture")]
EACH += itertools.product(KINDS, ("series", "tokens"))


@pytest.mark.parametrize(("how", "name"), fast_first(EACH, 1))
def test_the_maps_are_those_of_one_graph(how: str, name: str) -> None:
    stem, x = INPUTS[name]
    one, several = (lg.transform(Net(stem(), h), x) for h in ("", how))
    assert isinstance(one, CapturedModule)
    assert type(several) is KINDS[how]
    for method in OUTSIDE:
        if name == "ids" and method in ("smoothgrad", "integrated_gradients"):
            with pytest.raises(InputError, match="inputs_embeds"):
                lg.attribute(several, x, 1, method=method)
            continue
        wanted, found = (lg.attribute(m, x, 1, method=method, steps=3) for m in (one, several))
        torch.testing.assert_close(found.values, wanted.values, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(found.expected, wanted.expected, rtol=1e-12, atol=1e-13, equal_nan=True)
        assert found.others == wanted.others == {}
        assert found.policy == "libra"


def step(h: Tensor, ids: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.linear(h + nn.functional.embedding(ids, rows).mean(1), weight)


class Loop(nn.Module):
    """Dynamo makes a graph of ``step``, which runs twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.weight = nn.Parameter(randn(9, 6)), nn.Parameter(randn(6, 6))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        for _ in range(3):
            x = step(x, ids, self.rows, self.weight)
            if x.sum() > 1e9:
                break
        return x


def test_a_graph_that_runs_twice_counts_twice() -> None:
    """x W³ + e (W + W² + W³), e the mean of the rows that ``ids`` name."""
    model, x, ids = Loop(), randn(2, 6), torch.arange(10).view(2, 5) % 9
    module = lg.transform(model, (x, ids))
    assert len(module.captured_graphs) == 2
    found = lg.attribute(module, (x, ids), 1, method="input_x_gradient")
    w = model.weight.detach().T
    w3 = w @ w @ w
    torch.testing.assert_close(found.values, x * w3[:, 1], rtol=1e-12, atol=1e-13)
    words = model.rows.detach()[ids] @ (w + w @ w + w3)[:, 1] / 5
    torch.testing.assert_close(found.others["ids"], words, rtol=1e-12, atol=1e-13)
    assert float(found.completeness_error.max()) < 1e-12


def test_what_is_inside_is_refused_by_name() -> None:
    stem, x = INPUTS["tokens"]
    model = Net(stem(), "cut")
    offered = lg.methods(model, x, 1)
    assert {name for name, why in offered.items() if not why} == {*OUTSIDE}
    assert offered.keys() == METHODS.keys()
    assert "fullgrad needs one captured graph" in offered["fullgrad"]
    for wanted in ({"layers": ["head"]}, {"layers": "stages"}, {"by": "block"}):
        with pytest.raises(InputError, match=f"{next(iter(wanted))} needs one captured graph.*gradient"):
            lg.attribute(model, x, 1, method="gradient", **wanted)
    with pytest.raises(InputError, match="one captured graph"):
        lg.attribute(model, x, 1, method="path_averaged(gradient)")


def test_autograds_own_gradient() -> None:
    stem, x = INPUTS["tokens"]
    model, given = Net(stem(), "cut"), x.clone().requires_grad_()
    found = lg.attribute(model, x, 1, method="gradient", policy="autograd")
    (wanted,) = torch.autograd.grad(model(given)[:, 1].sum(), given)
    assert torch.equal(found.values, wanted.sum(2))
    assert found.policy == ""


class Fixed(nn.Module):
    """A constant, where the input is small."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y if x.sum() > 0 else torch.ones_like(y)


def test_a_branch_that_gives_a_constant_has_a_gradient_of_zero() -> None:
    module, x = lg.transform(Fixed(), torch.ones(2, 4).double()), torch.ones(2, 4).double()
    assert bool((lg.attribute(module, x, 1, method="gradient").values != 0).all())
    assert not lg.attribute(module, -x, 1, method="gradient").values.any()
