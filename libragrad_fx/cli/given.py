"""What people give to ``libragrad explain``, and where its answers go."""

from __future__ import annotations

import dataclasses
import glob
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from libragrad_fx.errors import InputError
from libragrad_fx.extras import writable
from libragrad_fx.models import IMAGE_ENDINGS
from libragrad_fx.viz import paper

RAW = (".npz", ".safetensors", ".json")
_NAME = "{name}"


@dataclasses.dataclass(frozen=True)
class Item:
    """One picture or text. name: of its files, different from that of any other."""

    name: str
    value: Path | str


def items(given: Sequence[str], texts: bool) -> list[Item]:
    """Pictures of files, folders and globs; or texts as they are.

    Raises:
        InputError: a folder or glob without pictures.
    """
    if texts:
        return [Item(f"text-{i}" if len(given) > 1 else "text", t) for i, t in enumerate(given, 1)]
    found = list(dict.fromkeys(path for g in given for path in _files(g)))
    seen = Counter[str]()
    named = []
    for path in found:
        seen[path.stem] += 1
        count = seen[path.stem]
        named.append(Item(path.stem if count == 1 else f"{path.stem}-{count}", path))
    return named


def _files(given: str) -> list[Path]:
    path = Path(given)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_ENDINGS)
    elif any(c in given for c in "*?[") and not path.exists():
        found = sorted(p for g in glob.glob(given, recursive=True) if (p := Path(g)).is_file())
    else:
        return [path]
    if not found:
        raise InputError(f"there are no pictures in {given!r}")
    return found


# --- where answers go


def place(output: str) -> Path:
    """The file that ``-o`` names; of a folder, ``{name}.png`` in it.

    Raises:
        InputError: an ending that is not known, or a path that cannot be written.
    """
    path = Path(output)
    if output.endswith("/") or path.is_dir() or not path.suffix:
        path = path / f"{_NAME}.png"
    return writable(path, (*paper.ENDINGS, *RAW))


def places(output: str | None, names: Sequence[str]) -> list[Path]:
    """The file of each item, whose ending decides what is written; one for all, if it can hold them.

    Args:
        output: a file, a folder (with a .png for each item), or a file with ``{name}`` in it.

    Raises:
        InputError: as ``place``, or one picture for several items.
    """
    path = place(output or ("out.png" if len(names) == 1 else "out"))
    if _NAME in str(path):
        return [Path(str(path).replace(_NAME, name)) for name in names]
    if len(names) > 1 and path.suffix not in paper.BOOKS:
        books = " or ".join(paper.BOOKS)
        raise InputError(
            f"{output} holds one of {len(names)} inputs: give a folder, {_NAME}{path.suffix}, or a {books}"
        )
    return [path] * len(names)


def raw_place(picture: Path, parts: Sequence[Any]) -> Path:
    """The file of raw values beside a picture: its name, then what tells it from others there."""
    ending = picture.suffix if picture.suffix in RAW else ".npz"
    said = [re.sub(r"[^\w+-]+", "-", str(part)).strip("-") for part in parts]
    return picture.with_name(".".join([picture.stem, *said]) + ending)
