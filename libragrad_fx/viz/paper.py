"""Sheets as files: the ending of the name decides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from libragrad_fx.errors import InputError
from libragrad_fx.extras import writing
from libragrad_fx.viz import figure, html
from libragrad_fx.viz.sheet import Sheet

_WRITERS = {".png": figure.save, ".svg": figure.save, ".pdf": figure.save, ".html": html.save}
ENDINGS = tuple(_WRITERS)
BOOKS = (".pdf", ".html")
"""What holds several pages."""


def save(pages: Sequence[Sheet], path: Path) -> Path:
    """Write pages as .png or .svg (one page), .pdf or .html.

    Raises:
        InputError: another ending, several pages for one picture, or a path that cannot be written.
    """
    if path.suffix not in _WRITERS:
        raise InputError(f"a picture is saved as {', '.join(ENDINGS)}; got {path.name!r}")
    if len(pages) != 1 and path.suffix not in BOOKS:
        raise InputError(f"{path.name} holds one page, and there are {len(pages)}: save {', '.join(BOOKS)}")
    with writing(path):
        _WRITERS[path.suffix](pages, path)
    return path
