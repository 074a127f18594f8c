"""What every test shares: one thread, one seed."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_attention_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small attention, which is left to PyTorch's kernel, goes through ours."""
    monkeypatch.setattr("libragrad_fx.ops.attention._SMALL", 0)
