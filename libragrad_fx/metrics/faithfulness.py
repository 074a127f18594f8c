"""Faithfulness: what happens to a model's answer when what a map calls relevant is taken from it.

The order of a map decides what is taken: first its most relevant cells (MIF, most important first), or
first its least relevant (LIF). The protocol is LibraGrad's (Mehri et al. 2025 and the released code):
the map is of the whole input, and a share of cells goes at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch

from libragrad_fx.errors import InputError
from libragrad_fx.metrics.given import named

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
Order = Literal["mif", "lif"]
Without = Callable[[torch.Tensor], torch.Tensor]
"""From the cells that stay, (B, K) int64, to logits (B, classes)."""


def ranked(maps: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """The cells of each map, the most relevant first.

    Args:
        maps: (B, *grid), signed.
        seed: cells of the same relevance come in an order drawn from it, the same for every map: their
            place in the picture has no say.

    Returns:
        (B, N) int64, cells counted row by row.

    Raises:
        InputError: a map that is not finite, or no maps.
    """
    if maps.ndim < 2:
        raise InputError(f"maps are (B, *grid), got {tuple(maps.shape)}")
    flat = maps.flatten(1)
    if not bool(flat.isfinite().all()):
        wrong = (~flat.isfinite()).any(1).nonzero()[:, 0].tolist()
        raise InputError(f"maps hold nan or inf in {named(wrong)}: their cells have no order")
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randperm(flat.shape[1], generator=draw).to(flat.device)
    return mixed[flat[:, mixed].argsort(dim=1, descending=True, stable=True)]


def staying(order: torch.Tensor, ratio: float, how: Order) -> torch.Tensor:
    """The cells that stay when a share of them is gone.

    ``mif`` takes away the floor(ratio N) most relevant; ``lif`` keeps the floor((1 - ratio) N) most
    relevant. As in the released code, the two differ by one cell where ratio N is no whole number.

    Args:
        order: (B, N), the most relevant cell first.
        ratio: the share that is gone, 0 to 1.

    Returns:
        (B, K) int64, in rising order.

    Raises:
        InputError: another order, or no share.
    """
    if how not in get_args(Order):
        raise InputError(f"the order is one of {', '.join(get_args(Order))}; got {how!r}")
    if not 0 <= ratio <= 1:
        raise InputError(f"a share is from 0 to 1, got {ratio!r}")
    n = order.shape[1]
    kept = order[:, _share(ratio, n) :] if how == "mif" else order[:, : _share(1 - ratio, n)]
    return kept.sort(1).values


def _share(ratio: float, n: int) -> int:
    """floor(ratio n), where 0.3 * 10 is 3."""
    return int(ratio * n + 1e-9)


@dataclasses.dataclass(frozen=True)
class Curves:
    """The answers of a model without a growing share of cells.

    ratios: the shares that are gone, R of them
    clean:  (B, classes) logits of the whole input
    mif, lif: (B, R, classes) logits without the most relevant cells, and without the least relevant
    """

    ratios: tuple[float, ...]
    clean: torch.Tensor
    mif: torch.Tensor
    lif: torch.Tensor


def curves(
    without: Without, clean: torch.Tensor, order: torch.Tensor, ratios: Sequence[float] = RATIOS
) -> Curves:
    """Run a model on what stays, for each share and both orders.

    Args:
        without: the model on some cells: ``Seen.kept``, ``Seen.zeroed`` or a function of masked pixels.
        clean: (B, classes) logits of the whole input.
        order: (B, N), the most relevant cell first: see ``ranked``.

    Raises:
        InputError: no shares, logits of other samples or classes than the clean ones, or nan among them.
    """
    if not ratios:
        raise InputError("there are no shares of cells to take away")
    clean = _finite(two_sided(clean), "of the whole input")
    if len(order) != len(clean):
        raise InputError(f"an order is of {len(order)} samples, the clean logits of {len(clean)}")
    mif, lif = (
        torch.stack([_answers(without, clean, staying(order, r, how), r, how) for r in ratios], 1)
        for how in get_args(Order)
    )
    return Curves(tuple(ratios), clean, mif, lif)


def _answers(
    without: Without, clean: torch.Tensor, cells: torch.Tensor, ratio: float, how: Order
) -> torch.Tensor:
    found = _finite(two_sided(without(cells)), f"without {ratio:g} of the cells, {how},")
    if found.shape != clean.shape:
        raise InputError(f"logits are {tuple(clean.shape)} of the whole input, else {tuple(found.shape)}")
    return found


def _finite(logits: torch.Tensor, what: str) -> torch.Tensor:
    """Logits, of which nan would count as the largest."""
    if bool((wrong := logits.isnan().any(1)).any()):
        raise InputError(f"logits {what} are nan in {named(wrong.nonzero()[:, 0].tolist())}")
    return logits


def two_sided(logits: torch.Tensor) -> torch.Tensor:
    """(B, classes) logits; of one logit z for class 1, those of two classes, [0, z]."""
    if logits.ndim != 2:
        raise InputError(f"logits are (B, classes), got {tuple(logits.shape)}")
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


# --- of logits (B, R, classes) and a target (B,), one number for each sample and share


def agreement(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(B, R) 1 where the largest logit is the target's. Its mean over samples is accuracy where the target
    is the label, and agreement with the clean answer where the target is that."""
    return (logits.argmax(-1) == _classes(logits, target)[:, None]).double()


def probability_drop(clean: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(B, R) p_clean - p, of the target's probability. Its mean over shares is AOPC (Samek et al. 2017)."""
    return _of(clean[:, None].double().softmax(-1), target) - _of(logits.double().softmax(-1), target)


def log_odds(clean: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(B, R) ln p_clean - ln p (Shrikumar et al. 2017, as LibraGrad's code has it: positive is a drop)."""
    return _of(clean[:, None].double().log_softmax(-1), target) - _of(
        logits.double().log_softmax(-1), target
    )


def logit_drop(clean: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(B, R) z_clean - z, of the target's logit."""
    return _of(clean[:, None].double(), target) - _of(logits.double(), target)


def _of(values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    target = _classes(values, target)
    return values.gather(-1, target.view(-1, 1, 1).expand(-1, values.shape[1], 1))[..., 0]


def _classes(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The target, if it names a class of each sample.

    Raises:
        InputError: it does not.
    """
    if logits.ndim != 3 or target.shape != logits.shape[:1] or target.dtype is not torch.int64:
        raise InputError(
            f"a target is (B,) int64 for logits (B, R, classes), got {tuple(target.shape)} {target.dtype}"
            f" for {tuple(logits.shape)}"
        )
    if len(target) and not 0 <= int(target.min()) <= int(target.max()) < logits.shape[2]:
        raise InputError(f"classes are 0 to {logits.shape[2] - 1}, got {target.tolist()}")
    return target.to(logits.device)


# --- one number a sample


def area(curve: torch.Tensor) -> torch.Tensor:
    """(B,): the mean of a curve (B, R) over its shares. LibraGrad's tables are means over 10 to 90 %."""
    return curve.double().mean(1)


def scores(of: Curves, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each measure of faithfulness, one number a sample, higher better.

    Args:
        target: (B,) int64, the class that was explained.

    Returns:
        mif_accuracy: 1 - agreement without the most relevant (LibraGrad's tables, over 100)
        lif_accuracy: agreement without the least relevant
        mif_aopc, mif_log_odds, mif_logit: the drops without the most relevant
        lif_aopc, lif_log_odds, lif_logit: minus the drops without the least relevant
        srg, srg_aopc: the symmetric relevance gain (Blücher et al. 2024): the area between the two
            curves, of agreement and of probability
    """
    found = {
        "mif_accuracy": 1 - area(agreement(of.mif, target)),
        "lif_accuracy": area(agreement(of.lif, target)),
    }
    for name, drop in (("aopc", probability_drop), ("log_odds", log_odds), ("logit", logit_drop)):
        found[f"mif_{name}"] = area(drop(of.clean, of.mif, target))
        found[f"lif_{name}"] = -area(drop(of.clean, of.lif, target))
    found["srg"] = found["lif_accuracy"] + found["mif_accuracy"] - 1
    found["srg_aopc"] = found["lif_aopc"] + found["mif_aopc"]
    return found
