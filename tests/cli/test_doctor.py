"""``libragrad doctor``, and the fetching of the data that it looks for."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import libragrad_fx as lg
from libragrad_fx.cli import app, doctor
from libragrad_fx.demo import sources

ROOT = Path(lg.__file__).parents[1]
EXTRAS = doctor._EXTRAS
NONE = (doctor.Extra("no_such_module", "no-such-package", "demo", "nothing"),)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of data; no package is imported but by the tests that ask."""
    monkeypatch.setenv(sources.VARIABLE, str(tmp_path / "data"))
    monkeypatch.setattr(doctor, "_EXTRAS", ())
    return tmp_path / "data"


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A source whose package pip finds in a folder of ours; the commands that were run."""
    folder = tmp_path / "packages"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_weights-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny/weights/main.bin", b"weights")
        archive.writestr("tiny/weights/deeper/main.bin", b"another of that name")
        archive.writestr("tiny/code.py", b"1 / 0")
    digest = hashlib.sha256(b"weights").hexdigest()
    source = sources.Source("pip", "tiny-weights", "tiny/weights/*", "main.bin", digest, (), "seven bytes")
    monkeypatch.setattr(sources, "SOURCES", {"tiny": source})
    called: list[list[str]] = []

    def pip(command: list[str], where: Path) -> None:
        called.append(command)
        for archive in folder.iterdir():
            (where / archive.name).write_bytes(archive.read_bytes())

    monkeypatch.setattr(fetch, "run", pip)
    return called


def _tool(name: str) -> ModuleType:
    """``tools/NAME.py``: a script, and no part of a package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fetch = _tool("fetch")


def said(*args: str) -> str:
    done = CliRunner().invoke(app, ["doctor", *args])
    assert done.exit_code == 0, done.output
    return done.stdout


def row(name: str) -> dict[str, str]:
    (found,) = [r for r in json.loads(said("--json")) if r["name"] == name]
    return found


# --- doctor


def test_versions_and_devices() -> None:
    text = said()
    assert lg.__version__ in text
    assert torch.__version__ in text
    assert f"{torch.get_num_threads()} threads" in text
    assert row("python")["found"].startswith(".".join(map(str, sys.version_info[:3])))


def test_an_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_EXTRAS", NONE)
    found = row("no-such-package")
    assert found["found"] == ""
    assert found["hint"] == "nothing: pip install no-such-package (of the extra 'demo')"
    assert "no-such-package  missing" in said()


def test_an_extra_that_is_installed_and_broken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "no_such_module.py").write_text("raise AttributeError('of another version\\n of x')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "_EXTRAS", NONE)
    assert "it raises AttributeError: of another version of x" in row("no-such-package")["hint"]


def test_the_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for _, package, extra, _ in EXTRAS:
        brought = project["optional-dependencies"][extra]
        assert any(r.startswith(package) for r in brought), package


def test_no_program_of_graphviz(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    assert "apt-get install graphviz" in row("dot")["hint"]


def test_data_that_is_missing_and_there(place: Path) -> None:
    assert "python tools/fetch.py minilm" in row("minilm")["hint"]
    (place / "minilm").mkdir(parents=True)
    (place / "minilm" / sources.SOURCES["minilm"].main).touch()
    assert row("minilm")["found"] == str(place / "minilm")


def test_outside_of_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zoo", None)
    assert "in a checkout" in row("all")["hint"]


# --- fetch


def test_fetch_keeps_what_is_asked_for_and_fetches_once(shipped: Any, place: Path) -> None:
    assert sources.missing("tiny") == "tiny is not here: python tools/fetch.py tiny"
    with pytest.raises(FileNotFoundError, match=r"fetch\.py tiny"):
        sources.require("tiny")
    assert fetch.fetch("tiny") == fetch.fetch("tiny") == place / "tiny"
    assert [p.name for p in place.rglob("*")] == ["tiny", "main.bin"]
    assert (place / "tiny" / "main.bin").read_bytes() == b"weights"
    assert len(shipped) == 1
    assert sources.missing("tiny") == ""


def test_fetch_refuses_another_file(shipped: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(sources.SOURCES["tiny"], sha256="0" * 64)
    monkeypatch.setattr(sources, "SOURCES", {"tiny": other})
    with pytest.raises(fetch.FetchError, match="another file"):
        fetch.fetch("tiny")
    assert [*place.iterdir()] == []


def test_fetch_says_what_failed(
    shipped: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(command: list[str], where: Path) -> None:
        raise fetch.FetchError("`pip download` failed:\n  no network")

    monkeypatch.setattr(fetch, "run", fails)
    monkeypatch.setattr(sys, "argv", ["fetch.py", "tiny"])
    with pytest.raises(SystemExit) as stopped:
        fetch.main()
    assert stopped.value.code == 1
    assert "no network" in capsys.readouterr().err


def test_a_command_that_fails_or_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(fetch.FetchError, match="no program no-such-program"):
        fetch.run(["no-such-program"], tmp_path)
    with pytest.raises(fetch.FetchError, match="ValueError: here"):
        fetch.run([sys.executable, "-c", "raise ValueError('here')"], tmp_path)
