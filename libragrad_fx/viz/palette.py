"""The colours of maps: the one place for them.

Signed values: red for what speaks for the target, blue for what speaks against it, from ColorBrewer's
red-blue, which colour-blind readers tell apart. Values of one sign: its yellow-brown. Zero is white
and lightness (CIELAB) falls evenly, on both sides alike: equal strengths look equally strong.
"""

from __future__ import annotations

import numpy as np

SIGNED = (
    "#16386b", "#095da2", "#3286b6", "#79acc5", "#bcd0db", "#f6f6f6", "#e8c7b3", "#df9370", "#d05b48",
    "#b3192b", "#721027",
)  # fmt: skip
POSITIVE = ("#f6f6f6", "#fec34f", "#f78920", "#d65707", "#a23804", "#652405")
_DARK = 0.45  # of brightness: on a darker ground, text is white


def colours(values: np.ndarray, scale: float, signed: bool = True) -> np.ndarray:
    """Values as colours, (..., 3) in [0, 1]: 0 is white, ``±scale`` the darkest; nan is white.

    Args:
        signed: whether values below zero have colours of their own, or are white.
    """
    table = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in _table(signed)])
    depth = np.nan_to_num(np.asarray(values, np.float64) / scale).clip(-1 if signed else 0, 1)
    place = (depth + 1) / 2 if signed else depth
    stops = np.linspace(0, 1, len(table))
    return np.stack([np.interp(place, stops, table[:, i]) for i in range(3)], -1)


def _table(signed: bool) -> tuple[str, ...]:
    return SIGNED if signed else POSITIVE


def code(colour: np.ndarray) -> str:
    """A colour (3,) in [0, 1] as ``#rrggbb``."""
    return "#" + "".join(f"{round(255 * float(c)):02x}" for c in colour)


def ink(ground: np.ndarray) -> str:
    """The colour of text that is readable on a colour (3,) in [0, 1]."""
    return "#ffffff" if float(ground @ np.array([0.299, 0.587, 0.114])) < _DARK else "#1a1a1a"
