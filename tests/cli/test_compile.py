"""``libragrad compile`` writes files that run without this package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import libragrad_fx as lg
from libragrad_fx.cli import app
from libragrad_fx.viz.browser import RUNTIME

run = CliRunner().invoke


def test_a_file_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    args = ["compile", "tests.cli.test_compile:model", "-o", str(path), "--single", "--json"]
    done = run(app, [*args, "--method", "input_x_gradient"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["inputs"] == {"input": "float32 (1, 6)", "target": "int64 (1)"}
    values, *_ = torch.export.load(path).module()(torch.ones(1, 6), torch.tensor([2]))
    torch.testing.assert_close(values, model()[0].weight[2:].double())


def test_steps_of_a_mean(tmp_path: Path) -> None:
    """Fewer steps are another mean: their number reaches the file, and the seed its noise."""
    args = ["compile", "tests.cli.test_compile:curved", "--method", "smoothgrad", "--seed", "3"]
    for steps in (2, 3):
        path = tmp_path / f"{steps}.pt2"
        done = run(app, [*args, "-o", str(path), "--steps", str(steps)])
        assert done.exit_code == 0, done.output
        x, target = torch.randn(2, 6), torch.tensor([1, 1])
        values, *_ = torch.export.load(path).module()(x, target)
        want = lg.attribute(curved(), x, 1, method="smoothgrad", steps=steps, seed=3)
        torch.testing.assert_close(values, want.values, rtol=1e-4, atol=1e-6)


def curved() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3))


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["-o", "x.so"], "must be one of .aoti.pt2, .pt2, .onnx, .html"),
        (["-o", "x.html", "--runtime", "nowhere"], "npm install onnxruntime-web"),
        (["-o", "x.pt2", "--examples", "x.png"], "--examples and --runtime are for a page"),
        (["-o", "x.pt2", "--method", "nothing"], "nothing"),
        (["-o", "x.pt2", "--method", "random"], "use attribute"),
    ],
)
def test_errors_are_one_line(args: list[str], says: str) -> None:
    done = run(app, ["compile", "tests.cli.test_compile:model", *args])
    assert done.exit_code == 2
    assert says in done.output


@pytest.mark.parametrize(
    ("name", "says"), [("no/*.png", "there are no pictures"), ("no.png", "there is no image file")]
)
def test_examples_that_are_not_there(name: str, says: str, tmp_path: Path) -> None:
    for part in RUNTIME:
        (tmp_path / part).write_text("")
    args = ["-o", str(tmp_path / "x.html"), "--runtime", str(tmp_path), "--examples", name]
    done = run(app, ["compile", "tests.cli.test_compile:model", *args])
    assert done.exit_code == 2
    assert says in done.output


def test_a_page_is_of_pictures(tmp_path: Path) -> None:
    """Said before the model is traced."""
    for name in RUNTIME:
        (tmp_path / name).write_text("")
    args = ["-o", str(tmp_path / "x.html"), "--runtime", str(tmp_path)]
    done = run(app, ["compile", "tests.cli.test_compile:model", *args])
    assert done.exit_code == 2
    assert "a page explains pictures" in done.output
    assert "this model takes float32 (1, 6)" in done.output


@pytest.mark.slow
def test_a_page_is_written(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    for name in RUNTIME:
        (tmp_path / name).write_text("")
    Image.new("RGB", (20, 30), "red").save(tmp_path / "a.png")
    path = tmp_path / "x.html"
    args = ["-o", str(path), "--runtime", str(tmp_path), "--examples", str(tmp_path)]
    done = run(app, ["compile", "tests.programs.test_page:classifier", *args, "--method", "hirescam"])
    assert done.exit_code == 0, done.output
    assert "takes    input: float32 (1, 3, 16, 16)" in done.stdout
    text = path.read_text("utf-8")
    assert "What does tests.programs.test_page:classifier look at?" in text
    assert text.count("<img") == 1
