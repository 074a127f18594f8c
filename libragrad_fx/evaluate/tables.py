"""From rows of results to tables: two policies side by side, with how sure the difference is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.store import EXAMPLES, MAPS, RESULTS, RUNS
from libragrad_fx.explain.kept import AUTOGRAD
from libragrad_fx.extras import need
from libragrad_fx.metrics.intervals import Interval, crossed, paired

Verdict = Literal["better", "worse", "even"]


class Measure(NamedTuple):
    """A column of numbers. scale: what they are multiplied by in tables. up: whether more is better."""

    metric: str
    name: str
    title: str
    scale: float = 100.0
    up: bool = True


MEASURES = (
    Measure("tokens", "srg", "Faithfulness on tokens: symmetric relevance gain of accuracy"),
    Measure("tokens", "mif_accuracy", "Faithfulness on tokens: most relevant first, 100 - accuracy"),
    Measure("tokens", "lif_accuracy", "Faithfulness on tokens: least relevant first, accuracy"),
    Measure("tokens", "mif_aopc", "Faithfulness on tokens: most relevant first, drop of the probability"),
    Measure("pixels", "srg", "Faithfulness on pixels: symmetric relevance gain of accuracy"),
    Measure("pixels", "mif_accuracy", "Faithfulness on pixels: most relevant first, 100 - accuracy"),
    Measure("places", "ap", "Localisation: average precision over pixels"),
    Measure("places", "pointing", "Localisation: pointing game"),
    Measure("places", "pointing_cell", "Localisation: does the most relevant cell overlap the mask"),
    Measure("places", "mass", "Localisation: relevance mass in the mask"),
    Measure("places", "rank", "Localisation: relevance rank accuracy"),
    Measure("places", "precision", "Localisation: precision at as many pixels as the mask has"),
    Measure("places", "emd", "Localisation: 1 - Earth Mover's Distance to the mask"),
    Measure("sensitivity_n", "correlation", "Sensitivity-n: correlation of sums with drops of the output"),
    Measure("randomisation", "spearman", "Randomised parameters: likeness of maps", up=False),
    Measure("max_sensitivity", "max_sensitivity", "Noise: largest relative change of the map", 1.0, False),
    Measure("parts", "csdc", "Parts: controlled synthetic data check"),
    Measure("parts", "preservation", "Parts: preservation check"),
    Measure("parts", "deletion", "Parts: deletion check"),
    Measure("parts", "distractibility", "Parts: distractibility"),
    Measure("parts", "single_deletion", "Parts: single deletion"),
    Measure("parts", "target_sensitivity", "Parts: target sensitivity"),
    Measure("completeness", "relative_error", "Completeness: error, as a share of the logit", 1.0, False),
)
"""What tables are made of, where results have it."""


Side = Mapping[str, Mapping[str, float]]
"""By model and sample, the numbers of one method under one policy."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """Two sides on the same samples.

    base, other: means over samples, and over models
    difference:  other - base, with its interval
    wins, ties, losses: samples of which ``other`` is better, equal, worse (means over models)
    models:      which; several seeds of one family, or those that a mean is taken over
    """

    base: float
    other: float
    difference: Interval
    wins: int
    ties: int
    losses: int
    models: tuple[str, ...]
    up: bool

    @property
    def verdict(self) -> Verdict:
        """Better or worse where the interval leaves zero out."""
        low, high = self.difference.low, self.difference.high
        if low <= 0 <= high:
            return "even"
        return "better" if (low > 0) == self.up else "worse"


@dataclasses.dataclass(frozen=True)
class Table:
    """One measure on one set, for one kind of target. cells: by method and family."""

    measure: Measure
    data: str
    target: str
    methods: tuple[str, ...]
    families: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]

    @property
    def size(self) -> int:
        """How many cells there are."""
        return len(self.cells)


class Results:
    """A folder that ``evaluate`` wrote.

    Raises:
        InputError: there are no results in it, or not all of them.
    """

    def __init__(self, folder: str | Path) -> None:
        self.file, self.runs_file = Path(folder) / RESULTS, Path(folder) / RUNS
        if not self.file.is_file():
            raise InputError(
                f"there is no {RESULTS} in {str(folder)!r}: it is written when the last unit of an"
                " evaluation is done; run it again to its end"
            )
        self.base = need("duckdb", "evaluate").connect()
        parquet = need("pyarrow.parquet", "evaluate")
        self.config: dict[str, Any] = json.loads(parquet.read_schema(self.file).metadata[b"libragrad"])[
            "config"
        ]
        self.base.execute(f"CREATE VIEW results AS SELECT * FROM read_parquet({str(self.file)!r})")
        self.base.execute(f"CREATE VIEW runs AS SELECT * FROM read_parquet({str(self.runs_file)!r})")

    def rows(self, query: str, *given: Any) -> list[tuple[Any, ...]]:
        """The rows of a query in SQL; views: ``results`` and ``runs``."""
        return self.base.execute(query, [*given]).fetchall()

    def examples(self) -> list[tuple[Any, ...]]:
        """The maps that were kept, as ``store.MAPS`` says; NULL where an earlier version kept nothing."""
        file = self.file.with_name(EXAMPLES)
        if not file.is_file():
            return []
        told = {row[0] for row in self.rows("DESCRIBE SELECT * FROM read_parquet(?)", str(file))}
        columns = ", ".join(name if name in told else f"NULL AS {name}" for name in MAPS)
        return self.rows(f"SELECT {columns} FROM read_parquet(?) WHERE error IS NULL", str(file))

    @property
    def methods(self) -> list[str]:
        return [m["name"] or m["method"].rpartition(":")[2] for m in self.config["methods"]]

    @property
    def foreign(self) -> list[str]:
        """The methods that are functions of somebody else."""
        return [n for n, m in zip(self.methods, self.config["methods"], strict=True) if ":" in m["method"]]

    @property
    def families(self) -> dict[str, list[str]]:
        """The models of each family."""
        by: dict[str, list[str]] = {}
        for name, spec in self.config["models"].items():
            by.setdefault(spec["family"] or name, []).append(name)
        return by

    def failures(self) -> list[tuple[Any, ...]]:
        """(model, data, policy, method, metric, error, samples) of what failed."""
        return self.rows(
            "SELECT model, data, policy, method, metric, error, count(DISTINCT coalesce(image, '')) FROM"
            " results"
            " WHERE error IS NOT NULL GROUP BY ALL ORDER BY ALL"
        )


def tables(found: Results, policies: tuple[str, str] = (AUTOGRAD, "libra")) -> list[Table]:
    """A table for each measure, set and kind of target."""
    made = []
    for measure in MEASURES:
        kinds = found.rows(
            "SELECT DISTINCT data, target FROM results WHERE metric = ? AND measure = ? ORDER BY data,"
            " target DESC",
            measure.metric, measure.name,
        )  # fmt: skip
        for data, target in kinds:
            made.append(_table(found, measure, data, target, policies))
    return [t for t in made if t.cells]


def _table(found: Results, measure: Measure, data: str, target: str, policies: tuple[str, str]) -> Table:
    sides, families = numbers(found, measure, data, target), found.families
    cells = {}
    for method in found.methods:
        base, other = (sides.get((method, p), {}) for p in policies)
        for family, models in families.items():
            if (c := compared(of(base, models), of(other, models), measure)) is not None:
                cells[method, family] = c
    kept = {f for _, f in cells}
    methods = tuple(m for m in found.methods if any(m == k for k, _ in cells))
    return Table(measure, data, target, methods, tuple(f for f in families if f in kept), cells)


def of(side: Side, models: Sequence[str]) -> Side:
    """Of some models."""
    return {m: side[m] for m in models if m in side}


def numbers(found: Results, measure: Measure, data: str, target: str) -> Mapping[tuple[str, str], Side]:
    """By method and policy, every number of a measure on a set, for one kind of target."""
    rows = found.rows(
        "SELECT method, policy, model, image, value FROM results WHERE metric = ? AND measure = ? AND data"
        " = ? AND target = ? AND value IS NOT NULL ORDER BY model, image",
        measure.metric, measure.name, data, target,
    )  # fmt: skip
    by: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for method, policy, model, image, value in rows:
        by.setdefault((method, policy), {}).setdefault(model, {})[image] = value
    return by


def compared(base: Side, other: Side, measure: Measure, seeds: bool = True) -> Cell | None:
    """Two sides, of the models and samples that both have; None of less than two samples.

    Args:
        seeds: whether several models stand for all seeds of their family, and the interval is for those;
            else it is for these models.
    """
    models = tuple(m for m in base if m in other)
    images = sorted(set.intersection(*({*base[m]} & {*other[m]} for m in models))) if models else []
    if len(images) < 2:
        return None
    each = [[[side[m][i] for i in images] for side in (base, other)] for m in models]
    values = torch.tensor(each, dtype=torch.float64)
    a, b = values[:, 0], values[:, 1]
    pair = paired(b.mean(0), a.mean(0), missing="omit", resamples=2000)
    difference = crossed(b - a, missing="omit") if seeds and len(models) > 1 else pair.difference
    wins, losses = (pair.wins, pair.losses) if measure.up else (pair.losses, pair.wins)
    return Cell(
        float(a.nanmean()), float(b.nanmean()), difference, wins, pair.ties, losses, models, measure.up
    )


def counted(found: Iterable[Table]) -> dict[str, dict[str, int]]:
    """By measure's title, how many cells are better, even and worse; and samples that win, tie, lose."""
    counts: dict[str, dict[str, int]] = {}
    for table in found:
        mine = counts.setdefault(
            table.measure.title, dict.fromkeys(("better", "even", "worse", "wins", "ties", "losses"), 0)
        )
        for cell in table.cells.values():
            mine[cell.verdict] += 1
            for kind in ("wins", "ties", "losses"):
                mine[kind] += getattr(cell, kind)
    return counts


def losses(found: Iterable[Table]) -> list[tuple[Table, str, str, Cell]]:
    """Every cell in which the second policy is worse, the worst first: (table, method, family, cell)."""
    worse = [
        (t, method, family, cell)
        for t in found
        for (method, family), cell in t.cells.items()
        if cell.verdict == "worse"
    ]
    return sorted(worse, key=lambda x: -abs(x[3].difference.mean) * x[0].measure.scale)


Curve = list[tuple[float, float]]


def curves(found: Results, metric: str, data: str, target: str) -> dict[tuple[str, str, str, str], Curve]:
    """By (method, model, policy, "mif" or "lif"): shares that are gone, and the shares of answers that stay
    behind them, both in [0, 1]."""
    rows = found.rows(
        "SELECT method, model, policy, measure, avg(value) FROM results WHERE metric = ? AND data = ? AND"
        " target = ? AND measure LIKE '%accuracy@%' AND value IS NOT NULL GROUP BY ALL",
        metric, data, target,
    )  # fmt: skip
    by: dict[tuple[str, str, str, str], Curve] = {}
    for method, model, policy, measure, value in rows:
        order, _, ratio = measure.partition("_accuracy@")
        by.setdefault((method, model, policy, order), []).append((float(ratio), value))
    return {key: sorted(points) for key, points in by.items()}


def policies_of(
    found: Results, measure: Measure, data: str, target: str
) -> tuple[Sequence[str], dict[Any, Any]]:
    """The methods, and by (method, policy) the mean over families of one measure: for ablations."""
    rows = found.rows(
        "SELECT method, policy, avg(v), count(*) FROM (SELECT method, policy, model, avg(value) v FROM"
        " results"
        " WHERE metric = ? AND measure = ? AND data = ? AND target = ? AND value IS NOT NULL GROUP BY ALL)"
        " GROUP BY ALL",
        measure.metric, measure.name, data, target,
    )  # fmt: skip
    return found.methods, {(m, p): (v, n) for m, p, v, n in rows}
