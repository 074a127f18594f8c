"""COCO's layout: pictures with all of several categories, their masks large enough and apart."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.data import Data, Item, coco
from tests.evaluate.pictures import picture, put

pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # its own
WIDE, HIGH = 40, 20
Box = tuple[int, int, int, int]  # left, top, right, bottom


def items(data: Data) -> list[Item]:
    again = pickle.loads(pickle.dumps(data))
    return [again.get(i) for i in range(again.count)]


def filled(box: Box) -> np.ndarray:
    left, top, right, bottom = box
    inside = np.zeros((HIGH, WIDE), bool)
    inside[top:bottom, left:right] = True
    return inside


def polygon(box: Box) -> list[list[float]]:
    left, top, right, bottom = box
    return [[left, top, right, top, right, bottom, left, bottom]]


def crowd(box: Box) -> dict[str, Any]:
    """Uncompressed run lengths, column by column, as COCO has them for crowds."""
    flat = filled(box).T.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *ends, len(flat)]).tolist()
    return {"size": [HIGH, WIDE], "counts": [0, *runs] if flat[0] else runs}


def layout(root: Path, shown: Mapping[int, Sequence[tuple[int, Any]]]) -> None:
    """shown: by picture, the category (24 zebra, 22 elephant, 1 person) and outline of each thing in it."""
    images, things = [], []
    for image, outlines in shown.items():
        images.append({"id": image, "file_name": f"{image:012d}.jpg", "width": WIDE, "height": HIGH})
        put(root / "train2017" / f"{image:012d}.jpg", picture(image, (WIDE, HIGH)))
        for category, outline in outlines:
            things.append({"id": len(things) + 1, "image_id": image, "category_id": category, "area": 1,
                           "iscrowd": int(isinstance(outline, dict)), "segmentation": outline})  # fmt: skip
    names = [{"id": i, "name": n} for i, n in ((1, "person"), (22, "elephant"), (24, "zebra"))]
    (root / "annotations").mkdir(parents=True)
    (root / "annotations" / "instances_train2017.json").write_text(
        json.dumps({"images": images, "annotations": things, "categories": names}), "utf-8"
    )


A, B, C = (0, 0, 10, 20), (20, 0, 40, 20), (10, 0, 14, 20)


def test_one_sample_a_picture_and_category_with_the_masks_of_both(tmp_path: Path) -> None:
    both = [(24, polygon(A)), (24, polygon(C)), (22, crowd(B)), (1, polygon(A))]
    layout(tmp_path, {7: both, 3: [(24, polygon(A))]})
    data = coco(tmp_path)
    assert [(i.id, i.label) for i in items(data)] == [
        ("train2017/000000000007.jpg#zebra", 340),
        ("train2017/000000000007.jpg#elephant", 386),
    ]
    for item in items(data):
        assert sorted(item.masks) == [340, 386]
        assert np.array_equal(item.masks[340], filled(A) | filled(C))
        assert np.array_equal(item.masks[386], filled(B))
        assert isinstance(item.content, Image.Image)
        assert item.content.size == (WIDE, HIGH)
    assert data.peek(0).id != data.peek(1).id


def test_masks_must_be_large_and_apart(tmp_path: Path) -> None:
    def over(wide: int) -> Box:
        return (10 - wide, 0, 20 - wide, 20)

    layout(tmp_path, {
        1: [(24, polygon((0, 0, 2, 20))), (22, polygon(B))],  # 5 % is not more than 5 %
        2: [(24, polygon((0, 0, 3, 20))), (22, polygon(B))],
        3: [(24, polygon(A)), (22, polygon(over(6)))],
        4: [(24, polygon(A)), (22, polygon(over(7)))],  # 0.7 is not below 0.7
        5: [(24, polygon((0, 0, 40, 20))), (22, polygon(A))],  # one inside the other
    })  # fmt: skip
    assert [i.id[-11:] for i in items(coco(tmp_path))][::2] == ["2.jpg#zebra", "3.jpg#zebra"]


def test_other_categories(tmp_path: Path) -> None:
    layout(tmp_path, {1: [(1, polygon(A)), (22, polygon(B))]})
    found = items(coco(tmp_path, categories={"elephant": 1, "person": 0}))
    assert [i.label for i in found] == [1, 0]
    with pytest.raises(InputError, match="COCO has no category 'unicorn', but elephant, person, zebra"):
        coco(tmp_path, categories={"unicorn": 0})
    with pytest.raises(InputError, match="no pictures"):
        coco(tmp_path)


def test_a_changed_outline_changes_the_hash(tmp_path: Path) -> None:
    hashes = set()
    for k, box in enumerate((A, C)):
        layout(tmp_path / str(k), {1: [(24, polygon(box)), (22, polygon(B))]})
        hashes.add(coco(tmp_path / str(k)).peek(0).sha256)
    assert len(hashes) == 2


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cocodataset.org"):
        coco(tmp_path / "nowhere")
    (tmp_path / "train2017").mkdir()
    with pytest.raises(InputError, match=r"instances_train2017.json.*annotations_trainval2017.zip"):
        coco(tmp_path)
    (tmp_path / "annotations").mkdir()
    for body in ("{", "[]", "{}"):
        (tmp_path / "annotations" / "instances_train2017.json").write_text(body, "utf-8")
        with pytest.raises(InputError, match=r"instances_train2017\.json"):
            coco(tmp_path)
