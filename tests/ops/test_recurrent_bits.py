"""Recurrent layers: PyTorch picks kernels by grad mode and by what requires grad, with other bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from tests.between import fast_first

SHAPES = [(3, 1), (8, 2), (16, 2)]  # hidden units, layers


@pytest.mark.parametrize("kind", fast_first([nn.RNN, nn.LSTM, nn.GRU], 1), ids=lambda k: k.__name__)
@pytest.mark.parametrize("both_ways", fast_first([True, False], 1))
def test_forward_bits(kind: type[nn.RNNBase], both_ways: bool) -> None:
    for (hidden, layers), trained in zip(SHAPES, (True, False, True), strict=True):
        torch.manual_seed(0)
        model = kind(3, hidden, layers, batch_first=True, bidirectional=both_ways).eval()
        x = torch.randn(2, 5, 3)
        gm = lg.transform(model.requires_grad_(trained), x)
        for now in (trained, not trained):
            model.requires_grad_(now)
            assert all(p.requires_grad is now for p in gm.parameters())
            for moving in (False, True):
                given = x.clone().requires_grad_(moving)
                assert torch.equal(model(given)[0], gm(given)[0])
            with torch.no_grad():
                assert torch.equal(model(x)[0], gm(x)[0])


def test_forward_bits_with_projection() -> None:
    model = nn.LSTM(3, 8, 2, proj_size=4).eval()
    x = torch.randn(5, 2, 3, requires_grad=True)
    assert torch.equal(model(x)[0], lg.transform(model, x)(x)[0])
