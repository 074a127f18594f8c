"""The residual stream against its branches, join by join, as a bar chart and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from libragrad_fx.errors import InputError
from libragrad_fx.extras import need
from libragrad_fx.viz.flow import BRANCH, RESIDUAL, Join
from libragrad_fx.viz.graph import NAMES, SIDES
from libragrad_fx.viz.text import table

_STREAM, _GONE = "#c9ccd1", "#ffffff"
# Okabe and Ito's colours, which colour-blind readers tell apart
_BRANCHES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442")
_OTHERS = "others"


def save(joins: Sequence[Join], path: Path, title: str = "") -> None:
    """Draw the mass that comes back over each join, autograd above and balanced below.

    path: .svg, .png or .pdf

    Raises:
        InputError: there are no joins.
    """
    _draw(joined(joins), title).savefig(path, dpi=200)


def joined(joins: Sequence[Join]) -> Sequence[Join]:
    """``joins``, checked.

    Raises:
        InputError: there are none.
    """
    if not joins:
        raise InputError("no branches come together in this model where all of the gradient passes")
    return joins


def _draw(joins: Sequence[Join], title: str) -> Any:
    need("matplotlib", "graph")
    from matplotlib.figure import Figure

    joins = _gathered(joins)
    kinds = branches(joins)
    names = [k for k in kinds if k != RESIDUAL]
    colours = {RESIDUAL: _STREAM, **dict(zip(names, _BRANCHES, strict=False))}
    width = min(max(6.0, 1.6 + 0.24 * len(joins)), 14)
    figure = Figure(figsize=(width, 4.6), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for panel, side in zip(panels, SIDES, strict=True):
        _bars(panel, joins, side, kinds, colours)
        panel.set_title(NAMES[side], loc="left", fontsize=9)
    panels[-1].set_xticks(range(len(joins)), _ticks(joins), rotation=90, fontsize=6)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(
        *handles, loc="outside upper right", ncols=min(len(kinds) + 1, 4), frameon=False, fontsize=8
    )
    figure.supxlabel("from the input to the output", fontsize=8)
    figure.supylabel("gradient mass, % of the output", fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def _bars(panel: Any, joins: Sequence[Join], side: str, kinds: Sequence[str], colours: Any) -> None:
    """Stacked bars: up for mass of the output's sign, down for mass against it."""
    up, down = [0.0] * len(joins), [0.0] * len(joins)
    parts = [(k, [100 * j.masses[side].get(k, 0.0) for j in joins], colours[k], "") for k in kinds]
    parts.append(("to biases so far", [100 * j.gone[side] for j in joins], _GONE, "////"))
    for name, values, colour, hatch in parts:
        base = [u if v >= 0 else d for v, u, d in zip(values, up, down, strict=True)]
        edge = "#9aa0a6" if hatch else "white"
        panel.bar(
            range(len(joins)), values, 0.96, base, color=colour, label=name, hatch=hatch,
            edgecolor=edge, linewidth=0.3,
        )  # fmt: skip
        up = [u + max(v, 0) for u, v in zip(up, values, strict=True)]
        down = [d + min(v, 0) for d, v in zip(down, values, strict=True)]
    panel.axhline(0, color="#222222", linewidth=0.6)
    panel.axhline(100, color="#222222", linewidth=0.8, linestyle=(0, (4, 3)))
    panel.tick_params(labelsize=7)
    panel.margins(x=0.01)
    for edge in ("top", "right"):
        panel.spines[edge].set_visible(False)


def _gathered(joins: Sequence[Join]) -> list[Join]:
    """If there are more branches than colours, the lightest ones become ``others``."""
    names = [k for k in branches(joins) if k != RESIDUAL]
    if len(names) <= len(_BRANCHES):
        return [*joins]
    heavy = lambda k: sum(abs(m.get(k, 0.0)) for j in joins for m in j.masses.values())  # noqa: E731
    kept = {RESIDUAL, *sorted(names, key=heavy)[-len(_BRANCHES) + 1 :]}
    return [
        dataclasses.replace(j, masses={side: _sum(m, kept) for side, m in j.masses.items()}) for j in joins
    ]


def _sum(masses: Mapping[str, float], kept: Collection[str]) -> dict[str, float]:
    rest = [m for k, m in masses.items() if k not in kept]
    return {k: m for k, m in masses.items() if k in kept} | ({_OTHERS: sum(rest)} if rest else {})


def branches(joins: Sequence[Join]) -> list[str]:
    """All names of branches: the residual stream first, unnamed ones last."""
    names = dict.fromkeys(k for j in joins for k in j.masses["balanced"])
    return sorted(names, key=lambda k: (k != RESIDUAL, k in (BRANCH, _OTHERS)))


def _ticks(joins: Sequence[Join]) -> list[str]:
    """A label for each join: its module, empty if the same as before."""
    named = [j.module or j.node for j in joins]
    return [n if i == 0 or n != named[i - 1] else "" for i, n in enumerate(named)]


def streams_table(joins: Sequence[Join]) -> str:
    """The mass that comes back over each join, in % of the output: autograd's → balanced."""
    kinds = branches(joins)
    pair = lambda *shares: " → ".join(f"{100 * s:.3g}" for s in shares)  # noqa: E731
    rows = [
        (
            j.node,
            j.module,
            *(pair(*(j.masses[s][k] for s in SIDES)) if k in j.masses["balanced"] else "" for k in kinds),
            pair(*(j.gone[s] for s in SIDES)),
        )
        for j in joins
    ]
    return "\n".join(table(("join", "module", *kinds, "to biases so far"), rows))
