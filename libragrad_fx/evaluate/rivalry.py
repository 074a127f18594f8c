"""Other comparisons than plain with balanced: every policy, and methods that are functions of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from libragrad_fx.evaluate.tables import Cell, Results, Table, compared, numbers
from libragrad_fx.explain.kept import AUTOGRAD

_BEST = 3  # methods that a rival is compared with


class Policies(NamedTuple):
    """One measure on one set: each policy against one of them. cells: by method and policy."""

    table: Table
    against: str
    policies: tuple[str, ...]
    methods: tuple[str, ...]
    cells: dict[tuple[str, str], Cell]


class Rivals(NamedTuple):
    """One measure on one set: a function under autograd, and methods under a policy. cells: by method and
    family."""

    table: Table
    rival: str
    policy: str
    methods: tuple[str, ...]
    families: tuple[str, ...]
    cells: dict[tuple[str, str], Cell]


def all_policies(found: Results, made: Sequence[Table], against: str) -> list[Policies]:
    """Where there are more than two policies: each against one of them, over all models at once."""
    every = tuple(found.config["policies"])
    shown = []
    for table in made if len(every) > 2 else ():
        sides = numbers(found, table.measure, table.data, table.target)
        cells = {}
        for method in found.methods:
            for policy in every:
                base, other = sides.get((method, against), {}), sides.get((method, policy), {})
                if (c := compared(base, other, table.measure, seeds=False)) is not None:
                    cells[method, policy] = c
        methods = tuple(m for m in found.methods if any((m, p) in cells for p in every))
        shown.append(Policies(table, against, every, methods, cells))
    return [p for p in shown if p.cells]


def all_rivals(found: Results, made: Sequence[Table], policy: str) -> list[Rivals]:
    """Each function under autograd, and the methods that do best under ``policy`` on the same samples.

    They are chosen by their means over families on these samples, which favours them.
    """
    shown = []
    for table in made:
        sides = numbers(found, table.measure, table.data, table.target)
        for rival in found.foreign:
            own = [m for m in table.methods if m not in found.foreign]
            cells = {}
            for method in own:
                theirs, ours = sides.get((rival, AUTOGRAD), {}), sides.get((method, policy), {})
                for family, models in found.families.items():
                    some = [{m: side[m] for m in models if m in side} for side in (theirs, ours)]
                    if (c := compared(some[0], some[1], table.measure)) is not None:
                        cells[method, family] = c
            best = tuple(sorted(own, key=lambda m: _mean(cells, m, table.measure.up))[:_BEST])
            families = tuple(f for f in found.families if any((m, f) in cells for m in best))
            if families:
                shown.append(Rivals(table, rival, policy, best, families, cells))
    return shown


def _mean(cells: dict[tuple[str, str], Cell], method: str, up: bool) -> float:
    """For sorting: the better, the smaller; methods without a number come last."""
    values = [c.other for (m, _), c in cells.items() if m == method]
    if not values:
        return float("inf")
    return sum(values) / len(values) * (-1 if up else 1)
