"""Pictures of COCO that show several categories at once, with their masks."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.data.files import File, Files, fitted, some, there
from libragrad_fx.evaluate.data.items import Data, Item, Stored, sha256
from libragrad_fx.extras import need
from libragrad_fx.models import read_image

HOW = (
    "COCO (annotations CC BY 4.0) is at cocodataset.org/#download: unpack train2017.zip and"
    " annotations_trainval2017.zip in one folder."
)
ZEBRA_ELEPHANT = {"zebra": 340, "elephant": 386}
"""The pair that LibraGrad looks at, with ImageNet's classes of them."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """Samples of COCO, as ``Data.get``. masks: of each, by class, a run-length code of pycocotools."""

    files: Files
    masks: tuple[Mapping[int, Mapping[str, Any]], ...]

    def __call__(self, index: int) -> Item:
        file, decode = self.files.files[index], need("pycocotools.mask", "data").decode
        picture = read_image(file.path)
        masks = {
            c: fitted(decode(code).astype(np.int32), picture.size, file.path) != 0
            for c, code in self.masks[index].items()
        }
        return Item(file.id, picture, file.label, masks)

    def stored(self, index: int) -> Stored:
        found = self.files.stored(index)
        codes = [str(sorted(code.items())).encode() for _, code in sorted(self.masks[index].items())]
        whole = sha256([found.sha256.encode(), *codes]) if found.sha256 else ""
        return dataclasses.replace(found, sha256=whole)


def coco(
    root: str | Path,
    split: str = "train2017",
    categories: Mapping[str, int] = ZEBRA_ELEPHANT,
    least: float = 0.05,
    overlap: float = 0.7,
) -> Data:
    """Pictures with all ``categories``: one sample a picture and category, with the masks of all.

    A mask holds all of a category in a picture, crowds too. LibraGrad's rule takes masks that cover more
    than 5 % of the picture and overlap by less than 0.7 (of the smaller one: the paper does not say). It
    also wants 2 % of each after the model's crop: ``covering(masks, 0.02)`` must leave them.

    Args:
        root: with ``annotations/instances_SPLIT.json`` and the pictures in ``SPLIT/``.
        categories: the model's class by COCO's name of each category.

    Raises:
        InputError: there is no such folder, file or category, or no such picture.
    """
    root = there(root, HOW)
    pictures = there(root / split, HOW)
    known = _annotations(there(root / "annotations" / f"instances_{split}.json", HOW))
    names = {row["name"]: row["id"] for row in known.loadCats(known.getCatIds())}
    if lacking := [name for name in categories if name not in names]:
        raise InputError(f"COCO has no category {lacking[0]!r}, but {', '.join(sorted(names))}")
    files, masks = [], []
    for image in sorted(known.getImgIds(catIds=[names[n] for n in categories])):
        about = known.loadImgs(image)[0]
        codes = {c: _code(known, image, names[n]) for n, c in categories.items()}
        if not _apart([*codes.values()], about["height"] * about["width"], least, overlap):
            continue
        path = pictures / about["file_name"]
        for name, label in categories.items():
            files.append(File(f"{split}/{about['file_name']}#{name}", str(path), label))
            masks.append(codes)
    get = Shown(Files(some(files, pictures, HOW)), tuple(masks))
    origin = f"COCO {split}, {' and '.join(categories)} (Lin et al. 2014)"
    return Data(f"coco-{split}-{'-'.join(categories)}", len(files), get, (), origin, get.stored)


def _annotations(file: Path) -> Any:
    library = need("pycocotools.coco", "data")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how long it took
            known = library.COCO(str(file))
        known.getCatIds()
        return known
    except (ValueError, KeyError, AssertionError) as e:
        raise InputError(f"{file} holds no annotations of COCO: {e}. {HOW}") from e


def _code(known: Any, image: int, category: int) -> dict[str, Any]:
    """All of a category in a picture, as one run-length code."""
    found = known.loadAnns(known.getAnnIds(imgIds=[image], catIds=[category]))
    codes = [known.annToRLE(a) for a in found if a["segmentation"]]
    return need("pycocotools.mask", "data").merge(codes)


def _apart(codes: list[dict[str, Any]], pixels: int, least: float, overlap: float) -> bool:
    """Whether each covers enough of the picture, and no two lie over each other."""
    library = need("pycocotools.mask", "data")
    areas = [int(library.area(code)) for code in codes]
    if min(areas) / pixels <= least:
        return False
    pairs = itertools.combinations(range(len(codes)), 2)
    common = {(i, j): int(library.area(library.merge([codes[i], codes[j]], True))) for i, j in pairs}
    return all(n / min(areas[i], areas[j]) < overlap for (i, j), n in common.items())
