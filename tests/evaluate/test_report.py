"""Tables and reports say what the rows say, and how sure that is; every number leads to its run."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate import charts
from libragrad_fx.evaluate.config import Config
from libragrad_fx.evaluate.report import report
from libragrad_fx.evaluate.rivalry import all_policies, all_rivals
from libragrad_fx.evaluate.store import EXAMPLES, SHOWN, Store, Unit
from libragrad_fx.evaluate.strips import strips
from libragrad_fx.evaluate.tables import Results, counted, curves, losses, tables
from libragrad_fx.viz import heatmap

pytest.importorskip("duckdb", reason="pip install 'libragrad-fx[evaluate]'")
N = 40
METHODS = ("random", "fullgrad_plus", "theirs")
POLICIES = ("autograd", "libra", "attn_lrp")
CONFIG = Config.of({
    "models": {"a": {"load": "x:a", "family": "A", "seed": 0},
               "b0": {"load": "x:b", "family": "B", "seed": 0},
               "b1": {"load": "x:b", "family": "B", "seed": 1}},
    "data": {"d": {"load": "x:d", "count": N}},
    "methods": [*METHODS[:2], {"method": "tests.evaluate.small:steps", "name": "theirs"}],
    "policies": POLICIES, "metrics": {"tokens": {}, "completeness": {}},
})  # fmt: skip
GAINS = {"fullgrad_plus": {"libra": 0.2, "attn_lrp": 0.1}, "random": {}, "theirs": {"autograd": 0.3}}
"""What a policy adds, but for random in family B, which loses 0.1 by libra."""


def value(model: str, policy: str, method: str, measure: str, i: int) -> float:
    """A closed form, with a noise that no sum over samples has."""
    if "@" in measure:
        return float(measure.partition("@")[2])
    if measure == "relative_error":
        return 0.5 if policy == "autograd" else 1e-7
    spread = len(model + policy + method) + len(policy)
    noise = 0.05 * torch.sin(torch.tensor(12.9898 * (i + 1) + 78.233 * spread)).item()
    worse = -0.1 if (method, policy, model[0]) == ("random", "libra", "b") else 0.0
    gain = GAINS[method].get(policy, worse)
    return 0.4 + gain + (noise if method != "random" or model[0] == "b" else 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results as ``evaluate`` writes them."""
    store, units = Store(tmp_path_factory.mktemp("results")), []
    asked = {"tokens": ("srg", "mif_accuracy@0.5", "lif_accuracy@0.5"), "completeness": ("relative_error",)}
    for model in CONFIG.models:
        for policy in POLICIES:
            for method in METHODS:
                for metric, measures in {**asked, SHOWN: ()}.items():
                    made = {"model": CONFIG.models[model].model_dump(), "policy": policy, "method": method,
                            "metric": metric, "name": model, "weights": "0" * 64, "device": "cpu",
                            "dtype": "float32", "versions": {"torch": "2"}}  # fmt: skip
                    unit = Unit(model, "d", 0, policy, method, metric, "predicted", made)
                    rows = [row(unit, measure, i) for measure in measures for i in range(N)]
                    if metric == SHOWN:
                        rows = [shown(unit, i) for i in range(5)]
                    if (model, method) == ("a", "random"):
                        rows = [{**r, "value": None, "error": "InputError: no <b>blocks</b>"} for r in rows]
                    ran = {"seconds": {"attribution": 1.0, "metric": 2.0}, "threads": 1, "device": "cpu"}
                    store.write(unit, rows, ran)
                    units.append(unit)
    assert store.collect(units, CONFIG.model_dump(mode="json"))
    return store.folder


def row(unit: Unit, measure: str, i: int) -> dict[str, object]:
    spec = CONFIG.models[unit.model]
    return {
        "model": unit.model, "family": spec.family, "seed": spec.seed, "data": "d", "policy": unit.policy,
        "method": unit.method, "metric": unit.metric, "target": "predicted", "image": f"i{i}", "label": 1,
        "explained": 1, "measure": measure,
        "value": value(unit.model, unit.policy, unit.method, measure, i),
        "how": "removed", "error": None, "run": unit.key,
    }  # fmt: skip


def shown(unit: Unit, i: int) -> dict[str, object]:
    """A map of which the left half speaks for the class, and under autograd, half as much."""
    values = np.array([[1.0, -1.0], [1.0, -0.5]]) * (1.0 if unit.policy == "libra" else 0.5)
    mask = np.zeros((8, 8), bool)
    mask[:, :4] = True
    return {
        "model": unit.model, "data": "d", "policy": unit.policy, "method": unit.method,
        "target": "predicted", "image": f"i{i}", "label": "<i>cat", "predicted": "dog", "explained": "dog",
        "probability": 0.75, "values": values.astype("<f2").tobytes(), "height": 2, "width": 2,
        "scale": 1.0,
        "picture": file(Image.new("RGB", (8, 8), (0, 0, 0))), "mask": file(Image.fromarray(mask)),
        "run": unit.key,
    }  # fmt: skip


def file(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def test_cells_are_means_over_samples_and_seeds(folder: Path) -> None:
    (srg, gap) = tables(Results(folder))
    assert (srg.measure.name, srg.families, srg.methods) == ("srg", ("A", "B"), METHODS)
    cell = srg.cells["fullgrad_plus", "A"]
    mine = [[value("a", p, "fullgrad_plus", "srg", i) for i in range(N)] for p in ("autograd", "libra")]
    assert cell.base == pytest.approx(sum(mine[0]) / N, abs=1e-12)
    assert cell.difference.mean == pytest.approx((sum(mine[1]) - sum(mine[0])) / N, abs=1e-12)
    assert cell.difference.low < cell.difference.mean < cell.difference.high
    assert (cell.verdict, cell.models, cell.wins + cell.ties + cell.losses) == ("better", ("a",), N)
    seeds = srg.cells["fullgrad_plus", "B"]
    assert (seeds.models, seeds.difference.method) == (("b0", "b1"), "crossed")
    assert gap.cells["fullgrad_plus", "A"].verdict == "better"  # a smaller error
    assert gap.cells["fullgrad_plus", "A"].wins == N


def test_what_failed_has_no_cell_and_is_listed(folder: Path) -> None:
    found = Results(folder)
    assert ("random", "A") not in tables(found)[0].cells
    assert {f[5] for f in found.failures()} == {"InputError: no <b>blocks</b>"}
    assert {f[6] for f in found.failures()} == {N}


def test_losses_are_the_cells_that_are_worse(folder: Path) -> None:
    made = tables(Results(folder))
    worse = [(t.measure.name, m, f) for t, m, f, _ in losses(made)]
    assert worse == [("srg", "theirs", "B"), ("srg", "theirs", "A"), ("srg", "random", "B")]
    counts = counted(made)[made[0].measure.title]
    assert [counts[k] for k in ("better", "even", "worse")] == [2, 0, 3]
    cells = made[0].cells.values()
    assert [counts[k] for k in ("wins", "ties", "losses")] == [
        sum(c.wins for c in cells), sum(c.ties for c in cells), sum(c.losses for c in cells)
    ]  # fmt: skip


def test_every_policy_is_compared_with_the_second(folder: Path) -> None:
    found = Results(folder)
    srg = all_policies(found, tables(found), "libra")[0]
    assert srg.policies == POLICIES
    cell = srg.cells["fullgrad_plus", "attn_lrp"]
    assert (cell.models, cell.verdict) == (("a", "b0", "b1"), "worse")
    assert cell.other - cell.base == pytest.approx(-0.1, abs=0.02)
    assert srg.cells["fullgrad_plus", "libra"].difference.mean == 0


def test_a_rival_is_compared_with_the_best_of_ours_under_autograd(folder: Path) -> None:
    found = Results(folder)
    assert found.foreign == ["theirs"]
    srg = all_rivals(found, tables(found), "libra")[0]
    assert (srg.rival, srg.methods, srg.families) == ("theirs", ("fullgrad_plus", "random"), ("A", "B"))
    cell = srg.cells["fullgrad_plus", "A"]
    theirs = [value("a", "autograd", "theirs", "srg", i) for i in range(N)]
    ours = [value("a", "libra", "fullgrad_plus", "srg", i) for i in range(N)]
    assert cell.base == pytest.approx(sum(theirs) / N)
    assert cell.other == pytest.approx(sum(ours) / N)
    assert cell.verdict == "worse"


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return report(folder, folder / "report.html").read_text("utf-8")


def test_losses_come_first_and_what_was_said_is_escaped(folder: Path, page: str) -> None:
    text = report(folder, folder / "report.md").read_text("utf-8")
    for found in (text, page):
        assert 0 < found.index("worse") < found.index("Counts")
        assert found.index("Counts") < found.index("symmetric relevance gain of accuracy; d")
        assert "theirs" in found[found.index("under libra") :]
    assert "<b>blocks" not in page
    assert "<i>cat" not in page
    assert "no &lt;b&gt;blocks" in page


def test_markdown_shows_its_charts(folder: Path) -> None:
    text = report(folder, folder / "some report.md").read_text("utf-8")
    files = re.findall(r"!\[.+\]\((.+)\)", text)
    assert {Path(f).name for f in files} >= {"curves-1.svg", "completeness-1.svg", "cost-1.svg"}
    for file in files:
        drawn = ElementTree.parse(folder / unquote(file)).getroot()
        own = {*re.findall(r"(--\w+):", drawn.attrib["style"])}
        assert {*re.findall(r"var\((--\w+)\)", ElementTree.tostring(drawn, "unicode"))} <= own


def test_a_chart_alone_has_the_colours_of_a_light_page(page: str) -> None:
    light = re.sub(r"@media \(prefers-color-scheme: dark\).*?\}\s*\}", "", page, flags=re.DOTALL)
    assert all(f"--{name}: {colour};" in light for name, colour in charts._ON_WHITE.items())


def test_a_page_stands_alone(page: str) -> None:
    assert not re.search(r"(src|href)=\"(https?:)?//", page)
    assert "url(http" not in page
    anchors = {*re.findall(r'href="#([^"]+)"', page)}
    places = re.findall(r'\sid="([^"]+)"', page)
    assert anchors
    assert anchors <= {*places}
    assert len({*places}) == len(places)


def test_every_number_leads_to_its_run(folder: Path, page: str) -> None:
    """The row that a number of a cell leads to says the policy, method and metric of the number."""
    runs = dict(re.findall(r'<tr id="(run-\d+)">(.*?)</tr>', page))
    section = page[page.index('<h2 id="tables">') : page.index('<h2 id="policies">')]
    first = section[: section.index("</table>")]
    found = re.search(r"<tr><th>fullgrad_plus</th>(.*?)</tr>", first, re.DOTALL)
    assert found is not None
    cells = re.findall(r"<td>(.*?)</td>", found[1], re.DOTALL)
    assert len(cells) == 2
    for cell in cells:
        links = re.findall(r'href="#(run-\d+)">(-?[\d.]+)<', cell)
        assert len(links) == 2
        for (anchor, _), policy in zip(links, POLICIES, strict=False):
            told = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", runs[anchor])
            assert told[:4] == ["fullgrad_plus", policy, "tokens", "predicted"]
            (key,) = re.findall(r"<code>(\w+)</code>", told[5])
            where = "SELECT count(*) FROM runs WHERE run = ? AND policy = ? AND metric = 'tokens'"
            assert Results(folder).rows(where, key, policy) == [(1,)]
    assert len(re.findall(r'href="#run-\d+">(?:autograd|libra)<', first)) == 2 * len(METHODS)  # other seeds


def test_the_query_of_a_table_gives_its_means_again(folder: Path) -> None:
    from libragrad_fx.evaluate.report import query

    found = Results(folder)
    table = tables(found)[0]
    rows = found.rows(query(table).replace("'results.parquet'", "results"))
    means = {(m, f, p): v for m, f, p, v, _ in rows}
    for (method, family), cell in table.cells.items():
        pair = means[method, family, "autograd"], means[method, family, "libra"]
        assert pair == pytest.approx((cell.base, cell.other))


# --- examples


def picture(uri: str) -> np.ndarray:
    opened = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    return np.asarray(opened.convert("RGB")).astype(int)


def test_strips_have_one_scale_for_both_policies(folder: Path) -> None:
    (first, *_), count = strips(Results(folder), ("autograd", "libra"))
    assert count == 15
    assert first.methods == ("fullgrad_plus", "theirs")  # random failed
    assert {p for _, p in first.maps} == {"autograd", "libra"}
    plain, balanced = (picture(first.maps["fullgrad_plus", p]) for p in ("autograd", "libra"))
    for found in (plain, balanced):
        left, right = found[5, 5], found[5, -5]
        assert left[0] > left[2] + 20  # red: for the class
        assert right[2] > right[0] + 20
    assert plain[5, 5].sum() > balanced[5, 5].sum() + 60  # half as strong: paler
    edge = np.abs(np.diff(picture(first.picture or "").sum(2), axis=1)).max(0).argmax()
    assert abs(edge - picture(first.picture or "").shape[1] // 2) <= 2  # the mask's line


def test_strips_are_spread_over_models(folder: Path) -> None:
    found, count = strips(Results(folder), ("autograd", "libra"))
    assert (len(found), count) == (12, 15)
    assert {m: sum(s.model == m for s in found) for m in CONFIG.models} == {"a": 4, "b0": 4, "b1": 4}


def test_results_without_examples_have_no_strips(folder: Path, tmp_path: Path) -> None:
    """As of an earlier version."""
    for name in ("results.parquet", "runs.parquet"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert not (tmp_path / EXAMPLES).exists()
    assert strips(Results(tmp_path), ("autograd", "libra")) == ([], 0)


# --- charts


def test_curves_are_by_share(folder: Path) -> None:
    found = curves(Results(folder), "tokens", "d", "predicted")
    assert found["fullgrad_plus", "a", "libra", "mif"] == [(0.5, 0.5)]
    assert charts.mean([[(0.1, 0.0), (0.2, 1.0)], [(0.1, 1.0), (0.2, 0.5)]]) == [(0.1, 0.5), (0.2, 0.75)]


def test_charts_have_the_colours_of_the_page_and_names_that_do_not_overlap() -> None:
    points: dict[tuple[str, str], Any] = {
        (f"m{i}", p): (10.0 ** (-i % 3), 50.0 + 0.01 * i) for i in range(18) for p in ("autograd", "libra")
    }
    svg = charts.against(points, ("autograd", "libra"), "across", "up", dict.fromkeys(points, "#run-0"))
    assert not re.search(r"#0[1-5]0[1-5]0[1-5]", svg)
    assert {"var(--plain)", "var(--balanced)", "var(--ink)"} <= {*re.findall(r"var\(--\w+\)", svg)}
    assert svg.count('href="#run-0"') == len(points)
    assert "target=" not in svg
    heights = [
        float(y) for y in re.findall(r'translate\([\d.]+ ([\d.]+)\)[^>]*>m\d+</text>', svg)
    ] or [float(y) for y in re.findall(r'<text [^>]*y="([\d.]+)"[^>]*>m\d+</text>', svg)]
    assert len(heights) == 18
    gaps = np.diff(sorted(heights))
    assert gaps.min() > 9  # points: a line of text


def test_a_page_has_both_scales(page: str) -> None:
    assert heatmap.data_uri(heatmap.legend()) in page
    assert heatmap.data_uri(heatmap.legend(signed=False)) in page


def test_a_folder_without_results_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no results\.parquet in"):
        report(tmp_path, tmp_path / "report.html")
