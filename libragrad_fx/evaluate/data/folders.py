"""Sets of pictures in folders, as their publishers lay them out."""

from __future__ import annotations

import csv
import functools
import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.data.files import (
    MASK_ENDINGS,
    File,
    Files,
    Meaning,
    Table,
    first,
    listed,
    own,
    some,
    there,
    trimap,
)
from libragrad_fx.evaluate.data.items import Data
from libragrad_fx.extras import need
from libragrad_fx.models import first_line

HOW = {
    "folder": "Give a folder of pictures: CLASS/x.jpg, or images/CLASS/x.jpg and masks/CLASS/x.png.",
    "imagenet": (
        "ImageNet (ILSVRC2012) is free for research after registration at image-net.org: unpack"
        " ILSVRC2012_img_val.tar into val/ with ILSVRC2012_devkit_t12.tar.gz beside it, or give a folder"
        " val/WNID/x.JPEG."
    ),
    "mura": (
        "MURA is given for research after registration at stanfordmlgroup.github.io/competitions/mura:"
        " unpack MURA-v1.1.zip."
    ),
    "pet": (
        "Oxford-IIIT Pet (CC BY-SA 4.0) is at robots.ox.ac.uk/~vgg/data/pets:"
        " torchvision.datasets.OxfordIIITPet(ROOT, download=True)."
    ),
    "imagenet-s": (
        "ImageNet-S masks are at github.com/LUSSeg/ImageNet-S (its datapreparation_anno.sh gets them); the"
        " pictures are ImageNet's, which need registration at image-net.org."
    ),
}
"""How to get each set."""

_PARTS = (50, 300, 919)  # classes of the three editions of ImageNet-S


def folder(
    root: str | Path, masks: str | Path | None = None, values: Mapping[int, int] | None = None
) -> Data:
    """Any folder of pictures: ``CLASS/x.jpg``, or ``x.jpg`` without labels; in ``images/`` if it is there.

    Classes are the folders' names, sorted, as in torchvision's ``ImageFolder``. A mask has the path of its
    picture, but the ending.

    Args:
        masks: their folder, from ``root``; ``masks/`` beside ``images/`` without being said.
        values: class of each value in a mask (see ``mask_values``). Without it, what is not 0 is of the
            picture's own class.

    Raises:
        InputError: there is no such folder, no picture, no mask that fits, or pictures lie beside folders.
    """
    root = there(root, HOW["folder"])
    pictures = root / "images" if (root / "images").is_dir() else root
    drawn = root / (masks or "masks")
    has_masks = masks is not None or (pictures != root and drawn.is_dir())
    found = [p for p in listed(pictures) if not (has_masks and (pictures / Path(*p)).is_relative_to(drawn))]
    loose = [p for p in found if len(p) == 1]
    if loose and len(loose) < len(found):
        raise InputError(f"{pictures / loose[0][0]} lies beside folders of classes: move it into one")
    names = () if loose else tuple(sorted({p[0] for p in found} | _folders(pictures, drawn)))
    places = {name: i for i, name in enumerate(names)}
    if has_masks and values is None and loose:
        raise InputError("pictures without classes need values={value: class}, what a mask's values mean")
    paired = _paired(found, there(drawn, HOW["folder"])) if has_masks else {}
    files = [
        File("/".join(p), str(pictures / Path(*p)), places.get(p[0]) if names else None, paired.get(p))
        for p in found
    ]
    get = Files(some(files, pictures, HOW["folder"]), _meaning(has_masks, values))
    name = root.resolve().name
    return Data(name, len(files), get, names, f"the folder {name}", get.stored)


def _meaning(has_masks: bool, values: Mapping[int, int] | None) -> Meaning | None:
    if not has_masks:
        return None
    return own if values is None else Table({int(k): int(v) for k, v in values.items()})


def _folders(root: Path, masks: Path) -> set[str]:
    """Folders of classes, those without a picture too: the others keep their index."""
    return {p.name for p in root.iterdir() if p.is_dir() and p.name[0] != "." and p != masks}


def _paired(pictures: Sequence[tuple[str, ...]], root: Path) -> dict[tuple[str, ...], str]:
    """The mask of each picture that has one.

    Raises:
        InputError: none fits, or one fits several.
    """
    masks: dict[tuple[str, ...], str] = {}
    for p in listed(root, MASK_ENDINGS):
        if (key := _stem(p)) in masks:
            raise InputError(f"{masks[key]} and {root / Path(*p)} are masks of one picture")
        masks[key] = str(root / Path(*p))
    owner: dict[tuple[str, ...], tuple[str, ...]] = {}
    for p in pictures:
        if (key := _stem(p)) in masks and key in owner:
            raise InputError(f"{masks[key]} fits {'/'.join(owner[key])} and {'/'.join(p)}: rename one")
        owner[key] = p
    found = {p: masks[key] for key, p in owner.items() if key in masks}
    if not found:
        endings = ", ".join(sorted(MASK_ENDINGS))
        raise InputError(f"no mask in {str(root)!r} has a picture's path (with an ending of {endings})")
    return found


def _stem(parts: tuple[str, ...]) -> tuple[str, ...]:
    return (*parts[:-1], Path(parts[-1]).stem)


# --- ImageNet


@functools.cache
def _info() -> Any:
    return need("timm.data", "data").ImageNetInfo("imagenet-1k")


def synsets() -> dict[str, int]:
    """Class index of each of ImageNet's 1000 WordNet ids: their sorted order."""
    return {name: i for i, name in enumerate(_info().label_names())}


def imagenet(root: str | Path, split: str = "val") -> Data:
    """ImageNet (ILSVRC2012): ``val/WNID/x.JPEG`` as torchvision's ``ImageNet`` makes it, or as unpacked.

    A folder of WordNet ids gives a class its index among all 1000, whichever of them are there. Pictures as
    unpacked, all in one folder, have their labels in ``LOC_val_solution.csv`` (Kaggle) or in the
    development kit (a folder or ``.tar.gz``) beside them.

    Raises:
        InputError: there is no such folder, no picture, no label, or a folder that is none of 1000 ids.
    """
    root = there(root, HOW["imagenet"])
    inner = root / "ILSVRC" / "Data" / "CLS-LOC" / split
    pictures = first((root / split, inner, root), HOW["imagenet"])
    found, known = listed(pictures), synsets()
    flat = bool(found) and all(len(p) == 1 for p in found)
    labels = _labels(root, split) if flat else {}
    files = []
    for p in found:
        wnid = labels.get(Path(p[0]).stem, "") if flat else p[0]
        if wnid not in known:
            wrong = f"{pictures / Path(*p)} has no label" if flat else f"ImageNet has no class {p[0]}"
            raise InputError(f"{wrong}. {HOW['imagenet']}")
        files.append(File(p[-1], str(pictures / Path(*p)), known[wnid]))
    get = Files(some(files, pictures, HOW["imagenet"]))
    classes, origin = tuple(_info().label_descriptions()), f"ImageNet {split} (Russakovsky et al. 2015)"
    return Data(f"imagenet-{split}", len(files), get, classes, origin, get.stored)


def _labels(root: Path, split: str) -> dict[str, str]:
    """WordNet id by the name of a picture, for pictures that lie in one folder."""
    for place in (root, root.parent):
        for name, read in (
            (f"LOC_{split}_solution.csv", _solution),
            ("ILSVRC2012_devkit_t12", _unpacked),
            ("ILSVRC2012_devkit_t12.tar.gz", _packed),
        ):
            if not (file := place / name).exists():
                continue
            try:
                return read(file)
            except (OSError, ValueError, LookupError, tarfile.TarError) as e:
                raise InputError(f"cannot read {file}: {first_line(e)}. {HOW['imagenet']}") from e
    raise InputError(f"{root} has pictures and no labels. {HOW['imagenet']}")


def _solution(file: Path) -> dict[str, str]:
    with file.open(encoding="utf-8", newline="") as opened:
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(opened)}


def _unpacked(kit: Path) -> dict[str, str]:
    return _kit({n: (kit / "data" / n).read_bytes() for n in _KIT})


def _packed(file: Path) -> dict[str, str]:
    with tarfile.open(file) as opened:
        found = {n: opened.extractfile(f"ILSVRC2012_devkit_t12/data/{n}") for n in _KIT}
        return _kit({n: member.read() for n, member in found.items() if member is not None})


_KIT = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")


def _kit(body: Mapping[str, bytes]) -> dict[str, str]:
    """WordNet id by picture, from the development kit: line n is the ILSVRC id of picture n."""
    meta = need("scipy.io", "data").loadmat(io.BytesIO(body[_KIT[0]]), squeeze_me=True)["synsets"]
    ids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in meta}
    lines = body[_KIT[1]].decode().split()
    return {f"ILSVRC2012_val_{n:08d}": ids[int(line)] for n, line in enumerate(lines, 1)}


def imagenet_s(
    root: str | Path,
    images: str | Path | None = None,
    split: str = "validation",
    categories: str | Path | None = None,
) -> Data:
    """ImageNet-S (Gao et al. 2022): masks of ImageNet's pictures, of 919, 300 or 50 of its classes.

    Masks are at ``SPLIT-segmentation/WNID/x.png``, coded as R + 256 G: 0 is any other thing, 1000 is to be
    ignored, and id i is the i-th WordNet id in sorted order. Samples are sorted by their pictures' names.
    ``label`` is the class of the folder (LibraGrad takes the class of the largest mask instead).

    Args:
        root: with the masks, such as ``ImageNetS919``.
        images: ImageNet's pictures, paired by file name, in any folders; without it ``SPLIT/`` in ``root``.
        categories: a file of WordNet ids, for a folder that does not hold all of 919, 300 or 50 classes.

    Raises:
        InputError: there is no such folder, no mask with a picture, or ids cannot be told.
    """
    how = HOW["imagenet-s"]
    root = there(root, how)
    drawn = first((root / f"{split}-segmentation", root), how)
    pictures = there(images or root / split, how)
    masks, known = listed(drawn, MASK_ENDINGS), synsets()
    table = Table(_ids(masks, categories, known))
    by_name: dict[str, str] = {}
    for p in listed(pictures):
        if (stem := Path(p[-1]).stem) in by_name:
            raise InputError(f"{by_name[stem]} and {pictures / Path(*p)} have one name")
        by_name[stem] = str(pictures / Path(*p))
    files = [
        File(Path(by_name[stem]).name, by_name[stem], known.get(p[0]), str(drawn / Path(*p)))
        for p in sorted(masks, key=lambda p: p[-1])
        if (stem := Path(p[-1]).stem) in by_name
    ]
    get = Files(some(files, pictures, how), table)
    classes, origin = tuple(_info().label_descriptions()), f"ImageNet-S {split} (Gao et al. 2022)"
    return Data(f"imagenet-s-{split}", len(files), get, classes, origin, get.stored)


def _ids(
    masks: Sequence[tuple[str, ...]], categories: str | Path | None, known: Mapping[str, int]
) -> dict[int, int]:
    """ImageNet's class index by the id in a mask."""
    if categories is None:
        names = sorted({p[0] for p in masks if len(p) > 1})
        if len(names) not in _PARTS:
            raise InputError(
                f"masks of ImageNet-S are in folders of {', '.join(map(str, _PARTS))} classes, not"
                f" {len(names)}: give categories=FILE, the ImageNetS_categories_im*.txt of the edition"
            )
    else:
        names = sorted(there(categories, HOW["imagenet-s"]).read_text("utf-8").split())
    if unknown := [n for n in names if n not in known]:
        raise InputError(f"{unknown[0]} is no WordNet id of ImageNet. {HOW['imagenet-s']}")
    return {i: known[name] for i, name in enumerate(names, 1)}


# --- MURA, Pet


def mura(root: str | Path, split: str = "valid") -> Data:
    """MURA (Rajpurkar et al. 2018): radiographs; a study is negative (0) or positive (1).

    ``SPLIT/XR_WRIST/patient1/study1_positive/image1.png``.

    Raises:
        InputError: there is no such folder, no picture, or one without a study.
    """
    root = there(root, HOW["mura"])
    pictures = first((root / split, root / "MURA-v1.1" / split), HOW["mura"])
    files = []
    for p in listed(pictures):
        said = [w for part in p if (w := part.rpartition("_")[2]) in ("negative", "positive")]
        if len(said) != 1:
            raise InputError(f"{pictures / Path(*p)} is in no study_negative or study_positive")
        files.append(File("/".join((split, *p)), str(pictures / Path(*p)), int(said[0] == "positive")))
    get = Files(some(files, pictures, HOW["mura"]))
    origin = f"MURA v1.1 {split} (Rajpurkar et al. 2018)"
    return Data(f"mura-{split}", len(files), get, ("negative", "positive"), origin, get.stored)


def pet(root: str | Path, split: str = "trainval") -> Data:
    """Oxford-IIIT Pet (Parkhi et al. 2012): 37 breeds, with the animal as mask.

    The layout, split and labels of torchvision's ``OxfordIIITPet``, which does not tell files' names.
    In a trimap the animal is 1; the border, 3, does not count.

    Raises:
        InputError: there is no such folder, no such split, or no picture.
    """
    root = there(root, HOW["pet"])
    base = first((root / "oxford-iiit-pet", root), HOW["pet"])
    there(base / "images", HOW["pet"])
    rows = there(base / "annotations" / f"{split}.txt", HOW["pet"]).read_text("utf-8").splitlines()
    trimaps, names, files = base / "annotations" / "trimaps", {}, []
    for row in rows:
        if not row.strip() or row.startswith("#"):
            continue
        try:
            name, label = row.split()[0], int(row.split()[1]) - 1
        except (ValueError, IndexError) as e:
            raise InputError(f"{split}.txt of Pet has a line {row!r:.80}. {HOW['pet']}") from e
        names[label] = name.rpartition("_")[0].replace("_", " ").title()
        mask = trimaps / f"{name}.png"
        path = base / "images" / f"{name}.jpg"
        files.append(File(name, str(path), label, str(mask) if mask.is_file() else None))
    get = Files(some(files, base, HOW["pet"]), trimap)
    classes = tuple(names.get(i, "") for i in range(max(names) + 1))
    origin = f"Oxford-IIIT Pet {split} (Parkhi et al. 2012)"
    return Data(f"pet-{split}", len(files), get, classes, origin, get.stored)
