"""A searched policy is one that the loader takes, and libra's choice is libra."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import libragrad_fx as lg
from libragrad_fx.attribution import blocks
from libragrad_fx.decide import rulebook
from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.search import HALVES, PAPER, SITES, SearchConfig, policy_text, search
from tests.evaluate import nets

LIBRA = {f"{half}.{site}": PAPER[site] for half in HALVES for site in SITES}


X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass(frozen=True)
class Known:
    """A network, its blocks, and its gradient under libra."""

    net: nn.Module
    blocks: list[str]
    libra: torch.Tensor


@pytest.fixture(scope="module")
def known() -> Known:
    net = nets.net().double()
    found = lg.transform(net, X)
    return Known(net, blocks(found), gradient(found))


def gradient(module: nn.Module) -> torch.Tensor:
    x = X.clone().requires_grad_()
    return torch.autograd.grad(module(x)[:, 0].sum(), x)[0]


def under(known: Known, choice: dict[str, str], file: Path) -> torch.Tensor:
    file.write_text(policy_text(choice, known.blocks))
    return gradient(lg.transform(known.net, X, policy=file, check=False))


def test_the_papers_choice_is_libra(known: Known, tmp_path: Path) -> None:
    assert torch.equal(under(known, LIBRA, tmp_path / "paper.yaml"), known.libra)


@pytest.mark.parametrize("key", [
    k if k == "early.value" else pytest.param(k, marks=pytest.mark.slow) for k in LIBRA
])
def test_every_other_choice_changes_the_gradient(known: Known, key: str, tmp_path: Path) -> None:
    other = next(a for a in SITES[key.partition(".")[2]] if a != LIBRA[key])
    assert not torch.allclose(under(known, {**LIBRA, key: other}, tmp_path / "other.yaml"), known.libra)


@settings(max_examples=25, deadline=None)
@given(st.fixed_dictionaries({k: st.sampled_from(SITES[k.partition(".")[2]]) for k in LIBRA}))
def test_any_choice_is_a_policy(choice: dict[str, str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "any.yaml"
        file.write_text(policy_text(choice, [f"blocks.{i}" for i in range(4)]))
        rulebook.load(file)


@pytest.mark.slow
def test_a_search_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """On pictures of noise: the law here is that trials are kept, and that nothing is compared on what was
    searched."""
    said = {
        "models": {"net": {"load": "tests.evaluate.nets:net", "steps": "tests.evaluate.nets:steps"}},
        "data": {n: {"load": "tests.evaluate.nets:noise", "args": {"seed": i}, "count": 4}
                 for i, n in enumerate("ab")},
        "search": {"models": ["net"], "data": "a"}, "held_out": {"models": ["net"], "data": "b"},
        "tokens": {"ratios": [0.5]}, "trials": 2, "batch": 4,
    }  # fmt: skip
    seen: list[int] = []
    first = search(SearchConfig.model_validate(said), tmp_path, lambda n, _: seen.append(n))
    assert first.value >= first.libra  # libra is the first trial
    more = search(SearchConfig.model_validate({**said, "trials": 3}), tmp_path, lambda n, _: seen.append(n))
    assert (seen, more.trials) == ([0, 1, 2], 3)
    assert {p.name for p in tmp_path.iterdir()} >= {"study.db", "found.json", "found-net.yaml"}
    assert more.compared["net"].difference.n == 4


def test_a_search_on_what_it_is_compared_on_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "search.yaml"
    file.write_text("models: {m: {load: x}}\ndata: {d: {load: y}}\nsearch: {models: [m], data: d}\n"
                    "held_out: {models: [m], data: d}\n")  # fmt: skip
    with pytest.raises(InputError, match="on the same set"):
        SearchConfig.load(file)
