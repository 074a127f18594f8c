"""The demo page says what was computed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from libragrad_fx.cli import app
from libragrad_fx.demo import build as demo
from libragrad_fx.demo import data as demo_data
from libragrad_fx.viz.page import number, percent
from tests.viz.test_page import read


def test_demo_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MEASURED", 4)
    studied: list[demo.Study] = []
    study = demo.study

    def keep(name: str, scenes: demo_data.Scenes) -> demo.Study:
        studied.append(study(name, scenes))
        return studied[-1]

    monkeypatch.setattr(demo, "study", keep)
    file = tmp_path / "new" / "demo.html"
    scenes = tmp_path / "scenes"
    asked = ["-o", str(file), "--images", "2", "--pictures", str(scenes), "--json"]
    done = CliRunner().invoke(app, ["demo", *asked])
    assert done.exit_code == 0, done.output
    pictures = [str(scenes / f"{i}.png") for i in (0, 1)]
    assert json.loads(done.stdout) == {"file": str(file), "pictures": pictures}
    assert sorted(p.name for p in scenes.iterdir()) == ["0.png", "1.png"]
    image = demo_data.scenes(4, "test", 1).images[1].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(Image.open(scenes / "1.png")) - 255 * image).max() < 0.51
    found = read(file.read_text("utf-8"))
    assert [s.name for s in studied] == list(demo_data.MODELS)
    for s in studied:
        assert s.certificate.ok
        assert str(s.certificate) in found.text
        assert percent(demo_data.demo_model_info(s.name).test_accuracy, 1) in found.text
        for (_, side), result in s.results.items():
            assert number(result.errors.mean()) in found.text
            assert percent(result.shares.mean()) in found.text
            assert number(result.errors[1]) in found.text
            assert (result.errors.mean() < 1e-4) <= (side == "balanced")
        assert all(edit.node in found.text for edit in s.plan.edits)
    assert found.tags.count("img") == 1 + 2 * 2 * 5


def test_share_in_box_counts_a_cut_patch_by_area() -> None:
    values = np.array([[2.0, -9.0], [1.0, 1.0]])  # patches of 4x4 pixels
    assert demo.share_in_box(values, [0, 0, 4, 4], 8) == pytest.approx(0.5)
    assert demo.share_in_box(values, [0, 4, 2, 8], 8) == pytest.approx(0.125)
    assert demo.share_in_box(-np.abs(values), [0, 0, 8, 8], 8) == 0
