"""Readings of the gradient that test a guess."""

from __future__ import annotations

import torch
from torch import nn

from zoo import probes


def test_of_a_linear_model_they_are_of_its_weights() -> None:
    w = torch.randn(3, 4, 5, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 2, bias=False)).double()
    with torch.no_grad():
        model[1].weight[1] = w.flatten()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    found = [f(model, x, lambda y: y[:, 1]) for f in (probes.gradient_sum, probes.gradient_norm)]
    for got, want in zip(found, (w.sum(0), w.norm(dim=0)), strict=True):
        torch.testing.assert_close(got, want.expand(2, -1, -1), rtol=1e-14, atol=0)
    assert not x.requires_grad
