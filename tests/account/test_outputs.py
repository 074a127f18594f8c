"""Outputs that no input reaches."""

from __future__ import annotations

import torch
from torch import nn

import libragrad_fx as lg


class Scaled(nn.Module):
    """CLIP returns its learned scale beside the vectors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.linear(x), "scale": self.scale.exp(), "bias": self.linear.bias}


def test_a_parameter_that_is_returned_is_a_constant_of_the_target() -> None:
    model, x = Scaled().double().eval(), torch.randn(2, 4, dtype=torch.float64)
    gm = lg.transform(model, x)  # checked at birth: the account closes
    every = lg.audit(gm, x, lambda y: y["y"].sum() + 2 * y["scale"] + y["bias"].sum())
    alone = lg.audit(gm, x, lambda y: y["y"].sum())
    assert every.completeness_error < 1e-12
    assert every.input == alone.input
    constant = 2 * model.scale.exp() + model.linear.bias.sum()
    torch.testing.assert_close(every.bias - alone.bias, constant.item())
    assert max(abs(r.residual) for r in every.rows) < 1e-12
