"""Insects: exact masks and removal, the same from the same seed; FunnyBirds' protocol from end to end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from libragrad_fx.errors import InputError
from libragrad_fx.metrics import parts
from zoo import articles

Tensor = torch.Tensor
FEW = settings(max_examples=8, deadline=None)


@FEW
@given(seed=st.integers(0, 10**6), number=st.integers(0, 4), what=st.sampled_from(["part", "object"]))
def test_removal_changes_the_mask_and_nothing_else(seed: int, number: int, what: str) -> None:
    seen = articles.scenes(articles.classes(6), 3, seed)
    kept = torch.ones(3, 5 if what == "part" else 6, dtype=torch.bool)
    kept[:, number] = False
    where = (articles.masks if what == "part" else articles.object_masks)(seen)[:, number]
    whole = articles.pictures(seen)
    less = articles.pictures(seen, parts=kept) if what == "part" else articles.pictures(seen, objects=kept)
    changed = (whole != less).any(1)
    assert not bool((changed & ~where).any())
    assert what == "object" or int(where.sum((1, 2)).min()) > 40  # all parts are seen
    assert what == "object" or float(changed.sum() / where.sum()) > 0.5  # some hide what has their colour


def test_what_is_hidden_is_not_in_the_mask() -> None:
    seen = articles.scenes(articles.classes(6), 8)
    where = articles.masks(seen)
    assert float((where.sum(1) > 1).float().mean()) < 0.02  # pixels at the edge of two parts
    bare = articles.pictures(seen, parts=torch.zeros(8, 5, dtype=torch.bool))
    assert not bool(((bare != articles.pictures(seen)).any(1) & ~where.any(1)).any())


def test_one_by_one_as_in_a_batch_and_from_the_same_seed() -> None:
    kinds = articles.classes(7, seed=3)
    seen = articles.scenes(kinds, 4, seed=5)
    x = articles.pictures(seen)
    assert (x.shape, x.dtype) == ((4, 3, 96, 96), torch.float32)
    assert 0 <= float(x.min()) < float(x.max()) <= 1
    assert all(torch.equal(articles.pictures(seen[i : i + 1])[0], x[i]) for i in range(4))
    assert torch.equal(articles.pictures(articles.scenes(kinds, 4, seed=5)), x)
    assert not torch.equal(articles.pictures(articles.scenes(kinds, 4, seed=6)), x)
    assert seen.labels.tolist() == [0, 1, 2, 3]
    assert torch.equal(seen.variants, kinds[:4])


@pytest.mark.parametrize("count", [5, 10, 50])
def test_classes_differ_and_have_rivals(count: int) -> None:
    found = articles.classes(count)
    assert len(found.unique(dim=0)) == count
    assert bool((parts.rivals(found) >= 0).all())
    assert bool((found < torch.tensor([len(v) for v in articles.PARTS.values()])).all())
    with pytest.raises(InputError, match="5 to 500 classes"):
        articles.classes(2)


def test_answers_without_some_parts() -> None:
    kinds = articles.classes(10)
    seen = articles.scenes(kinds, 40)
    shown = articles.missing(40, seed=1)
    found = articles.answers(kinds, seen, shown)
    torch.testing.assert_close(found.sum(1), torch.ones(40))
    assert bool((found[torch.arange(40), seen.labels] > 0).all())
    whole = torch.ones(40, 5, dtype=torch.bool)
    assert torch.equal(articles.answers(kinds, seen, whole).argmax(1), seen.labels)
    assert torch.equal(articles.answers(kinds, seen, ~whole), torch.full((40, 10), 0.1))
    assert 0.3 < float(shown.all(1).float().mean()) < 0.8


def test_the_protocol_from_end_to_end() -> None:
    """A linear model and its exact map: the difference to the picture without parts, times the weights."""
    torch.manual_seed(0)
    kinds = articles.classes(5)
    seen = articles.scenes(kinds, 5)
    weights = torch.randn(5, 3, 96, 96) / 96
    blank = articles.pictures(seen, parts=torch.zeros(5, 5, dtype=torch.bool))

    def forward(x: Tensor) -> Tensor:
        return x.flatten(1) @ weights.flatten(1).T

    def explain(x: Tensor, targets: Tensor) -> Tensor:
        return (weights[targets] * (x - blank)).sum(1)

    found = articles.measured(forward, explain, kinds, seen, margin=0)
    assert float(found["deleted"].mean()) > 0.9  # parts overlap a little: removal shows what they hid
    assert {n: tuple(v.shape) for n, v in found.items()} == {
        "csdc": (5, 80), "pc": (5, 80), "dc": (5, 80), "distracted": (5, 80),
        "independent": (5,), "deleted": (5,), "sensitive": (5,),
    }  # fmt: skip

    def opposite(x: Tensor, targets: Tensor) -> Tensor:
        return -3 * (weights[targets] * (x - blank[4:])).sum(1)

    last = articles.measured(forward, opposite, kinds, seen[4:], margin=0)
    torch.testing.assert_close(last["deleted"], 1 - found["deleted"][4:])
    torch.testing.assert_close(last["independent"], found["independent"][4:])
