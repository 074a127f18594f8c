"""A sheet as a matplotlib figure: maps in a grid, their captions, and a colour bar for each scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from libragrad_fx.extras import need
from libragrad_fx.viz import bars
from libragrad_fx.viz.heatmap import as_picture
from libragrad_fx.viz.palette import code, ink
from libragrad_fx.viz.sheet import Cell, Row, Scale, Sheet

# inches
_MARGIN, _GAP, _HEAD, _FOOT, _NAME = 0.2, 0.15, 0.4, 0.35, 0.3
_LINE = 0.16  # of a caption
_BAR, _TICKS = 0.14, 0.85  # a colour bar, and the room for its numbers
_SIDE, _LEAST, _WIDEST, _PAPER = 3.2, 1.9, 6.0, 13.0
_LETTER, _TEXT_LINE = 0.088, 0.24  # of monospaced text of 10 points
_CAPTION_LETTER = 0.058  # on average
_GREY, _INK = "#666666", "#333333"


def figure(page: Sheet) -> Any:
    """The figure; its size depends on what is in the rows alone."""
    side = _side(page)
    heights = [_height(row, side) for row in page.rows]
    runs = [*page.runs()]
    width = 2 * _MARGIN + page.columns * (side + _GAP) - _GAP + (_BAR + _TICKS) * bool(runs)
    width = max(width + page.pictured * (min(side, _SIDE) + _GAP), 5.0)  # a note needs a line
    height = _HEAD * bool(page.title) + sum(heights) + _FOOT + _MARGIN
    sheet = need("matplotlib.figure", "demo").Figure((width, height), dpi=120, facecolor="white")
    place = _Placer(sheet, width, height)
    if page.title:
        place.text(_MARGIN, height - 0.3, page.title, 12, "black")
    tops = height - _MARGIN / 2 - _HEAD * bool(page.title) - np.cumsum([0, *heights])
    for row, top in zip(page.rows, tops, strict=False):
        _draw_row(place, page, row, float(top), side)
    for scale, first, last in runs:
        top, bottom = (
            float(tops[first]) - _caption_height(page.rows[first]),
            float(tops[last + 1]) + 2 * _GAP,
        )
        _bar(place, scale, width - _MARGIN - _BAR - _TICKS + 0.1, bottom, top - bottom)
    place.text(_MARGIN, 0.15, page.note, 7.5, _GREY)
    return sheet


def save(pages: Sequence[Sheet], path: Path) -> None:
    """Write .png or .svg (one page), or .pdf."""
    matplotlib = need("matplotlib", "demo")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "libragrad", "pdf.fonttype": 42}):
        if path.suffix == ".pdf":
            with need("matplotlib.backends.backend_pdf", "demo").PdfPages(path) as book:
                for page in pages:
                    book.savefig(figure(page))
        else:
            (page,) = pages
            figure(page).savefig(path)


class _Placer:
    """Puts axes and text on a figure, by inches from its left and bottom."""

    def __init__(self, sheet: Any, width: float, height: float) -> None:
        self.sheet, self.width, self.height = sheet, width, height

    def axes(self, left: float, bottom: float, w: float, h: float) -> Any:
        return self.sheet.add_axes(
            (left / self.width, bottom / self.height, w / self.width, h / self.height)
        )

    def text(self, left: float, bottom: float, text: str, size: float, colour: str) -> None:
        self.sheet.text(
            left / self.width, bottom / self.height, text, fontsize=size, color=colour, parse_math=False
        )


# --- sizes


def _side(page: Sheet) -> float:
    """The width of a cell: text and bars want more than pictures, and many columns leave less to each."""
    cells = [(row, cell) for row in page.rows for cell in row.cells]
    wanted = max(_wanted(row, cell) for row, cell in cells)
    return min(wanted, max(_LEAST, _PAPER / (page.columns + page.pictured)))


def _wanted(row: Row, cell: Cell) -> float:
    if cell.values.ndim == 2:
        return _SIDE
    if cell.values.ndim > 2 or row.pieces is None:
        return _WIDEST
    said = max(map(len, cell.caption), default=0) * _CAPTION_LETTER
    return min(_WIDEST, max(sum(map(len, row.pieces)) * _LETTER, said, _SIDE))


def _caption_height(row: Row) -> float:
    most = max(len(c.caption) for c in row.cells)
    return _NAME * bool(row.name) + _LINE * most + 0.08


def _height(row: Row, side: float) -> float:
    sizes = [_cell_height(row, c, side) for c in row.cells]
    return _caption_height(row) + max(*sizes, _input_height(row, side)) + 2 * _GAP


def _input_height(row: Row, side: float) -> float:
    if not row.shown or row.picture is None:
        return 0.0
    return min(side, _SIDE) * min(row.picture.shape[0] / row.picture.shape[1], 2)


def _cell_height(row: Row, cell: Cell, side: float) -> float:
    if cell.values.ndim == 1:
        if row.pieces is not None:
            return _TEXT_LINE * len(_lines(row, side))
        return 0.2 * min(len(cell.values), bars.MOST) + 0.3
    shape = (
        as_picture(cell.values).shape if row.picture is None or cell.values.ndim > 2 else row.picture.shape
    )
    return min(side * shape[0] / shape[1], 2 * side)


def _lines(row: Row, side: float) -> list[list[tuple[int, str]]]:
    return bars.lines(row.pieces or (), int(side / _LETTER))


# --- drawing


def _draw_row(place: _Placer, page: Sheet, row: Row, top: float, side: float) -> None:
    if row.name:
        place.text(_MARGIN, top - 0.2, row.name, 10, "black")
    below = top - _caption_height(row)
    left = _MARGIN
    if page.pictured:
        if row.shown and row.picture is not None:
            size, wide = _input_height(row, side), min(side, _SIDE)
            _picture(place.axes(left, below - size, wide, size), row.picture)
            place.text(left, below + 0.06, "input", 8, _INK)
        left += min(side, _SIDE) + _GAP
    for cell in row.cells:
        for k, line in enumerate(cell.caption):
            y = below + 0.06 + _LINE * (len(cell.caption) - 1 - k)
            place.text(left, y, _fitting(line, side), 8 if k == 0 else 7, _INK if k == 0 else _GREY)
        size = _cell_height(row, cell, side)
        _draw_cell(place, page, row, cell, (left, below - size, side, size))
        left += side + _GAP


def _fitting(line: str, side: float) -> str:
    most = int(side / _CAPTION_LETTER)
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _draw_cell(place: _Placer, page: Sheet, row: Row, cell: Cell, box: tuple[float, ...]) -> None:
    left, bottom, side, size = box
    if cell.values.ndim != 1:
        _picture(place.axes(left, bottom, side, size), page.drawn(row, cell))
    elif row.pieces is not None:
        _text(place.axes(left, bottom, side, size), row, cell, side)
    else:
        _numbers(
            place.axes(left + 0.35, bottom + 0.2, side - 0.4, size - 0.2), cell, page.reach(cell.scale)
        )


def _picture(axis: Any, picture: np.ndarray) -> None:
    axis.imshow(picture.clip(0, 1), interpolation="nearest")
    axis.set_anchor("NW")
    axis.set_axis_off()


def _text(axis: Any, row: Row, cell: Cell, side: float) -> None:
    """Monospaced, each piece on its colour."""
    found, grounds = _lines(row, side), cell.scale.colours(cell.values)
    axis.set(xlim=(0, side / _LETTER), ylim=(len(found), 0))
    axis.set_axis_off()
    for y, line in enumerate(found):
        x = 0
        for i, text in line:
            ground = grounds[i]
            box = need("matplotlib.patches", "demo").Rectangle
            axis.add_patch(box((x, y + 0.06), len(text), 0.88, color=code(ground), linewidth=0))
            axis.text(x, y + 0.5, text, fontsize=10, family="monospace", color=ink(ground), va="center",
                      parse_math=False)  # fmt: skip
            x += len(text)


def _numbers(axis: Any, cell: Cell, reach: tuple[float, float]) -> None:
    """A bar for each entry, the first on top."""
    places = bars.strongest(cell.values)
    shown = np.nan_to_num(cell.values[places])
    grounds = [code(c) for c in cell.scale.colours(shown)]
    axis.barh(range(len(places)), shown, 0.8, color=grounds, edgecolor="#999999", linewidth=0.4)
    axis.set_yticks(range(len(places)), [str(p) for p in places], fontsize=6)
    axis.set_ylim(len(places) - 0.4, -0.6)
    room = 0.03 * (reach[1] - reach[0] or 1.0)
    axis.set_xlim(reach[0] - room, reach[1] + room)
    axis.axvline(0, color="#222222", linewidth=0.6)
    axis.tick_params(axis="x", labelsize=6)
    for edge in ("top", "right", "left"):
        axis.spines[edge].set_visible(False)


def _bar(place: _Placer, scale: Scale, left: float, bottom: float, height: float) -> None:
    """The colours of a scale from bottom to top, at most as high as one map."""
    size = max(min(height, _SIDE), 0.45)
    axis = place.axes(left, bottom + height - size, _BAR, size)
    low = -scale.end if scale.signed else 0.0
    ramp = scale.colours(np.linspace(low, scale.end, 256))[:, None]
    axis.imshow(ramp, extent=(0, 1, low, scale.end), aspect="auto", origin="lower")
    axis.set_xticks([])
    ticks = [low, 0.0, scale.end] if scale.signed else [low, scale.end]
    axis.set_yticks(ticks, [f"{t:.3g}" for t in ticks], fontsize=7)
    axis.yaxis.tick_right()
    axis.tick_params(length=2)
    for spine in axis.spines.values():
        spine.set_visible(False)
    if scale.signed and size > 1.2:
        for y, said in ((0.75, "for"), (0.25, "against")):
            axis.text(
                1.35, y, said, fontsize=7, color=_GREY, rotation=90, va="center", transform=axis.transAxes
            )
