"""A config says in one line what is wrong with it, and where."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("pydantic", reason="pydantic is not installed")

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.config import Config
from tests.evaluate import small

GOOD = small.config(Path("somewhere"))


def changed(**said: Any) -> dict[str, Any]:
    """GOOD, with values set at dotted places."""
    found = copy.deepcopy(GOOD)
    for place, value in said.items():
        *path, last = place.split("__")
        at: Any = found
        for key in path:
            at = at[int(key) if key.isdigit() else key]
        at[last] = value
    return found


@pytest.mark.parametrize(
    ("said", "place", "why"),
    [
        ({"metrix": 1}, "metrix", "no such field"),
        ({"models__vit__wights": 1}, "models.vit.wights", "no such field"),
        ({"models": {}}, "models", "at least 1"),
        ({"models": {"../up": GOOD["models"]["vit"]}}, "models.../up", "pattern"),
        ({"models": {"..": GOOD["models"]["vit"]}}, "models", "pattern"),
        ({"models__vit": {}}, "models.vit.load", "is missing"),
        ({"data__animals__count": 0}, "data.animals.count", "greater than"),
        ({"methods": ["gradcamm"]}, "methods.0.method", "gradcamm"),
        ({"methods": "random"}, "methods", "tuple"),
        ({"methods": []}, "methods", "at least 1"),
        ({"methods": ["random", "random"]}, "", "two methods are called random"),
        ({"policies": ["libra", "librra"]}, "policies", "librra"),
        ({"policies": ["libra", "libra"]}, "policies", "libra is there twice"),
        ({"policies": []}, "policies", "names none"),
        ({"device": "gpu"}, "device", "no device 'gpu'"),
        ({"dtype": "float31"}, "dtype", "float32"),
        ({"batch": "many"}, "batch", "integer"),
        ({"batch": 5, "chunk": 4}, "", "smaller than a batch"),
        ({"metrics": {}}, "", "names none"),
        ({"metrics__tokens": {"ratios": [0.5, 1.5]}}, "metrics.tokens.ratios.1", "less than 1"),
        ({"metrics__tokens": {"ratios": [0.5, 0.5]}}, "metrics.tokens.ratios", "0.5 is there twice"),
        ({"metrics__tokens": {"targets": ["predictd"]}}, "metrics.tokens.targets.0", "'predicted'"),
        ({"metrics__places": {"targets": ["mask", "mask"]}}, "metrics.places.targets", "is there twice"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(said: dict[str, Any], place: str, why: str) -> None:
    with pytest.raises(InputError) as error:
        Config.of(changed(**said), "a.yaml")
    text = str(error.value)
    assert text.startswith(f"a.yaml: {place}")
    assert why in text
    assert "\n" not in text
    assert "Value error" not in text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("models: [", "is no YAML"),
        ("", "says no models"),
        ("just words", "says no models"),
        ("models:\n  a: {load: x}\n  a: {load: y}\n", "line 3: a is there twice"),
        ("\xff\xfe", "is no YAML"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=why) as error:
        Config.load(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"cannot read '.*no.yaml': No such file"):
        Config.load("no.yaml")


def test_a_file_says_what_a_mapping_says(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(GOOD))
    assert Config.load(tmp_path / "c.yaml") == Config.of(GOOD)
    assert Config.of(Config.of(GOOD).model_dump(mode="json")) == Config.of(GOOD)
