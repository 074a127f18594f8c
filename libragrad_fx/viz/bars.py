"""For every kind of paper: which numbers are drawn as bars, and how a text breaks into lines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST = 40


def strongest(values: np.ndarray) -> list[int]:
    """The places of the ``MOST`` largest |values|, in their order."""
    return sorted(np.argsort(-np.abs(np.nan_to_num(values)), kind="stable")[:MOST].tolist())


def lines(pieces: Sequence[str], width: int) -> list[list[tuple[int, str]]]:
    """(place, text) line by line, at most ``width`` characters each; a longer piece has its own.

    A line break in a piece is shown, and followed.
    """
    found: list[list[tuple[int, str]]] = [[]]
    for i, piece in enumerate(pieces):
        text = piece.replace("\n", "⏎").replace("\t", " ")
        if found[-1] and sum(len(t) for _, t in found[-1]) + len(text) > width:
            found.append([])
        if text:
            found[-1].append((i, text))
        if "\n" in piece:
            found.append([])
    return [line for line in found if line] or [[]]
