"""A selection is drawn by its seed alone, written down, and changes with what it holds."""

from __future__ import annotations

import dataclasses
import functools
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.data import Data, Item, Selection, Stored, folder, selected
from libragrad_fx.evaluate.data.items import hashed, sha256
from tests.evaluate.pictures import picture, put


def text(i: int, words: str = "w") -> Item:
    return Item(f"t{i}", f"{words}{i}", i % 3)


def noise(i: int, seed: int = 0, label: int | None = 1, share: int = 3) -> Item:
    mask = np.arange(96).reshape(8, 12) < share
    return Item(f"p{i}", picture(seed + i), label, {2: mask})


TEXTS = Data("texts", 50, text)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**32))
def test_the_order_is_that_of_datasets(n: int, seed: int) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    wanted = datasets.Dataset.from_dict({"i": [*range(n)]}).shuffle(seed=seed)["i"][:]
    assert [*selected(dataclasses.replace(TEXTS, count=n), None, seed).indices] == wanted


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(0, 99), st.integers(0, 49))
def test_a_filter_takes_out_of_one_order(count: int, seed: int, dropped: int) -> None:
    """What is left is the order without what the filter drops, cut after ``count``."""

    def keep(data: Data, index: int) -> bool:
        return index % 50 != dropped

    order = [i for i in selected(TEXTS, None, seed).indices if i != dropped]
    found = selected(TEXTS, min(count, 49), seed, keep)
    assert [*found.indices] == order[: min(count, 49)]
    assert found.ids == tuple(f"t{i}" for i in found.indices)
    assert found.keep.startswith("tests.evaluate.test_selection:")


def test_each_part_of_a_sample_is_in_its_hash() -> None:
    changed = [
        (text(1), text(1, "v")),
        (noise(1), noise(1, label=None)),
        (noise(1), noise(1, seed=5)),
        (noise(1), noise(1, share=4)),
    ]
    for a, b in changed:
        assert a.id == b.id
        assert hashed(a) != hashed(b)
    assert hashed(noise(1)) == hashed(noise(1))
    a, b = (selected(Data("d", 1, functools.partial(named, n)), 1, 0) for n in ("x", "y"))
    assert a.hashes == b.hashes
    assert a.digest != b.digest


def named(name: str, i: int) -> Item:
    return Item(name, "same")


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_where_a_part_ends_is_hashed(a: list[bytes], b: list[bytes]) -> None:
    assert (sha256(a) == sha256(b)) == (a == b)


def test_written_down_and_read_again(tmp_path: Path) -> None:
    found = selected(TEXTS, 7, 3)
    found.save(tmp_path / "deep" / "s.json")
    again = Selection.load(tmp_path / "deep" / "s.json")
    assert again == found
    assert again.digest == found.digest
    assert len(again) == 7
    again.check(TEXTS)
    body = (tmp_path / "deep" / "s.json").read_text("utf-8")
    for wrong in (body.replace('"t1', '"u1', 1), body.replace('"seed"', '"sead"'), "{", "[1]", "3"):
        (tmp_path / "s.json").write_text(wrong, "utf-8")
        with pytest.raises(InputError, match=r"no selection|changed after"):
            Selection.load(tmp_path / "s.json")
    with pytest.raises(InputError, match="no selection"):
        Selection.load(tmp_path / "none.json")


def test_a_picture_that_changes_changes_the_digest_and_is_found(tmp_path: Path) -> None:
    for i in range(4):
        put(tmp_path / "a" / f"{i}.png", picture(i))
    before = selected(folder(tmp_path), None, 0)
    file = tmp_path / "a" / "2.png"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # of the same size
    after = selected(folder(tmp_path), None, 0)
    assert after.ids == before.ids
    assert after.digest != before.digest
    assert sum(a != b for a, b in zip(after.hashes, before.hashes, strict=True)) == 1
    with pytest.raises(InputError, match=r"1 samples .* \(a/2.png\)"):
        before.check(folder(tmp_path))
    put(tmp_path / "a" / "9.png", picture(9))
    with pytest.raises(InputError, match="has 5 samples, and had 4"):
        before.check(folder(tmp_path))


def test_grey_pictures_are_dropped_before_the_first_n_and_broken_ones_stay(tmp_path: Path) -> None:
    for i in range(12):
        put(tmp_path / "a" / f"{i:02}.png", picture(i, mode="L" if i % 2 else "RGB"))
    (tmp_path / "a" / "04.png").write_bytes(b"broken")
    data = folder(tmp_path)
    order = [i for i in selected(data, None, 43).indices if i % 2 == 0]
    assert [*selected(data, 4, 43, "rgb").indices] == order[:4]
    assert 4 in selected(data, 6, 43, "rgb").indices
    with pytest.raises(InputError, match="has 6 samples that rgb keeps, not 7"):
        selected(data, 7, 43, "rgb")


def test_a_filter_by_masks() -> None:
    data = Data("d", 6, some_masked)
    assert sorted(selected(data, None, 0, "masked").indices) == [0, 2, 3, 4]


def some_masked(i: int) -> Item:
    if i == 3:
        raise InputError("broken")
    return noise(i) if i % 2 == 0 else Item(f"p{i}", picture(i))


def broken(i: int) -> Item:
    if i == 1:
        raise InputError("sample 1 is broken")
    return text(i)


def test_a_sample_that_cannot_be_read_is_selected_and_known_as_such() -> None:
    found = selected(Data("texts", 3, broken), 3, 0)
    assert dict(zip(found.ids, found.hashes, strict=True))["texts#1"] == ""


def test_wrong_requests() -> None:
    with pytest.raises(InputError, match="has 50 samples, not 51: ask for fewer"):
        selected(TEXTS, 51, 0)
    with pytest.raises(InputError, match="cannot select 0"):
        selected(TEXTS, 0, 0)
    with pytest.raises(InputError, match="no filter 'green': choose rgb, masked"):
        selected(TEXTS, 1, 0, "green")
    with pytest.raises(InputError, match="several samples with the id 'x'"):
        selected(Data("d", 2, functools.partial(named, "x")), 2, 0)
    with pytest.raises(InputError, match="empty has no samples"):
        Data("empty", 0, text)


def test_a_filter_by_name() -> None:
    name = "tests.evaluate.test_selection:last"
    wanted = [i for i in selected(TEXTS, None, 0).indices if i > 40][:3]
    assert [*selected(TEXTS, 3, 0, name).indices] == wanted
    assert selected(TEXTS, 3, 0, name) == selected(TEXTS, 3, 0, last)


def last(data: Data, index: int) -> bool:
    return index > 40


def test_what_a_sample_may_be() -> None:
    assert Item("a", "x", np.int64(3)).label == 3  # pyright: ignore[reportArgumentType]
    for label in (-1, 1.5):
        with pytest.raises(InputError, match="label"):
            Item("a", "x", label)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="no text"):
        Item("a", " \n")
    with pytest.raises(InputError, match="picture in L"):
        Item("a", Image.new("L", (3, 2)))
    for wrong in (np.ones((3, 2), bool), np.ones((2, 3), np.uint8)):
        with pytest.raises(InputError, match=r"not bool \(2, 3\)"):
            Item("a", Image.new("RGB", (3, 2)), 0, {0: wrong})


def test_a_set_goes_to_another_process() -> None:
    again = pickle.loads(pickle.dumps(TEXTS))
    assert selected(again, 5, 1) == selected(TEXTS, 5, 1)
    assert again.peek(3) == Stored("t3", hashed(text(3)))
