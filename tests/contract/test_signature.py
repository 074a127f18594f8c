"""Arguments and outputs have the original's names, defaults and structure; misfits are named."""

from __future__ import annotations

import enum
import inspect
import pickle
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.errors import InputError, ModeError

A, B = torch.randn(2, 3), torch.randn(2, 3)


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Many(nn.Module):
    def forward(
        self, x: torch.Tensor, opts: dict[str, Any], y: Any = None, *, flag: bool = True
    ) -> Any:
        total = x * opts["a"] + opts["b"][1]
        return {"sum": total if flag else x, "pair": Pair(x, total), "none": None}


class Variadic(nn.Module):
    def forward(self, x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        return x + sum(m.sigmoid() for m in more)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 6), nn.Linear(6, 2)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        h = self.table(ids)
        if mask is not None:
            h = h * mask.unsqueeze(-1).float()
        return self.head(h.mean(1))


OPTS = {"a": A, "b": [1, B]}


def test_signature_and_structures() -> None:
    model = Many()
    gm = lg.transform(model, {"x": A, "opts": OPTS})
    mine, theirs = inspect.signature(gm.forward), inspect.signature(model.forward)
    assert list(mine.parameters) == list(theirs.parameters)
    for name, p in theirs.parameters.items():
        assert mine.parameters[name].default == p.default
    for out in (gm(A, OPTS), gm(opts=OPTS, x=A), gm(A, opts=OPTS, flag=True)):
        expected = model(A, OPTS)
        assert list(out) == list(expected)
        assert isinstance(out["pair"], Pair)
        assert torch.equal(out["pair"].second, expected["pair"].second)
        assert out["none"] is None


def test_variadic_arguments() -> None:
    model = Variadic()
    gm = lg.transform(model, (A, B, A))
    assert torch.equal(gm(B, A, B), model(B, A, B))


def test_integer_and_optional_inputs() -> None:
    model, ids = Masked(), torch.randint(10, (2, 4))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    with_mask, without = lg.transform(model, (ids, mask)), lg.transform(model, ids)
    assert torch.equal(with_mask(ids, mask), model(ids, mask))
    assert torch.equal(without(ids), model(ids))
    assert torch.equal(without(ids, mask), model(ids, mask))  # captured again
    assert torch.equal(with_mask(ids), model(ids))
    with pytest.raises(InputError, match="mask was None"):
        alone(without)(ids, mask)
    with pytest.raises(InputError, match="mask must be a tensor"):
        alone(with_mask)(ids)


def test_a_dataclass_of_transformers_comes_back() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra: models)")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=16, patch_size=8,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    gm = lg.transform(model)
    x = torch.randn(3, 3, 16, 16, requires_grad=True)
    assert type(gm(x)) is type(model(x))
    assert torch.equal(gm(pixel_values=x).logits, model(x).logits)


def alone(gm: Any) -> Any:
    """As in a process of its own: without the original, no call is captured again."""
    return pickle.loads(pickle.dumps(gm))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.randn(2, 4), OPTS), r"x was captured with shape \(.*, 3\), got \(2, 4\)"),
        ((A.long(), OPTS), "x was captured as float32"),
        ((A, {"a": A, "b": [2, B]}), r"opts\['b'\]\[0\] was 1 at capture"),
        ((A, OPTS, 3), "y was None at capture"),
        ((None, OPTS), "x must be a tensor"),
    ],
)
def test_misfits_are_named(inputs: tuple[Any, ...], message: str) -> None:
    gm = alone(lg.transform(Many(), {"x": A, "opts": OPTS}))
    with pytest.raises(InputError, match=message):
        gm(*inputs)


@pytest.mark.parametrize("name", ["graphs", "run_by", "unchanged", "captured_graphs", "origin"])
def test_attributes_may_have_names_that_are_ours(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)).double()
    setattr(model, name, 3)
    x = torch.randn(2, 3, dtype=torch.float64)
    gm = pickle.loads(pickle.dumps(lg.transform(model, x)))
    assert lg.verify(model, gm, x, 1).ok


def test_a_graph_is_of_one_mode() -> None:
    gm = lg.transform(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).eval(), A)
    gm.train()
    with pytest.raises(ModeError, match="eval"):
        gm(A)
    gm.eval()
    gm(A)


def test_a_batch_of_one_is_an_example_for_all() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.GELU())
    gm = lg.transform(model, A[:1])
    assert torch.equal(gm(torch.cat([A, B])), model(torch.cat([A, B])))


def test_training_statistics_are_the_models() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train(), torch.randn(6, 3)
    gm = lg.transform(model, x)
    mine = {k: v.clone() for k, v in gm.state_dict().items()}
    out = gm(x)
    after = {k: v.clone() for k, v in gm.state_dict().items()}
    model.load_state_dict(mine)
    assert torch.equal(model(x), out)
    assert all(torch.equal(after[k], v) for k, v in model.state_dict().items())
    assert not torch.equal(after["1.running_mean"], mine["1.running_mean"])


class _Sentinel(enum.Enum):
    NONE = 0


class OddDefaults(nn.Module):
    """A default that code cannot spell between those that it can, and one that is required behind."""

    def forward(
        self,
        x: torch.Tensor,
        a: Any = None,
        b: Any = _Sentinel.NONE,
        c: Any = (),
        *,
        d: torch.Tensor,
    ) -> torch.Tensor:
        return (x * a - b + d).sum(-1)


def test_arguments_keep_their_places() -> None:
    x, a, b, d = (torch.randn(2, 4) for _ in range(4))
    model = OddDefaults()
    gm = lg.transform(model, {"x": x, "a": a, "b": b, "d": d})
    assert torch.equal(gm(x, a, b, d=d), model(x, a, b, d=d))
    assert torch.equal(gm(x, a, b, (), d=d), model(x, a, b, d=d))
    with pytest.raises(InputError, match="b must be a tensor"):
        gm(x, a, d=d)
    with pytest.raises(InputError, match=r"c was \(\) at capture"):
        alone(gm)(x, a, b, 3, d=d)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, *xs: torch.Tensor) -> torch.Tensor:
        return self.linear(xs[0] * xs[1])


def test_any_number_of_arguments_is_accounted_for() -> None:
    inputs = torch.randn(2, 4), torch.randn(2, 4)
    model = Product()
    gm = lg.transform(model, inputs)
    assert lg.verify(model, gm, inputs).ok
    assert lg.audit(gm, inputs).input == pytest.approx(
        float((model(*inputs) - model.linear.bias).sum())
    )
