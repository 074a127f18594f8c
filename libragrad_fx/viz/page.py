"""The demo page: from values to one self-contained HTML file, with everything escaped."""

from __future__ import annotations

import dataclasses
from decimal import Decimal

from libragrad_fx.viz.template import rendered

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclasses.dataclass(frozen=True)
class Word:
    """A word on its colour. told: its value; decides: whether the answer depends on it."""

    text: str
    ground: str
    ink: str
    told: str
    decides: bool


@dataclasses.dataclass(frozen=True)
class Map:
    """What a backward says of one input, as a picture or as words.

    side:    plain or balanced
    error:   how much of the sum that it promises the map invents or loses, as a share of that sum
    share:   of its red, in [0, 1], what falls on the known truth; None where there is none
    picture: a data URI
    """

    side: str
    error: float
    share: float | None = None
    picture: str = ""
    words: tuple[Word, ...] = ()


@dataclasses.dataclass(frozen=True)
class Pair:
    """The maps of one method side by side."""

    method: str
    maps: tuple[Map, ...]


@dataclasses.dataclass(frozen=True)
class Example:
    """One input and its maps.

    title:   the input, and what the model says of it
    wrong:   what would have been right, "" if it was
    picture: a data URI; "" of a text, whose words are in the maps
    """

    title: str
    wrong: str
    pairs: tuple[Pair, ...]
    picture: str = ""


@dataclasses.dataclass(frozen=True)
class Part:
    """One model's examples. missing: what is not here, and how to get it; "" if nothing is."""

    title: str
    about: tuple[str, ...]
    examples: tuple[Example, ...] = ()
    missing: str = ""

    @property
    def small(self) -> bool:
        """Whether two of its examples fit side by side."""
        return all(example.picture and len(example.pairs) == 1 for example in self.examples)


@dataclasses.dataclass(frozen=True)
class Summary:
    """Means over many inputs: (plain, balanced) errors and shares, and the share by chance; shares are None
    where no truth is known."""

    model: str
    method: str
    errors: tuple[float, float]
    shares: tuple[float, float] | None = None
    chance: float | None = None


@dataclasses.dataclass(frozen=True)
class Checked:
    """What was proved of one model. A row of ``plan`` is node, module, action, rule, reason."""

    title: str
    certificate: str
    certified: bool
    plan: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Page:
    """The content of the page.

    asked:    what the first maps answer, and which model was asked
    hero:     the first maps, of one method
    said:     a few words on the scales of maps
    key:      the colour scale, as a data URI
    measured: a sentence on what the summary was measured on
    reading:  pairs of a term and its explanation
    browser:  the address of the page that explains in the browser; "" if it was not made
    command:  the command that makes it
    """

    title: str
    lede: str
    asked: str
    hero: Example
    said: str
    key: str
    parts: tuple[Part, ...]
    measured: str
    summary: tuple[Summary, ...]
    reading: tuple[tuple[str, str], ...]
    checked: tuple[Checked, ...]
    browser: str
    command: str
    footer: str


def render(page: Page) -> str:
    """The page as HTML."""
    return rendered("viz/page.html", "demo", {"percent": percent}, page=page)


def number(value: float) -> str:
    """Two significant digits, small numbers as 1.2·10⁻⁷: for quantities that span decades."""
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}·10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def percent(value: float) -> str:
    """4.453 -> 445 %, 0.0312 -> 3.1 %, 1.6e-7 -> 0.00002 %: no exponents, which are read past."""
    hundredth = 100 * value
    if abs(hundredth) >= 10:
        said = f"{hundredth:.0f}"
    else:
        said = f"{Decimal(f'{hundredth:.{2 if abs(hundredth) >= 0.1 else 1}g}'):f}"
    return f"{said}\N{NO-BREAK SPACE}%"
