"""Other comparisons than plain with balanced: every policy, and methods that are functions of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from libragrad_fx.evaluate.tables import Cell, Results, Side, Table, compared, numbers, of
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

    They are chosen by their means over models on these samples, which favours them.
    """
    shown = []
    for table in made if found.foreign else ():
        sides = numbers(found, table.measure, table.data, table.target)
        own = [m for m in table.methods if m not in found.foreign and (m, policy) in sides]
        best = tuple(sorted(own, key=lambda m: _mean(sides[m, policy], table.measure.up))[:_BEST])
        for rival in found.foreign:
            theirs, cells = sides.get((rival, AUTOGRAD), {}), {}
            for method in best:
                for family, models in found.families.items():
                    some = of(theirs, models), of(sides[method, policy], models)
                    if (c := compared(*some, table.measure)) is not None:
                        cells[method, family] = c
            families = tuple(f for f in found.families if any((m, f) in cells for m in best))
            if families:
                shown.append(Rivals(table, rival, policy, best, families, cells))
    return shown


def _mean(side: Side, up: bool) -> float:
    """For sorting: of what is better, the smaller."""
    means = [sum(values.values()) / len(values) for values in side.values()]
    return sum(means) / len(means) * (-1 if up else 1)
