"""Charts of an evaluation as SVG: inside a page in its colours, light or dark; as a file, on white."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from libragrad_fx.evaluate.tables import Curve
from libragrad_fx.extras import need

_INK, _SOFT, _FAINT, _PLAIN, _BALANCED = "#010101", "#020202", "#030303", "#040404", "#050505"
_NAMES = {_INK: "ink", _SOFT: "soft", _FAINT: "faint", _PLAIN: "plain", _BALANCED: "balanced"}
"""Stand for the page's colours, and are replaced by its CSS variables."""
_ON_WHITE = {
    "ink": "#1f2328", "soft": "#5b636d", "faint": "#d9dde2", "plain": "#68727f", "balanced": "#b4500a"
}  # fmt: skip
"""These of a chart that is a file of its own."""
_SIZE = 9  # points
_ACROSS = 4  # panels in a row


def curves(by: Mapping[str, Mapping[tuple[str, str], Curve]], policies: tuple[str, str], gone: str) -> str:
    """Panels by title. In each, by policy and order ("mif", "lif"), the answers that stay.

    Args:
        gone: what is taken away, for the axis.
    """
    across = min(_ACROSS, len(by))
    down = -(-len(by) // across)
    figure, places = _pyplot().subplots(
        down, across, figsize=(0.6 + 2.2 * across, 0.8 + 1.7 * down), sharex=True, sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for place in places.flat[len(by) :]:
        place.set_visible(False)
    for place, (title, lines) in zip(places.flat, by.items(), strict=False):
        for policy, colour in zip(policies, (_PLAIN, _BALANCED), strict=True):
            for order, style in (("mif", "-"), ("lif", "--")):
                points = lines.get((policy, order), [])
                place.plot(
                    [100 * x for x, _ in points], [100 * y for _, y in points], style, color=colour,
                    label=f"{policy}, {order.upper()}", marker=".", markersize=4, linewidth=1.4,
                )  # fmt: skip
        place.set_title(title, fontsize=_SIZE, color=_INK)
        place.set_xlim(0, 100)
        place.set_ylim(-3, 103)
    handles, labels = places[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, ncols=min(4, 2 * across), loc="outside upper left", fontsize=_SIZE, frameon=False,
        labelcolor=_INK,
    )  # fmt: skip
    figure.supxlabel(f"{gone} that are gone, %", fontsize=_SIZE, color=_SOFT)
    figure.supylabel("answers that stay, %", fontsize=_SIZE, color=_SOFT)
    return _drawn(figure)


def against(
    points: Mapping[tuple[str, str], tuple[float, float]], policies: tuple[str, str], across: str, up: str,
    links: Mapping[tuple[str, str], str],
) -> str:  # fmt: skip
    """A point for each method and policy, an arrow from the one policy to the other.

    Args:
        points: by (method, policy), what is across (> 0, on a logarithmic axis) and up.
        links: of points, in the page.
    """
    methods = [*dict.fromkeys(m for m, _ in points)]
    figure, place = _pyplot().subplots(
        figsize=(7, 0.9 + max(3.2, 0.24 * len(methods))), layout="constrained"
    )
    for side, colour in zip(policies, (_PLAIN, _BALANCED), strict=True):
        mine = {m: points[m, side] for m in methods if (m, side) in points}
        drawn = place.scatter(
            [x for x, _ in mine.values()], [y for _, y in mine.values()], s=26, color=colour, label=side,
            zorder=3,
        )  # fmt: skip
        drawn.set_urls([links.get((m, side)) for m in mine])
    for m in methods:
        if all((m, side) in points for side in policies):
            start, end = (points[m, side] for side in policies)
            place.annotate(
                "", end, start, arrowprops={"arrowstyle": "->", "color": _SOFT, "lw": 0.7, "shrinkB": 4}
            )
    place.set_xscale("log")
    place.set_xlabel(across, fontsize=_SIZE, color=_SOFT)
    place.set_ylabel(up, fontsize=_SIZE, color=_SOFT)
    _named(place, {m: points.get((m, policies[1])) or points[m, policies[0]] for m in methods})
    place.legend(
        fontsize=_SIZE, frameon=False, labelcolor=_INK, ncols=2, loc="lower left", bbox_to_anchor=(0, 1)
    )
    return _drawn(figure)


def _named(place: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Names in a column on the right, by height, with a line to the point of each."""
    low, high = place.get_ylim()
    gap, names = (high - low) / max(len(points), 12), sorted(points, key=lambda m: points[m][1])
    heights: list[float] = []
    for m in names:
        heights.append(max(points[m][1], heights[-1] + gap if heights else low))
    over = max(0.0, heights[-1] - high)
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i] - over if i == len(heights) - 1 else heights[i],
                         heights[i + 1] - gap if i + 1 < len(heights) else high)  # fmt: skip
    for m, height in zip(names, heights, strict=True):
        place.annotate(
            m, points[m], xytext=(1.03, (height - low) / (high - low)), textcoords="axes fraction",
            fontsize=_SIZE - 1, color=_INK, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": _FAINT, "lw": 0.6, "shrinkB": 3},
        )  # fmt: skip


def _pyplot() -> Any:
    need("matplotlib", "evaluate").use("agg")
    return need("matplotlib.pyplot", "evaluate")


def _drawn(figure: Any) -> str:
    """SVG without a ground, whose text is text."""
    for place in figure.axes:
        place.patch.set_alpha(0)
        place.tick_params(which="both", colors=_SOFT, labelsize=_SIZE - 1)
        place.grid(color=_FAINT, linewidth=0.5)
        place.set_axisbelow(True)
        for name, line in place.spines.items():
            line.set_color(_SOFT)
            line.set_visible(name in ("left", "bottom"))
    out = io.StringIO()
    with need("matplotlib", "evaluate").rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None}, bbox_inches="tight")
    _pyplot().close(figure)
    return _inline(out.getvalue())


def _inline(svg: str) -> str:
    """The element alone, with the colours and the font of the page, and ids that no other chart has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = svg.replace(' target="_blank"', "")  # links are to places of the page
    own = {*re.findall(r'\bid="([^"]+)"', svg)}
    mark = hashlib.sha256(svg.encode()).hexdigest()[:6]

    def told_apart(found: re.Match[str]) -> str:
        return f"{found[1]}{mark}-{found[2]}" if found[2] in own else found[0]

    svg = re.sub(r'(\bid="|href="#|url\(#)([^")]+)', told_apart, svg)
    for colour, name in _NAMES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def alone(svg: str) -> str:
    """A chart as a file of its own."""
    look = "; ".join(f"--{name}: {colour}" for name, colour in _ON_WHITE.items())
    return svg.replace("<svg ", f'<svg style="background: #fff; font-family: sans-serif; {look}" ', 1)


def mean(lines: Sequence[Curve]) -> Curve:
    """Point by point."""
    return [(points[0][0], sum(y for _, y in points) / len(points)) for points in zip(*lines, strict=True)]
