"""Recorded while it ran: shapes that depend on values, control flow as an op, packed sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import libragrad_fx as lg
from libragrad_fx.errors import CustomBackwardWarning
from tests.between import Between, X, certified, fast_first, fast_of, weighed

Tensor = torch.Tensor


def boxes_kept(y: Tensor, p: Tensor) -> Tensor:
    """What a detector does behind its heads: a threshold for each class, then no box over another."""
    boxes, scores = y.sigmoid().cumsum(1)[:, :4], y[:, 4:].softmax(1)
    found = []
    for c in range(2):
        keep = torch.where(scores[:, c] > 0.1)[0]
        kept = torch.ops.torchvision.nms(boxes[keep], scores[keep, c], 0.5)
        found.append(scores[keep[kept], c])
    return torch.cat(found)


def by_mask(y: Tensor, p: Tensor) -> Tensor:
    y = y.clone()
    y[y < -1] = y[y < -1] * 0.5
    return y[y > 0].cumsum(0)


def through_tokens(y: Tensor, p: Tensor) -> Tensor:
    kept = (y > 0).any(0).nonzero()[:, 0]
    return torch.zeros_like(y).index_copy(1, kept, y[:, kept] * 2) + len(torch.unique(kept))


def repeated(y: Tensor, p: Tensor) -> Tensor:
    return torch.repeat_interleave(y, (y[:, 0] > 0).long() + 1, dim=0).mean(0)


def until_small(y: Tensor, p: Tensor) -> Tensor:
    while y.abs().max() > 1:
        y = y / 2
    return y * p[0]


def drawn(y: Tensor, p: Tensor) -> Tensor:
    rows = torch.multinomial(torch.ones(4).double(), 2)
    return y[rows] * torch.rand(8).double()


RECORDED = {
    "boxes": boxes_kept, "masks": by_mask, "nonzero": through_tokens, "repeats": repeated,
    "a loop on a value": until_small, "random rows": drawn,
    "masked_select": lambda y, p: torch.masked_select(y, y > p[:4]),
    "cov": lambda y, p: torch.cov(y),
    "data": lambda y, p: y * y.data.abs().mean(),
    "cond": lambda y, p: torch.cond(y.sum() > 0, lambda a: a * 2, lambda a: a.tanh(), (y,)),
    "while_loop": lambda y, p: torch._higher_order_ops.while_loop(
        lambda i, a: i < 3, lambda i, a: (i + 1, a.tanh()), (torch.tensor(0), y)
    )[1],
}  # fmt: skip


FAST = ("random rows", "repeats", "boxes")


@pytest.mark.parametrize("name", fast_of(RECORDED, FAST))
@pytest.mark.filterwarnings("ignore::libragrad_fx.errors.CutWarning")
def test_what_depends_on_values(name: str) -> None:
    if name == "boxes":
        pytest.importorskip("torchvision", reason="torchvision's nms is what the box test calls")
    model = Between(RECORDED[name])
    module = certified(model)
    for x in (X, -2 * X):  # other values: other shapes inside
        torch.manual_seed(3)
        wanted = model(x)
        torch.manual_seed(3)
        assert torch.equal(module(x), wanted)
        if name != "random rows":
            assert lg.verify(model, module, x, weighed).ok


def written(write: Callable[[Tensor, Tensor], Any]) -> Any:
    """A Function that writes its second argument into its first one."""

    class Write(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, into: Tensor, value: Tensor) -> Tensor:
            write(into.data, value)
            return into

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            raise AssertionError("the backward of the ops is taken in its place")

    return Write.apply


@pytest.mark.filterwarnings("ignore::libragrad_fx.errors.CutWarning")
@pytest.mark.parametrize("by_value", fast_first([True, False], 1))
@pytest.mark.parametrize("write", [
    pytest.param(lambda t, v: t[..., 1:].copy_(v[..., 1:]), marks=pytest.mark.slow),
    lambda t, v: t.mul_(0.5).add_(v.tanh()),
    pytest.param(lambda t, v: t.__setitem__((..., 0), v[..., 0]), marks=pytest.mark.slow),
    pytest.param(lambda t, v: t.masked_scatter_(v > 0, v), marks=pytest.mark.slow),
])  # fmt: skip
def test_writes_by_data_inside_a_function(write: Any, by_value: bool) -> None:
    apply = written(write)

    def f(y: Tensor, p: Tensor) -> Tensor:
        if by_value and float(y.detach().numpy().sum()) > 1e9:
            y = -y
        return apply(y * 2, F.gelu(y + p[0])).sin()

    model = Between(f)
    with pytest.warns(CustomBackwardWarning, match=r"Write: a user-written autograd\.Function"):
        module = lg.transform(model, X)
    assert any("Write" in note for note in module.plan.notes)
    assert torch.equal(module(X), model(X))
    assert lg.verify(model, module, X, weighed).ok
    assert "data" not in vars(Tensor)


class Packed(nn.Module):
    def __init__(self, layer: type[nn.RNNBase], how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = layer(6, 8, batch_first=True, bidirectional=how == "both ways")
        self.how, self.head = how, nn.Linear(16 if how == "both ways" else 8, 3)

    def forward(self, x: Tensor, lengths: Any) -> Tensor:
        rnn = nn.utils.rnn
        sorted_ = self.how == "sorted"
        packed = rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=sorted_)
        output, state = self.rnn(packed)
        if self.how == "state":
            return self.head((state[0] if isinstance(state, tuple) else state)[-1])
        if self.how == "data":
            return self.head(output.data)
        padded, _ = rnn.pad_packed_sequence(output, True, padding_value=0.5, total_length=6)
        return self.head(padded)


@pytest.mark.parametrize(
    ("layer", "how"), fast_first([(nn.RNN, "both ways"), (nn.LSTM, "state"), (nn.GRU, "data")], 1)
)
@pytest.mark.filterwarnings("ignore::libragrad_fx.errors.CutWarning")
def test_packed_sequences(layer: Any, how: str) -> None:
    model, x = Packed(layer, how).eval(), torch.randn(3, 4, 6)
    module = lg.transform(model, (x, torch.tensor([4, 3, 1])))
    other = x, torch.tensor([3, 3, 2])
    assert torch.equal(module(*other), model(*other))
    certificate = lg.verify(model, module, other, weighed)
    assert certificate.ok, certificate


@pytest.mark.filterwarnings("ignore::libragrad_fx.errors.CutWarning")
@pytest.mark.slow
def test_sequences_packed_out_of_a_list() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(6, 8)

        def forward(self, sequences: list[Tensor]) -> Tensor:
            packed = nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
            return torch.stack([s[-1] for s in nn.utils.rnn.unpack_sequence(self.rnn(packed)[0])])

    model, call = Model(), ([torch.randn(n, 6) for n in (4, 2, 3)],)
    certified(model, call)


def tiny(name: str, **more: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="its models are what is tested")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    if name.startswith("GPT2"):
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 32}
    else:
        sizes["intermediate_size"] = 32
    model = getattr(transformers, name)
    return model(model.config_class(**sizes, **more)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "BertForSequenceClassification", pytest.param("GPT2LMHeadModel", marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore::libragrad_fx.errors.CutWarning")
def test_gradient_checkpointing(name: str) -> None:
    """transformers puts a hook on the embedding for it, which is Python of its own."""
    model, call = tiny(name), {"input_ids": torch.arange(14).view(2, 7)}
    model.gradient_checkpointing_enable()
    certified(model, call)


LABELS = {
    "single_label_classification": torch.tensor([0, 2]),
    "multi_label_classification": torch.tensor([[0.0, 1, 1], [1, 0, 0]]),
    "regression": torch.tensor([[0.3, 1, -1], [2, 0, 0.5]]),
}


@pytest.mark.parametrize("problem", fast_first(LABELS, 1))
def test_a_batch_with_labels(problem: str) -> None:
    """The loss comes first; what is explained are the logits, and the loss where it is asked for."""
    model = tiny("BertForSequenceClassification", num_labels=3, problem_type=problem)
    call = {"input_ids": torch.arange(14).view(2, 7), "labels": LABELS[problem]}
    module = lg.transform(model, call)
    assert torch.equal(module(**call).loss, model(**call).loss)
    for target in (1, lambda y: y.loss):
        certificate = lg.verify(model, module, call, target)
        assert certificate.ok, certificate


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::libragrad_fx.errors.CutWarning")
def test_a_picture_and_a_text_of_which_patches_are_drawn() -> None:
    model = tiny(
        "ViltForQuestionAnswering", image_size=32, patch_size=16, max_position_embeddings=16
    )
    call = {
        "input_ids": torch.arange(14).view(2, 7), "pixel_values": torch.randn(2, 3, 32, 32),
        "pixel_mask": torch.ones(2, 32, 32, dtype=torch.long),
    }  # fmt: skip
    assert lg.verify(model, lg.transform(model, call), call, 0).ok
