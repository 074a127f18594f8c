"""What pyproject.toml puts into the wheel works alone, and holds no list of models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import libragrad_fx
from libragrad_fx.coverage import SUITES

ROOT = Path(libragrad_fx.__file__).parents[1]
LISTED = {"hf": "zoo/huggingface.py", "community": "zoo/community.py"}
"""The suites that are lists of names, and the file that holds each."""
CODE = """
import json, os, sys
sys.path = [p for p in sys.path if not os.path.isdir(os.path.join(p, "zoo"))]  # no checkout's
import libragrad_fx
from libragrad_fx.coverage import SUITES
from libragrad_fx.errors import LibraGradError

def listed(suite):
    try:
        return len(suite.names())
    except LibraGradError as e:
        return str(e)

print(json.dumps({"at": libragrad_fx.__file__} | {n: listed(s) for n, s in SUITES.items()}))
"""


def targets() -> dict[str, Any]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    return project["tool"]["hatch"]["build"]["targets"]


def unpack(place: Path) -> None:
    """Copy what the wheel holds to where pip would put it."""
    wheel = targets()["wheel"]
    assert set(wheel) == {"packages", "force-include"}  # nothing else says what goes in
    for package in wheel["packages"]:
        shutil.copytree(
            ROOT / package, place / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for source, target in wheel["force-include"].items():
        shutil.copytree(ROOT / source, place / target)


@pytest.mark.slow
def test_only_suites_that_libraries_list_are_in_the_wheel(tmp_path: Path) -> None:
    unpack(tmp_path)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    made = subprocess.run(
        [sys.executable, "-c", CODE], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout.splitlines()[-1])
    assert Path(found.pop("at")).parents[1] == tmp_path
    assert set(found) == set(SUITES) > set(LISTED)
    for suite, said in found.items():
        if suite in LISTED:
            assert f"listed in {LISTED[suite]} of the repository" in said
            assert "in a checkout" in said
        else:
            assert isinstance(said, int), said
            assert said > 10


def test_the_zoo_is_in_the_source_distribution() -> None:
    assert all((ROOT / file).is_file() for file in LISTED.values())
    assert "zoo" in targets()["sdist"]["include"]
