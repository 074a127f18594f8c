"""``libragrad evaluate``: one line for each error, a summary, and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from libragrad_fx.cli import app
from libragrad_fx.evaluate import measures
from libragrad_fx.extras import how_to_get
from tests.evaluate import small


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    small.pictures(tmp_path / "d", 3)

    def invoke(*options: str, **changed: Any) -> Any:
        file = tmp_path / "c.yaml"
        file.write_text(yaml.safe_dump({**small.config(tmp_path / "d", metrics={"places": {}}), **changed}))
        return CliRunner().invoke(app, ["evaluate", str(file), "-o", str(tmp_path / "out"), *options])

    return invoke


def test_help_says_what_there_is() -> None:
    said = CliRunner().invoke(app, ["evaluate", "--help"]).output
    for word in ("CONFIG.yaml", "--output", "--rank", "--world", "--engine", "--workers", "--retry"):
        assert word in said


def test_a_run_ends_with_a_summary(run: Any, tmp_path: Path) -> None:
    found = run()
    assert found.exit_code == 0, found.output
    assert f"wrote {tmp_path / 'out' / 'results.parquet'}: 42 numbers, 0 failures (" in found.output
    assert len(found.output.splitlines()) == 1


def test_a_summary_and_a_report_in_json(run: Any, tmp_path: Path) -> None:
    said = json.loads(run("--json").stdout)
    assert said.pop("seconds") > 0
    file = tmp_path / "out" / "results.parquet"
    assert said == {"results": str(file), "numbers": 42, "failures": 0}
    page = tmp_path / "report.md"
    made = CliRunner().invoke(app, ["report", str(file.parent), "-o", str(page), "--json"])
    assert json.loads(made.stdout) == {"file": str(page)}
    assert page.is_file()


def test_a_share_says_that_others_have_work_left(run: Any) -> None:
    found = run("--rank", "1", "--world", "2")
    assert found.exit_code == 0
    assert "this share is done" in found.output
    assert "others have work left" in found.output


def test_failures_are_said_once_and_counted(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, method: str, **more: Any) -> Any:
        if method == "random":
            raise RuntimeError("no\nsuch thing")
        return attribute(*args, method=method, **more)

    attribute = measures.attribute
    monkeypatch.setattr(measures, "attribute", fails)
    found = run()
    assert found.exit_code == 0
    assert "21 numbers, 3 failures" in found.output
    line = "net on animals: RuntimeError: no (first in places of random, autograd)"
    assert found.output.count(line) == 1
    monkeypatch.setattr(measures, "attribute", attribute)
    assert "21 numbers, 3 failures" in run().output
    assert "42 numbers, 0 failures" in run("--retry").output


def test_no_number_at_all_is_a_failure(run: Any) -> None:
    assert run(methods=["rollout"]).exit_code == 1


@pytest.mark.parametrize(
    ("options", "changed", "why"),
    [
        ((), {"modles": 1}, "c.yaml: modles: there is no such field"),
        ((), {"methods": ["randm"]}, "methods.0.method: "),
        ((), {"models": {"m": {"load": "no.such:thing"}}}, "cannot import no.such:thing"),
        ((), {"device": "cuda:99"}, "no device 'cuda:99'"),
        ((), {"data": {"d": {"load": "folder:/no/such"}}}, "there is no '/no/such'"),
        (("--rank", "2", "--world", "2"), {}, "ranks of 2 processes are 0 to 1, got 2"),
        (("--world", "2"), {}, "give --rank and --world"),
    ],
)
def test_what_is_wrong_is_one_line(run: Any, options: Any, changed: Any, why: str) -> None:
    found = run(*options, **changed)
    assert found.exit_code == 2
    assert found.output.startswith("error: ")
    assert why in found.output
    assert len(found.output.splitlines()) == 1


def test_ctrl_c_is_no_failure(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(measures, "attribute", stop)
    found = run()
    assert found.exit_code == 130
    assert not [*tmp_path.rglob("*.parquet")]


def test_what_is_not_installed_is_said(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    found = run()
    assert found.exit_code == 2
    assert "this needs pyarrow, which is not installed" in found.output
    assert how_to_get("evaluate") in found.output
    assert len(found.output.splitlines()) == 1


LIGHT = """
import sys
sys.modules["pydantic"] = None
import libragrad_fx.evaluate.data
print([n for n in ("pyarrow", "duckdb", "optuna", "ray") if n in sys.modules])
try:
    libragrad_fx.evaluate.Config
except libragrad_fx.errors.LibraGradError as e:
    print(e)
del sys.modules["pydantic"]
import libragrad_fx.cli.evaluate, libragrad_fx.cli.report, libragrad_fx.cli.search
print([n for n in ("pyarrow", "duckdb", "optuna", "ray") if n in sys.modules])
print("libragrad_fx.evaluate.config" in sys.modules)
"""


@pytest.mark.slow
def test_sets_of_data_and_the_command_line_are_light() -> None:
    """Typer may bring pydantic itself; then it is there."""
    root = Path(__file__).parents[2]
    said = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, cwd=root)
    first, missing, last, read = said.stdout.splitlines()
    assert first == last == "[]"
    assert missing.startswith("this needs pydantic, which is not installed")
    assert read == "False"
