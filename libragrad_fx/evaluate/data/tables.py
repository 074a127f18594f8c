"""Texts and labels in files of rows: CSV, TSV and JSON lines."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.data.files import there
from libragrad_fx.evaluate.data.items import Data, Item, Label, checked, indexed
from libragrad_fx.extras import need
from libragrad_fx.models import first_line

HOW = "Give a .csv, .tsv or .jsonl file of UTF-8 with a column of texts and one of labels."


@dataclasses.dataclass(frozen=True)
class Texts:
    """Samples in rows, as ``Data.get``."""

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    labels: tuple[Label, ...]

    def __call__(self, index: int) -> Item:
        name = self.ids[index]
        return Item(name, self.texts[index], checked(self.labels[index], name))


def table(
    file: str | Path,
    content: str = "text",
    label: str | None = "label",
    id: str | None = None,
    classes: Sequence[str] = (),
    quoted: bool | None = None,
) -> Data:
    """Texts with labels. Its ending says what a file is.

    Args:
        content, label: their columns; ``label=None`` for a file without labels.
        id: a column of ids. Without it a sample is called by its row, from 1.
        classes: names in the order of the model's outputs. Without it labels are indices, or are sorted.
        quoted: whether fields may stand in double quotes. CSV files do so, and TSV files usually do not.

    Raises:
        InputError: there is no such file or column, it cannot be read, or two rows have one id.
    """
    path = there(file, HOW)
    columns = _columns(path, quoted)
    if lacking := [c for c in (content, label, id) if c is not None and c not in columns]:
        raise InputError(
            f"{path.name} has no column {lacking[0]!r}, but {', '.join(columns)}: say content=COLUMN and"
            " label=COLUMN (None for a file without labels)"
        )
    texts = ["" if t is None else str(t) for t in columns[content]]
    labels, names = indexed(columns[label], classes) if label else ([None] * len(texts), tuple(classes))
    ids = [str(v) for v in columns[id]] if id else [str(n) for n in range(1, len(texts) + 1)]
    name, n = next(iter(Counter(ids).most_common(1)), ("", 0))
    if n > 1:
        raise InputError(f"{n} rows of {path.name} have the id {name!r}: ids must differ")
    get = Texts(tuple(ids), tuple(texts), tuple(labels))
    return Data(path.stem, len(texts), get, names, f"the file {path.name}")


def _columns(path: Path, quoted: bool | None) -> dict[str, list[Any]]:
    """Columns by name. Fields of CSV and TSV stay texts: "NA" is one, and "007" no number."""
    arrow, ending = need("pyarrow", "data"), path.suffix.lower()
    try:
        if ending in (".jsonl", ".ndjson"):
            return need("pyarrow.json", "data").read_json(path).to_pydict()
        if ending not in (".csv", ".tsv"):
            raise InputError(f"{path.name} is no table that is read. {HOW}")
        csv, tabs = need("pyarrow.csv", "data"), ending == ".tsv"
        quotes = quoted if quoted is not None else not tabs
        parse = csv.ParseOptions(
            delimiter="\t" if tabs else ",", quote_char='"' if quotes else False, newlines_in_values=quotes
        )
        with path.open(encoding="utf-8-sig", newline="") as opened:
            head = opened.readline()
        names = csv.read_csv(arrow.py_buffer(head.encode()), parse_options=parse).column_names
        if twice := [name for name, n in Counter(names).items() if n > 1]:
            raise InputError(f"{path.name} has several columns called {twice[0]!r}")
        texts = csv.ConvertOptions(
            column_types={n: arrow.string() for n in names}, strings_can_be_null=False
        )
        return csv.read_csv(path, parse_options=parse, convert_options=texts).to_pydict()
    except (arrow.ArrowException, OSError, ValueError) as e:
        raise InputError(f"cannot read {path.name}: {first_line(e)}. {HOW}") from e
