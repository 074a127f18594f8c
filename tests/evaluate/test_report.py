"""Tables and reports say what the rows say, losses first, and how sure that is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.config import Config
from libragrad_fx.evaluate.report import report
from libragrad_fx.evaluate.store import Store, Unit
from libragrad_fx.evaluate.tables import Results, counted, losses, tables

pytest.importorskip("duckdb", reason="pip install 'libragrad-fx[evaluate]'")
N = 40
CONFIG = Config.of({
    "models": {"a": {"load": "x:a", "family": "A", "seed": 0},
               "b0": {"load": "x:b", "family": "B", "seed": 0},
               "b1": {"load": "x:b", "family": "B", "seed": 1}},
    "data": {"d": {"load": "x:d", "count": N}},
    "methods": ["random", "fullgrad_plus"], "policies": ["autograd", "libra"],
    "metrics": {"tokens": {}, "completeness": {}},
})  # fmt: skip


def value(model: str, policy: str, method: str, measure: str, i: int) -> float:
    """A closed form: libra is better by 0.2 for fullgrad_plus, worse by 0.1 in family B's random."""
    noise = 0.05 * torch.sin(torch.tensor(12.9898 * (i + 1) + 78.233 * len(model + policy + method))).item()
    gain = {"fullgrad_plus": 0.2, "random": -0.1 if model[0] == "b" else 0.0}[method]
    if measure == "relative_error":
        return 0.5 if policy == "autograd" else 1e-7
    return 0.4 + gain * (policy == "libra") + (noise if gain else 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results as ``evaluate`` writes them."""
    store, units = Store(tmp_path_factory.mktemp("results")), []
    for model in CONFIG.models:
        for policy in CONFIG.policies:
            for method in ("random", "fullgrad_plus"):
                for metric, measure in (("tokens", "srg"), ("completeness", "relative_error")):
                    made = {"model": CONFIG.models[model].model_dump(), "policy": policy, "method": method,
                            "metric": metric, "name": model, "weights": "0" * 64, "device": "cpu",
                            "dtype": "float32", "versions": {"torch": "2"}}  # fmt: skip
                    unit = Unit(model, "d", 0, policy, method, metric, "predicted", made)
                    rows = [row(unit, measure, i) for i in range(N)]
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


def test_cells_are_means_over_samples_and_seeds(folder: Path) -> None:
    (srg, gap) = tables(Results(folder))
    assert (srg.measure.name, srg.families, srg.methods) == ("srg", ("A", "B"), ("random", "fullgrad_plus"))
    cell = srg.cells["fullgrad_plus", "A"]
    mine = [[value("a", p, "fullgrad_plus", "srg", i) for i in range(N)] for p in ("autograd", "libra")]
    assert cell.base == pytest.approx(sum(mine[0]) / N, abs=1e-12)
    assert cell.difference.mean == pytest.approx((sum(mine[1]) - sum(mine[0])) / N, abs=1e-12)
    assert cell.difference.low < cell.difference.mean < cell.difference.high
    assert (cell.verdict, cell.seeds, cell.wins + cell.ties + cell.losses) == ("better", 1, N)
    seeds = srg.cells["fullgrad_plus", "B"]
    assert (seeds.seeds, seeds.difference.method) == (2, "crossed")
    assert gap.cells["fullgrad_plus", "A"].verdict == "better"  # a smaller error
    assert gap.cells["fullgrad_plus", "A"].wins == N


def test_what_failed_has_no_cell_and_is_listed(folder: Path) -> None:
    found = Results(folder)
    assert ("random", "A") not in tables(found)[0].cells
    assert {f[5] for f in found.failures()} == {"InputError: no <b>blocks</b>"}
    assert {f[6] for f in found.failures()} == {N}


def test_losses_are_the_cells_that_are_worse(folder: Path) -> None:
    made = tables(Results(folder))
    assert [(t.measure.name, m, f) for t, m, f, _ in losses(made)] == [("srg", "random", "B")]
    assert counted(made)[made[0].measure.title] == {"better": 2, "even": 0, "worse": 1}


@pytest.mark.parametrize("ending", ["md", "html"])
def test_losses_come_first_and_what_was_said_is_escaped(folder: Path, ending: str, tmp_path: Path) -> None:
    text = report(folder, tmp_path / f"report.{ending}").read_text("utf-8")
    assert 0 < text.index("worse") < text.index("Counts")
    assert text.index("Counts") < text.index("symmetric relevance gain of accuracy; d")
    if ending == "html":
        assert "<b>blocks" not in text
        assert "no &lt;b&gt;blocks" in text
        assert not re.search(r"(src|href)=\"(https?:)?//", text)  # it stands alone
        anchors = {*re.findall(r'href="#([^"]+)"', text)}
        assert anchors
        assert anchors <= {*re.findall(r'id="([^"]+)"', text)}


def test_the_query_of_a_cell_gives_its_means_again(folder: Path) -> None:
    from libragrad_fx.evaluate.report import query

    found = Results(folder)
    table = tables(found)[0]
    rows = found.rows(query(table, "fullgrad_plus", "A").replace("'results.parquet'", "results"))
    cell = table.cells["fullgrad_plus", "A"]
    assert {p: v for p, v, _ in rows} == pytest.approx({"autograd": cell.base, "libra": cell.other})


def test_a_folder_without_results_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no results\.parquet in"):
        report(tmp_path, tmp_path / "report.html")
