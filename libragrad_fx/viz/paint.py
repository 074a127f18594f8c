"""The colours of imbalance: the ends of ColorBrewer's PuOr, which colour-blind readers tell apart."""

from __future__ import annotations

import math
from collections.abc import Mapping

LOST, CREATED, NEITHER = "#5e3c99", "#e66101", "#f7f7f7"
SEEN = 5e-4  # of the output: what is less is neither said nor painted


def moved(sums: Mapping[str, float] | None) -> float:
    """What a node, or a group of them, loses and creates."""
    return sums["lost"] + sums["created"] if sums else 0.0


def paint(sums: Mapping[str, float] | None, unit: float, worst: float) -> str:
    """From pale to the colour of what prevails, by the logarithm of how much.

    Args:
        sums: what is ``lost`` and ``created``.
        unit: the size of the output.
        worst: the share of it that gets the full colour.
    """
    amount = moved(sums) / unit
    if not sums or amount < SEEN:
        return NEITHER
    depth = 0.6 * math.log1p(100 * amount) / math.log1p(100 * worst)
    end = LOST if sums["lost"] >= sums["created"] else CREATED
    pairs = [(int(end[i : i + 2], 16), int(NEITHER[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(pale + (full - pale) * depth):02x}" for full, pale in pairs)
