"""FunnyBirds' scores: does a map know which parts of an object the model looks at? Hesse et al. 2023.

For any objects made of parts that can be removed from the picture, P parts each: ``zoo/articles.py``
draws some. A *set* of parts has a number, Σ 2^p over its parts p (``numbered``); 2^P - 1 is the whole
object. The model's outputs are given for all 2^P sets, (B, 2^P, C), so that each score looks up what it
removes.

| score | question | needs |
|---|---|---|
| CSDC, controlled synthetic data check | are the important parts enough to tell the class? | classes |
| PC, preservation check | does the prediction stay if only those are kept? | predictions of all sets |
| DC, deletion check | does it change if those are removed? | predictions of all sets |
| D, distractibility | is what has no effect called unimportant? | outputs without each part or object |
| BI, background independence | does the model itself ignore the background? | outputs without each object |
| SD, single deletion | do importances rank parts as their removal does? | outputs without each part |
| TS, target sensitivity | are a rival's parts important in the map for it? | maps of two rivals |

Completeness = ((CSDC + PC + DC) / 3 + D) / 2, correctness = SD, contrastivity = TS; BI is about the
model. Each function returns one number a sample, nan where the protocol leaves the sample out; ``scores``
takes means. Definitions are those of the paper and of the authors' code, ``evaluation_protocols.py`` of
``visinf/funnybirds``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from libragrad_fx.errors import InputError
from libragrad_fx.metrics import compare, given

_EFFECT = 0.05  # of the clean output: a smaller drop is none
_MOST_PARTS = 12  # 4096 sets

# --- sets of parts


def subsets(parts: int) -> torch.Tensor:
    """(2^P, P) bool: all sets, in the order of their numbers."""
    if not 1 <= parts <= _MOST_PARTS:
        raise InputError(
            f"objects have 1 to {_MOST_PARTS} parts, not {parts}: all sets of them are looked at"
        )
    return (torch.arange(2**parts)[:, None] >> torch.arange(parts) & 1).bool()


def numbered(sets: torch.Tensor) -> torch.Tensor:
    """(...): the number of each set of (..., P) bool."""
    return (sets.long() << torch.arange(sets.shape[-1], device=sets.device)).sum(-1)


def without_one(outputs: torch.Tensor) -> torch.Tensor:
    """(B, P, ...): of outputs (B, 2^P, ...), those without part p, for each p."""
    parts = _parts_of(outputs)
    return outputs[:, 2**parts - 1 - (1 << torch.arange(parts, device=outputs.device))]


def _parts_of(table: torch.Tensor) -> int:
    parts = table.shape[1].bit_length() - 1 if table.ndim > 1 else 0
    if parts < 1 or table.shape[1] != 2**parts:
        raise InputError(f"a table of all sets is (B, 2^P, ...), not {tuple(table.shape)}")
    return parts


def sufficient(variants: torch.Tensor) -> torch.Tensor:
    """(K, 2^P) bool: which sets of parts tell a class from all others, and no smaller set in them does.

    Args:
        variants: (K, P) int: the variant of each part that a class has.

    Raises:
        InputError: two classes are the same.
    """
    sets = subsets(variants.shape[1]).to(variants.device)
    same = variants[:, None] == variants  # (K, K, P)
    shared = (same[:, :, None] | ~sets).all(-1)  # (K, K, 2^P): another class has these parts as well
    if bool((shared[..., -1].sum(1) > 1).any()):
        raise InputError("two classes have the same parts: no set of parts can tell them apart")
    enough = shared.sum(1) == 1
    inside = (sets[:, None] | ~sets).all(-1) & ~torch.eye(len(sets), dtype=torch.bool, device=sets.device)
    return enough & ~(enough[:, None, :] & inside).any(-1)


def rivals(variants: torch.Tensor) -> torch.Tensor:
    """(K, 2) long: for each class the first two others that target sensitivity can ask about.

    Each shares exactly two parts with the class, and not the same ones; -1 where there are none. FunnyBirds
    has five parts. variants: (K, P) int.
    """
    same = variants[:, None] == variants
    two = same.sum(-1) == 2
    found = variants.new_full((len(variants), 2), -1, dtype=torch.long)
    for k in range(len(variants)):
        close = two[k].nonzero().flatten()
        apart = ~(same[k, close][:, None] & same[k, close]).any(-1)
        pairs = apart.triu(1).nonzero()
        if len(pairs):
            found[k] = close[pairs[0]]
    return found


# --- from maps to parts


def thresholds(count: int = 80) -> torch.Tensor:
    """(count,): the shares of the total that a part has to exceed, 0.01 to 0.5; 80 in the authors' code."""
    return torch.linspace(0.01, 0.5, count, dtype=torch.float64)


def importance(maps: torch.Tensor, parts: torch.Tensor, margin: int = 2) -> torch.Tensor:
    """(B, P): the sum of a map over each part, and over ``margin`` pixels around it.

    Args:
        maps: (B, H, W), signed.
        parts: (B, P, H, W) in bool or 0 and 1: where each part is seen. They may overlap.
        margin: 2 is the 5 × 5 dilation of the authors' code.

    Raises:
        InputError: other shapes, nan or inf, other values in the masks.
    """
    found = given.pictures(given.numbers(maps, "maps"), "maps")
    where = given.flags(parts, "parts").to(found.device)
    if where.ndim != 4 or where.shape[0] != len(found) or where.shape[2:] != found.shape[1:]:
        raise InputError(f"parts are (B, P, H, W), of maps {tuple(found.shape)}, not {tuple(where.shape)}")
    if margin:
        where = torch.nn.functional.max_pool2d(where.float(), 2 * margin + 1, 1, margin)
    return (where.double() * found[:, None]).sum((2, 3))


def important(importances: torch.Tensor, totals: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """(B, T, P) bool: where importances (B, P) exceed each of the shares (T,) of a map's total (B,)."""
    return importances[:, None] > totals[:, None, None] * shares.to(totals)[:, None]


# --- completeness


def synthetic_check(chosen: torch.Tensor, enough: torch.Tensor, correct: torch.Tensor) -> torch.Tensor:
    """(B, T): CSDC, the largest share of a sufficient set that is among the important parts.

    Args:
        chosen: (B, T, P) bool, by ``important``, of maps for the label.
        enough: (B, 2^P) bool: ``sufficient`` sets of each sample's class.
        correct: (B,) bool: whether the model is right about the picture. Others are nan.
    """
    sets = subsets(chosen.shape[-1]).to(chosen.device).double()
    size = sets.sum(1)
    share = chosen.double() @ sets.T / size.clamp(min=1)
    best = share.masked_fill(~enough[:, None], 0).amax(-1)
    return best.where(correct[:, None], torch.nan)


def preservation_check(chosen: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """(B, T): PC, 1 where the prediction stays if only the important parts are kept.

    Args:
        chosen: (B, T, P) bool, by ``important``, of maps for the prediction.
        outputs: (B, 2^P, C).
    """
    predicted = outputs.argmax(-1)
    return (predicted.gather(1, numbered(chosen)) == predicted[:, -1:]).double()


def deletion_check(chosen: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """(B, T): DC, 1 where the prediction changes if the important parts are removed. Arguments as of PC."""
    return 1 - preservation_check(~chosen, outputs)


def distractibility(chosen: torch.Tensor, clean: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
    """(B, T): D, 1 - the share of irrelevant parts and background objects that are called important.

    Irrelevant is what changes the label's output by less than 5 %, or raises it, when it is removed.

    Args:
        chosen: (B, T, P + O) bool, by ``important``, for parts and background objects.
        clean: (B,) the label's output.
        without: (B, P + O) the same without each part, and without each object.

    nan where nothing is irrelevant.
    """
    idle = ~_matters(clean, without)
    called = (chosen & idle[:, None]).sum(-1).double()
    return 1 - called / idle.sum(-1, keepdim=True)


def background_independence(clean: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
    """(B,): BI, the share of background objects without effect. clean: (B,); without: (B, O)."""
    return 1 - _matters(clean, without).double().mean(-1)


def _matters(clean: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
    drop = clean[:, None] - without
    return (drop > 0) & (drop.abs() >= _EFFECT * clean[:, None].abs())


# --- correctness and contrastivity


def single_deletion(importances: torch.Tensor, clean: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
    """(B,): SD, (1 + ρ) / 2, ρ the rank correlation over parts of importances and drops of the output.

    Args:
        importances: (B, P), by ``importance``, of maps for the label.
        clean, without: the label's output (B,), and without each part (B, P).

    nan where all importances or all drops are equal.
    """
    return (1 + compare.spearman(importances, clean[:, None] - without)) / 2


def target_sensitivity(
    importances: torch.Tensor, shared: torch.Tensor, outputs: torch.Tensor
) -> torch.Tensor:
    """(B,): TS, 1, ½ or 0: how many of two pairs of parts matter more in the map for their own rival.

    The object shares one pair with one rival class, and another pair with a second.

    Args:
        importances: (B, 2, P), by ``importance``, of maps for the first rival and for the second.
        shared: (B, 2, P) bool: the parts shared with each.
        outputs: (B, 2^P, 2): outputs of the two rivals, for all sets of parts.

    nan where the model itself disagrees: where removing a rival's parts does not lower its output by more
    than removing the other's; and where there are no rivals (``shared`` is empty).
    """
    parts = _parts_of(outputs)
    left = (2**parts - 1 - numbered(shared))[..., None].expand(-1, -1, 2)  # (B, set removed, rival)
    removed = outputs.gather(1, left)
    holds = (removed[:, 0, 0] < removed[:, 1, 0]) & (removed[:, 1, 1] < removed[:, 0, 1])
    sums = importances.double() @ shared.double().transpose(1, 2)  # (B, map of rival, pair)
    right = torch.stack((sums[:, 0, 0] > sums[:, 1, 0], sums[:, 1, 1] > sums[:, 0, 1]), 1)
    return right.double().mean(1).where(holds & shared.any(-1).all(1), torch.nan)


# --- together


class Removed(NamedTuple):
    """What a model answers without parts and objects, and where they are.

    variants: (K, P), of each class the variant of each part
    labels:   (B,) the class of each object
    outputs:  (B, 2^P, C), C >= K, with each set of parts, by its number
    cleared:  (B, O, C) with all parts and without each object of the background
    where:    (B, P, H, W) bool
    around:   (B, O, H, W) bool
    """

    variants: torch.Tensor
    labels: torch.Tensor
    outputs: torch.Tensor
    cleared: torch.Tensor
    where: torch.Tensor
    around: torch.Tensor


def measured(
    seen: Removed,
    explain: Callable[[torch.Tensor], torch.Tensor],
    shares: torch.Tensor,
    *,
    margin: int = 2,
) -> dict[str, torch.Tensor]:
    """FunnyBirds' numbers of each object, by the names of the arguments of ``scores``.

    Args:
        explain: from targets (B,) to maps (B, H, W) of the whole pictures: for labels, predictions, and two
            rivals.
        shares: (T,), as of ``thresholds``.
        margin: as of ``importance``.

    Raises:
        InputError: a label or a model without the classes of ``variants``, and as the functions above.
    """
    labels, table = seen.labels, seen.outputs
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(seen.variants):
        raise InputError(f"labels are 0 to {len(seen.variants) - 1}, got {labels.tolist()}")
    if table.shape[2] < len(seen.variants):
        raise InputError(f"a model of {table.shape[2]} classes is asked about {len(seen.variants)}")
    rows, count = torch.arange(len(labels), device=table.device), seen.where.shape[1]
    mine, without = table[rows, :, labels], seen.cleared[rows, :, labels]
    clean, alone = mine[:, -1], without_one(mine)
    predicted = table[:, -1].argmax(1)

    def of(targets: torch.Tensor, areas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = explain(targets)
        return importance(maps, areas, margin), maps.flatten(1).sum(1)

    known, total = of(labels, torch.cat((seen.where, seen.around), 1))
    kept = important(*of(predicted, seen.where), shares)
    chosen = important(known, total, shares)
    both = rivals(seen.variants)[labels]
    shared = (seen.variants[both] == seen.variants[labels][:, None]) & (both >= 0)[..., None]
    both = both.clamp(min=0)
    against = torch.stack([of(rival, seen.where)[0] for rival in both.unbind(1)], 1)
    theirs = table.gather(2, both[:, None].expand(-1, table.shape[1], 2))
    enough = sufficient(seen.variants)[labels]
    return {
        "csdc": synthetic_check(chosen[..., :count], enough, predicted == labels),
        "pc": preservation_check(kept, table),
        "dc": deletion_check(kept, table),
        "distracted": distractibility(chosen, clean, torch.cat((alone, without), 1)),
        "independent": background_independence(clean, without),
        "deleted": single_deletion(known[:, :count], clean, alone),
        "sensitive": target_sensitivity(against, shared, theirs),
    }


class Scores(NamedTuple):
    """Means over samples that are not nan, at the best threshold. ``samples``: how many each mean is of."""

    csdc: float
    pc: float
    dc: float
    distractibility: float
    background_independence: float
    single_deletion: float
    target_sensitivity: float
    completeness: float
    correctness: float
    contrastivity: float
    mean: float
    threshold: float
    samples: dict[str, int]


def scores(
    csdc: torch.Tensor,
    pc: torch.Tensor,
    dc: torch.Tensor,
    distracted: torch.Tensor,
    independent: torch.Tensor,
    deleted: torch.Tensor,
    sensitive: torch.Tensor,
    shares: torch.Tensor,
) -> Scores:
    """What the paper reports of a method on a model, from numbers of each sample.

    Args:
        csdc, pc, dc, distracted: (B, T) for the thresholds ``shares`` (T,). One threshold is chosen for all
            four, the first with the largest (CSDC + PC + DC) / 3 + D, on these samples.
        independent, deleted, sensitive: (B,).

    Raises:
        InputError: a score is nan for all samples.
    """
    numbers = (csdc, pc, dc, distracted, independent, deleted, sensitive)
    counted = {n: int((~v.isnan()).sum(0).amax()) for n, v in zip(Scores._fields[:7], numbers, strict=True)}
    if empty := [n for n, count in counted.items() if not count]:
        raise InputError(f"nan for all samples: {', '.join(empty)}; the protocol leaves all of them out")
    means = [v.nanmean(0) for v in numbers]
    whole = (means[0] + means[1] + means[2]) / 3 + means[3]
    best = int(whole.argmax())
    complete, correct, contrast = float(whole[best]) / 2, float(means[5]), float(means[6])
    return Scores(
        **{n: float(m[best] if m.ndim else m) for n, m in zip(counted, means, strict=True)},
        completeness=complete,
        correctness=correct,
        contrastivity=contrast,
        mean=(complete + correct + contrast) / 3,
        threshold=float(shares[best]),
        samples=counted,
    )
