"""A rival that patches classes runs in a process of its own, and leaves nothing in this one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from libragrad_fx.errors import InputError, LibraGradError
from libragrad_fx.evaluate.measures import Logit, Probability
from libragrad_fx.evaluate.runner import recorded
from tests.evaluate import small
from zoo import rivals

FAKE = """
import torch
torch.nn.Linear.forward = lambda self, x: x * 0  # patches a class
def attribute(model, x, target, attn_mode="cp"):
    if target == 2:
        raise ValueError("no port for this")
    assert float(model(x).abs().sum()) == 0  # the patch is there
    return {"pixel_map": x[0].sum(0) * (target + (attn_mode == "attnlrp"))}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "hilrp").mkdir()
    (tmp_path / "hilrp" / "__init__.py").write_text(FAKE)
    monkeypatch.setenv(rivals.FOLDER, str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_it_explains_the_classes_that_are_asked_for(folder: Path) -> None:
    x, net = torch.randn(3, 3, 24, 24), small.net()
    before = net(x)
    found = rivals.hilrp(net, x, Logit(torch.tensor([0, 1, 1])))
    assert torch.equal(found, torch.stack([x[0].sum(0) * 0, x[1].sum(0), x[2].sum(0)]))
    found = rivals.attnlrp(net, x[:1], Probability(torch.tensor([1])))
    assert torch.equal(found, 2 * x[:1].sum(1))
    assert "hilrp" not in sys.modules
    assert torch.equal(net(x), before)


@pytest.mark.slow
def test_what_fails_there_is_said_here(folder: Path) -> None:
    with pytest.raises(InputError, match="HiLRP fails: ValueError: no port for this"):
        rivals.hilrp(small.net(), torch.randn(1, 3, 24, 24), Logit(torch.tensor([2])))


def test_without_it_an_evaluation_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not installed would fail everywhere: it is no result."""
    monkeypatch.delenv(rivals.FOLDER, raising=False)
    with pytest.raises(LibraGradError, match=r"see zoo/rivals\.py") as caught:
        rivals.hilrp(small.net(), torch.randn(1, 3, 24, 24), Logit(torch.tensor([0])))
    assert not recorded(caught.value)
