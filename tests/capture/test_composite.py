"""Composite ops that have no fact are written out, one by one, in ops that have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.capture import export as capture
from libragrad_fx.pieces.dynamo import CutModule
from tests.between import certified, fast_of, weighed

F = nn.functional
COMPOSITES = {
    "diff": lambda y: y.diff(),
    "meshgrid": lambda y: torch.stack(torch.meshgrid(y[:, 0], y[:, 1], indexing="xy")),
    "cosine_similarity": lambda y: F.cosine_similarity(y, y.roll(1, 1)),
    "trapezoid": lambda y: torch.trapezoid(y),
    "special_softmax": lambda y: torch.special.softmax(y, 1),
    "quantile": lambda y: y.quantile(0.3, dim=1),
    "nanquantile": lambda y: y.nanquantile(0.6, dim=1),
    "matrix_power": lambda y: torch.linalg.matrix_power(y.T @ y, 3),
    "combinations": lambda y: torch.combinations(y[:, 0]),
    "triplet_margin_loss": lambda y: F.triplet_margin_loss(y, y.roll(1, 1), y.roll(2, 1)),
    "gradient": lambda y: torch.gradient(y, dim=1)[0],
    "pad_sequence": lambda y: nn.utils.rnn.pad_sequence([y[0], y[1][:3]], padding_value=0.5),
    "block_diag of a part": lambda y: torch.block_diag(y, y[:1]),
    "tensor_split": lambda y: torch.tensor_split(y, 4, 1)[2],
    "vander": lambda y: torch.vander(y[:, 0], 3),
    "concatenate": lambda y: torch.concatenate([y, y]) * (y.max() > 0).logical_or(y.min() > 0),
}


class Net(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.linear, self.f = nn.Linear(6, 6), COMPOSITES[name]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.f(self.linear(x))


class All(nn.Module):
    """Every composite, behind a branch on a value, which no export takes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.linear(x)
        if float(y.detach().numpy().sum()) > 1e9:
            y = -y
        return {name: f(y) for name, f in COMPOSITES.items()}


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Net(name).double(), torch.randn(3, 6).double()


FAST = ("diff", "trapezoid", "special_softmax")


@pytest.mark.parametrize("name", fast_of(COMPOSITES, FAST))
def test_it_is_one_graph_of_known_ops(name: str) -> None:
    model, x = made(name)
    assert isinstance(certified(model, x), torch.fx.GraphModule)


@pytest.fixture(scope="module")
def recorded() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What all of them give in one model that is recorded while it runs, and what it gives itself."""
    torch.manual_seed(0)
    model, x = All().double(), torch.randn(3, 6).double()
    module = lg.transform(model, x)
    assert isinstance(module, CutModule)
    return module(x), model(x)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPOSITES)
def test_it_is_written_out_where_it_is_recorded_while_it_runs(name: str, recorded: Any) -> None:
    """Quantile's kernel fills a tensor beside the ops that it calls: those are not all that it does."""
    got, wanted = recorded
    assert torch.equal(got[name], wanted[name])


@pytest.mark.parametrize("name", ["diff", "cosine_similarity", "special_softmax", "tensor_split"])
def test_the_program_is_not_traced_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That would cost several times the export."""

    def traced_again(*args: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(capture.ExportedProgram, "run_decompositions", traced_again)
    lg.transform(*made(name))


def test_a_composite_op_of_another_library(request: pytest.FixtureRequest) -> None:
    library = torch.library.Library("composite_of_tests", "FRAGMENT")
    request.addfinalizer(library._destroy)
    library.define("doubled(Tensor x) -> Tensor")
    library.impl("doubled", lambda x: F.gelu(x.diff()) * 2, "CompositeImplicitAutograd")

    class Custom(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.composite_of_tests.doubled(x.sin())

    x = torch.randn(3, 6, dtype=torch.float64)
    assert lg.verify(Custom(), lg.transform(Custom(), x), x, weighed).ok
