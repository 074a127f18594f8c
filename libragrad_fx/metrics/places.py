"""Does a map lie where the object is? Maps (B, H, W) against masks (B, H, W), one number a sample.

What all functions here share:

* maps are (B, H, W) or (B, 1, H, W), of any real dtype, signed and not normalised; masks likewise, in
  bool or 0 and 1. Results are (B,) in float64, on the device of the maps. A sample's number does not
  depend on the batch it is in.
* nan or inf in a map, a mask with other values and shapes that do not fit are an ``InputError``.
* a sample with an empty mask is nan: there is nothing to find. Of a full mask the value is as defined,
  and it says nothing (AP, IoU at the best threshold, pointing game and relevance mass are 1).
* pixels of equal relevance are not ordered: they count together at one threshold, or by their expectation
  over all orders.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch

from libragrad_fx.errors import InputError, LibraGradError
from libragrad_fx.extras import need
from libragrad_fx.metrics import given

Pooling = Literal["positive", "absolute", "squared"]
_MOST_ROUTES = 2**26  # entries of a table of distances: 0.5 GB
_ROUNDING = 4e-16  # of a difference between two parts of 1


def enlarged(maps: torch.Tensor, size: int | tuple[int, int]) -> torch.Tensor:
    """(B, *size) in float64: maps (B, h, w) by bicubic interpolation, without alignment of corners.

    As LibraGrad's authors bring patch maps to the size of the model's input, before the AP. Bicubic
    interpolation overshoots: values may lie outside of the range of the map.

    Raises:
        InputError: ``size`` is smaller than the maps; nan or inf in a map.
    """
    found = given.pictures(given.numbers(maps, "maps"), "maps")
    height, width = (size, size) if isinstance(size, int) else size
    if height < found.shape[1] or width < found.shape[2]:
        raise InputError(
            f"maps of {tuple(found.shape[1:])} are not enlarged to {(height, width)}: it is smaller"
        )
    if not len(found):
        return found.new_zeros(0, height, width)
    return torch.nn.functional.interpolate(found[:, None], (height, width), mode="bicubic")[:, 0]


# --- all thresholds at once


class _Order(NamedTuple):
    """Pixels from the most relevant one on.

    values: (B, N), falling
    hits:   (B, N) how many of the first n lie in the mask
    last:   (B, N) whether the next pixel is less relevant: a threshold can cut here
    """

    values: torch.Tensor
    hits: torch.Tensor
    last: torch.Tensor

    @property
    def inside(self) -> torch.Tensor:
        """(B,): pixels of the mask."""
        return self.hits[:, -1]

    @property
    def count(self) -> torch.Tensor:
        """(N,): 1, 2, … N."""
        return torch.arange(1, self.hits.shape[1] + 1, device=self.hits.device)


def _ordered(maps: torch.Tensor, masks: torch.Tensor) -> _Order:
    values, order = maps.flatten(1).sort(1, descending=True)
    last = torch.ones_like(values, dtype=torch.bool)
    last[:, :-1] = values[:, :-1] != values[:, 1:]
    return _Order(values, masks.flatten(1).gather(1, order).cumsum(1).double(), last)


def _before(order: _Order) -> torch.Tensor:
    """(B, N): hits before the threshold that a pixel is at."""
    cut = (order.hits * order.last).cummax(1).values.roll(1, 1)
    cut[:, 0] = 0
    return cut


def segmentation_ap(maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Average precision over the pixels of each image: Σ_n (R_n - R_{n-1}) P_n, n over distinct values.

    The step-wise integral of the precision-recall curve, as in
    ``sklearn.metrics.average_precision_score`` and torchmetrics' ``binary_average_precision``;
    LibraGrad's segmentation metric (Mehri et al. 2025; they set nan to 0 and average batch means, which
    weighs small batches more). It depends on the order of the values alone. Quantus's ``AUC`` is the area
    under the ROC curve, another number.

    An empty mask is nan, where scikit-learn says 0.
    """
    order = _ordered(*given.maps_and_masks(maps, masks))
    steps = (order.hits - _before(order)) * order.last
    return (steps * order.hits / order.count).sum(1) / order.inside


def iou(maps: torch.Tensor, masks: torch.Tensor, quantile: float | None = None) -> torch.Tensor:
    """Intersection over union of a mask and the pixels that are at least as relevant as a threshold.

    Args:
        quantile: of each map's N values, the threshold is number floor(quantile · N) from below, counted
            from 0 (the largest for 1): without ties the N - floor(quantile · N) most relevant pixels are
            taken. None: the best threshold of each image. It is chosen with the mask: an upper bound.

    Raises:
        InputError: also for a quantile outside of [0, 1].
    """
    order = _ordered(*given.maps_and_masks(maps, masks))
    ious = order.hits / (order.count + order.inside[:, None] - order.hits)
    if quantile is None:
        found = ious.masked_fill(~order.last, 0).amax(1)
    elif 0 <= quantile <= 1:
        n = ious.shape[1]
        below = min(math.floor(quantile * n + 1e-9), n - 1)  # 0.29 * 100 is 28.999999999999996
        found = ious.gather(1, _end(order, order.inside.new_full((len(ious),), n - below))[:, None])[:, 0]
    else:
        raise InputError(f"a quantile is between 0 and 1, not {quantile}")
    return found.where(order.inside > 0, torch.nan)


def _end(order: _Order, count: torch.Tensor) -> torch.Tensor:
    """(B,): where the threshold cuts that takes the first ``count`` pixels, and their equals."""
    reached = order.last & (order.count >= count[:, None])
    return reached.int().argmax(1)


# --- the most relevant pixels


def pointing_game(maps: torch.Tensor, masks: torch.Tensor, tolerance: int = 0) -> torch.Tensor:
    """1 if the most relevant pixel lies in the mask, or at most ``tolerance`` pixels from it; else 0.

    The distance is Euclidean, between centres of pixels. Zhang et al. 2018 (Excitation Backprop) allow 15.
    Of several most relevant pixels the share that hits: the expectation if one of them is drawn. Quantus's
    ``PointingGame`` says 1 if any of them hits, so that a constant map is perfect, and has no tolerance.

    Raises:
        InputError: also for a negative tolerance.
    """
    found, inside = given.maps_and_masks(maps, masks)
    if tolerance < 0:
        raise InputError(f"a tolerance is a number of pixels, not {tolerance}")
    most = found == found.amax((1, 2), keepdim=True)
    share = (most & _grown(inside, tolerance)).sum((1, 2)) / most.sum((1, 2)).double()
    return share.where(inside.flatten(1).any(1), torch.nan)


def pointing_cell(cells: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """1 if the cell of the map with most relevance overlaps the mask, in one pixel at least; else 0.

    For masks that are smaller than a cell (token). Of an enlarged map, the most relevant pixel is near the
    middle of its cell, and misses a small mask in the same cell. Of several most relevant cells the share
    that hits counts, as in ``pointing_game``.

    Args:
        cells: (B, h, w) or (B, 1, h, w), the maps as they are, not enlarged.
        masks: (B, H, W) with h <= H and w <= W. Cell i of h has the pixels from floor(i H / h) up to, and
            without, ceil((i + 1) H / h): where h does not divide H, a pixel may be in two cells.

    Raises:
        InputError: also for maps that are larger than the masks.
    """
    found = given.pictures(given.numbers(cells, "maps"), "maps")
    inside = given.pictures(given.flags(masks, "masks"), "masks").to(found.device)
    h, w = found.shape[1:]
    if h > inside.shape[1] or w > inside.shape[2]:
        raise InputError(f"{(h, w)} cells are smaller than the pixels of masks {tuple(inside.shape[1:])}")
    if not len(inside):
        return inside.new_zeros(0, dtype=torch.float64)
    overlaps = torch.nn.functional.adaptive_max_pool2d(inside[:, None].double(), (h, w))[:, 0] > 0
    return pointing_game(found, overlaps)


def _grown(masks: torch.Tensor, radius: int) -> torch.Tensor:
    """Masks (B, H, W) with the pixels at most ``radius`` from them."""
    if not radius or not len(masks):
        return masks
    across = torch.arange(-radius, radius + 1, device=masks.device)
    disc = (across[:, None] ** 2 + across**2 <= radius**2).float()
    return torch.nn.functional.conv2d(masks[:, None].float(), disc[None, None], padding=radius)[:, 0] > 0.5


def relevance_mass(
    maps: torch.Tensor, masks: torch.Tensor, *, pooling: Pooling = "positive"
) -> torch.Tensor:
    """The share of the relevance that lies in the mask: CLEVR-XAI's mass accuracy, Arras et al. 2022.

    Relevance has to be positive. ``pooling`` says how: "positive" drops the negative ("sum,pos" in the
    authors' code), "absolute" takes |r| ("sum,abs"; of one channel also "max-norm" and "l1-norm"),
    "squared" r² ("l2-norm,sq"). Channels are summed before, by whoever made the map.

    nan if a map has no relevance that counts. Quantus's ``RelevanceMassAccuracy`` sums signed values, and
    its ratio may lie outside of [0, 1]; on maps without negative values it is the same.
    """
    found, inside = given.maps_and_masks(maps, masks)
    found = _pooled(found, pooling)
    share = (found * inside).sum((1, 2)) / found.sum((1, 2))
    return share.where(inside.flatten(1).any(1), torch.nan)


def relevance_rank(
    maps: torch.Tensor, masks: torch.Tensor, *, pooling: Pooling = "positive"
) -> torch.Tensor:
    """Of the K most relevant pixels the share in the mask, K the pixels of the mask. Arras et al. 2022.

    CLEVR-XAI's relevance rank accuracy; ``pooling`` as in ``relevance_mass``. Of pixels that are equally
    relevant the expected share counts: after "positive" many are 0. Quantus's ``RelevanceRankAccuracy``
    ranks signed values, and takes equal ones in an arbitrary order.
    """
    found, inside = given.maps_and_masks(maps, masks)
    order = _ordered(_pooled(found, pooling), inside)
    return _taken(order, order.inside) / order.inside


def precision_at_k(
    maps: torch.Tensor,
    masks: torch.Tensor,
    k: int | None = None,
    *,
    pooling: Pooling = "absolute",
) -> torch.Tensor:
    """Of the k most important pixels the share in the mask. XAI-TRIS's precision, Clark et al. 2024.

    The mask is F⁺, the pixels that depend on the class by construction. All others count against the map.
    Suppressors are among them: pixels that a model needs to cancel noise, and that by themselves say
    nothing about the class.

    Args:
        k: pixels that are taken; None: as many as F⁺ has, as in the paper.
        pooling: the paper takes absolute values; see ``relevance_mass``.

    A pixel of importance 0 is never taken, as in the authors' code (``eval/eval_utils.py``): it counts
    as a miss.

    Raises:
        InputError: also for a k that is not between 1 and the pixels of a map.
    """
    found, inside = given.maps_and_masks(maps, masks)
    order = _ordered(_pooled(found, pooling), inside)
    if k is not None and not 1 <= k <= order.hits.shape[1]:
        raise InputError(f"k is between 1 and the {order.hits.shape[1]} pixels of a map, not {k}")
    wanted = order.inside if k is None else torch.full_like(order.inside, k)
    taken = _taken(order, wanted.minimum((order.values > 0).sum(1).double()))
    return (taken / wanted).where(order.inside > 0, torch.nan)


def _pooled(maps: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    if pooling == "positive":
        return maps.relu()
    if pooling == "absolute":
        return maps.abs()
    if pooling == "squared":
        return maps.square()
    raise InputError(f"no pooling {pooling!r}; there are positive, absolute and squared")


def _taken(order: _Order, count: torch.Tensor) -> torch.Tensor:
    """(B,): how many of the first ``count`` pixels are in the mask, expected over orders of equal ones."""
    end = _end(order, count)[:, None]
    until = order.hits.gather(1, end)[:, 0]
    before = _before(order).gather(1, end)[:, 0]
    first = (order.count * order.last * (order.count < count[:, None])).amax(1)  # surely among them
    share = (count - first) / (end[:, 0] + 1 - first)
    return (before + share * (until - before)).where(count > 0, 0.0)


# --- transport


def emd_score(
    maps: torch.Tensor,
    masks: torch.Tensor,
    *,
    grid: tuple[int, int] | None = None,
    pooling: Pooling = "absolute",
) -> torch.Tensor:
    """1 - OT(s, F⁺) / δ. XAI-TRIS's score by the Earth Mover's Distance, Clark et al. 2024.

    s is the map after ``pooling`` and F⁺ the mask, each divided by its sum; OT is the least cost of
    carrying one to the other, the Euclidean distance between pixels the cost of a unit; δ is the largest
    distance, between opposite corners, so that the score is in [0, 1]. All importance outside of F⁺
    costs, that of suppressors with the rest; near misses cost little. (The authors' code divides by the
    diagonal √(H² + W²) of the picture, a little more than the largest distance √((H-1)² + (W-1)²) between
    pixels.)

    The transport is exact (POT's network simplex), sample by sample. What map and mask share stays in
    place, which is optimal for distances.

    Args:
        grid: (h, w), divisors of (H, W): importance is summed over cells first, and distances are those of
            cells. For large maps: the table of distances has up to (H · W)² / 4 entries, and the time
            grows faster than that.

    nan if a map has no importance.

    Raises:
        InputError: also for a grid that does not divide the maps, or a table of distances over 0.5 GB.
        LibraGradError: POT is not installed, or found no optimum.
    """
    found, inside = given.maps_and_masks(maps, masks)
    mass, truth = _pooled(found, pooling), inside.double()
    if grid is not None:
        mass, truth = _cells(mass, grid), _cells(truth, grid)
    surplus = mass / mass.sum((1, 2), keepdim=True) - truth / truth.sum((1, 2), keepdim=True)
    height, width = surplus.shape[1:]
    longest = math.hypot(height - 1, width - 1) or 1.0
    costs = [_transport(one) / longest for one in surplus.cpu().numpy()]
    return 1 - torch.tensor(costs, dtype=found.dtype, device=found.device)


def _cells(maps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    (height, width), (h, w) = maps.shape[1:], grid
    if h < 1 or w < 1 or height % h or width % w:
        raise InputError(f"a grid of {grid} does not divide maps of {(height, width)}")
    return maps.unflatten(2, (w, -1)).unflatten(1, (h, -1)).sum((2, 4))


def _transport(surplus: np.ndarray) -> float:
    """The cost of levelling a surplus (H, W) whose sum is 0; nan if it holds nan."""
    if np.isnan(surplus).any():
        return math.nan
    surplus = np.where(np.abs(surplus) < _ROUNDING, 0, surplus)
    here, there = np.argwhere(surplus > 0), np.argwhere(surplus < 0)
    if not len(here) or not len(there):
        return 0.0
    if len(here) * len(there) > _MOST_ROUTES:
        raise InputError(
            f"maps of {surplus.shape} have too many pixels to carry: pass grid=(h, w), as (32, 32)"
        )
    distances = np.linalg.norm(here[:, None] - there[None], axis=-1)
    much, little = surplus[surplus > 0], -surplus[surplus < 0]
    cost, log = need("ot", "evaluate").emd2(
        much, little * (much.sum() / little.sum()), distances, numItermax=10**7, log=True
    )
    if log["warning"] is not None:
        raise LibraGradError(
            f"POT found no optimal transport of a map of {surplus.shape}: {log['warning']}"
        )
    return float(cost)
