"""FunnyBirds' scores from a config: those of the protocol on the same pictures."""

from __future__ import annotations

import dataclasses
import functools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

import libragrad_fx as lg
from libragrad_fx.errors import InputError
from libragrad_fx.evaluate import Config, evaluate
from libragrad_fx.evaluate.data import Data, Item, Parts
from libragrad_fx.evaluate.data.items import hashed
from libragrad_fx.metrics import parts
from tests.evaluate import small
from zoo import articles, sets

Tensor = torch.Tensor
COUNT = 3


@functools.cache
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    pool = torch.nn.AvgPool2d(12)
    return torch.nn.Sequential(pool, torch.nn.Flatten(), torch.nn.Linear(192, 5))


def steps(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.resize((96, 96)), np.float32)).permute(2, 0, 1) / 255


def insects() -> Data:
    return sets.articles(5, COUNT, seed=1)


def asked(data: str) -> dict[str, Any]:
    here = "tests.evaluate.test_removal"
    return {
        "models": {"net": {"load": f"{here}:net", "steps": f"{here}:steps"}},
        "data": {"insects": {"load": data}}, "policies": ["autograd"], "methods": ["input_x_gradient"],
        "metrics": {"parts": {"thresholds": 3, "margin": 0}}, "dtype": "float64", "batch": 2,
    }  # fmt: skip


def test_they_are_those_of_the_protocol(tmp_path: Path) -> None:
    file = evaluate(Config.of(asked("tests.evaluate.test_removal:insects")), tmp_path)
    assert file is not None
    rows = parquet.read_table(file).to_pylist()
    assert {r["error"] for r in rows} == {None}
    found = {(r["image"], r["measure"]): r["value"] for r in rows}
    model = net().double()

    def levels(x: Tensor) -> Tensor:
        """As of a picture in bytes, and ``steps``."""
        return ((x * 255).round() / 255).double()

    def explain(x: Tensor, targets: Tensor) -> Tensor:
        return lg.attribute(model, levels(x), targets, method="input_x_gradient", policy="autograd").values

    kinds = articles.classes(5)
    seen = articles.scenes(kinds, COUNT, seed=1)
    want = articles.measured(lambda x: model(levels(x)), explain, kinds, seen, margin=0)
    for i in range(COUNT):
        name = f"articles/5/{COUNT}/1/{i}"
        for measure, key in (
            ("background_independence", "independent"), ("single_deletion", "deleted"),
            ("target_sensitivity", "sensitive"),
        ):  # fmt: skip
            value = float(want[key][i])
            assert found[name, measure] == (None if np.isnan(value) else pytest.approx(value))
        for measure, key in (("preservation", "pc"), ("deletion", "dc"), ("distractibility", "distracted")):
            ends = want[key][i, [0, -1]].tolist()  # 0.01 and 0.5, of any number of thresholds
            assert [found[name, f"{measure}@0.01"], found[name, f"{measure}@0.5"]] == pytest.approx(ends)
            three = [found[name, f"{measure}@{t}"] for t in ("0.01", "0.255", "0.5")]
            assert found[name, measure] == pytest.approx(sum(three) / 3)
    assert any(v is None for (_, m), v in found.items() if m == "csdc")  # wrong about some
    assert len({*found}) == len(rows) == COUNT * (4 * 4 + 3)


def test_a_set_without_parts_says_so(tmp_path: Path) -> None:
    folder = small.pictures(tmp_path / "d", 2)
    file = evaluate(Config.of(small.config(folder, metrics={"parts": {}})), tmp_path / "out")
    assert file is not None
    rows = parquet.read_table(file).to_pylist()
    assert all("no parts that can be left out" in r["error"] for r in rows)
    assert len(rows) == 2 * 2


# --- items


def test_insects_have_exact_masks_and_leave_out_what_is_asked() -> None:
    data = pickle.loads(pickle.dumps(insects()))
    item = data.get(2)
    assert item.parts is not None
    whole = np.array(item.content)
    assert np.array_equal(whole, np.array(insects().get(2).content))
    shown, around = np.ones(5, bool), np.ones(6, bool)
    for p in range(5):
        less = np.array(item.parts.draw(shown & (np.arange(5) != p), around))
        changed = (less != whole).any(2)
        assert changed.any()
        assert not (changed & ~item.parts.masks[p]).any()
    assert item.label == 2
    assert np.array_equal(item.masks[2], item.parts.masks.any(0))
    assert len(item.parts.variants) == 5


def test_a_sample_is_known_by_its_parts() -> None:
    item = insects().get(0)
    given = item.parts
    assert given is not None
    plain = Item(item.id, item.content, item.label, item.masks)
    other = Parts(given.variants[::-1], given.masks, given.objects, given.draw)
    blank = Parts(given.variants, given.masks, given.objects, lambda a, b: Image.new("RGB", (96, 96)))
    every = [plain, item, *(dataclasses.replace(item, parts=p) for p in (other, blank))]
    assert len({hashed(i) for i in every}) == 4
    assert hashed(insects().get(0)) == hashed(item)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"masks": np.zeros((5, 4, 4))}, "masks of parts are bool"),
        ({"objects": np.zeros((6, 4, 5), bool)}, "objects of parts are bool"),
        ({"variants": np.zeros((3, 4), int)}, r"variants of 5 parts are \(K, P\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict[str, Any], why: str) -> None:
    fit: dict[str, Any] = {
        "variants": np.zeros((3, 5), int), "masks": np.zeros((5, 4, 4), bool),
        "objects": np.zeros((6, 4, 4), bool), "draw": lambda parts, objects: Image.new("RGB", (4, 4)),
    }  # fmt: skip
    Parts(**fit)
    with pytest.raises(InputError, match=why):
        Parts(**{**fit, **change})


def test_classes_that_are_not_there_are_refused() -> None:
    kinds = articles.classes(6)
    where = torch.zeros(1, 5, 2, 2, dtype=torch.bool)
    table = torch.zeros(1, 32, 5)
    seen = parts.Removed(kinds, torch.tensor([0]), table, table[:, :5], where, where)

    def explain(targets: Tensor) -> Tensor:
        return torch.zeros(1, 2, 2)

    with pytest.raises(InputError, match="5 classes is asked about 6"):
        parts.measured(seen, explain, parts.thresholds(2))
    with pytest.raises(InputError, match="labels are 0 to 5"):
        parts.measured(seen._replace(labels=torch.tensor([6])), explain, parts.thresholds(2))
