"""Pictures and masks in files: how they are listed, read, paired and told apart."""

from __future__ import annotations

import dataclasses
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.data.items import Item, Stored, sha256
from libragrad_fx.models import IMAGE_ENDINGS, IMAGE_FORMATS, first_line, read_image

MASK_FORMATS = ("BMP", "GIF", "PNG", "PPM", "TIFF")
"""Formats that keep each value as it is."""
MASK_ENDINGS = frozenset((".bmp", ".gif", ".pgm", ".png", ".ppm", ".tif", ".tiff"))
_ORIENTATION = 0x0112  # of EXIF; 2 to 8 say that a picture is to be mirrored or turned

Meaning = Callable[[np.ndarray, int | None], dict[int, np.ndarray]]
"""From a mask's values (H, W) and the sample's label to bool (H, W) by class."""


@dataclasses.dataclass(frozen=True)
class File:
    """Where a sample lies: its picture, and its mask if it has one."""

    id: str
    path: str
    label: int | None = None
    mask: str | None = None


@dataclasses.dataclass(frozen=True)
class Files:
    """Samples in files, as ``Data.get``. ``meaning``: what values of masks mean."""

    files: tuple[File, ...]
    meaning: Meaning | None = None

    def __call__(self, index: int) -> Item:
        file = self.files[index]
        picture = read_image(file.path)
        if file.mask is None or self.meaning is None:
            return Item(file.id, picture, file.label)
        values = fitted(mask_values(file.mask), picture.size, file.path)
        return Item(file.id, picture, file.label, self.meaning(values, file.label))

    def stored(self, index: int) -> Stored:
        file = self.files[index]
        try:
            parts = [Path(p).read_bytes() for p in (file.path, file.mask) if p is not None]
        except OSError:
            return Stored(file.id, "")
        return Stored(file.id, sha256([*parts, str(file.label).encode()]), mode_of(parts[0]))


def mode_of(body: bytes) -> str:
    """Pillow's mode of a picture as stored; "" if it is none."""
    try:
        with Image.open(io.BytesIO(body), formats=IMAGE_FORMATS) as opened:
            return opened.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return ""


# --- where files are


def there(root: str | Path, how: str) -> Path:
    """A folder or file that is there.

    Raises:
        InputError: it is not; ``how`` says how to get it.
    """
    found = Path(root).expanduser()
    if not found.exists():
        raise InputError(f"there is no {str(found)!r}. {how}")
    return found


def first(places: Iterable[Path], how: str) -> Path:
    """The first place that is there.

    Raises:
        InputError: none is; ``how`` says how to get it.
    """
    tried = [*places]
    for place in tried:
        if place.exists():
            return place
    raise InputError(f"there is none of {', '.join(map(str, tried))}. {how}")


def listed(root: Path, endings: frozenset[str] = IMAGE_ENDINGS) -> list[tuple[str, ...]]:
    """The pictures under a folder, as the parts of their relative paths: sorted by these, links followed.

    Hidden files and folders are left out: some archives hold a ``._x.png`` beside each ``x.png``.
    """
    found = []
    for at, folders, names in os.walk(root, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        parts = Path(at).relative_to(root).parts
        found += [
            (*parts, n)
            for n in names
            if not n.startswith(".") and os.path.splitext(n)[1].lower() in endings
        ]
    return sorted(found)


def some(files: Sequence[File], root: Path, how: str) -> tuple[File, ...]:
    """Files, if there are any, and no two have one id.

    Raises:
        InputError: there are none, or two have.
    """
    if not files:
        raise InputError(f"there are no pictures in {str(root)!r}. {how}")
    name, n = Counter(f.id for f in files).most_common(1)[0]
    if n > 1:
        same = [f.path for f in files if f.id == name]
        raise InputError(f"{n} pictures are called {name!r}: {', '.join(same[:3])}")
    return tuple(files)


# --- masks


def mask_values(file: str | Path) -> np.ndarray:
    """int32 (H, W): grey levels or indices of a palette; R + 256 G + 65536 B of a mask in colours.

    The latter codes ids above 255 in ImageNet-S and COCO. An alpha channel says nothing.

    Raises:
        InputError: it is no picture in a format that keeps each value.
    """
    try:
        with Image.open(file, formats=MASK_FORMATS) as opened:
            values = np.asarray(opened).astype(np.int32)
            alpha = opened.mode in ("LA", "RGBA", "PA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        kinds = ", ".join(MASK_FORMATS)
        raise InputError(f"cannot read {str(file)!r} as a mask ({kinds}): {first_line(e)}") from e
    if values.ndim == 3 and alpha:
        values = values[..., :-1]
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim == 3 and values.shape[2] == 3:
        values = values @ np.array([1, 256, 65536], np.int32)
    if values.ndim != 2:
        raise InputError(f"{str(file)!r} is no mask: it has {values.shape[2]} channels")
    return values


def fitted(values: np.ndarray, size: tuple[int, int], file: str | Path) -> np.ndarray:
    """A mask's values, turned like its picture if they were drawn on the picture as stored.

    Args:
        size: (W, H) of the picture, upright.
        file: of the picture.

    Raises:
        InputError: their size is another, or does not tell whether they are upright.
    """
    with Image.open(file, formats=IMAGE_FORMATS) as opened:
        stored, how = opened.size, opened.getexif().get(_ORIENTATION, 1)
    drawn = (values.shape[1], values.shape[0])
    turned = how in range(2, 9)
    if turned and drawn == size == stored:
        raise InputError(
            f"{str(file)!r} is to be turned (EXIF orientation {how}), and its mask may or may not be turned"
            " already: save the picture upright, without that mark"
        )
    if drawn == size:
        return values
    if turned and drawn == stored:
        marked = Image.fromarray(values)
        marked.getexif()[_ORIENTATION] = how
        return np.asarray(ImageOps.exif_transpose(marked))
    raise InputError(f"{str(file)!r} is {size[0]} x {size[1]}, and its mask {drawn[0]} x {drawn[1]}")


def own(values: np.ndarray, label: int | None) -> dict[int, np.ndarray]:
    """What is not 0 is of the picture's own class."""
    inside = values != 0
    return {label: inside} if label is not None and inside.any() else {}


def trimap(values: np.ndarray, label: int | None) -> dict[int, np.ndarray]:
    """What is 1 is of the picture's own class; 2 is background and 3 a border that is neither (Pet)."""
    return own(values == 1, label)


@dataclasses.dataclass(frozen=True)
class Table:
    """Classes by value. Other values are of no class, and several may be of one."""

    classes: Mapping[int, int]

    def __call__(self, values: np.ndarray, label: int | None) -> dict[int, np.ndarray]:
        found: dict[int, np.ndarray] = {}
        for value in np.unique(values).tolist():
            if value in self.classes:
                index = self.classes[value]
                found[index] = found.get(index, np.False_) | (values == value)
        return found
