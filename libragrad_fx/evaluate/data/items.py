"""A sample, and a set of samples that are read one at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from PIL import Image

from libragrad_fx.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """An object's P parts, and O objects around it, that can be left out of a picture (``metrics.parts``).

    variants: int (K, P), of each class of the set the variant of each part
    masks:    bool (P, H, W), where each part is seen
    objects:  bool (O, H, W), where each object of the background is seen
    draw:     from what is shown, bool (P,) and bool (O,), to the picture, in RGB and of the same size

    Raises:
        InputError: shapes or dtypes that do not fit.
    """

    variants: np.ndarray
    masks: np.ndarray
    objects: np.ndarray
    draw: Callable[[np.ndarray, np.ndarray], Image.Image]

    def __post_init__(self) -> None:
        for name, found in (("masks", self.masks), ("objects", self.objects)):
            if found.dtype != np.bool_ or found.ndim != 3 or found.shape[1:] != self.masks.shape[1:]:
                raise InputError(f"{name} of parts are bool (N, H, W), not {found.dtype} {found.shape}")
        if self.variants.ndim != 2 or self.variants.shape[1] != len(self.masks):
            raise InputError(f"variants of {len(self.masks)} parts are (K, P), not {self.variants.shape}")

    def hidden(self) -> Image.Image:
        """The picture without parts and objects."""
        return self.draw(np.zeros(len(self.masks), bool), np.zeros(len(self.objects), bool))


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """One sample.

    id:      the same in every run and on every machine (a relative path, a column of ids)
    content: a picture in RGB, or a text
    label:   index of its class; None if it is not known. Of a text also a name: of a class, or of the next
             token (" Mary")
    masks:   by class, bool (H, W) at the picture's own size; of a text bool (N,), over its characters
    against: as label: what the label is compared with, in a contrast
    parts:   of a picture whose object has parts that can be left out; None of others

    Raises:
        InputError: one of them is something else.
    """

    id: str
    content: Image.Image | str
    label: int | str | None = None
    masks: Mapping[Any, np.ndarray] = dataclasses.field(default_factory=dict)
    against: int | str | None = None
    parts: Parts | None = None

    def __post_init__(self) -> None:
        for name in ("label", "against"):
            object.__setattr__(self, name, self._class(getattr(self, name)))
        if isinstance(self.content, str):
            if not self.content.strip():
                raise InputError(f"{self.id} has no text")
            size: tuple[int, ...] = (len(self.content),)
        elif self.content.mode == "RGB":
            size = (self.content.height, self.content.width)
        else:
            raise InputError(f"{self.id} is a picture in {self.content.mode}: .convert('RGB')")
        for index, mask in self.masks.items():
            if mask.dtype != np.bool_ or mask.shape != size:
                raise InputError(
                    f"{self.id}: the mask of class {index} is {mask.dtype} {mask.shape}, not bool {size}"
                )

    def _class(self, found: Any) -> int | str | None:
        named = isinstance(found, str) and isinstance(self.content, str)
        if found is None or named:
            return found
        try:
            index = operator.index(cast(Any, found))
        except TypeError as e:
            raise InputError(f"{self.id}: label {found!r} is no class index") from e
        if index < 0:
            raise InputError(f"{self.id}: label {index} is negative; None is for no label")
        return index


@dataclasses.dataclass(frozen=True)
class Stored:
    """What is known of a sample without decoding it.

    sha256: of its content, label and masks as they are stored; "" if they cannot be read
    mode:   Pillow's mode of the picture as stored ("RGB", "L", "CMYK", ...); "" of a text, or not known
    """

    id: str
    sha256: str
    mode: str = ""


@dataclasses.dataclass(frozen=True)
class Data:
    """A set of samples. It can be pickled if ``get`` and ``stored`` can.

    name:    for tables and files
    count:   how many samples there are
    get:     the sample of an index; raises InputError for one that cannot be read, and can go on
    classes: names by index; () if they are not known
    origin:  where the set comes from, for the record
    stored:  see ``Stored``; without it samples are decoded to know them

    Raises:
        InputError: there is no sample.
    """

    name: str
    count: int
    get: Callable[[int], Item]
    classes: tuple[str, ...] = ()
    origin: str = ""
    stored: Callable[[int], Stored] | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"{self.name} has no samples")

    def peek(self, index: int) -> Stored:
        """``Stored`` of a sample, from ``stored`` or from ``get``."""
        if self.stored is not None:
            return self.stored(index)
        try:
            item = self.get(index)
        except InputError:
            return Stored(f"{self.name}#{index}", "")
        return Stored(item.id, hashed(item))


def hashed(item: Item) -> str:
    """SHA-256 of what a decoded sample is: its text or pixels, its label, its masks, its contrast. Of
    parts: their masks and variants, and the picture without any."""
    if isinstance(item.content, str):
        parts = [item.content.encode()]
    else:
        parts = [repr(item.content.size).encode(), item.content.tobytes()]
    for index in sorted(item.masks, key=repr):
        parts += [repr(index).encode(), np.packbits(item.masks[index]).tobytes()]
    if item.parts is not None:
        parts += [np.packbits(item.parts.masks).tobytes(), np.packbits(item.parts.objects).tobytes()]
        parts += [item.parts.variants.astype("<i8").tobytes(), item.parts.hidden().tobytes()]
    contrast = [] if item.against is None else [repr(item.against).encode()]
    return sha256([*parts, repr(item.label).encode(), *contrast])


def sha256(parts: Sequence[bytes]) -> str:
    """Of several strings of bytes; where one ends counts."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()


# --- labels

Label = int | str | None
"""An index; None where a sample has no label; a text that says why it has none that could be used."""


def indexed(found: Sequence[object], classes: Sequence[str] = ()) -> tuple[list[Label], tuple[str, ...]]:
    """Indices of classes from what a column holds, and the classes' names.

    Numbers from 0 are indices. Anything else is a name: an index into ``classes``, or without these into
    the sorted names that occur. An empty field is no label.

    Raises:
        InputError: without ``classes``, names and numbers are mixed, or a number is no index.
    """
    texts = [None if v is None or v == "" else str(v) for v in found]
    if not classes:
        seen = sorted({t for t in texts if t is not None})
        numbers = [t for t in seen if _number(t)]
        if len(numbers) == len(seen):
            return [None if t is None else int(t) for t in texts], ()
        if numbers or any(_numeric(t) for t in seen):
            raise InputError(
                f"labels {', '.join(seen[:6])}{', …' * (len(seen) > 6)} are neither indices from 0 nor all"
                " names: give classes=[...], the names in the order of the model's outputs"
            )
        classes = seen
    places = {name: i for i, name in enumerate(classes)}
    return [_place(t, places) for t in texts], tuple(classes)


def _place(text: str | None, places: Mapping[str, int]) -> Label:
    if text is None or text in places:
        return None if text is None else places[text]
    if _number(text) and int(text) < len(places):
        return int(text)
    return f"label {text!r} is none of its {len(places)} classes"


def _number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def checked(label: Label, name: str) -> int | None:
    """A label that can be used.

    Raises:
        InputError: it is none.
    """
    if isinstance(label, str):
        raise InputError(f"{name}: {label}")
    return label
