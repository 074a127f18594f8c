"""FunnyBirds' scores: closed forms of an additive model, and the protocol written as loops over samples."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from libragrad_fx.errors import InputError
from libragrad_fx.metrics import parts

F64 = torch.float64
Tensor = torch.Tensor
SOME = settings(max_examples=30, deadline=None)


def equal(a: Tensor, b: Any) -> None:
    want = torch.as_tensor(b, dtype=a.dtype)
    torch.testing.assert_close(a, want, rtol=0, atol=1e-12, equal_nan=True)


def drawn(seed: int, batch: int = 5, count: int = 4, classes: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of all sets (B, 2^P, C), importances (B, P), important parts (B, T, P)."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(batch, 2**count, classes, dtype=F64, generator=generator)
    found = torch.randn(batch, count, dtype=F64, generator=generator)
    return outputs, found, parts.important(found, found.sum(1), torch.linspace(0.01, 0.5, 7))


# --- sets


def test_sets_and_their_numbers() -> None:
    equal(parts.numbered(parts.subsets(5)), torch.arange(32))
    assert parts.subsets(3)[5].tolist() == [True, False, True]
    table = torch.arange(8.0)[None, :, None]
    assert parts.without_one(table)[0, :, 0].tolist() == [6, 5, 3]
    with pytest.raises(InputError, match="1 to 12 parts, not 20"):
        parts.subsets(20)
    with pytest.raises(InputError, match=r"\(B, 2\^P, ...\), not \(1, 7\)"):
        parts.without_one(torch.zeros(1, 7))


def variants(seed: int, classes: int, count: int, most: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(most, (classes, count), generator=generator).unique(dim=0)


@SOME
@given(seed=st.integers(0, 999), classes=st.integers(2, 7), most=st.integers(2, 4))
def test_sufficient_sets_by_their_definition(seed: int, classes: int, most: int) -> None:
    kinds = variants(seed, classes, 4, most)
    found = parts.sufficient(kinds)
    for k, kind in enumerate(kinds.tolist()):
        others = [o for i, o in enumerate(kinds.tolist()) if i != k]
        all_sets = [set(c) for n in range(5) for c in itertools.combinations(range(4), n)]
        enough = [s for s in all_sets if not any(all(o[p] == kind[p] for p in s) for o in others)]
        least = [s for s in enough if not any(t < s for t in enough)]
        assert {sum(2**p for p in s) for s in least} == set(found[k].nonzero().flatten().tolist())


def test_equal_classes_are_refused() -> None:
    with pytest.raises(InputError, match="two classes have the same parts"):
        parts.sufficient(torch.tensor([[0, 1], [1, 1], [0, 1]]))


@SOME
@given(seed=st.integers(0, 999))
def test_rivals_share_two_parts_each_and_not_the_same(seed: int) -> None:
    kinds = variants(seed, 12, 5, 3)
    for k, (a, b) in enumerate(parts.rivals(kinds).tolist()):
        same = (kinds == kinds[k]).tolist()
        shared = [{p for p in range(5) if row[p]} for row in same]
        pairs = [
            (i, j)
            for i, j in itertools.combinations([i for i, s in enumerate(shared) if len(s) == 2], 2)
            if not shared[i] & shared[j]
        ]
        assert (a, b) == (pairs[0] if pairs else (-1, -1))


# --- an additive model: the output of a class is the sum of the weights of the parts that it has


def additive(kinds: Tensor, weights: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of all sets (B, 2^P, K), and what each part adds to each class (B, K, P)."""
    adds = weights * (kinds[None] == kinds[labels][:, None])
    return torch.einsum("sp,bkp->bsk", parts.subsets(kinds.shape[1]).to(weights), adds), adds


KINDS = torch.tensor(
    [[0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [1, 1, 0, 0, 2], [2, 1, 1, 2, 0], [1, 2, 2, 0, 1], [2, 2, 1, 2, 2]]
)
WEIGHTS = torch.tensor([1.0, 1.3, 1.7, 2.2, 0.4], dtype=F64)


def test_the_truth_has_the_best_scores() -> None:
    labels = torch.tensor([0, 1, 2])
    outputs, adds = additive(KINDS, WEIGHTS, labels)
    rows = torch.arange(3)
    mine, truth = outputs[rows, :, labels], adds[rows, labels]
    alone = parts.without_one(mine)
    equal(parts.single_deletion(truth, mine[:, -1], alone), torch.ones(3, dtype=F64))
    equal(parts.single_deletion(-truth, mine[:, -1], alone), torch.zeros(3, dtype=F64))
    chosen = parts.important(truth, truth.sum(1), torch.tensor([0.0, 0.2, 0.5]))
    enough = parts.sufficient(KINDS)[labels]
    equal(parts.synthetic_check(chosen, enough, labels > 0)[:, 0], [math.nan, 1, 1])
    equal(parts.preservation_check(chosen, outputs)[:, 0], [1.0, 1, 1])
    equal(parts.deletion_check(chosen, outputs)[:, 2], [0.0, 0, 0])  # no part is half: none is removed
    equal(parts.preservation_check(chosen, outputs)[1:, 2], [0.0, 0])  # none is kept: class 0 is predicted


def test_target_sensitivity_of_the_truth_of_its_opposite_and_of_no_rivals() -> None:
    """Class 0 shares parts 0 and 1 with class 1, and 2 and 3 with class 2."""
    both = parts.rivals(KINDS)
    assert both[0].tolist() == [1, 2]
    outputs, adds = additive(KINDS, WEIGHTS, torch.tensor([0]))
    truth = adds[:, both[0]]
    shared = (KINDS[both[0]] == KINDS[0])[None]
    theirs = outputs[..., both[0]]
    equal(parts.target_sensitivity(truth, shared, theirs), [1.0])
    equal(parts.target_sensitivity(-truth, shared, theirs), [0.0])
    one = truth[:, :1].expand(1, 2, 5)  # one map for both
    equal(parts.target_sensitivity(one, shared, theirs), [0.0])
    half = torch.stack((truth[:, 0], torch.zeros(1, 5, dtype=F64)), 1)
    equal(parts.target_sensitivity(half, shared, theirs), [0.5])
    equal(parts.target_sensitivity(truth, shared, -theirs), [math.nan])  # the model itself disagrees
    equal(parts.target_sensitivity(truth, torch.zeros_like(shared), theirs), [math.nan])


def test_the_background() -> None:
    clean = torch.tensor([2.0, -2.0])
    without = torch.tensor([[1.0, 1.95, 2.5, 0.0], [-2.2, -2.05, -1.0, -9.0]])  # matters, not, not, matters
    equal(parts.background_independence(clean, without), torch.tensor([0.5, 0.5], dtype=F64))
    chosen = torch.tensor([[[1, 1, 0, 0], [0, 1, 1, 1]], [[1, 0, 0, 1], [0, 0, 1, 0]]]).bool()
    equal(parts.distractibility(chosen, clean, without), torch.tensor([[0.5, 0], [1, 0.5]], dtype=F64))
    all_matter = parts.distractibility(chosen[:1], clean[:1], torch.zeros(1, 4))
    equal(all_matter, torch.full((1, 2), math.nan, dtype=F64))


# --- the protocol, sample by sample, as the authors' loops go


@SOME
@given(seed=st.integers(0, 9999))
def test_checks_are_those_of_the_loops(seed: int) -> None:
    outputs, found, chosen = drawn(seed)
    kinds = variants(seed, 6, 4, 3)
    labels = torch.arange(5) % len(kinds)
    enough = parts.sufficient(kinds)[labels]
    csdc = parts.synthetic_check(chosen, enough, torch.ones(5, dtype=torch.bool))
    pc, dc = parts.preservation_check(chosen, outputs), parts.deletion_check(chosen, outputs)
    for b, t in itertools.product(range(5), range(7)):
        picked = {p for p in range(4) if found[b, p] > found[b].sum() * torch.linspace(0.01, 0.5, 7)[t]}
        number = sum(2**p for p in picked)
        before = int(outputs[b, 15].argmax())
        assert float(pc[b, t]) == (int(outputs[b, number].argmax()) == before)
        assert float(dc[b, t]) == (int(outputs[b, 15 - number].argmax()) != before)
        sets = [{p for p in range(4) if s >> p & 1} for s in enough[b].nonzero().flatten().tolist()]
        best = max((len(s & picked) / len(s) for s in sets), default=0.0)
        assert float(csdc[b, t]) == pytest.approx(best)


@SOME
@given(seed=st.integers(0, 9999))
def test_single_deletion_is_scipys_correlation(seed: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason="of the extra evaluate")
    outputs, found, _ = drawn(seed)
    mine = outputs[..., 0]
    score = parts.single_deletion(found.round(), mine[:, -1], parts.without_one(mine))
    for b in range(5):
        if found[b].round().unique().numel() == 1:
            assert math.isnan(score[b])
            continue
        drops = [float(mine[b, 15] - mine[b, 15 - 2**p]) for p in range(4)]
        rho = stats.spearmanr(drops, found[b].round().tolist()).statistic
        assert float(score[b]) == pytest.approx(0.5 + 0.5 * rho)


# --- from maps, and together


def test_importance_counts_a_margin() -> None:
    maps, where = torch.ones(2, 9, 9), torch.zeros(2, 2, 9, 9)
    where[:, 0, 4, 4], where[:, 1, 0, 0] = 1, 1
    equal(parts.importance(maps, where), torch.tensor([[25.0, 9], [25, 9]], dtype=F64))
    equal(parts.importance(-maps[:, None], where, margin=0), -torch.ones(2, 2, dtype=F64))
    with pytest.raises(InputError, match=r"parts are \(B, P, H, W\)"):
        parts.importance(maps, where[..., :8])
    with pytest.raises(InputError, match="nan or inf in samples 0, 1"):
        parts.importance(maps * torch.nan, where)


def test_scores_take_one_threshold_and_say_of_how_many() -> None:
    nan, shares = math.nan, torch.tensor([0.1, 0.3])
    given = {
        "csdc": torch.tensor([[1.0, 0.5], [nan, nan]]),
        "pc": torch.tensor([[1.0, 0.0], [0.5, 0.0]]),
        "dc": torch.tensor([[0.0, 1.0], [0.5, 0.0]]),
        "distracted": torch.tensor([[0.2, 0.9], [0.4, 0.9]]),
        "independent": torch.tensor([1.0, 0.5]),
        "deleted": torch.tensor([0.9, nan]),
        "sensitive": torch.tensor([0.5, 1.0]),
    }
    # at 0.1: (1 + 0.75 + 0.25) / 3 + 0.3; at 0.3: (0.5 + 0 + 0.5) / 3 + 0.9
    found = parts.scores(**given, shares=shares)
    assert found.threshold == pytest.approx(0.3)
    assert (found.csdc, found.pc, found.dc) == (0.5, 0, 0.5)
    assert found.distractibility == pytest.approx(0.9)
    assert found.completeness == pytest.approx((1 / 3 + 0.9) / 2)
    assert (found.correctness, found.contrastivity) == pytest.approx((0.9, 0.75))
    assert found.background_independence == 0.75
    assert found.mean == pytest.approx((found.completeness + 0.9 + 0.75) / 3)
    assert (found.samples["csdc"], found.samples["pc"], found.samples["single_deletion"]) == (1, 2, 1)
    with pytest.raises(InputError, match="nan for all samples: target_sensitivity"):
        parts.scores(**(given | {"sensitive": torch.tensor([nan, nan])}), shares=shares)
