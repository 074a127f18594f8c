"""The demo page says what was computed, and what is not here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from libragrad_fx.cli import app
from libragrad_fx.demo import build, parts, photographs, sources
from libragrad_fx.demo import data as demo_data
from libragrad_fx.demo import sentences as spoken
from libragrad_fx.demo.study import Study, share_in_box, share_of_words
from libragrad_fx.viz.page import percent
from tests.viz.test_page import read


@pytest.fixture
def studied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Study]:
    """Few samples, and no weights that were fetched; what was studied."""
    monkeypatch.setattr(parts, "MEASURED", 4)
    monkeypatch.setattr(build, "MEASURED", 4)
    monkeypatch.setenv(sources.VARIABLE, str(tmp_path / "data"))
    kept: list[Study] = []
    study: Callable[..., Study] = parts.study

    def keep(*args: Any, **options: Any) -> Study:
        kept.append(study(*args, **options))
        return kept[-1]

    monkeypatch.setattr(parts, "study", keep)
    return kept


@pytest.mark.slow
def test_demo_writes_what_it_measured(tmp_path: Path, studied: list[Study]) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    file, scenes = tmp_path / "new" / "demo.html", tmp_path / "scenes"
    asked = ["-o", str(file), "--images", "2", "--pictures", str(scenes), "--json"]
    done = CliRunner().invoke(app, ["demo", *asked])
    assert done.exit_code == 0, done.output
    pictures = [str(scenes / f"{i}.png") for i in (0, 1)]
    assert json.loads(done.stdout) == {"file": str(file), "browser": None, "pictures": pictures}
    assert sorted(p.name for p in scenes.iterdir()) == ["0.png", "1.png"]
    image = demo_data.scenes(4, "test", 1).images[1].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(Image.open(scenes / "1.png")) - 255 * image).max() < 0.51
    found = read(file.read_text("utf-8"))
    assert [s.title for s in studied] == [*parts.TITLES.values(), parts.READER]
    for s in studied:
        assert s.certificate.ok
        assert str(s.certificate) in found.text
        assert all(percent(share) in found.text for share in s.by_block) or s.title == parts.READER
        for (method, side), result in s.results.items():
            assert percent(result.errors.mean()) in found.text
            assert percent(result.shares.mean()) in found.text
            assert method != "fullgrad_plus" or (result.errors.mean() < 1e-5) == (side == "balanced")
        assert all(edit.node in found.text for edit in s.plan.edits)
    for name in demo_data.MODELS:
        assert percent(demo_data.demo_model_info(name).test_accuracy) in found.text
    assert "python tools/fetch.py dinov2" in found.text
    for one in (spoken.sentence("test", i) for i in range(2)):
        assert all(word in found.text for word in one.words)
    assert found.tags.count("img") == 1 + 3 + 2 * 2 * 5  # the key, the first maps, the scenes


def test_photographs_come_first(studied: list[Study], monkeypatch: pytest.MonkeyPatch) -> None:
    """The real network is stood in for by a small one, with random weights."""
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, **small).eval()
    monkeypatch.setattr(sources, "missing", lambda name: "")
    monkeypatch.setattr(sources, "dinov2", lambda: net)
    monkeypatch.setattr(photographs, "SIDE", 32)
    shown = parts.photographed(lambda text: None)
    (found,) = studied
    assert found.answers == tuple(range(len(found.answers)))
    assert [e.title for e in shown.part.examples] == [*photographs.photographs()]
    asked, hero, (rest,) = build._hero([shown.part])
    assert parts.PHOTOGRAPHER in asked
    assert hero.title in build.HERO
    assert {hero.title} | {e.title for e in rest.examples} == {e.title for e in shown.part.examples}
    assert rest.small


def test_without_transformers_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    shown = parts.spoken(2, lambda text: None)
    assert "pip install" in shown.part.missing
    assert "transformers" in shown.part.missing
    assert shown.studies == ()


def test_the_head_is_the_direction_from_the_others() -> None:
    features = torch.randn(5, 7, dtype=torch.float64)
    rows = photographs.against_the_others(features)
    for i, row in enumerate(rows):
        others = torch.cat([features[:i], features[i + 1 :]]).mean(0)
        torch.testing.assert_close(row, (features[i] - others) / (features[i] - others).norm())


def test_a_photograph_is_cut_to_its_middle() -> None:
    levels = np.zeros((4, 10, 3), np.uint8)
    levels[:, 3:7] = 255
    assert np.asarray(photographs.middle(levels)).min() == 255


def test_share_in_box_counts_a_cut_patch_by_area() -> None:
    values = np.array([[2.0, -9.0], [1.0, 1.0]])  # patches of 4x4 pixels
    assert share_in_box(values, [0, 0, 4, 4], 8) == pytest.approx(0.5)
    assert share_in_box(values, [0, 4, 2, 8], 8) == pytest.approx(0.125)
    assert share_in_box(-np.abs(values), [0, 0, 8, 8], 8) == 0


def test_share_of_words_is_of_the_red() -> None:
    values = np.array([2.0, -9.0, 1.0, 1.0])  # the last is padding
    assert share_of_words(values, [True, True, False]) == 0.5
    assert share_of_words(values, [False, True, False]) == 0
    assert share_of_words(-np.abs(values), [True, True, True]) == 0
