"""Sets in the form of Hugging Face's ``datasets``: of its hub, saved to disk, or in parquet files."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.data.files import mode_of
from libragrad_fx.evaluate.data.items import Data, Item, Label, Stored, checked, indexed, sha256
from libragrad_fx.extras import need, quiet
from libragrad_fx.models import decoded, first_line

HUB = (
    "A set of the hub needs a network, and some a login (`hf auth login`) after their terms are accepted;"
    " elsewhere `hf download --repo-type dataset {} --local-dir FOLDER`, and give hf:FOLDER."
)
LOCAL = "Give a folder of Hugging Face's save_to_disk, or one of parquet files or of pictures."
"""How to get a set."""

SECONDS = 3
"""How long the hub may take to answer at all."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Samples in rows of a ``datasets.Dataset``, as ``Data.get``. Pictures are there undecoded."""

    rows: Any
    split: str
    content: str
    labels: tuple[Label, ...]
    id: str | None = None

    def __call__(self, index: int) -> Item:
        name, found = self._name(index), self.rows[index][self.content]
        label = checked(self.labels[index], name)
        if isinstance(found, str):
            return Item(name, found, label)
        return Item(name, decoded(io.BytesIO(_body(found, name)), name), label)

    def stored(self, index: int) -> Stored:
        name, found = self._name(index), self.rows[index][self.content]
        label = str(self.labels[index]).encode()
        if isinstance(found, str):
            return Stored(name, sha256([found.encode(), label]))
        try:
            body = _body(found, name)
        except InputError:
            return Stored(name, "")
        return Stored(name, sha256([body, label]), mode_of(body))

    def _name(self, index: int) -> str:
        return f"{self.split}/{index}" if self.id is None else str(self.rows[index][self.id])


def _body(found: Any, name: str) -> bytes:
    """The bytes of a picture: in its row, or in a file that the row names."""
    if found and found.get("bytes"):
        return found["bytes"]
    if not found or not found.get("path"):
        raise InputError(f"{name} has no picture")
    try:
        return Path(found["path"]).read_bytes()
    except OSError as e:
        raise InputError(f"{name} has no picture: {first_line(e)}") from e


def hugging_face(
    where: str | Path,
    split: str | None = None,
    config: str | None = None,
    content: str | None = None,
    label: str | None = "label",
    id: str | None = None,
    classes: Sequence[str] = (),
    several: bool = False,
) -> Data:
    """A set of pictures or texts: a folder of ``save_to_disk``, a file or folder that ``datasets`` reads
    (parquet, pictures, ...), or a name on the hub, which is asked last.

    Args:
        split: such as "validation"; needless if there is one.
        config: the variant of a set on the hub that has several.
        content: the column of pictures or texts; needless if one column holds pictures, or is called
            "text", or is the only one that holds text.
        label: the column of labels: indices, names, or lists of them; None for a set without.
        id: a column of ids. Without it a sample is called by its split and row.
        classes: names by index, where the set does not say them.
        several: whether to take the first of several labels, as LibraGrad does for ImageNet-Hard.

    Raises:
        InputError: there is no such set, split or column, or the hub cannot be reached.
    """
    rows, part = _split(_loaded(str(where), split, config), split, str(where))
    column = content or _content(rows)
    if lacking := [c for c in (column, label, id) if c is not None and c not in rows.column_names]:
        raise InputError(
            f"{where} has no column {lacking[0]!r}, but {', '.join(rows.column_names)}: say content=COLUMN,"
            " label=COLUMN (None for a set without labels)"
        )
    labels, names = _labels(rows, label, classes, several)
    rows = rows.select_columns([c for c in (column, id) if c is not None])
    if hasattr(rows.features[column], "decode"):
        rows = rows.cast_column(column, need("datasets", "data").Image(decode=False))
    get = Rows(rows, part, column, tuple(labels), id)
    name = f"{Path(where).name}-{part}"
    origin = f"{Path(where).name if Path(where).exists() else where}, split {part} (Hugging Face datasets)"
    return Data(name, len(rows), get, names, origin, get.stored)


def imagenet_hard(where: str | Path = "taesiri/imagenet-hard", split: str = "validation") -> Data:
    """ImageNet-Hard (Taesiri et al. 2023): pictures with several labels of ImageNet; the first counts.

    Raises:
        InputError: as ``hugging_face``.
    """
    return hugging_face(where, split, several=True)


# --- reading


def _loaded(where: str, split: str | None, config: str | None) -> Any:
    datasets, place = need("datasets", "data"), Path(where).expanduser()
    try:
        with quiet():
            if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
                return datasets.load_from_disk(str(place))
            if place.is_file():
                kind = {"jsonl": "json", "arrow": "arrow"}.get(place.suffix[1:], place.suffix[1:])
                return datasets.load_dataset(kind, data_files=str(place))
            if place.is_dir():
                return datasets.load_dataset(str(place), config)
            if where.startswith((".", "/", "~")):
                raise InputError(f"there is no {where!r}. {LOCAL}")
            with _online():
                return datasets.load_dataset(where, config, split=split)
    except InputError:
        raise
    except Exception as e:  # readers, hub and network raise types of several libraries
        how = LOCAL if place.exists() else HUB.format(where)
        raise InputError(f"cannot load {where}: {first_line(e)}. {how}") from e


def _split(found: Any, split: str | None, where: str) -> tuple[Any, str]:
    """The rows of a split, and its name."""
    if not hasattr(found, "keys"):
        return found, split or str(found.split or "rows")
    names = [*found.keys()]
    part = names[0] if split is None and len(names) == 1 else split
    if part is None or part not in names:
        raise InputError(f"{where} has the splits {', '.join(names)}, not {part}: say {where}@SPLIT")
    return found[part], part


def _content(rows: Any) -> str:
    """The column of pictures, else the column of texts."""
    kinds = {name: type(feature).__name__ for name, feature in rows.features.items()}
    pictures = [name for name, kind in kinds.items() if kind == "Image"]
    texts = [n for n, f in rows.features.items() if getattr(f, "dtype", "") in ("string", "large_string")]
    texts = texts if kinds.get("text") is None else ["text"]
    found = pictures or texts
    if len(found) != 1:
        raise InputError(f"say content=COLUMN, which of {', '.join(rows.column_names)} is to be explained")
    return found[0]


def _labels(
    rows: Any, column: str | None, classes: Sequence[str], several: bool
) -> tuple[list[Label], tuple[str, ...]]:
    """The labels of all rows, and the classes' names."""
    if column is None:
        return [None] * len(rows), tuple(classes)
    feature = rows.features[column]
    found = rows[column][:]
    if any(isinstance(v, list) for v in found):
        if not several:
            raise InputError(f"{column!r} holds several labels: say several=True to take the first")
        found = [(v or [None])[0] if isinstance(v, list) else v for v in found]
    names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
    if names:  # a test split without labels says -1
        found = [None if v == -1 else v for v in found]
        return indexed(found, classes or names)
    return indexed([int(v) if isinstance(v, bool) else v for v in found], classes)


@contextlib.contextmanager
def _online() -> Iterator[None]:
    """Where the hub does not answer, only what is cached is looked for; its clients would try for long."""
    hub, config = (need(n, "data") for n in ("huggingface_hub.constants", "datasets.config"))
    before = [(module, module.HF_HUB_OFFLINE) for module in (hub, config)]
    reached = any(was for _, was in before) or _reachable(hub.ENDPOINT)
    try:
        for module, was in before:
            module.HF_HUB_OFFLINE = was or not reached
        yield
    finally:
        for module, was in before:
            module.HF_HUB_OFFLINE = was


def _reachable(address: str) -> bool:
    """Whether a server answers, whatever it says. A look-up of its name has no time-out of its own."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SECONDS)
        except urllib.error.HTTPError:
            pass
        except (OSError, ValueError):
            return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS)
    return answered.is_set()
