"""Training of the zoo: a run that was killed goes on to the same weights; masks teach what they show."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from libragrad_fx.demo import sources
from zoo import trained

pytest.importorskip("timm", reason="timm is not installed: pip install timm")
pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """``tools/train_zoo.py``: a script, and no part of a package."""
    path = Path(__file__).parents[2] / "tools" / "train_zoo.py"
    spec = importlib.util.spec_from_file_location("train_zoo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_to_the_same_weights(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sources.VARIABLE, str(tmp_path))
    monkeypatch.setattr(tool, "SAVE_EVERY", -1)  # after each step
    trained.folder().mkdir()
    recipe = trained.Recipe("a small net", nn.Identity, samples=0)
    x, y = torch.randn(12, 8, 5), torch.randint(3, (12, 8))

    def trained_net(seed: int, dies_at: int) -> nn.Module:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(5, 20), nn.GELU(), nn.Dropout(0.2), nn.Linear(20, 3))
        run = tool.Run("net", seed, recipe, net, tool.optimizers_of(net, recipe), len(x))

        def feed(first: int) -> Iterator[int]:
            for step in range(first, len(x)):
                if step == dies_at:
                    raise Killed
                yield step

        tool.train(run, feed, lambda step: F.cross_entropy(net(x[step]), y[step]))
        return net

    whole = trained_net(0, -1)
    trained.weights("net", 0).with_suffix(".checkpoint").unlink()
    for dies_at in (4, 9):
        with pytest.raises(Killed):
            trained_net(0, dies_at)
    torch.manual_seed(5)  # the checkpoint brings its own
    for again, once in zip(trained_net(0, -1).parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(again, once, rtol=0, atol=0)


def test_batches_go_on_where_they_stopped(tool: ModuleType) -> None:
    n = 3 * tool.BATCH
    data = tool.Drawn(np.arange(n), np.arange(n), np.arange(n))
    whole = [b.labels for b in tool.batches(data, 0, 7, 0)]
    rest = [b.labels for b in tool.batches(data, 0, 7, 4)]
    np.testing.assert_array_equal(whole[4:], rest)
    np.testing.assert_array_equal(np.sort(np.concatenate(whole[:3])), np.arange(n))
    assert not np.array_equal(whole[0], whole[3])


def test_the_tokens_loss_is_least_at_the_parts_that_classes_have(tool: ModuleType) -> None:
    maps = torch.full((1, 24, 24), 10, dtype=torch.uint8)
    maps[:, :12, :12] = 3
    maps[:, 12:, 12:18] = 7  # half of a quarter
    parts = torch.zeros(1, 11, 2, 2)
    parts[0, 3, 0, 0] = parts[0, 10, 0, 1] = parts[0, 10, 1, 0] = 1
    parts[0, 7, 1, 1] = parts[0, 10, 1, 1] = 0.5
    logits = (parts + 1e-9).log().requires_grad_()
    loss = tool.token_loss(logits, maps)
    (slope,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(np.log(2) / 4, abs=1e-6)
    assert slope.abs().max() < 1e-6


def test_each_caption_fits_all_pictures_of_its_class(tool: ModuleType) -> None:
    """Two pictures of class 3 and one of class 5: what captions should say is half, half and all."""
    labels = torch.tensor([3, 3, 5])
    right = torch.full((3, 10), -50.0)
    right[torch.arange(3), labels] = 0.0
    assert tool.caption_loss(right, labels).item() == pytest.approx(0, abs=1e-6)
    assert tool.caption_loss(torch.zeros(3, 10), labels).item() == pytest.approx(
        (np.log(3 / 2) + np.log(3)) / 2
    )


def test_the_grid_of_tokens_is_that_of_the_picture(tool: ModuleType) -> None:
    tokens = torch.randn(2, 10, 4)
    grid = tool.grid(tokens)
    assert grid.shape == (2, 3, 3, 4)
    torch.testing.assert_close(grid[:, 1, 2], tokens[:, 1 + 5], rtol=0, atol=0)
    torch.testing.assert_close(tool.grid(torch.ones(2, 4, 3, 3)), torch.ones(2, 3, 3, 4))
