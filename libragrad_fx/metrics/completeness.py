"""Does an attribution add up to the output that it explains?"""

from __future__ import annotations

from typing import NamedTuple

import torch

from libragrad_fx.errors import InputError
from libragrad_fx.metrics import given


class Completeness(NamedTuple):
    """What is missing from a sum, each (B,) or (B, L) in float64.

    error:    total - expected, with its sign
    absolute: |error|. Its mean over images is the completeness error of Mehri et al. 2025, equation 1
    relative: |error| / |expected|; inf where 0 is expected and something else found, nan where both are 0
    """

    error: torch.Tensor
    absolute: torch.Tensor
    relative: torch.Tensor


def completeness(totals: torch.Tensor, expected: torch.Tensor) -> Completeness:
    """Compare what attributions add up to with what they should.

    Args:
        totals: (B,), or (B, L) for L layers: the sum of a sample's attribution, with class tokens and
            biases.
        expected: (B,): the target's value, a logit; or the difference to that of a baseline, for methods
            that explain a difference (Sundararajan et al. 2017, proposition 1).

    Raises:
        InputError: other shapes, nan or inf.
    """
    found, wanted = given.numbers(totals, "totals"), given.numbers(expected, "expected")
    if found.ndim not in (1, 2) or wanted.shape != found.shape[:1]:
        raise InputError(
            "totals are (B,) or (B, layers) and expected (B,), "
            f"not {tuple(found.shape)} and {tuple(wanted.shape)}"
        )
    wanted = wanted.to(found.device)
    error = found - (wanted if found.ndim == 1 else wanted[:, None])
    relative = error.abs() / (wanted if found.ndim == 1 else wanted[:, None]).abs()
    return Completeness(error, error.abs(), relative)
