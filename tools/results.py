"""Writes the tables of docs/results.md from the results of the evaluations in ``zoo/evaluations/``.

    for name in paper seeds ablations shortcut real texts why_gradient why_attention why_path why_zeros \
      why_real why_activation; do
      libragrad evaluate zoo/evaluations/$name.yaml -o out/evaluations/$name; done
    libragrad search-policy zoo/evaluations/search.yaml -o out/evaluations/search
    python tools/results.py

A table stands between ``<!-- NAME.PART -->`` and ``<!-- end -->``. The tables of an evaluation that is not
in the folder stay as they are: each may be run on a machine of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from pages import refill, table

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.report import both, grid, losses_of, number, spread
from libragrad_fx.evaluate.rivalry import all_policies
from libragrad_fx.evaluate.tables import MEASURES, Results, counted, policies_of, tables
from libragrad_fx.explain.kept import AUTOGRAD
from zoo import trained

ROOT = Path(__file__).parent.parent
SHOWN = [m for m in MEASURES if m.name in ("srg", "mif_accuracy", "ap", "pointing", "relative_error")]
"""The measures whose tables are printed; the report of a folder has all."""
TESTED = [m for m in SHOWN if m.name in ("srg", "ap", "relative_error")]
"""Those by which a guess is tested."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "out/evaluations")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/results.md")
    asked = parser.parse_args()
    for name, parts in PARTS.items():
        try:
            found = Results(asked.results / name)
        except InputError as e:
            print(f"{name} stays as it is: {e}")
            continue
        refill(asked.page, {f"{name}.{part}": write(found) for part, write in parts.items()})
    if (file := asked.results / "search" / "found.json").is_file():
        refill(asked.page, {"search.tables": search(json.loads(file.read_text("utf-8")))})


def made(found: Results) -> str:
    """Of what code, how many samples, and where."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE
    )
    told = json.loads(found.rows("SELECT any_value(made_by) FROM runs")[0][0])
    names = [k for k in ("python", "torch", "timm", "transformers") if k in told["versions"]]
    versions = ", ".join(f"{k} {told['versions'][k].partition('+')[0]}" for k in names)
    counts = ", ".join(f"{spec['count']} of {name}" for name, spec in found.config["data"].items())
    code = commit.stdout.strip()
    return f"Code {code}; {counts}; {told['dtype']} on {told['device']}; {versions}."


def models(found: Results) -> str:
    rows = []
    for name, spec in found.config["models"].items():
        said = trained.about(spec["args"]["name"], spec["args"]["seed"])
        how = found.rows("SELECT any_value(how) FROM results WHERE metric = 'tokens' AND model = ?", name)[
            0
        ][0]
        accuracy = [f"{100 * said['accuracy'][k]:.1f}" for k in ("scenes/test", "crowded/test")]
        rows.append([f"`{name}`", spec["family"], f"{said['parameters']:,}", *accuracy, how or "–"])
    return table(["model", "family", "parameters", "scenes, %", "crowded, %", "tokens are"], rows)


def counts(found: Results) -> str:
    rows = [
        [title, *(str(of[v]) for v in ("better", "even", "worse"))]
        for title, of in counted(tables(found)).items()
    ]
    return table(["measure", "better", "even", "worse"], rows)


def means(found: Results) -> str:
    """By method, each measure's mean over models, on each set."""
    parts = []
    for data in found.config["data"]:
        head, rows = ["method"], {f"`{m}`": list[str]() for m in found.methods}
        for measure in SHOWN:
            target = "mask" if measure.metric == "places" else "predicted"
            _, of = policies_of(found, measure, data, target)
            head.append(f"{measure.metric} {measure.name}")
            for m in found.methods:
                pair = [of.get((m, p)) for p in ("autograd", "libra")]
                said = " → ".join("–" if v is None else number(v[0], measure.scale) for v in pair)
                rows[f"`{m}`"].append(said)
        parts += [f"On `{data}`:", "", table(head, [[m, *r] for m, r in rows.items()]), ""]
    return "\n".join(parts)


def losses(found: Results) -> str:
    return losses_of(tables(found))


def each_table(found: Results) -> str:
    parts = []
    for t in tables(found):
        if t.measure in SHOWN:
            parts += [f"### {t.measure.title}; `{t.data}`", "", grid(t), ""]
    return "\n".join(parts)


def pairs(found: Results) -> str:
    """Every cell of some measures in a row of its own: of a test that asks for few."""
    rows = [
        [f"`{m}`", family, t.measure.title, t.data, both(c, t.measure.scale), spread(c, t.measure.scale)]
        for t in tables(found)
        if t.measure in TESTED
        for (m, family), c in t.cells.items()
    ]
    return table(["method", "family", "measure", "data", "autograd → libra", "difference"], rows)


def each_policy(found: Results) -> str:
    """The same where there are more policies: each as what it adds to autograd."""
    others = [k for k in found.config["policies"] if k != AUTOGRAD]
    rows = []
    for p in all_policies(found, tables(found), AUTOGRAD):
        measure = p.table.measure
        for m in p.methods if measure in TESTED else ():
            base, adds = p.cells[m, AUTOGRAD].base, [spread(p.cells[m, k], measure.scale) for k in others]
            rows.append([f"`{m}`", measure.title, p.table.data, number(base, measure.scale), *adds])
    return table(["method", "measure", "data", AUTOGRAD, *others], rows)


def ablations(found: Results) -> str:
    parts = []
    for model in found.config["models"]:
        for metric, name, target in (
            ("tokens", "mif_accuracy", "predicted"), ("tokens", "mif_accuracy", "label"),
            ("tokens", "srg", "predicted"), ("places", "ap", "mask"),
        ):  # fmt: skip
            measure = next(m for m in MEASURES if (m.metric, m.name) == (metric, name))
            parts.append((model, measure, target))
    rows = []
    for model, measure, target in parts:
        for method in found.methods:
            of = dict(found.rows(
                "SELECT policy, avg(value) FROM results WHERE model = ? AND metric = ? AND measure = ?"
                " AND target = ?"
                " AND method = ? AND value IS NOT NULL GROUP BY policy",
                model, measure.metric, measure.name, target, method,
            ))  # fmt: skip
            rows.append([
                f"`{model}`", f"`{method}`", f"{measure.metric} {measure.name}, {target}",
                *(number(of[p], measure.scale) if p in of else "–" for p in found.config["policies"]),
            ])  # fmt: skip
    return table(["model", "method", "measure", *found.config["policies"]], rows)


def shortcut(found: Results) -> str:
    """In how many images a map's most relevant pixel lies in the watermark, where the model follows it."""
    rows = []
    followed = (
        "SELECT m.model, m.policy, m.method, avg(m.value), count(*) FROM results m JOIN (SELECT DISTINCT"
        " model, image,"
        " explained FROM results WHERE metric = 'tokens' AND explained IS NOT NULL) t ON m.model ="
        " t.model AND m.image"
        " = t.image AND m.explained = t.explained WHERE m.metric = 'places' AND m.measure = ? AND"
        " m.label <>"
        " m.explained GROUP BY ALL"
    )
    for measure in ("pointing", "mass"):
        of = {(m, k, p): (v, n) for m, p, k, v, n in found.rows(followed, measure)}
        for model in found.config["models"]:
            for method in found.methods:
                pair = [of.get((model, method, p)) for p in ("autograd", "libra")]
                if None not in pair:
                    n = pair[0][1]
                    said = " → ".join(f"{100 * v:.0f} %" for v, _ in pair)
                    rows.append([f"`{model}`", f"`{method}`", measure, said, str(n)])
    return table(["model", "method", "measure", "autograd → libra", "images"], rows)


def search(said: Mapping) -> str:
    rows = []
    for model, pair in said["compared"].items():
        d = dict(zip(("mean", "low", "high"), pair["difference"][:3], strict=True))
        searched = "yes" if model in said["config"]["search"]["models"] else "no"
        told = f"{100 * d['mean']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"
        rows.append(
            [f"`{model}`", searched, told, f"{pair['wins']} : {pair['losses']}", f"{pair['p']:.3f}"]
        )
    choice = ", ".join(f"{k} {v}" for k, v in said["choice"].items())
    return (
        f"{said['trials']} trials; on the search set the best has an SRG of {100 * said['value']:.1f},"
        " libra"
        f" {100 * said['libra']:.1f}. The best: {choice}.\n\nOn scenes that were not searched, found"
        " policy - libra:\n\n"
        + table(["model", "searched", "difference of SRG [95 %]", "wins : losses", "p"], rows)
    )


def failures(found: Results) -> str:
    by: dict[tuple[str, str, str], set[str]] = {}
    for model, _, _, method, metric, why, _ in found.failures():
        by.setdefault((method, metric, why.partition(":")[2].strip()[:140]), set()).add(model)
    rows = [[f"`{m}`", k, ", ".join(sorted(v)), why] for (m, k, why), v in sorted(by.items())]
    return table(["method", "metric", "models", "why"], rows) if rows else "Nothing."


def complete(found: Results) -> str:
    """The largest error of balanced FullGrad, of all samples, models and layers."""
    largest, middle, count = found.rows(
        "SELECT max(value), median(value), count(*) FROM results WHERE metric = 'completeness' AND method ="
        " 'fullgrad' AND policy = 'libra' AND measure LIKE 'relative_error%'"
    )[0]
    return (
        f"FullGrad with `libra`, float32, at the input of every block: of {count:,} sums the largest error"
        f" is {largest:.1e} of the logit, the median {middle:.1e}."
    )


def cost(found: Results) -> str:
    rows = found.rows(
        "SELECT r.metric, sum(r.seconds), sum(r.attribution_seconds), (SELECT count(DISTINCT (model,"
        " data, policy,"
        " method, image)) FROM results x WHERE x.metric = r.metric AND value IS NOT NULL) FROM runs r"
        " GROUP BY r.metric"
        " ORDER BY r.metric"
    )
    said = [[m, f"{s:.0f}", f"{a:.0f}", f"{n:,}", f"{1000 * s / max(n, 1):.0f}"] for m, s, a, n in rows]
    return table(["metric", "seconds in all", "of which attribution", "maps scored", "ms a map"], said)


PARTS: Mapping[str, Mapping[str, Callable[[Results], str]]] = {
    "paper": {
        "made": made, "models": models, "losses": losses, "counts": counts, "means": means,
        "tables": each_table, "failures": failures, "complete": complete, "cost": cost,
    },
    "seeds": {"made": made, "models": models, "losses": losses, "tables": each_table},
    "ablations": {"made": made, "tables": ablations},
    "shortcut": {"made": made, "tables": shortcut},
    "real": {"made": made, "losses": losses, "tables": each_table},
    "why_gradient": {"made": made, "tables": pairs},
    "why_attention": {"made": made, "tables": each_policy},
    "why_path": {"made": made, "tables": pairs},
    "why_zeros": {"made": made, "tables": pairs},
    "why_real": {"made": made, "tables": each_policy},
    "why_activation": {"made": made, "tables": each_policy},
    "texts": {"made": made, "tables": each_policy},
}  # fmt: skip
"""By evaluation, its parts of the page."""


if __name__ == "__main__":
    main()
