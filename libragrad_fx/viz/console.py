"""Maps over texts in a terminal."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from libragrad_fx.viz.palette import code, ink
from libragrad_fx.viz.sheet import Sheet


def texts(page: Sheet) -> list[tuple[str, Any]]:
    """Of each map over a text: its caption, and the text on its colours for ``rich``."""
    found = []
    for row in page.rows:
        for cell in row.cells:
            if row.pieces is None or cell.values.ndim != 1:
                continue
            line = Text()
            for piece, ground in zip(row.pieces, cell.scale.colours(cell.values), strict=False):
                line.append(piece, f"{ink(ground)} on {code(ground)}")
            found.append((", ".join(cell.caption), line))
    return found
