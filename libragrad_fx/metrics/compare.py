"""How alike two vectors or two maps are: one number a pair. All in float64."""

from __future__ import annotations

import torch

_WINDOW = 7  # of SSIM, as scikit-image's default


def pearson(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(...): correlation over the last axis of (..., N). nan where one of them is constant."""
    varies = (a.amax(-1) > a.amin(-1)) & (b.amax(-1) > b.amin(-1))
    a, b = (v.double() - v.double().mean(-1, keepdim=True) for v in (a, b))
    found = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    return found.clamp(-1, 1).where(varies, torch.nan)


def ranks(values: torch.Tensor) -> torch.Tensor:
    """(..., N): ranks from 1 on along the last axis; equal values share the mean of theirs."""
    values = values.contiguous()
    ordered = values.sort(-1).values
    below = torch.searchsorted(ordered, values)
    return (below + torch.searchsorted(ordered, values, right=True) + 1).double() / 2


def spearman(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(...): rank correlation over the last axis, as ``scipy.stats.spearmanr``. nan if one is constant."""
    return pearson(ranks(a), ranks(b))


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(B,): structural similarity of maps (B, H, W). Wang et al. 2004, equations 13 to 17.

    The mean over windows of 7 x 7 pixels that lie inside, or of the largest odd number that fits into a
    smaller map; variances by n - 1, K₁ = 0.01, K₂ = 0.03: as scikit-image by default, and so Quantus.
    (torchmetrics adds windows that reach over the edge.) The data range L of a pair is its largest value
    minus its smallest; nan if that is 0.
    """
    both = torch.stack((a, b)).double()
    spread = both.amax((0, 2, 3)) - both.amin((0, 2, 3))
    a, b = both / spread.where(spread > 0, 1.0)[:, None, None]
    least = min(_WINDOW, *a.shape[1:])
    side = least - 1 + least % 2
    windows = torch.stack((a, b, a * a, b * b, a * b), 1)
    mean_a, mean_b, aa, bb, ab = torch.nn.functional.avg_pool2d(windows, side, 1).unbind(1)
    scale = side**2 / max(side**2 - 1, 1)
    covariance = scale * (ab - mean_a * mean_b)
    variances = scale * (aa - mean_a**2 + bb - mean_b**2)
    likeness = (2 * mean_a * mean_b + 0.01**2) * (2 * covariance + 0.03**2)
    found = likeness / ((mean_a**2 + mean_b**2 + 0.01**2) * (variances + 0.03**2))
    return found.mean((1, 2)).where(spread > 0, torch.nan)


def entropy(values: torch.Tensor, bins: int = 100) -> torch.Tensor:
    """(B,): entropy in nats of a histogram of (B, N), its bins of equal width from the least to the
    largest."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    at = ((values - low) / (high - low).where(high > low, 1.0) * bins).long().clamp(max=bins - 1)
    share = torch.zeros(len(values), bins, dtype=torch.float64, device=values.device)
    share = share.scatter_add(1, at, torch.ones_like(values, dtype=torch.float64)) / values.shape[1]
    return torch.special.entr(share).sum(1)
