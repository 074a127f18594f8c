"""What is explained where nobody says is balanced, whatever else is returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import libragrad_fx as lg
from tests.between import X, certified

Tensor = torch.Tensor


class Heads(nn.Module):
    """A squashed head first, and what it is made of behind it (as MONAI's ViT)."""

    def __init__(self, squash: Callable[[Tensor], Tensor], inside: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 8).double(), nn.Linear(8, 8).double()
        self.squash, self.inside = squash, inside

    def forward(self, x: Tensor) -> Any:
        hidden = F.gelu(self.body(x))
        gate = self.squash(self.head(hidden))
        return gate, [hidden, hidden * gate if self.inside else hidden]


@pytest.mark.parametrize("squash", [torch.tanh, torch.erf, torch.sigmoid, lambda y: y.softmax(-1)])
@pytest.mark.filterwarnings("ignore::libragrad_fx.errors.GateOutputWarning")
def test_a_first_output_that_could_gate_is_balanced(squash: Any) -> None:
    certified(Heads(squash, inside=False))


def test_a_first_output_that_gates_inside_is_said_not_to_be() -> None:
    module = lg.transform(Heads(torch.sigmoid, inside=True), X)
    assert any("keeps autograd's gradient" in note for note in module.plan.notes)
