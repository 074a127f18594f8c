"""Texts and labels in files, as they are in them and nothing else."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.data import Data, Item, table
from libragrad_fx.evaluate.data.items import indexed

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=9).filter(str.strip)


def items(data: Data) -> list[Item]:
    again = pickle.loads(pickle.dumps(data))
    return [again.get(i) for i in range(again.count)]


def write(file: Path, rows: Sequence[Sequence[str]], head: Sequence[str] = ("text", "label")) -> Path:
    with file.open("w", encoding="utf-8", newline="") as opened:
        csv.writer(opened).writerows([head, *rows])
    return file


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(WORDS, st.integers(0, 9)), min_size=1, max_size=5))
def test_any_text_comes_back(tmp_path: Path, rows: list[tuple[str, int]]) -> None:
    """NA, null, 007 and quotes too, which readers of numbers change silently."""
    file = write(tmp_path / "x.csv", [(t, str(n)) for t, n in rows])
    lines = tmp_path / "x.jsonl"
    lines.write_text("".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in rows), "utf-8")
    for data in (table(file), table(lines)):
        assert [(i.content, i.label) for i in items(data)] == rows
        assert [i.id for i in items(data)] == [str(n) for n in range(1, len(rows) + 1)]


@pytest.mark.parametrize("word", ["NA", "null", "", "007", "1e5", "true", 'say "no"', "a,b", "two\nlines"])
def test_words_that_readers_change(tmp_path: Path, word: str) -> None:
    data = table(write(tmp_path / "x.csv", [(word, "0"), ("x", "1")]))
    if word:
        assert data.get(0).content == word
    else:
        with pytest.raises(InputError, match="1 has no text"):
            data.get(0)
    assert data.get(1).content == "x"


def test_quotes_in_tsv_are_letters(tmp_path: Path) -> None:
    """As in GLUE's files, where one alone would swallow the rows after it."""
    (tmp_path / "x.tsv").write_text('text\tlabel\n"open\t1\nclosed"\t0\n', "utf-8")
    assert [i.content for i in items(table(tmp_path / "x.tsv"))] == ['"open', 'closed"']
    (tmp_path / "x.tsv").write_text('text\tlabel\n"a\tb"\t1\n', "utf-8")
    assert table(tmp_path / "x.tsv", quoted=True).get(0).content == "a\tb"


def test_names_of_classes(tmp_path: Path) -> None:
    file = write(tmp_path / "x.csv", [("a", "pos"), ("b", "neg"), ("c", "")])
    data = table(file)
    assert data.classes == ("neg", "pos")
    assert [i.label for i in items(data)] == [1, 0, None]
    data = table(file, classes=["pos", "neg"])
    assert [i.label for i in items(data)] == [0, 1, None]
    data = table(file, classes=["pos", "other"])
    assert data.get(0).label == 0
    with pytest.raises(InputError, match="2: label 'neg' is none of its 2 classes"):
        data.get(1)


def test_labels_that_could_mean_anything() -> None:
    for labels in (["-1", "1"], ["0.0", "1.0"], ["1", "cat"]):
        with pytest.raises(InputError, match=r"neither indices from 0 nor all names: give classes"):
            indexed(labels)
    assert indexed(["-1", "1"], ["-1", "1"])[0] == [0, 1]
    out_of_range, _ = indexed([0, 2, 3], ["a", "b", "c"])
    assert out_of_range == [0, 2, "label '3' is none of its 3 classes"]


def test_columns_and_ids(tmp_path: Path) -> None:
    file = write(tmp_path / "x.csv", [("a", "1", "k1"), ("b", "0", "k2")], ("sentence", "y", "key"))
    with pytest.raises(InputError, match="no column 'text', but sentence, y, key: say content=COLUMN"):
        table(file)
    found = items(table(file, content="sentence", label="y", id="key"))
    assert [(i.id, i.content, i.label) for i in found] == [("k1", "a", 1), ("k2", "b", 0)]
    assert [i.label for i in items(table(file, content="sentence", label=None))] == [None, None]
    write(file, [("a", "k"), ("b", "k")], ("text", "key"))
    with pytest.raises(InputError, match=r"2 rows of x\.csv have the id 'k'"):
        table(file, label=None, id="key")
    write(file, [("a", "b")], ("text", "text"))
    with pytest.raises(InputError, match="several columns called 'text'"):
        table(file, label=None)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    for name, body in {
        "x.csv": b"text,label\na,1,2\n", "y.csv": b"text,label\n\xff,1\n", "z.csv": b"",
        "x.jsonl": b'{"text": ', "x.txt": b"text", "u.csv": b'text,label\n"open,1\n',
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(body)
        with pytest.raises(InputError, match=rf"{name}.*Give a .csv"):
            table(tmp_path / name)
    with pytest.raises(InputError, match="there is no"):
        table(tmp_path / "nowhere.csv")
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbftext,label\n")
    with pytest.raises(InputError, match="x has no samples"):
        table(tmp_path / "x.csv")
