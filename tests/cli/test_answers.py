"""Answers on stdout, as text or JSON and nothing else; progress and colours; completion."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console

from libragrad_fx import coverage as cover
from libragrad_fx.cli import app, explain, options, progress
from libragrad_fx.decide.rulebook import rules_folder
from libragrad_fx.evaluate import search
from libragrad_fx.metrics.intervals import Interval, Paired
from tests.cli.test_cli import TINY, photo, run
from tests.viz.test_sheet import made

__all__ = ["photo"]


def answer(*args: object) -> Any:
    """What a command says in JSON, all of its stdout."""
    done = run(*args, "--json")
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.output
    return json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("name", options.COMMANDS)
def test_every_command_answers_in_json(name: str) -> None:
    group: Any = typer.main.get_command(app)
    found = group.get_command(None, name).params
    assert [p.name for p in found if "--json" in p.opts] == ["json"]
    assert {p.name for p in found if "-o" in p.opts} == {p.name for p in found if p.name == "output"}


def test_plans_and_why() -> None:
    made = answer("plan", TINY)
    node = made["edits"][0]["node"]
    said = answer("plan", TINY, "--why", node)
    assert said["node"] == node
    assert said["why"].startswith(f"{node}: ")
    assert "at rules/ops.yaml:" in said["why"]
    assert str(rules_folder().parent) not in said["why"]


def test_accounts() -> None:
    assert answer("audit", TINY)["rows"]
    first, *others = answer("graph", TINY)["modules"]
    assert first["module"] == ""
    assert first["ops"] >= sum(m["ops"] for m in others if "." not in m["module"])
    assert first["lost"] > 0
    assert first["left"] == pytest.approx(0, abs=1e-5)
    (last,) = answer("graph", TINY, "--view", "streams")["joins"][-1:]
    assert set(last["masses"]) == {"plain", "balanced"}


def test_files(tmp_path: Path, photo: Path) -> None:
    drawn = tmp_path / "new" / "g.dot"
    assert answer("graph", TINY, "-o", drawn) == {"file": str(drawn)}
    assert drawn.is_file()
    asked = ("--model", TINY, "--method", "gradcam", "-o", tmp_path / "a.html")
    said = answer("explain", photo, *asked)
    (found,) = said["inputs"]
    assert all(Path(file).is_file() for file in found["files"])
    assert found["maps"][0]["method"] == "gradcam"
    assert found["maps"][0]["completeness_error"] is None  # nan: it promises no sum


def test_costs() -> None:
    said = answer("bench", TINY, "--rounds", 2, "--batch", 2)
    assert [c["name"] for c in said["costs"]] == ["plain", "balanced"]
    assert said["shape"] == [2, 3, 32, 32]


def test_coverage(tmp_path: Path) -> None:
    row = cover.Result("timm", "a", "f", "static", "balanced")
    (tmp_path / "timm-static.jsonl").write_text(json.dumps(dataclasses.asdict(row)) + "\n")
    page = tmp_path / "a.md"
    assert answer("coverage", "--results", tmp_path, "--report", page) == {"report": str(page)}


def test_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Paired(Interval(0.1, 0.0, 0.2, 0.95, 3, 0, "bca"), 2, 0, 1, 0.5)

    def found(config: Any, folder: Path, seen: Any) -> search.Found:
        print("what a library prints")
        seen(0, 0.5)
        (folder / "found.json").write_text('{"value": 0.5}')
        return search.Found({}, 0.5, 0.4, 1, {"net": pair})

    monkeypatch.setattr(search, "search", found)
    monkeypatch.setattr(
        search.SearchConfig, "load", lambda _: search.SearchConfig.model_construct(trials=1)
    )
    assert answer("search-policy", "c.yaml", "-o", tmp_path) == {"value": 0.5}
    done = run("search-policy", "c.yaml", "-o", tmp_path)
    assert "best of 1: +0.500, libra +0.400" in done.stdout
    assert done.stderr == "what a library prints\n"


# --- progress and colours


def test_a_bar_is_shown_on_terminals_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        with progress.working("one") as say:
            say("two")
        with progress.counting("counted", 2) as bar:
            bar.at("[red]now")
            bar.step()
            print("a library's")
            bar.line("a line")
        print("the result")

    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    work()
    assert capsys.readouterr() == ("the result\n", "a library's\na line\n")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    work()
    out, err = capsys.readouterr()
    assert out == "the result\n"
    for said in ("two", "counted", "1/2", "[red]now", "a library's", "a line"):
        assert said in err


def test_where_there_is_no_terminal_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    with progress.counting("counted", 2) as bar:
        bar.step()
        bar.at("[red]now")
    with progress.working("one") as say:
        say("two")
    first, now, two = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"counted 1 of 2, 0:00:00 so far(, 0:00:00 left)?", first)
    assert re.fullmatch(r"counted 1 of 2, 0:00:00 so far(, 0:00:00 left)?, \[red\]now", now)
    assert two == "0:00:00 so far, two"


def test_texts_have_colours_on_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def lines() -> str:
        console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor")
        return "".join(explain._lines(explain.Item("t", "t"), page, console))

    page = explain.sheet.sheet(made(torch.ones(1, 2), tokens=(("a", " b"),)))
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in lines()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in lines()


# --- completion


def test_names_are_completed() -> None:
    assert options.policy_names("attn") == ["attn_lrp"]
    assert options.method_names("roll") == ["rollout"]
    group: Any = typer.main.get_command(app)
    command = group.get_command(None, "explain")
    context = command.make_context("explain", ["x", "--model", "m"])
    found = {p.name: [c.value for c in p.shell_complete(context, "libra")] for p in command.params}
    assert "libra_pixels" in found["policy"]
