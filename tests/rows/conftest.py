"""Samples are small, and small attention is left to PyTorch's kernel: here it is ours that is tested."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _ours(no_attention_is_small: None) -> None: ...
