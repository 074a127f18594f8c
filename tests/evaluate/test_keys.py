"""A result is found again if nothing changed that it depends on, and is made again if anything did."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from libragrad_fx.decide.rulebook import rules_folder
from libragrad_fx.errors import InputError
from libragrad_fx.evaluate import runner
from libragrad_fx.evaluate.config import Config
from libragrad_fx.evaluate.runner import Bench
from libragrad_fx.evaluate.store import SHOWN
from libragrad_fx.evaluate.subject import hashed
from tests.evaluate import small
from tests.evaluate.pictures import mask, picture, put

FACTORY = """
import torch
def model(width=3, scale=1.0):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, width), torch.nn.{act}())
def steps(image):
    return torch.full((3, 8, 8), {grey})
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return small.pictures(tmp_path / "d", 6)


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes a user's module ``mine``, as a later process would see it."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(act: str = "ReLU", grey: float = 0.5) -> None:
        (tmp_path / "mine.py").write_text(FACTORY.format(act=act, grey=grey))
        sys.modules.pop("mine", None)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)

    write()
    return write


def keys(found: dict[str, Any]) -> list[str]:
    """Of what has numbers."""
    return [unit.key for unit in Bench(Config.of(found)).all_units() if unit.metric != SHOWN]


def with_(found: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    found = copy.deepcopy(found)
    *path, last = place.split(".")
    at: Any = found
    for key in path:
        at = at[key]
    at[last] = value
    return found


def mine(root: Path) -> dict[str, Any]:
    return small.config(root, models={"m": {"load": "mine:model", "steps": "mine:steps"}})


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("models.m.args", {"scale": 2.0}),
        ("models.m.args", {"width": 5}),
        ("batch", 1),
        ("dtype", "float64"),
        ("policies", ["libra"]),
        ("methods", [{"method": "random", "seed": 1}, {"method": "input_x_gradient", "steps": 51}]),
        ("metrics", {"pixels": {"ratios": [0.3, 0.7]}, "places": {"least": 0.1}}),
        ("metrics", {"pixels": {"fill": "zero"}, "places": {"scalar": "logit"}}),
        ("metrics", {"pixels": {"targets": ["label"]}, "places": {"targets": ["label"]}}),
        ("data.animals.seed", 2),
        ("data.animals.args", {"values": {1: 2}}),
    ],
)
def test_each_choice_is_in_the_key(root: Path, factory: Any, place: str, value: Any) -> None:
    """``scale`` changes no weight and no module: a model may take it in any way."""
    first = keys(mine(root))
    assert len({*first}) == len(first)
    assert first == keys(mine(root))
    assert {*keys(with_(mine(root), place, value))}.isdisjoint(first)


def test_what_no_number_depends_on_is_not_in_the_key(root: Path, factory: Any, tmp_path: Path) -> None:
    first = keys(mine(root))
    for place, value in [
        ("models.m.family", "F"), ("models.m.seed", 3), ("threads", 2),
        ("data.animals.load", f"folder:{root.rename(tmp_path / 'elsewhere')}"),
    ]:  # fmt: skip
        moved = with_(mine(tmp_path / "elsewhere"), place, value)
        assert keys(moved) == first, place


def test_a_new_method_leaves_the_keys_of_others(root: Path, factory: Any) -> None:
    first = keys(mine(root))
    assert {*first} < {*keys(with_(mine(root), "methods", ["random", "input_x_gradient", "gradient"]))}


def test_the_code_of_a_model_and_of_its_preparation_is_in_the_key(root: Path, factory: Any) -> None:
    seen = [keys(mine(root))]
    for said in ({"act": "GELU"}, {"act": "ReLU", "grey": 0.25}):
        factory(**said)
        seen.append(keys(mine(root)))
        assert all({*seen[-1]}.isdisjoint(other) for other in seen[:-1])
    factory()
    assert keys(mine(root)) == seen[0]


def test_the_code_of_a_method_that_is_a_function_is_in_the_key(root: Path, factory: Any) -> None:
    found = with_(small.config(root), "methods", ["random", "mine:steps"])
    first = keys(found)
    factory(grey=0.25)
    assert [a == b for a, b in zip(first, keys(found), strict=True)] == [True, True, False, False] * 2


def test_random_preparation_is_refused(root: Path) -> None:
    found = with_(small.config(root), "models.net.steps", "tests.evaluate.test_keys:noisy")
    with pytest.raises(InputError, match="preparation of pictures is random"):
        keys(found)


def noisy(image: Any) -> torch.Tensor:
    return torch.rand(3, 24, 24)


def test_a_changed_sample_changes_its_chunk_alone(root: Path) -> None:
    found = small.config(root)
    bench = Bench(Config.of(found))
    chosen = bench.data["animals"][1]
    first = {c: [u.key for u in bench.units("net", "animals", c)] for c in (0, 1)}
    name = chosen.ids[1]
    for change in (
        lambda: put(root / "images" / name, picture(99, (24, 24))),
        lambda: put(root / "masks" / name, mask(np.eye(24))),
    ):
        change()
        now = Bench(Config.of(found))
        assert [u.key for u in now.units("net", "animals", 1)] == first[1]
        other = [u.key for u in now.units("net", "animals", 0)]
        assert {*other}.isdisjoint(first[0])
        first[0] = other


def test_a_changed_checkpoint_of_one_name(root: Path, factory: Any, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3), torch.nn.ReLU())
    found = with_(mine(root), "models.m.checkpoint", str(tmp_path / "w.pt"))
    seen = []
    for step in (0.0, 1e-7):
        with torch.no_grad():
            model[1].bias[0].add_(step)
        torch.save(model.state_dict(), tmp_path / "w.pt")
        seen.append(keys(found))
    assert {*seen[0]}.isdisjoint(seen[1])


def test_weights_of_a_factory_with_arguments_are_loaded(root: Path, factory: Any, tmp_path: Path) -> None:
    torch.save({"1.weight": torch.ones(4, 192), "1.bias": torch.ones(4)}, tmp_path / "w.pt")
    found = with_(mine(root), "models.m.args", {"width": 4})
    found = with_(found, "models.m.checkpoint", str(tmp_path / "w.pt"))
    module: Any = Bench(Config.of(found)).subject("m").module
    assert bool((module[1].weight == 1).all())


def test_a_policy_file_that_changed(root: Path, factory: Any, tmp_path: Path) -> None:
    file, body = tmp_path / "mine.yaml", (rules_folder() / "libra.yaml").read_text("utf-8")
    found = with_(mine(root), "policies", [str(file)])
    file.write_text(body)
    first = keys(found)
    file.write_text(f"# a comment says nothing\n{body}")
    assert keys(found) == first
    file.write_text("\n".join(body.splitlines()[:-1]))
    assert {*keys(found)}.isdisjoint(first)


def test_versions_and_code(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = keys(small.config(root))
    now = {**runner.versions(), "torch": "0.0"}
    monkeypatch.setattr(runner, "versions", lambda: now)
    assert {*keys(small.config(root))}.isdisjoint(first)


@pytest.mark.parametrize(
    ("file", "counts"),
    [("attribution/methods.py", True), ("evaluate/measures.py", True), ("viz/draw.py", False),
     ("cli/evaluate.py", False), ("evaluate/store.py", False), ("new.py", True)],
)  # fmt: skip
def test_the_source_that_numbers_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, counts: bool
) -> None:
    for name in ("attribution/methods.py", "evaluate/measures.py", "viz/draw.py", "cli/evaluate.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(runner.libragrad_fx, "__file__", str(tmp_path / "__init__.py"))
    before = runner.code.__wrapped__()
    (tmp_path / file).write_text("x = 2\n")
    assert (runner.code.__wrapped__() != before) == counts


def test_what_does_not_count_is_there() -> None:
    """A file that is renamed would count again, and none of its results be found."""
    root = Path(runner.libragrad_fx.__file__).parent
    assert {n for n in runner._APART if not (root / n).exists()} == set()


def test_each_tensor_is_in_the_hash_of_weights() -> None:
    def made() -> torch.nn.Module:
        model = torch.nn.BatchNorm1d(2)
        model.register_buffer("table", torch.zeros(2), persistent=False)
        return model

    first = hashed(made())
    for name in ("weight", "running_mean", "table", "num_batches_tracked"):
        model = made()
        with torch.no_grad():
            getattr(model, name).add_(1)
        assert hashed(model) != first, name
    assert hashed(made()) == first
    assert hashed(made().double()) != first
