"""What is not installed is said with a command that gets it; reports of faults say what runs."""

from __future__ import annotations

import importlib.metadata
import shlex
import tomllib
from pathlib import Path

import pytest
import torch

import libragrad_fx as lg
from libragrad_fx import extras
from libragrad_fx.errors import LibraGradError

ROOT = Path(lg.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def wanted(extra: str) -> set[str]:
    """The requirements of an extra, by hand."""
    found = set()
    for line in EXTRAS[extra]:
        if line.startswith("libragrad-fx["):
            for other in line.removeprefix("libragrad-fx[").removesuffix("]").split(","):
                found |= wanted(other)
        else:
            found.add(line)
    return found


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As pip writes the metadata of this checkout."""
    lines = [f'{line}; extra == "{name}"' for name, of in EXTRAS.items() for line in of]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [*PROJECT["dependencies"], *lines])


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_command_names_every_package_of_an_extra(extra: str, installed: None) -> None:
    said = shlex.split(extras.how_to_get(extra))
    assert said[:2] == ["pip", "install"]
    assert {*said[2:]} == wanted(extra)


def test_what_is_missing_is_said_once(installed: None) -> None:
    with pytest.raises(LibraGradError, match=r"this needs no_such, .*: pip install .*graphviz") as error:
        extras.need("no_such.module", "graph")
    assert len(str(error.value).splitlines()) == 1


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    lg.show_versions()
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["torch"] == torch.__version__.partition("+")[0] or said["torch"] == torch.__version__
    assert said["rules"] == lg.plan(torch.nn.Linear(2, 2), torch.ones(1, 2)).digest[:12]
    assert said["devices"].startswith("cpu")
