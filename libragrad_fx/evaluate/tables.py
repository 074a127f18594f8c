"""From rows of results to tables: two policies side by side, with how sure the difference is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.store import RESULTS, RUNS
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


@dataclasses.dataclass(frozen=True)
class Cell:
    """Two policies on the same samples.

    base, other: means over samples, and over seeds where a family has several
    difference:  other - base, with its interval
    wins, ties, losses: samples of which ``other`` is better, equal, worse (means over seeds)
    seeds:       how many trained models
    model, how:  the first of them, and what was done to it
    """

    base: float
    other: float
    difference: Interval
    wins: int
    ties: int
    losses: int
    seeds: int
    model: str
    how: str
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

    @property
    def methods(self) -> list[str]:
        return [m["name"] or m["method"] for m in self.config["methods"]]

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
    rows = found.rows(
        "SELECT family, method, model, policy, image, value, how FROM results WHERE metric = ? AND"
        " measure = ?"
        " AND data = ? AND target = ? AND value IS NOT NULL ORDER BY family, method, model, image",
        measure.metric, measure.name, data, target,
    )  # fmt: skip
    by: dict[tuple[str, str], dict[str, dict[str, dict[str, float]]]] = {}
    how: dict[str, str] = {}
    for family, method, model, policy, image, value, said in rows:
        of = by.setdefault((method, family), {}).setdefault(model, {})
        of.setdefault(policy, {})[image] = value
        how[model] = said or ""
    cells = {k: c for k, models in by.items() if (c := _cell(models, how, measure, policies)) is not None}
    families = dict.fromkeys(spec["family"] or name for name, spec in found.config["models"].items())
    kept = {f for _, f in cells}
    methods = tuple(m for m in found.methods if any(m == k for k, _ in cells))
    return Table(measure, data, target, methods, tuple(f for f in families if f in kept), cells)


def _cell(
    models: Mapping[str, Mapping[str, Mapping[str, float]]], how: Mapping[str, str], measure: Measure,
    policies: tuple[str, str],
) -> Cell | None:  # fmt: skip
    """What is known of one method and family; None where a side is missing."""
    base, other = policies
    both = {m: p for m, p in models.items() if base in p and other in p}
    if not both:
        return None
    images = sorted(set.intersection(*({*p[base]} & {*p[other]} for p in both.values())))
    if len(images) < 2:
        return None
    each = [[[p[side][i] for i in images] for side in policies] for p in both.values()]
    values = torch.tensor(each, dtype=torch.float64)
    a, b = values[:, 0], values[:, 1]
    pair = paired(b.mean(0), a.mean(0), missing="omit", resamples=2000)
    difference = crossed(b - a, missing="omit") if len(both) > 1 else pair.difference
    wins, losses = (pair.wins, pair.losses) if measure.up else (pair.losses, pair.wins)
    first = next(iter(both))
    return Cell(
        float(a.nanmean()), float(b.nanmean()), difference, wins, pair.ties, losses, len(both), first,
        how[first], measure.up,
    )  # fmt: skip


def counted(found: Iterable[Table]) -> dict[str, dict[Verdict, int]]:
    """By measure's title, how many cells are better, worse and even."""
    counts: dict[str, dict[Verdict, int]] = {}
    for table in found:
        of = counts.setdefault(table.measure.title, {"better": 0, "even": 0, "worse": 0})
        for cell in table.cells.values():
            of[cell.verdict] += 1
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


def curves(found: Results, model: str, data: str, method: str, target: str = "predicted") -> dict[str, Any]:
    """By policy and order ("mif", "lif"), the shares taken and the mean accuracies behind them."""
    rows = found.rows(
        "SELECT policy, measure, avg(value) FROM results WHERE metric = 'tokens' AND model = ? AND data"
        " = ? AND"
        " method = ? AND target = ? AND measure LIKE '%accuracy@%' GROUP BY ALL ORDER BY ALL",
        model, data, method, target,
    )  # fmt: skip
    by: dict[str, Any] = {}
    for policy, measure, value in rows:
        order, _, ratio = measure.partition("_accuracy@")
        by.setdefault(policy, {}).setdefault(order, []).append((float(ratio), value))
    return by


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
