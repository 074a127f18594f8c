"""Where things lie is followed once for each size of the inputs, and anew where a value may say it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.attribution import again
from libragrad_fx.attribution.places import Locator
from tests.attribution.once import captured
from zoo.small import Small

F64 = torch.float64


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> list[Locator]:
    """The runs that were followed."""
    found: list[Locator] = []
    start = Locator.__init__

    def noted(self: Locator, *args: Any) -> None:
        found.append(self)
        start(self, *args)

    monkeypatch.setattr(Locator, "__init__", noted)
    return found


def swin() -> tuple[Small, Any]:
    """A copy, which knows of no earlier test."""
    made, gm = captured("swin")
    return made, copy.deepcopy(gm)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out(nn.functional.gelu(self.mix(x)))


class Shuffled(nn.Module):
    """Tokens in an order that ``how`` says: an input, an attribute, chance, or which of them are large."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.embed = how, nn.Linear(3, 8)
        self.order = nn.Buffer(torch.tensor([2, 0, 1, 4, 3]))
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        if self.how == "input":
            x = x[:, order]
        elif self.how == "gathered":
            x = x.gather(1, order[None, :, None].expand(x.shape))
        elif self.how == "attribute":
            x = x[:, self.order + order.shape[0] - 5]
        else:
            x = x[:, torch.randperm(5)]
        for layer in self.layers:
            x = layer(x)
        return self.head((x * torch.arange(1, 6)[:, None]).mean(1))


def by_hand(gm: Any, x: torch.Tensor, order: torch.Tensor, seed: int) -> torch.Tensor:
    h: list[torch.Tensor] = []
    handle = gm.get_submodule("layers.0").register_forward_hook(lambda m, args, y: h.append(args[0]))
    torch.manual_seed(seed)
    logits = gm(x, order)
    handle.remove()
    (g,) = torch.autograd.grad(logits[:, 1].sum(), h[0])
    torch.manual_seed(seed)
    lies = {"attribute": gm.order, "chance": torch.randperm(5)}.get(gm.how, order)
    return torch.zeros(2, 5, dtype=F64).index_add(1, lies, (h[0] * g).sum(2).detach())


@pytest.mark.parametrize(
    ("how", "times"), [("input", 3), ("gathered", 3), ("chance", 3), ("attribute", 2)]
)
def test_an_order_that_a_value_says_is_followed_anew(how: str, times: int, followed: list[Locator]) -> None:
    model, x = Shuffled(how).double().eval(), torch.randn(2, 5, 3, dtype=F64)
    orders = [torch.tensor(o) for o in ([1, 0, 3, 4, 2], [1, 0, 3, 4, 2], [4, 3, 2, 1, 0])]
    gm = lg.transform(model, (x, orders[0]))
    for seed, order in enumerate(orders):
        if seed == 2:
            gm.order.copy_(order)
        want = by_hand(gm, x, order, seed)
        torch.manual_seed(seed)
        found = lg.attribute(gm, (x, order), 1, method="input_x_gradient")
        torch.testing.assert_close(found.values, want)
    assert len(followed) == times


@pytest.mark.slow
def test_sizes_say_where_things_lie(followed: list[Locator]) -> None:
    """The second call of a size follows nothing, and says the same to the bit; a copy starts afresh."""
    pytest.importorskip("timm")
    made, gm = swin()
    first, second = (lg.attribute(gm, made.inputs, made.target) for _ in range(2))
    assert len(followed) == 1
    assert torch.equal(first.values, second.values)
    three = torch.cat([made.inputs, made.inputs[:1]])
    for _ in range(2):
        found = lg.attribute(gm, three, made.target)
        torch.testing.assert_close(found.values[2], first.values[0], rtol=1e-10, atol=1e-12)
    assert len(followed) == 2
    lg.attribute(gm, made.inputs, made.target, method="gradcam")  # another layer
    assert len(followed) == 3
    gm.recompile()
    lg.attribute(gm, made.inputs, made.target)
    assert len(followed) == 4


@pytest.mark.slow
def test_a_copy_is_explained_as_its_original(followed: list[Locator]) -> None:
    """It knows which rows are windows and which layers are stages, and keeps no places of its original."""
    pytest.importorskip("timm")
    made, gm = swin()
    first = lg.attribute(gm, made.inputs, made.target, layers="stages")
    for count, other in enumerate((copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))), 2):
        found = lg.attribute(other, made.inputs, made.target, layers="stages")
        assert torch.equal(found.values, first.values)
        assert found.layers == first.layers
        assert len(followed) == count


def test_what_is_kept_does_not_grow(monkeypatch: pytest.MonkeyPatch, followed: list[Locator]) -> None:
    """Places of windows are those of one sample; of many sizes, the latest are kept."""
    monkeypatch.setattr(again, "_MOST", 2)
    model, order = Shuffled("attribute").double().eval(), torch.arange(5)
    gm = lg.transform(model, (torch.randn(2, 5, 3, dtype=F64), order))
    for batch in (2, 3, 2, 4, 2, 3):
        lg.attribute(gm, (torch.randn(batch, 5, 3, dtype=F64), order), 1)
    assert [locator.shapes["x"][0] for locator in followed] == [2, 3, 4, 3]


@pytest.mark.slow
def test_places_in_windows_are_kept_for_one_sample() -> None:
    pytest.importorskip("timm")
    made, gm = swin()
    many = made.inputs[:1].expand(7, -1, -1, -1)
    lg.attribute(gm, many, made.target)
    (kept,) = gm._located.values()
    rows = {len(w.rows.mass) for held in kept.located.windows.values() for w in held.values()}
    assert rows == {16, 4}  # of 16 x 16 and 8 x 8 tokens, in windows of 4 x 4
