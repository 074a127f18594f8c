"""A report of an evaluation: one HTML page that stands alone, or Markdown."""

from __future__ import annotations

import base64
import importlib.resources
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from libragrad_fx.evaluate.tables import (
    MEASURES,
    Cell,
    Results,
    Table,
    counted,
    curves,
    losses,
    policies_of,
    tables,
)  # fmt: skip
from libragrad_fx.explain.kept import AUTOGRAD
from libragrad_fx.extras import need, writing

_MARKS = {"better": "▲", "worse": "▼", "even": "·"}
_SHOWN = "fullgrad_plus"
"""The method whose curves are drawn, if it is there; else the first."""


def report(folder: str | Path, output: str | Path, policies: tuple[str, str] = (AUTOGRAD, "libra")) -> Path:
    """Write a report of the results in a folder: HTML, or Markdown if ``output`` ends in .md.

    Args:
        policies: the two that are compared; others are rows of a table of their own.

    Raises:
        InputError: no results, or a path that cannot be written.
        LibraGradError: the extra ``evaluate`` is not installed.
    """
    found, path = Results(folder), Path(output)
    made = tables(found, policies)
    text = markdown(found, made, policies) if path.suffix == ".md" else page(found, made, policies)
    with writing(path):
        path.write_text(text, "utf-8")
    return path


# --- both forms


def number(value: float, scale: float) -> str:
    """As a table has it: with one digit of a percentage, or two of a small number."""
    return f"{scale * value:.1f}" if scale != 1 else f"{value:.1e}"


def both(cell: Cell, scale: float) -> str:
    """The two means."""
    return f"{number(cell.base, scale)} → {number(cell.other, scale)}"


def spread(cell: Cell, scale: float) -> str:
    """The difference and its interval."""
    d = cell.difference
    if scale == 1:
        return f"{d.mean:+.1e} [{d.low:+.1e}, {d.high:+.1e}]"
    return f"{scale * d.mean:+.1f} [{scale * d.low:+.1f}, {scale * d.high:+.1f}]"


def summary(found: Results, made: Sequence[Table], policies: tuple[str, str]) -> list[str]:
    """Sentences: what was measured, on what."""
    config = found.config
    sizes = [f"{name} ({spec['count'] or 'all'} samples)" for name, spec in config["data"].items()]
    return [
        f"{len(config['models'])} models, {len(found.methods)} methods, policies"
        f" {', '.join(config['policies'])};"
        f" data: {', '.join(sizes)}.",
        f"Cells say {policies[0]} → {policies[1]}; ▲ better, ▼ worse where the 95 % interval of the"
        " difference"
        " over the same samples leaves zero out (bootstrap over samples; of several seeds, over seeds and"
        " samples), · otherwise.",
    ]


# --- Markdown


def markdown(found: Results, made: Sequence[Table], policies: tuple[str, str]) -> str:
    parts = [*summary(found, made, policies), "", "## Where balancing is worse", "", losses_of(made), ""]
    parts += ["## Counts", "", _counts(made), ""]
    for table in made:
        parts += [f"### {table.measure.title}; {table.data}, target {table.target}", "", grid(table), ""]
    others = [p for p in found.config["policies"] if p not in policies]
    if others:
        parts += ["## Other policies", "", *_others(found, made)]
    parts += ["## What failed", "", _failures(found), ""]
    return "\n".join(parts)


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
        [title, *(str(of[v]) for v in ("better", "even", "worse"))] for title, of in counted(made).items()
    ]
    return _lines(["measure", "better", "even", "worse"], rows)


def grid(table: Table) -> str:
    scale, rows = table.measure.scale, []
    for method in table.methods:
        row = [f"`{method}`"]
        for family in table.families:
            cell = table.cells.get((method, family))
            row.append("–" if cell is None else f"{both(cell, scale)} {_MARKS[cell.verdict]}")
        rows.append(row)
    return _lines(["method", *table.families], rows)


def _others(found: Results, made: Sequence[Table]) -> list[str]:
    parts = []
    for measure, data, target in dict.fromkeys((t.measure, t.data, t.target) for t in made):
        methods, means = policies_of(found, measure, data, target)
        policies = found.config["policies"]
        rows = [
            [
                f"`{m}`",
                *(number(means[m, p][0], measure.scale) if (m, p) in means else "–" for p in policies),
            ]
            for m in methods
            if any((m, p) in means for p in policies)
        ]
        parts += [f"### {measure.title}; {data}, target {target}: means over models", ""]
        parts += [_lines(["method", *policies], rows), ""]
    return parts


def _failures(found: Results) -> str:
    rows = [
        [m, d, p, f"`{k}`", metric, str(n), why[:160]] for m, d, p, k, metric, why, n in found.failures()
    ]
    return (
        _lines(["model", "data", "policy", "method", "metric", "samples", "why"], rows)
        if rows
        else "Nothing."
    )


# --- HTML


def page(found: Results, made: Sequence[Table], policies: tuple[str, str]) -> str:
    jinja2 = need("jinja2", "evaluate")
    source = importlib.resources.files("libragrad_fx.evaluate").joinpath("report.html").read_text("utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    targets = {(t.data, t.target) for t in made}
    return template.render(
        summary=summary(found, made, policies), policies=policies, counts=counted(made), marks=_MARKS,
        losses=losses(made), tables=made, both=both, spread=spread, query=query, anchor=anchor,
        others=_policy_tables(found, made, policies), failures=found.failures(), runs=_runs(found),
        charts=[c for of in sorted(targets) for c in _charts(found, made, *of, policies)],
        config=json.dumps(found.config, indent=1),
    )  # fmt: skip


def anchor(model: str, data: str) -> str:
    return f"run-{model}-{data}"


def query(table: Table, method: str, family: str) -> str:
    """SQL that gives the two means of a cell again."""
    return (
        "SELECT policy, avg(value), count(*) FROM 'results.parquet' WHERE metric ="
        f" '{table.measure.metric}' AND"
        f" measure = '{table.measure.name}' AND data = '{table.data}' AND target = '{table.target}' AND"
        " method ="
        f" '{method}' AND family = '{family}' GROUP BY policy"
    )


def _policy_tables(
    found: Results, made: Sequence[Table], policies: tuple[str, str]
) -> list[dict[str, Any]]:
    every = found.config["policies"]
    if set(every) <= {*policies}:
        return []
    shown = []
    for measure, data, target in dict.fromkeys((t.measure, t.data, t.target) for t in made):
        methods, means = policies_of(found, measure, data, target)
        rows = [
            (m, [number(means[m, p][0], measure.scale) if (m, p) in means else "–" for p in every])
            for m in methods
            if any((m, p) in means for p in every)
        ]
        shown.append(
            {"title": f"{measure.title}; {data}, target {target}", "policies": every, "rows": rows}
        )
    return shown


def _runs(found: Results) -> list[dict[str, Any]]:
    """What numbers were made by: one entry for each model and set, and the policies and keys in it."""
    rows = found.rows(
        "SELECT model, data, any_value(made_by), count(*), sum(seconds), string_agg(DISTINCT policy, ',"
        " ') FROM runs"
        " GROUP BY model, data ORDER BY model, data"
    )
    shown = []
    for model, data, made_by, count, seconds, policies in rows:
        made: Mapping[str, Any] = json.loads(made_by)
        shown.append({
            "anchor": anchor(model, data), "model": model, "data": data, "units": count, "seconds": seconds,
            "policies": policies, "weights": made["weights"], "spec": json.dumps(made["model"]),
            "device": made["device"], "dtype": made["dtype"],
            "versions": ", ".join(f"{k} {v[:12]}" for k, v in made["versions"].items()),
        })  # fmt: skip
    return shown


# --- charts


def _charts(
    found: Results, made: Sequence[Table], data: str, target: str, policies: tuple[str, str]
) -> list[dict[str, str]]:
    """Pictures of one set and target: (title, data URI)."""
    shown = _SHOWN if _SHOWN in found.methods else found.methods[0]
    drawn = []
    by = {m: c for m in found.config["models"] if (c := curves(found, m, data, shown, target))}
    if by:
        title = f"Accuracy of the answer behind {shown}, {data}, target {target}"
        drawn.append({"title": title, "picture": _curves(by, policies)})
    faithful = next((t for t in made if (t.measure, t.data, t.target) == (MEASURES[0], data, target)), None)
    if faithful is not None:
        drawn += _against(found, faithful, made, policies)
    return drawn


def _curves(by: Mapping[str, Any], policies: tuple[str, str]) -> str:
    pyplot = _pyplot()
    across = min(4, len(by))
    down = -(-len(by) // across)
    figure, axes = pyplot.subplots(
        down, across, figsize=(2.9 * across, 2.3 * down), sharex=True, sharey=True, squeeze=False
    )
    for place in axes.flat:
        place.set_visible(False)
    for place, (model, sides) in zip(axes.flat, by.items(), strict=False):
        place.set_visible(True)
        for side, colour in zip(policies, ("#8a93a0", "#d9730d"), strict=True):
            for order, style in (("mif", "-"), ("lif", "--")):
                points = sorted(sides.get(side, {}).get(order, []))
                place.plot([x for x, _ in points], [100 * y for _, y in points], style, color=colour,
                           label=f"{side}, {order.upper()}")  # fmt: skip
        place.set_title(model, fontsize=9)
        place.set_ylim(-3, 103)
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.supxlabel("share of tokens that are gone", fontsize=9)
    figure.supylabel("% of answers that stay", fontsize=9)
    return _drawn(figure)


def _against(
    found: Results, faithful: Table, made: Sequence[Table], policies: tuple[str, str]
) -> list[dict[str, str]]:
    """Faithfulness against completeness, and against cost: a point for each method and policy, means over
    models."""
    _, means = policies_of(found, faithful.measure, faithful.data, faithful.target)
    gaps = {(m, p): v for m, p, v in found.rows(
        "SELECT method, policy, median(value) FROM results WHERE metric = 'completeness' AND measure ="
        " 'relative_error' AND data = ? AND value IS NOT NULL GROUP BY ALL", faithful.data,
    )}  # fmt: skip
    cost = {(m, p): v for m, p, v in found.rows(
        "SELECT method, policy, sum(attribution_seconds) / count(*) FROM runs WHERE metric = 'tokens'"
        " AND target"
        " = ? AND data = ? GROUP BY ALL", faithful.target, faithful.data,
    )}  # fmt: skip
    drawn = []
    for title, across in (
        ("completeness error, share of the logit (median)", gaps),
        ("seconds a chunk", cost),
    ):
        shown = {k: (across[k], 100 * means[k][0]) for k in means if k in across and k[1] in policies}
        if shown:
            title_ = (
                f"Faithfulness against {title.partition(',')[0]}, {faithful.data}, target {faithful.target}"
            )
            drawn.append(
                {"title": title_, "picture": _scatter(shown, title, faithful.measure.name, policies)}
            )
    return drawn


def _scatter(shown: Mapping[Any, Any], across: str, up: str, policies: tuple[str, str]) -> str:
    figure, place = _pyplot().subplots(figsize=(7.5, 4.2))
    for side, colour in zip(policies, ("#8a93a0", "#d9730d"), strict=True):
        points = {m: v for (m, p), v in shown.items() if p == side}
        place.scatter(
            [max(x, 1e-9) for x, _ in points.values()],
            [y for _, y in points.values()],
            color=colour,
            label=side,
        )
        for method, (x, y) in points.items():
            place.annotate(
                method,
                (max(x, 1e-9), y),
                fontsize=6.5,
                xytext=(3, 3),
                textcoords="offset points",
                color=colour,
            )
    place.set_xscale("log")
    place.set_xlabel(across, fontsize=9)
    place.set_ylabel(f"{up}, mean over models", fontsize=9)
    place.legend(fontsize=8, frameon=False)
    return _drawn(figure)


def _pyplot() -> Any:
    matplotlib = need("matplotlib", "evaluate")
    matplotlib.use("agg")
    return need("matplotlib.pyplot", "evaluate")


def _drawn(figure: Any) -> str:
    """A figure as a data URI, with grey axes on no ground, for light and dark pages."""
    for place in figure.axes:
        place.patch.set_alpha(0)
        place.tick_params(colors="#808891", labelsize=8)
        place.title.set_color("#808891")
        for text in (place.xaxis.label, place.yaxis.label, *figure.texts):
            text.set_color("#808891")
        for line in place.spines.values():
            line.set_color("#808891")
        if (legend := place.get_legend()) is not None:
            for text in legend.get_texts():
                text.set_color("#808891")
    for text in (figure._supxlabel, figure._supylabel):
        if text is not None:
            text.set_color("#808891")
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    _pyplot().close(figure)
    return f"data:image/svg+xml;base64,{base64.b64encode(out.getvalue()).decode()}"
