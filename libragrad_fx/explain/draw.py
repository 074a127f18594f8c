"""``draw``: attributions side by side, on the screen or in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(
    grid: Any, path: str | Path | None = None, *, title: str = "", names: Sequence[str] = (), **look: Any
) -> Any:
    """Draw attributions in a grid, with captions and a colour bar for each scale.

    The maps of one method share a scale, as those of different methods have different units;
    ``scale="all"`` puts them all on one.

    Args:
        grid: an ``Attribution``, a list of them (side by side), or a list of lists (rows). All are of the
            same samples, and each sample has rows of its own: of a model of several inputs, one for each.
        path: where to write it: .png, .svg, .pdf or .html.
        names: of the samples.
        look: as for ``Attribution.show``.

    Returns:
        A matplotlib figure, or the path.

    Raises:
        InputError: nothing to draw, attributions of different samples, or an unknown option or ending.
    """
    from libragrad_fx.viz import figure, paper, sheet  # here, so that only drawing imports it

    page = sheet.sheet(grid, title, names, **look)
    return figure.figure(page) if path is None else paper.save([page], Path(path))
