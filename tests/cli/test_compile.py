"""``libragrad compile`` writes files that run without this package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from libragrad_fx.cli import app

run = CliRunner().invoke


def test_a_file_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    args = ["compile", "tests.cli.test_compile:model", "-o", str(path), "--single", "--json"]
    done = run(app, [*args, "--method", "input_x_gradient"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["inputs"] == {"input": "float32 (1, 6)", "target": "int64 (1)"}
    values, *_ = torch.export.load(path).module()(torch.ones(1, 6), torch.tensor([2]))
    torch.testing.assert_close(values, model()[0].weight[2:].double())


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["-o", "x.so"], "ends in .aoti.pt2, .pt2, .onnx"),
        (["-o", "x.pt2", "--method", "nothing"], "nothing"),
        (["-o", "x.pt2", "--method", "smoothgrad"], "use attribute"),
    ],
)
def test_errors_are_one_line(args: list[str], says: str) -> None:
    done = run(app, ["compile", "tests.cli.test_compile:model", *args])
    assert done.exit_code == 2
    assert says in done.output
