"""Maps of a few samples are kept beside the numbers: the maps that were measured, and never stale ones."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from libragrad_fx.evaluate import Config, evaluate, runner
from libragrad_fx.evaluate.config import MethodSpec
from libragrad_fx.evaluate.examples import example
from libragrad_fx.evaluate.runner import Bench
from libragrad_fx.evaluate.store import EXAMPLES, RESULTS, SHOWN
from tests.evaluate import small


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return small.config(small.pictures(tmp_path_factory.mktemp("d"), 5))


def units(found: dict[str, Any]) -> list[Any]:
    return [u for u in Bench(Config.of(found)).all_units() if u.metric == SHOWN]


def test_the_maps_that_were_measured_are_kept(asked: dict[str, Any], tmp_path: Path) -> None:
    config = Config.of(asked)
    assert evaluate(config, tmp_path) == tmp_path / RESULTS
    rows = parquet.read_table(tmp_path / EXAMPLES).to_pylist()
    bench = Bench(config)
    first = bench.data["animals"][1].ids[:2]
    assert [(r["method"], r["image"]) for r in rows] == [
        (m, i) for m in ("random", "input_x_gradient") for i in first
    ]
    case, *_ = runner._Batches(bench, "net", "animals", 0).cases
    classes = case.target("predicted")
    maps = case.attribution(MethodSpec(method="input_x_gradient"), "autograd", classes, "probability")
    for row in rows[2:]:
        i = [*case.ids].index(row["image"])
        kept = np.frombuffer(row["values"], "<f2").reshape(row["height"], row["width"]) * row["scale"]
        assert np.abs(kept - maps.values[i].detach().numpy()).max() <= 2e-3 * row["scale"]
        assert row["explained"] == row["predicted"] == small.CLASSES[int(classes[i])]
        assert row["label"] == small.CLASSES[case.labels[i] or 0]
        assert 0 < row["probability"] <= 1
        assert Image.open(io.BytesIO(row["picture"])).size == (24, 24)


def test_only_the_first_chunk_has_them(asked: dict[str, Any]) -> None:
    assert [(u.chunk, u.method) for u in units(asked)] == [(0, "random"), (0, "input_x_gradient")]
    assert units({**asked, "examples": 0}) == []


def test_keys_are_of_all_that_maps_depend_on(asked: dict[str, Any]) -> None:
    first = {u.key for u in units(asked)}
    same = {**asked, "metrics": {"pixels": {"ratios": [0.5]}, "places": {}}}
    assert {u.key for u in units(same)} == first
    for changed in (
        {"examples": 1}, {"batch": 1}, {"metrics": {"places": {}}},
        {"data": {"animals": {**asked["data"]["animals"], "seed": 2}}},
    ):  # fmt: skip
        assert first.isdisjoint(u.key for u in units({**asked, **changed}))


def test_a_failure_is_tried_again(asked: dict[str, Any], tmp_path: Path) -> None:
    """raw_attention fails on a network without attention."""
    config = Config.of({**asked, "methods": ["raw_attention"], "metrics": {"pixels": {"ratios": [0.5]}}})
    evaluate(config, tmp_path)
    rows = parquet.read_table(tmp_path / EXAMPLES).to_pylist()
    assert [r["values"] for r in rows] == [None, None]
    assert all(r["error"] for r in rows)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "parts").rglob("*.parquet")}
    evaluate(config, tmp_path, retry=True)
    assert all(f.stat().st_mtime_ns > made for f, made in before.items())


def test_a_fine_map_is_the_mean_over_areas(asked: dict[str, Any]) -> None:
    case, *_ = runner._Batches(Bench(Config.of(asked)), "net", "animals", 0).cases
    fine = torch.arange(2 * 128 * 96, dtype=torch.float64).view(2, 128, 96)
    found: Any = type("Found", (), {"values": fine})()
    row = example(case, found, torch.tensor([1, -1]), 0, ())
    assert (row["height"], row["width"], row["explained"]) == (64, 64, "1")
    kept = np.frombuffer(row["values"], "<f2").reshape(64, 64).astype(float) * row["scale"]
    wanted = torch.nn.functional.adaptive_avg_pool2d(fine[:1], 64)[0].numpy()
    assert np.abs(kept - wanted).max() <= 1e-3 * wanted.max()
    assert example(case, found, torch.tensor([1, -1]), 1, ()) == {}
