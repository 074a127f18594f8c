"""Maps and masks as Hypothesis draws them: ties, signs, zeros, empty and full masks among them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

Tensor = torch.Tensor


@st.composite
def cases(draw: st.DrawFn, *, most: int = 7, full: bool = True) -> tuple[Tensor, Tensor]:
    """Maps (B, H, W) and masks (B, H, W), no mask empty; ``full``: one may be full."""
    batch, height, width = draw(st.integers(1, 4)), draw(st.integers(2, most)), draw(st.integers(2, most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    maps = torch.randn(batch, height, width, dtype=torch.float64, generator=generator)
    if draw(st.booleans()):  # few values: many ties
        maps = maps.mul(1.5).round()
    share = torch.rand(batch, 1, 1, generator=generator)
    masks = torch.rand(batch, height, width, generator=generator) < share
    masks[:, 0, 0] = True
    if not full:
        masks[:, -1, -1] = False
    return maps, masks
