"""A sheet as static HTML: one piece without scripts, extensions or links, for notebooks and for files."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from libragrad_fx.viz import bars
from libragrad_fx.viz.heatmap import data_uri, larger, legend, to_image
from libragrad_fx.viz.palette import code, ink
from libragrad_fx.viz.sheet import Cell, Row, Scale, Sheet

_SIDE = 224  # screen pixels of a map
_BOX = "background:#fff;color:#333;font:13px/1.4 system-ui,sans-serif;padding:8px;overflow-x:auto"
_ROW = "display:flex;gap:12px;align-items:flex-end;margin:0 0 12px"
_SMALL = "color:#666;font-size:11px"


def fragment(page: Sheet) -> str:
    """The sheet as one ``<div>``."""
    title = f'<p style="font-size:15px;margin:0 0 6px">{html.escape(page.title)}</p>' if page.title else ""
    keys = {last: _key(scale) for scale, _, last in page.runs()}
    rows = "".join(_row(page, row) + keys.get(i, "") for i, row in enumerate(page.rows))
    note = f'<p style="{_SMALL};margin:0">{html.escape(page.note)}</p>'
    return f'<div style="{_BOX}">{title}{rows}{note}</div>'


def document(pages: Sequence[Sheet], title: str) -> str:
    """A file of its own."""
    body = "<hr>".join(map(fragment, pages))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{html.escape(title)}</title></head><body style="margin:16px">{body}</body></html>'
    )


def save(pages: Sequence[Sheet], path: Path) -> None:
    path.write_text(document(pages, pages[0].title or "Attributions"), "utf-8")


def _row(page: Sheet, row: Row) -> str:
    name = f'<p style="margin:0 0 2px"><b>{html.escape(row.name)}</b></p>' if row.name else ""
    first = ""
    if page.pictured:
        seen = _image(larger(row.picture), "input", False) if row.shown and row.picture is not None else ""
        first = _figure(seen, ("input",) if seen else (), f"width:{_SIDE}px")
    cells = "".join(_figure(_cell(page, row, c), c.caption, _width(row, c)) for c in row.cells)
    return f'{name}<div style="{_ROW}">{first}{cells}</div>'


def _figure(body: str, caption: Sequence[str], width: str) -> str:
    said = "<br>".join(
        html.escape(line) if k == 0 else f'<span style="{_SMALL}">{html.escape(line)}</span>'
        for k, line in enumerate(caption)
    )
    return (
        f'<figure style="margin:0;flex:none;{width}">'
        '<figcaption style="margin:0 0 4px;white-space:nowrap;overflow:hidden;text-overflow:ellipsis">'
        f"{said}</figcaption>{body}</figure>"
    )


def _width(row: Row, cell: Cell) -> str:
    if cell.values.ndim == 1 and row.pieces is not None:
        return f"max-width:{2 * _SIDE}px"
    return f"width:{_SIDE * {1: 2, 2: 1}.get(cell.values.ndim, 3)}px"


def _cell(page: Sheet, row: Row, cell: Cell) -> str:
    if cell.values.ndim == 1:
        if row.pieces is not None:
            return text(row.pieces, cell.values, cell.scale.colours(cell.values))
        return _bars(cell, page.reach(cell.scale))
    shown = page.drawn(row, cell)
    alone = row.picture is None or cell.values.ndim > 2
    shape = "x".join(map(str, cell.values.shape))
    return _image(shown, f"map of {shape} values: {', '.join(cell.caption)}", alone)


def _image(picture: np.ndarray, said: str, pixels: bool) -> str:
    """pixels: whether each is to be seen, as of a map without a picture."""
    how = ";image-rendering:pixelated" if pixels else ""
    uri = data_uri(to_image(picture))
    return f'<img src="{uri}" alt="{html.escape(said)}" style="width:100%;display:block{how}">'


def text(
    pieces: Sequence[str], values: np.ndarray, grounds: np.ndarray, marked: Sequence[bool] = ()
) -> str:
    """Each piece on its colour; its value is told on hovering. marked: which are underlined."""
    spans = "".join(
        f'<span title="{v:+.4g}" style="background:{code(g)};color:{ink(g)}'
        f'{";text-decoration:underline" * mark}">{html.escape(piece)}</span>'
        for piece, v, g, mark in zip(pieces, values, grounds, marked or [False] * len(pieces), strict=False)
        if piece
    )
    return f'<div style="white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7">{spans}</div>'


def _bars(cell: Cell, reach: tuple[float, float]) -> str:
    places = bars.strongest(cell.values)
    shown = np.nan_to_num(cell.values[places])
    low, whole = reach[0], reach[1] - reach[0] or 1.0
    lines = "".join(
        f'<tr><td style="{_SMALL};text-align:right;padding:0 6px">{p}</td>'
        f'<td style="width:100%;padding:1px 0"><div title="{v:+.4g}" style="height:12px;'
        f"margin-left:{100 * (min(v, 0.0) - low) / whole:.2f}%;width:{100 * abs(v) / whole:.2f}%;"
        f'background:{code(g)};outline:1px solid #bbb"></div></td>'
        f'<td style="{_SMALL};padding:0 6px">{v:+.3g}</td></tr>'
        for p, v, g in zip(places, shown, cell.scale.colours(shown), strict=True)
    )
    return f'<table style="border-collapse:collapse;width:100%">{lines}</table>'


def _key(scale: Scale) -> str:
    low = f"against {-scale.end:.3g}" if scale.signed else "0"
    high = f"{scale.end:.3g} for" if scale.signed else f"{scale.end:.3g}"
    bar = (
        f'<img src="{data_uri(legend(128, signed=scale.signed))}" alt="colour scale"'
        ' style="width:160px;height:10px;vertical-align:middle;margin:0 6px">'
    )
    return f'<p style="{_SMALL};margin:0 0 12px">{low}{bar}{high}</p>'
