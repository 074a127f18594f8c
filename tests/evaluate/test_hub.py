"""Sets of ``datasets``: on disk, in parquet, and a hub that cannot be reached."""

from __future__ import annotations

import io
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.data import Data, Item, hub, hugging_face, imagenet_hard, selected
from tests.evaluate.pictures import picture, put

datasets = pytest.importorskip("datasets", reason="datasets is not installed")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def items(data: Data) -> list[Item]:
    again = pickle.loads(pickle.dumps(data))
    return [again.get(i) for i in range(again.count)]


def encoded(image: Image.Image) -> dict[str, Any]:
    made = io.BytesIO()
    image.save(made, "PNG")
    return {"bytes": made.getvalue(), "path": None}


def pictures(labels: list[Any], kind: Any, modes: str = "RGB") -> Any:
    rows = {"image": [encoded(picture(i, mode=modes)) for i in range(len(labels))], "label": labels}
    return datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image(), "label": kind}))


NAMES = datasets.ClassLabel(names=["tench", "zebra", "elephant"])


@pytest.mark.parametrize("way", ["disk", "disk of splits", "parquet", "parquet file"])
def test_pictures_on_this_machine(tmp_path: Path, way: str) -> None:
    made, place = pictures([2, 0, -1], NAMES), tmp_path / "set"
    if way == "disk":
        made.save_to_disk(str(place))
    elif way == "disk of splits":
        datasets.DatasetDict({"validation": made, "train": made.select([0])}).save_to_disk(str(place))
    elif way == "parquet":
        (place / "data").mkdir(parents=True)
        made.to_parquet(place / "data" / "validation-00000-of-00001.parquet")
    else:
        place = tmp_path / "set.parquet"
        made.to_parquet(place)
    split = None if way in ("disk", "parquet file") else "validation"
    data = hugging_face(place, split)
    assert data.classes == ("tench", "zebra", "elephant")
    assert [item.label for item in items(data)] == [2, 0, None]
    part = data.get(0).id.partition("/")[0]
    assert [item.id for item in items(data)] == [f"{part}/{i}" for i in range(3)]
    for i, item in enumerate(items(data)):
        assert np.array_equal(np.asarray(item.content), np.asarray(picture(i)))


def test_a_folder_of_pictures_as_datasets_reads_it(tmp_path: Path) -> None:
    for k, name in enumerate(("cat", "dog")):
        put(tmp_path / "set" / "test" / name / "x.png", picture(k))
    data = hugging_face(tmp_path / "set", "test")
    assert data.classes == ("cat", "dog")
    assert [item.label for item in items(data)] == [0, 1]
    assert np.array_equal(np.asarray(data.get(1).content), np.asarray(picture(1)))


def test_the_first_of_several_labels(tmp_path: Path) -> None:
    several = datasets.Sequence(datasets.Value("int64"))
    datasets.DatasetDict({"validation": pictures([[340, 2], [7], []], several)}).save_to_disk(
        str(tmp_path / "hard")
    )
    assert [item.label for item in items(imagenet_hard(tmp_path / "hard"))] == [340, 7, None]
    with pytest.raises(InputError, match="'label' holds several labels: say several=True"):
        hugging_face(tmp_path / "hard", "validation")


def test_grey_and_broken_pictures(tmp_path: Path) -> None:
    rows = [encoded(picture(0)), encoded(picture(1, mode="L")), {"bytes": b"broken", "path": None},
            None]  # fmt: skip
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    made = datasets.Dataset.from_dict({"image": rows, "label": [0, 1, 0, 1]}, features)
    made.save_to_disk(str(tmp_path / "set"))
    data = hugging_face(tmp_path / "set")
    assert [data.peek(i).mode for i in range(4)] == ["RGB", "L", "", ""]
    assert data.get(1).content.mode == "RGB"  # pyright: ignore[reportAttributeAccessIssue]
    for i in (2, 3):
        with pytest.raises(InputError, match=rf"/{i}"):
            data.get(i)
    assert sorted(selected(data, 3, 0, "rgb").indices) == [0, 2, 3]


def test_texts_and_columns(tmp_path: Path) -> None:
    rows = {"text": ["good", "bad"], "note": ["a", "b"], "label": ["pos", "neg"], "key": ["k1", "k2"]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "set"))
    data = hugging_face(tmp_path / "set", id="key")
    assert [(i.id, i.content, i.label) for i in items(data)] == [("k1", "good", 1), ("k2", "bad", 0)]
    assert data.classes == ("neg", "pos")
    assert hugging_face(tmp_path / "set", content="note", label=None).get(1).content == "b"
    with pytest.raises(InputError, match="no column 'y', but text, note, label, key"):
        hugging_face(tmp_path / "set", label="y")
    datasets.Dataset.from_dict({"a": ["x"], "b": ["y"], "label": [0]}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(InputError, match="say content=COLUMN, which of a, b, label"):
        hugging_face(tmp_path / "two")


def test_splits_that_are_not_there(tmp_path: Path) -> None:
    made = pictures([0], NAMES)
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(str(tmp_path / "set"))
    for split in (None, "validation"):
        with pytest.raises(InputError, match=rf"has the splits train, test, not {split}: say .*@SPLIT"):
            hugging_face(tmp_path / "set", split)
    with pytest.raises(InputError, match="there is no '/nowhere/set'"):
        hugging_face("/nowhere/set")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"cannot load .*empty: .* Give a folder of Hugging Face's"):
        hugging_face(tmp_path / "empty")


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    before = time.monotonic()
    with pytest.raises(InputError, match=r"cannot load nobody/nothing.*hf download --repo-type dataset"):
        hugging_face("nobody/nothing", "train")
    assert time.monotonic() - before < hub.SECONDS + 5
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_server_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: time.sleep(30))
    before = time.monotonic()
    assert not hub._reachable("http://127.0.0.1:9")
    assert time.monotonic() - before < 5
