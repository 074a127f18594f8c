"""An attribution as data: scaled, enlarged, ranked, joined, saved and loaded to the bit."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch

import libragrad_fx as lg
from libragrad_fx.errors import InputError
from tests.attribution.once import same_vit

F64 = torch.float64


@functools.cache
def answer(method: str) -> lg.Attribution:
    torch.manual_seed(0)
    return lg.attribute(same_vit(), torch.randn(2, 3, 32, 32, dtype=F64), [1, 0], method=method)


@pytest.fixture(scope="module")
def found() -> lg.Attribution:
    torch.manual_seed(0)
    return lg.attribute(same_vit(), torch.randn(3, 3, 32, 32, dtype=F64), [1, 0, 2])


def same(a: lg.Attribution, b: lg.Attribution) -> None:
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, torch.Tensor):
            assert x.dtype is y.dtype
            assert torch.equal(x.nan_to_num(-7.0), y.nan_to_num(-7.0)), field.name
        elif field.name == "others":
            assert x.keys() == y.keys()
            assert all(torch.equal(x[k], y[k]) for k in x)
        else:
            assert x == y, field.name


@pytest.mark.parametrize("ending", [".npz", ".safetensors", ".json"])
@pytest.mark.parametrize("method", ["fullgrad_plus", "xgradcam"])  # the second promises no sum: nan
def test_saved_and_loaded_to_the_bit(ending: str, method: str, tmp_path: Path) -> None:
    one = answer(method)
    one = dataclasses.replace(
        one, others={"x['b']": torch.rand(2, 5).float()}, tokens=(("a", "[SEP]"), ("ä", "")),
        target=((1, 2), 3),
    )
    file = tmp_path / "deep" / f"map{ending}"
    assert one.save(file) == file
    same(lg.Attribution.load(file), one)


@pytest.mark.parametrize("ending", [".npz", ".safetensors", ".json"])
def test_a_file_that_is_none(ending: str, tmp_path: Path, found: lg.Attribution) -> None:
    with pytest.raises(InputError, match="there is no file"):
        lg.Attribution.load(tmp_path / f"none{ending}")
    (tmp_path / f"odd{ending}").write_bytes(b"[1, 2]")
    with pytest.raises(InputError, match="odd"):
        lg.Attribution.load(tmp_path / f"odd{ending}")
    with pytest.raises(InputError, match=r"saved as \.npz"):
        found.save(tmp_path / "map.pt")
    with pytest.raises(InputError, match="cannot write"):
        found.save(tmp_path / f"odd{ending}" / f"map{ending}")


def test_it_prints_what_was_asked_and_what_maps_add_up_to(found: lg.Attribution) -> None:
    first, *samples = repr(found).splitlines()
    assert first == f"Attribution of FullGrad+, balanced: values {tuple(found.values.shape)}"
    assert [s.split(":")[0].strip() for s in samples] == ["class 1", "class 0", "class 2"]
    assert all(f"adds up to {t:.5g} (completeness" in s for s, t in zip(samples, found.total, strict=True))
    longer = {k: torch.cat([getattr(found, k)] * 7) for k in ("output", "total", "completeness_error")}
    many = dataclasses.replace(found, **longer, target=(0,) * 21, labels=("tench, Tinca",) * 21)
    assert "class 0 (tench): " in repr(many)
    assert repr(many).endswith("and 5 more")
    assert "  sample 2: " in repr(dataclasses.replace(found, target=(), labels=()))


def test_normalized_keeps_signs_and_rank(found: lg.Attribution) -> None:
    scaled = found.normalized()
    assert float(scaled.values.abs().max()) <= 1
    assert torch.equal(scaled.values.sign(), found.values.sign())
    whole = found.normalized(quantile=1.0)
    torch.testing.assert_close(whole.values.abs().amax((1, 2)), torch.ones(3, dtype=F64))
    nothing = dataclasses.replace(found, values=torch.zeros_like(found.values))
    assert torch.equal(nothing.normalized().values, nothing.values)


def test_upsample_is_bicubic(found: lg.Attribution) -> None:
    large = found.upsample((32, 32))
    assert large.grid == (32, 32)
    want = torch.nn.functional.interpolate(found.values[:, None], scale_factor=8, mode="bicubic")[:, 0]
    torch.testing.assert_close(large.values, want)
    row = dataclasses.replace(found, values=found.values.flatten(1))
    assert row.grid is None
    with pytest.raises(InputError, match="over no picture"):
        row.upsample((32, 32))


def test_topk_falls(found: lg.Attribution) -> None:
    best = found.topk(16)
    for values, row in zip(found.values, best, strict=True):
        numbers = [v for _, v in row]
        assert numbers == sorted(numbers, reverse=True)
        assert all(float(values[place]) == v for place, v in row)
    with pytest.raises(InputError, match="number of positions, 16"):
        found.topk(17)
