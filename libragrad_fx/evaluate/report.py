"""A report of an evaluation: one HTML page that stands alone, or Markdown and its charts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from libragrad_fx.evaluate import charts
from libragrad_fx.evaluate.rivalry import Policies, Rivals, all_policies, all_rivals
from libragrad_fx.evaluate.strips import keys, strips
from libragrad_fx.evaluate.tables import (
    MEASURES,
    Cell,
    Curve,
    Results,
    Table,
    counted,
    curves,
    losses,
    policies_of,
    tables,
)  # fmt: skip
from libragrad_fx.explain.kept import AUTOGRAD
from libragrad_fx.extras import writable, writing
from libragrad_fx.viz.template import markup, rendered

_MARKS = {"better": "▲", "worse": "▼", "even": "·"}
_SHOWN = "fullgrad_plus"
"""The method whose curves are drawn for each model, if it is there; else the first."""
_PANELS = 16  # of a figure, at most
_KINDS = {
    "curves": (
        "Curves: most and least influential first",
        "Parts of the input are taken away in the order of the map, and the line is the share of"
        " samples whose answer stays. MIF, solid: the most influential parts go first, so a faithful map"
        " falls at once. LIF, dashed: the least influential go first, so it stays high. The area between"
        " the two is the symmetric relevance gain.",
    ),
    "completeness": (
        "Completeness against faithfulness",
        "Left: the map adds up to the output; up: it is faithful. An arrow leads from {0} to {1}; one"
        " to the upper left gains both. Means over models.",
    ),
    "cost": (
        "Cost against faithfulness",
        "Left: fast; up: faithful. Time is that of the map alone, without capture, in batches, on the"
        " machine that is named below. Means over models.",
    ),
}
"""What charts of a kind are called, and how they are read, of two policies."""


def report(folder: str | Path, output: str | Path, policies: tuple[str, str] = (AUTOGRAD, "libra")) -> Path:
    """Write a report of the results in a folder, as HTML, or Markdown with its charts in NAME.charts.

    Args:
        output: ends in .html or .md.
        policies: the two that are compared; all are compared with the second in tables of their own.

    Raises:
        InputError: no results, another ending, or a path that cannot be written.
        LibraGradError: the extra ``evaluate`` is not installed.
    """
    path = writable(Path(output), (".html", ".md"))
    found = Results(folder)
    made = tables(found, policies)
    if path.suffix == ".md":
        pictures = path.with_suffix(".charts")
        shown = _saved(_charts(found, made, policies, lambda *_: None), writable(pictures, folder=True))
        text = markdown(found, made, policies, shown)
    else:
        text = page(found, made, policies)
    with writing(path):
        path.write_text(text, "utf-8")
    return path


# --- both forms


def number(value: float, scale: float) -> str:
    """As a table has it: with one digit of a percentage, or two of a small number."""
    return f"{round(scale * value, 1) + 0.0:.1f}" if scale != 1 else f"{value:.1e}"


def both(cell: Cell, scale: float) -> str:
    """The two means."""
    return f"{number(cell.base, scale)} → {number(cell.other, scale)}"


def spread(cell: Cell, scale: float) -> str:
    """The difference and its interval."""
    d = cell.difference
    if scale == 1:
        return f"{d.mean:+.1e} [{d.low:+.1e}, {d.high:+.1e}]"
    return f"{scale * d.mean:+.1f} [{scale * d.low:+.1f}, {scale * d.high:+.1f}]"


def summary(found: Results, policies: tuple[str, str]) -> list[str]:
    """Sentences: what was measured, on what."""
    config = found.config
    sizes = [f"{name} ({spec['count'] or 'all'} samples)" for name, spec in config["data"].items()]
    foreign = [
        f"{', '.join(found.foreign)}: functions of others. A policy is that of the module that they are"
        " given; what they make of its backward is their own."
    ]
    return [
        f"{len(config['models'])} models, {len(found.methods)} methods, policies"
        f" {', '.join(config['policies'])}; data: {', '.join(sizes)}.",
        f"Cells say {policies[0]} → {policies[1]}; ▲ better, ▼ worse where the 95 % interval of the"
        " difference over the same samples leaves zero out (bootstrap over samples; of several seeds, over"
        " seeds and samples), · otherwise. Of a hundred cells without a difference, about five are marked.",
        *(foreign if found.foreign else []),
    ]


# --- Markdown


def _saved(drawn: Mapping[str, Sequence[tuple[str, str]]], folder: Path) -> dict[str, list[str]]:
    """Charts as files. By kind, the lines that show them beside the folder."""
    shown: dict[str, list[str]] = {}
    for kind, some in drawn.items():
        for i, (title, svg) in enumerate(some, 1):
            with writing(file := folder / f"{kind}-{i}.svg"):
                file.write_text(charts.alone(svg), "utf-8")
            shown.setdefault(kind, []).append(f"{title}\n\n![{title}]({quote(folder.name)}/{file.name})")
    return shown


def markdown(
    found: Results, made: Sequence[Table], policies: tuple[str, str], shown: Mapping[str, Sequence[str]]
) -> str:
    """The report as Markdown. shown: by kind, the lines of each chart."""
    parts = [*summary(found, policies), "", f"## Where {policies[1]} is worse", "", losses_of(made), ""]
    parts += ["## Counts", "", _counts(made), ""]
    for table in made:
        parts += [f"### {table.measure.title}; {table.data}, target {table.target}", "", grid(table), ""]
    for kind, lines in shown.items():
        title, how = _KINDS[kind]
        parts += [f"## {title}", "", how.format(*policies), ""]
        parts += [line for one in lines for line in (one, "")]
    for p in all_policies(found, made, policies[1]):
        parts += [f"### All policies against {p.against}: {_title(p.table)}, means over models", ""]
        parts += [_policy_grid(p), ""]
    for r in all_rivals(found, made, policies[1]):
        parts += [f"### {r.rival} → methods under {r.policy}: {_title(r.table)}", "", _rival_grid(r), ""]
    parts += [
        "## What failed",
        "",
        _failures(found),
        "",
        "## What numbers were made by",
        "",
        _made_by(found),
    ]
    return "\n".join([*parts, ""])


def _title(table: Table) -> str:
    return f"{table.measure.title}; {table.data}, target {table.target}"


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(r)} |" for r in (head, ["---"] * len(head), *rows))


def losses_of(made: Sequence[Table]) -> str:
    rows = [
        [f"`{method}`", family, t.measure.title, f"{t.data}, {t.target}", both(c, t.measure.scale),
         spread(c, t.measure.scale)]
        for t, method, family, c in losses(made)
    ]  # fmt: skip
    return (
        _lines(["method", "family", "measure", "data, target", "", "difference"], rows)
        if rows
        else "Nowhere."
    )


def _counts(made: Sequence[Table]) -> str:
    rows = [
        [title, *(str(of[v]) for v in ("better", "even", "worse")), f"{of['wins']} : {of['losses']}"]
        for title, of in counted(made).items()
    ]
    return _lines(["measure", "better", "even", "worse", "samples won : lost"], rows)


def grid(table: Table) -> str:
    return _grid(table.methods, table.families, table.cells, table.measure.scale)


def _grid(
    methods: Sequence[str], families: Sequence[str], cells: Mapping[tuple[str, str], Cell], scale: float
) -> str:
    rows = []
    for method in methods:
        row = [f"`{method}`"]
        for family in families:
            cell = cells.get((method, family))
            row.append("–" if cell is None else f"{both(cell, scale)} {_MARKS[cell.verdict]}")
        rows.append(row)
    return _lines(["method", *families], rows)


def _policy_grid(found: Policies) -> str:
    scale, rows = found.table.measure.scale, []
    for m in found.methods:
        cells = [found.cells.get((m, p)) for p in found.policies]
        said = [
            "–"
            if c is None
            else f"{number(c.other, scale)} {'' if p == found.against else _MARKS[c.verdict]}"
            for p, c in zip(found.policies, cells, strict=True)
        ]
        rows.append([f"`{m}`", *map(str.strip, said)])
    return _lines(["method", *found.policies], rows)


def _rival_grid(found: Rivals) -> str:
    return _grid(found.methods, found.families, found.cells, found.table.measure.scale)


def _failures(found: Results) -> str:
    rows = [
        [m, d, p, f"`{k}`", metric, str(n), why[:160]] for m, d, p, k, metric, why, n in found.failures()
    ]
    return (
        _lines(["model", "data", "policy", "method", "metric", "samples", "why"], rows)
        if rows
        else "Nothing."
    )


def _made_by(found: Results) -> str:
    rows = [
        [r.model, r.data, f"`{r.weights[:16]}`", f"{r.dtype} on {r.device}", f"{r.seconds:.0f}", r.versions]
        for r in _runs(found)
    ]
    return _lines(["model", "data", "weights", "computed in", "seconds", "versions"], rows)


# --- what numbers were made by

Key = tuple[str, str, str, str, str, str]
"""(model, data, policy, method, metric, target)"""


@dataclasses.dataclass(frozen=True)
class Run:
    """What one cell's number of one model was made by: rows of ``runs.parquet``, one for each chunk."""

    anchor: str
    policy: str
    method: str
    metric: str
    target: str
    seconds: float
    keys: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Made:
    """The runs of a model on a set, and what they have in common."""

    model: str
    data: str
    weights: str
    spec: str
    dtype: str
    device: str
    versions: str
    runs: tuple[Run, ...]

    @property
    def seconds(self) -> float:
        return sum(r.seconds for r in self.runs)


def _runs(found: Results) -> list[Made]:
    rows = found.rows(
        "SELECT model, data, policy, method, metric, target, sum(seconds), list(run ORDER BY chunk),"
        " any_value(made_by) FROM runs GROUP BY ALL ORDER BY model, data, method, policy, metric, target"
    )
    by: dict[tuple[str, str], list[Run]] = {}
    made_by: dict[tuple[str, str], Mapping[str, Any]] = {}
    for i, (model, data, policy, method, metric, target, seconds, run, made) in enumerate(rows):
        mine = by.setdefault((model, data), [])
        mine.append(Run(f"run-{i}", policy, method, metric, target, seconds, tuple(run)))
        made_by[model, data] = json.loads(made)
    return [
        Made(
            model, data, of["weights"], json.dumps(of["model"]), of["dtype"], of["device"],
            ", ".join(f"{k} {v[:12]}" for k, v in of["versions"].items()), tuple(runs),
        )
        for ((model, data), runs), of in zip(by.items(), made_by.values(), strict=True)
    ]  # fmt: skip


# --- HTML


def page(found: Results, made: Sequence[Table], policies: tuple[str, str]) -> str:
    """The report as HTML."""
    runs = _runs(found)
    anchors: dict[Key, str] = {
        (m.model, m.data, r.policy, r.method, r.metric, r.target): r.anchor for m in runs for r in m.runs
    }

    def link(t: Table, model: str, policy: str, method: str) -> str:
        """Where the runs of a number are."""
        return f"#{anchors[model, t.data, policy, method, t.measure.metric, t.target]}"

    shown, count = strips(found, policies)
    drawn = _charts(found, made, policies, link)
    marked = {k: [(t, markup(svg, "evaluate")) for t, svg in some] for k, some in drawn.items()}
    return rendered(
        "evaluate/report.html", "evaluate", summary=summary(found, policies), policies=policies,
        counts=counted(made), marks=_MARKS, losses=losses(made), tables=made, number=number, spread=spread,
        query=query, link=link, autograd=AUTOGRAD, others=all_policies(found, made, policies[1]),
        rivals=all_rivals(found, made, policies[1]), failures=found.failures(), runs=runs,
        charts=marked, kinds=_KINDS, strips=shown, strip_count=count, keys=keys(),
        config=json.dumps(found.config, indent=1),
    )  # fmt: skip


def query(table: Table) -> str:
    """SQL that gives the means of a table again."""
    return (
        "SELECT method, family, policy, avg(value), count(*) FROM 'results.parquet' WHERE metric ="
        f" '{table.measure.metric}' AND measure = '{table.measure.name}' AND data = '{table.data}' AND"
        f" target = '{table.target}' GROUP BY ALL ORDER BY ALL"
    )


# --- charts


def _charts(
    found: Results, made: Sequence[Table], policies: tuple[str, str], link: Any
) -> dict[str, list[tuple[str, str]]]:
    """By kind, pairs of a title and SVG."""
    drawn: dict[str, list[tuple[str, str]]] = {"curves": [], "completeness": [], "cost": []}
    for metric, data, target in dict.fromkeys((t.measure.metric, t.data, t.target) for t in made):
        if lines := curves(found, metric, data, target):
            for title, by in _panels(found, lines).items():
                said = f"{title}; {metric} of {data}, target {target}"
                drawn["curves"].append((said, charts.curves(by, policies, metric)))
    for t in made:
        if t.measure == MEASURES[0]:
            for kind, svg in _against(found, t, policies, link).items():
                drawn[kind].append((f"{t.data}, target {t.target}", svg))
    return drawn


def _panels(
    found: Results, lines: Mapping[tuple[str, str, str, str], Curve]
) -> dict[str, dict[str, dict[tuple[str, str], Curve]]]:
    """By figure, panel and (policy, order): each method over all models, and each model by one method."""
    methods = [m for m in found.methods if any(m == k[0] for k in lines)]
    models = [m for m in found.config["models"] if any(m == k[1] for k in lines)]
    shown = _SHOWN if _SHOWN in methods else methods[0]
    rest = {k[2:] for k in lines}
    by_method = {
        m: {
            (p, o): charts.mean([c for k, c in lines.items() if (k[0], *k[2:]) == (m, p, o)])
            for p, o in rest
        }
        for m in methods[:_PANELS]
    }
    by_model = {
        m: {(p, o): lines[shown, m, p, o] for p, o in rest if (shown, m, p, o) in lines}
        for m in models[:_PANELS]
    }
    if len(models) == 1:
        return {f"Each method, {models[0]}": by_method}
    return {f"Each method, mean over {len(models)} models": by_method, f"{shown}, each model": by_model}


def _against(found: Results, t: Table, policies: tuple[str, str], link: Any) -> dict[str, str]:
    """Faithfulness against completeness, and against cost: means over models, of methods that have both."""
    _, means = policies_of(found, t.measure, t.data, t.target)
    gaps = found.rows(
        "SELECT method, policy, median(value) FROM results WHERE metric = 'completeness' AND measure ="
        " 'relative_error' AND data = ? AND value IS NOT NULL GROUP BY ALL", t.data,
    )  # fmt: skip
    cost = found.rows(
        "SELECT method, policy, sum(attribution_seconds) / sum(n) FROM runs JOIN (SELECT run,"
        " count(DISTINCT image) n FROM results WHERE error IS NULL GROUP BY run) USING (run) WHERE metric ="
        " ? AND target = ? AND data = ? GROUP BY ALL", t.measure.metric, t.target, t.data,
    )  # fmt: skip
    first = found.rows(
        "SELECT method, policy, min(model) FROM results WHERE metric = ? AND data = ? AND target = ? AND"
        " value IS NOT NULL GROUP BY ALL", t.measure.metric, t.data, t.target,
    )  # fmt: skip
    models = {(method, policy): model for method, policy, model in first}
    drawn = {}
    for kind, rows, across in (
        ("completeness", gaps, "median completeness error, share of the logit"),
        ("cost", cost, "seconds a map of one sample takes"),
    ):
        points = {
            (m, p): (max(x, 1e-9), t.measure.scale * means[m, p][0])
            for m, p, x in rows
            if (m, p) in means and p in policies
        }
        links = {k: link(t, models[k], k[1], k[0]) for k in points}
        if points:
            up = "symmetric relevance gain, points"
            drawn[kind] = charts.against(points, policies, across, up, links)
    return drawn
