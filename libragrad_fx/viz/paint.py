"""The colours of imbalance: the ends of ColorBrewer's PuOr, which colour-blind readers tell apart."""

from __future__ import annotations

import math
from collections.abc import Mapping

LOST, CREATED, NEITHER = "#5e3c99", "#e66101", "#f7f7f7"
SEEN = 5e-4  # of the output: a smaller imbalance is neither written nor painted


def moved(sums: Mapping[str, float] | None) -> float:
    """The mass that a node, or a group, loses plus the mass that it creates."""
    return sums["lost"] + sums["created"] if sums else 0.0


def paint(sums: Mapping[str, float] | None, unit: float, worst: float) -> str:
    """The colour of a node: violet if it loses more than it creates, else orange; stronger by the log.

    Args:
        sums: the mass ``lost`` and ``created``.
        unit: |output|.
        worst: the share of the output that gets the strongest colour.
    """
    amount = moved(sums) / unit
    if not sums or amount < SEEN:
        return NEITHER
    depth = 0.6 * math.log1p(100 * amount) / math.log1p(100 * worst)
    end = LOST if sums["lost"] >= sums["created"] else CREATED
    pairs = [(int(end[i : i + 2], 16), int(NEITHER[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(pale + (full - pale) * depth):02x}" for full, pale in pairs)
