"""What is drawn, for every kind of paper: rows of maps with their captions and scales."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from libragrad_fx.errors import InputError
from libragrad_fx.viz import words
from libragrad_fx.viz.heatmap import COVER, WAYS, Sign, Way, drawn, shared_scale, signed_part
from libragrad_fx.viz.palette import colours
from libragrad_fx.viz.pieces import readable

Scope = Literal["method", "all", "each"]
_PARTS = {"positive": "positive values", "negative": "negative values, without their sign",
          "absolute_value": "values without their sign"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Look:
    """How maps are drawn; names as of Captum's ``visualize_image_attr`` where they fit.

    method:        what is drawn of a map over a picture
    sign:          what part of the values; None is "all" if there are any below zero, else "positive"
    outlier_perc:  the scale ends where this percentage of the largest |values| begins
    alpha_overlay: how far the picture fades under the map, from 0 to 1
    scale:         what shares a scale: the maps of a method ("method"), all of them, or none ("each")
    """

    method: Way = "blended_heat_map"
    sign: Sign | None = None
    outlier_perc: float = 1.0
    alpha_overlay: float = COVER
    scale: Scope = "method"
    show_colorbar: bool = True

    def __post_init__(self) -> None:
        """Raises ``InputError`` if a value is none of those."""
        if self.method not in WAYS:
            raise InputError(f"method is one of {', '.join(WAYS)}; got {self.method!r}")
        if self.sign is not None:
            signed_part(np.zeros(1), self.sign)
        if self.scale not in ("method", "all", "each"):
            raise InputError(f"scale is 'method', 'all' or 'each'; got {self.scale!r}")
        for name, top in (("outlier_perc", 100), ("alpha_overlay", 1)):
            if not 0 <= getattr(self, name) <= top:
                raise InputError(f"{name} is from 0 to {top}, got {getattr(self, name)!r}")


@dataclasses.dataclass(frozen=True)
class Scale:
    """end: what has the darkest colour. signed: whether values below zero have colours of their own."""

    end: float
    signed: bool

    def colours(self, values: np.ndarray) -> np.ndarray:
        """(..., 3) in [0, 1]."""
        return colours(values, self.end, self.signed)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One map of one sample: (H, W), frames of those (..., H, W), or a row of numbers (N,)."""

    values: np.ndarray
    caption: tuple[str, ...]
    scale: Scale


@dataclasses.dataclass(frozen=True)
class Row:
    """Maps of one sample side by side.

    picture: (H, W, 3) in [0, 1], what the model saw
    shown:   whether it stands in front of the maps
    pieces:  the text, piece by piece, each with the space before it; padding is ""
    """

    name: str
    picture: np.ndarray | None
    shown: bool
    pieces: tuple[str, ...] | None
    cells: tuple[Cell, ...]


@dataclasses.dataclass(frozen=True)
class Sheet:
    """All that is on one page. note: what a reader must know of the scale."""

    title: str
    rows: tuple[Row, ...]
    look: Look
    note: str

    def drawn(self, row: Row, cell: Cell) -> np.ndarray:
        """A map with more than one axis as a picture (H, W, 3) in [0, 1]."""
        scale, look = cell.scale, self.look
        return drawn(cell.values, row.picture, scale.end, scale.signed, look.method, look.alpha_overlay)

    @property
    def columns(self) -> int:
        return max(len(row.cells) for row in self.rows)

    @property
    def pictured(self) -> bool:
        """Whether there is a column of inputs."""
        return any(row.shown for row in self.rows)

    def runs(self) -> Iterator[tuple[Scale, int, int]]:
        """The rows in a run whose maps share one scale, which is to be told: it, the first, and the last of
        them."""
        scales = [frozenset(c.scale for c in row.cells) for row in self.rows]
        for found, run in itertools.groupby(range(len(scales)), lambda i: scales[i]):
            at = list(run)
            if len(found) == 1 and self.look.show_colorbar and self.look.scale != "each":
                yield next(iter(found)), at[0], at[-1]

    def reach(self, scale: Scale) -> tuple[float, float]:
        """How far the bars of a scale go to each side."""
        found = [np.nan_to_num(c.values) for row in self.rows for c in row.cells if c.scale == scale]
        return min(0.0, *(float(v.min()) for v in found)), max(0.0, *(float(v.max()) for v in found))


def sheet(
    grid: Any, title: str = "", names: Sequence[str] = (), most: int | None = None, **look: Any
) -> Sheet:
    """A page of attributions.

    Args:
        grid: an ``Attribution``, a list of them (side by side), or a list of lists (rows), all of the same
            samples; each sample has rows of its own.
        names: of the samples.
        most: how many samples are drawn; the note says how many are not.
        look: see ``Look``.

    Raises:
        InputError: nothing to draw, attributions of different samples, or a look that there is not.
    """
    inputs, rows = zip(*_by_input(_rows(grid)), strict=True)
    how = _look(look)
    count = len(rows[0][0].values)
    if names and len(names) != count:
        raise InputError(f"there are {count} samples, and {len(names)} names: {', '.join(names)}")
    cells = {(r, c): a for r, row in enumerate(rows) for c, a in enumerate(row)}
    called = names or ([f"sample {i}" for i in range(count)] if count > 1 else [""])
    scales = _scales(cells, how)
    shown = count if most is None else min(most, count)
    made = tuple(
        _row(
            inputs[r] or (called[i] if r == 0 else ""),
            row,
            i,
            r == 0 or bool(inputs[r]),
            [scales[r, c, i] for c in range(len(row))],
        )
        for i in range(shown)
        for r, row in enumerate(rows)
    )
    sign = "" if how.sign in (None, "all") else f"Drawn are the {_PARTS[how.sign]}. "
    note = f"{sign}The scale ends at the {100 - how.outlier_perc:g}% quantile of |values|."
    note += f" {count - shown} more samples are not drawn." if shown < count else ""
    return Sheet(title, tuple(_signed(row, how) for row in made), how, note)


def _rows(grid: Any) -> list[list[Any]]:
    listed = list(grid) if isinstance(grid, (list, tuple)) else [grid]
    nested = bool(listed) and all(isinstance(row, (list, tuple)) for row in listed)
    rows = [list(row) for row in listed] if nested else [listed]
    found = [a for row in rows for a in row]
    if not found or not all(rows) or not all(hasattr(a, "completeness_error") for a in found):
        raise InputError("draw takes an Attribution, a list of them, or a list of such lists")
    if len({len(a.values) for a in found}) > 1:
        raise InputError("attributions in one picture must be of the same samples")
    return rows


def _by_input(rows: Sequence[Sequence[Any]]) -> Iterator[tuple[str, list[Any]]]:
    """Each row, and behind it one for each other input of the model, with the input's name."""
    for row in rows:
        yield "", [*row]
        for name in dict.fromkeys(name for a in row for name in a.others):
            yield name, [_of_input(a, a.others[name]) for a in row if name in a.others]


def _of_input(a: Any, values: Any) -> Any:
    """The attribution with the map of another input; a text or a picture that fits it goes with it."""
    text, beside = a.tokens, a.values.ndim == 2
    read = text is not None and not beside and values.ndim == 2 and len(text[0]) == values.shape[1]
    return dataclasses.replace(
        a, values=values, others={}, tokens=text if read else None,
        pictures=a.pictures if beside and values.ndim == 3 else None,
    )  # fmt: skip


def _look(given: Mapping[str, Any]) -> Look:
    known = [f.name for f in dataclasses.fields(Look)]
    if odd := [k for k in given if k not in known]:
        raise InputError(f"a picture has no option {odd[0]!r}; there are {', '.join(known)}")
    return Look(**given)


def _scales(cells: Mapping[tuple[int, int], Any], look: Look) -> dict[tuple[int, int, int], Scale]:
    """The scale of each row, column and sample."""
    maps = {(r, c, i): v for (r, c), a in cells.items() for i, v in enumerate(a.values.numpy(force=True))}
    scopes = {
        "all": lambda key: (),
        "method": lambda key: (cells[key[:2]].method,),
        "each": lambda key: key,
    }
    groups: dict[Any, list[np.ndarray]] = {}
    for key, values in maps.items():
        groups.setdefault(scopes[look.scale](key), []).append(values)
    found = {}
    for scope, group in groups.items():
        signed = look.sign == "all" or (look.sign is None and any((v < 0).any() for v in group))
        shown = group if look.sign is None else [signed_part(v, look.sign) for v in group]
        found[scope] = Scale(shared_scale(*shown, quantile=1 - look.outlier_perc / 100), signed)
    return {key: found[scopes[look.scale](key)] for key in maps}


def _row(name: str, row: Sequence[Any], i: int, shown: bool, scales: Sequence[Scale]) -> Row:
    first = row[0]
    pictures, tokens = first.pictures, first.tokens
    return Row(
        name=name,
        picture=None if pictures is None else pictures[i].numpy(force=True) / 255,
        shown=shown and pictures is not None,
        pieces=None if tokens is None else tuple(readable(tokens[i])),
        cells=tuple(
            Cell(a.values[i].numpy(force=True), _caption(a, i), s) for a, s in zip(row, scales, strict=True)
        ),
    )


def _caption(a: Any, i: int) -> tuple[str, ...]:
    target = a.target[i] if i < len(a.target) else None
    label = a.labels[i] if i < len(a.labels) else ""
    asked = f"{words.target_name(target, label, a.tokens is not None)}, " if a.target else ""
    return (
        f"{words.method_name(a.method)}, {words.side_name(a.policy)}",
        f"{asked}output {float(a.output[i]):.3g}",
        words.error_words(float(a.completeness_error[i])),
        *filter(None, [words.apart_words(a, i)]),
    )


def _signed(row: Row, look: Look) -> Row:
    """With what is shown of its values; where no bar says the scale, each caption does."""
    cells = row.cells
    if look.sign is not None:
        cells = tuple(dataclasses.replace(c, values=signed_part(c.values, look.sign)) for c in cells)
    if look.scale == "each" or not look.show_colorbar or len({c.scale for c in cells}) > 1:
        cells = tuple(
            dataclasses.replace(c, caption=(*c.caption, f"colours end at {c.scale.end:.3g}")) for c in cells
        )
    return dataclasses.replace(row, cells=cells)
