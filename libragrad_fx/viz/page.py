"""The demo page: from values to one self-contained HTML file, with everything escaped."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from libragrad_fx.viz.template import rendered

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclasses.dataclass(frozen=True)
class Panel:
    """One map. ``picture`` is a data URI, ``share`` in [0, 1]."""

    picture: str
    error: float
    share: float


@dataclasses.dataclass(frozen=True)
class Example:
    """One picture and its maps, one for each column of the page."""

    picture: str
    label: int
    answer: int
    probability: float
    score: float
    panels: tuple[Panel, ...]


@dataclasses.dataclass(frozen=True)
class Section:
    """One model. A row of ``plan`` is node, module, action, rule, reason."""

    title: str
    about: str
    examples: tuple[Example, ...]
    certificate: str
    certified: bool
    plan: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Summary:
    """Means over many pictures: (plain, balanced) errors and shares, and the share by chance."""

    model: str
    method: str
    errors: tuple[float, float]
    shares: tuple[float, float]
    chance: float


@dataclasses.dataclass(frozen=True)
class Page:
    """The content of the page.

    reading:    pairs of a term and its explanation
    measured:   a sentence on what the summary was measured on
    certified:  a sentence on what each certificate was made on
    """

    title: str
    lede: tuple[str, ...]
    reading: tuple[tuple[str, str], ...]
    legend: str
    measured: str
    certified: str
    summary: tuple[Summary, ...]
    models: tuple[Section, ...]
    footer: str


def render(page: Page, columns: Sequence[tuple[str, str]]) -> str:
    """The page as HTML. columns: the (method, side) of each example's panels, in order."""
    filters = {"number": number, "percent": percent}
    return rendered("viz/page.html", "demo", filters, page=page, columns=list(columns))


def number(value: float) -> str:
    """Two significant digits, small numbers as 1.2·10⁻⁷: for quantities that span decades."""
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}·10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def percent(value: float, digits: int = 0) -> str:
    return f"{value:.{digits}%}".replace("%", "\N{NO-BREAK SPACE}%")
