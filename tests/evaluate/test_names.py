"""Sets by name, as a command line or a configuration says them."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate import data as room
from libragrad_fx.evaluate.data import LOADERS, Data, Item, open_data
from tests.evaluate.pictures import picture, put


def item(i: int) -> Item:
    return Item(str(i), "x")


def made(count: int = 2) -> Data:
    return Data("made", count, item)


def wrong() -> int:
    return 3


def failing() -> Data:
    raise FileNotFoundError("get it with a command")


def test_each_loader_is_in_the_table_of_the_room() -> None:
    said = inspect.getdoc(room) or ""
    for name in LOADERS:
        assert f"``{name}:" in said or name in ("tsv", "jsonl")


def test_by_path_and_split(tmp_path: Path) -> None:
    put(tmp_path / "at@home" / "MURA-v1.1" / "train" / "p" / "study1_negative" / "x.png", picture(0))
    root = tmp_path / "at@home"
    assert open_data(f"mura:{root}@train").name == "mura-train"
    assert open_data({"load": "mura", "args": {"root": root, "split": "train"}}).name == "mura-train"
    assert open_data({"load": f"mura:{root}@train"}).name == "mura-train"
    with pytest.raises(InputError, match="stanfordmlgroup"):
        open_data(f"mura:{root}")
    assert open_data(f"folder:{root}/MURA-v1.1/train/p").count == 1
    with pytest.raises(InputError, match=r"@train says more than folder takes.*root, masks, values"):
        open_data(f"folder:{tmp_path}/nowhere@train")


@pytest.mark.parametrize("name", [n for n in LOADERS if n not in ("hf", "imagenet-hard")])
def test_a_missing_set_is_answered_by_how_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no .*nowhere.*\. [A-Z]"):
        open_data(f"{name}:{tmp_path}/nowhere")


def test_by_a_factory_of_the_user(tmp_path: Path) -> None:
    here = "tests.evaluate.test_names"
    assert open_data(f"{here}:made").count == 2
    assert open_data({"load": f"{here}:made", "args": {"count": 5}}).count == 5
    with pytest.raises(InputError, match=r"wrong\(\) returned int, not a Data"):
        open_data(f"{here}:wrong")
    with pytest.raises(InputError, match=r"failing\(\) raised FileNotFoundError: get it with a command"):
        open_data(f"{here}:failing")
    with pytest.raises(InputError, match=r"cannot import nobody\.knows:made"):
        open_data("nobody.knows:made")
    with pytest.raises(InputError, match=r"made\(\) raised TypeError.*size"):
        open_data({"load": f"{here}:made", "args": {"size": 5}})


def test_what_is_no_name() -> None:
    with pytest.raises(InputError, match=r"no data 'imagenat': say folder, .*:PATH, or package"):
        open_data("imagenat")
    for spec in ({"load": "mura", "path": "x"}, {"args": {}}, {"load": "mura", "args": [1]}):
        with pytest.raises(InputError, match="a mapping of load and args"):
            open_data(spec)
    with pytest.raises(InputError, match="'root'; it takes root, split"):
        open_data({"load": "mura"})
    with pytest.raises(InputError, match="or twice: root, split"):
        open_data({"load": "mura:/x", "args": {"root": "/y"}})
    with pytest.raises(InputError, match="'splat'; it takes root, split"):
        open_data({"load": "mura:/x", "args": {"splat": "y"}})
