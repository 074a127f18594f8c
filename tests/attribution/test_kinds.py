"""Attribution says what it shows: where terms have positions, and what the map adds up to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.errors import BranchWarning, InputError, ModeError
from libragrad_fx.module.walk import blocks
from tests.between import fast_first

F64 = torch.float64


def net(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))


class Text(nn.Module):
    """A text classifier without repeated blocks."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.embed = kind, nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, dropout=0.0)
        self.place = nn.Embedding(5, 6)
        self.head = net(6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        if self.kind == "lstm":
            x = self.lstm(x)[0]
        elif self.kind == "conv":
            x = self.conv(x.mT).mT.relu()
        elif self.kind == "one layer":
            x = self.layer(x)
        elif self.kind == "positions":
            x = x + self.place(torch.arange(5))
        elif self.kind == "two embeddings":
            x = x * self.embed(ids.flip(1)).sigmoid()
        return self.head(x).mean(1)


@pytest.mark.parametrize("kind", fast_first(
    ["net", "two embeddings", "lstm", "conv", "one layer", "positions"], 2
))
def test_each_term_is_counted_once(kind: str) -> None:
    model, ids = Text(kind).double().eval(), torch.randint(11, (3, 5))
    gm = lg.transform(model, ids)
    found = lg.attribute(gm, ids, 1, method="fullgrad_plus")
    assert found.layers == ()
    torch.testing.assert_close(found.total, model(ids)[:, 1].detach())
    torch.testing.assert_close(found.values.sum(1) + found.unplaced, found.total)
    assert found.completeness_error.max() < 1e-10
    assert lg.verify(model, gm, ids, 1).ok


class State(nn.Module):
    """Reads the last state of a recurrent network, whose layers lie in front of the samples."""

    def __init__(self, kind: str, layers: int) -> None:
        super().__init__()
        self.net = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[kind](
            6, 6, layers, batch_first=True
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = self.net(x)[1]
        return self.head((state[0] if isinstance(state, tuple) else state).sum(0))


@pytest.mark.parametrize("kind", fast_first(["lstm", "gru", "rnn"], 1))
@pytest.mark.parametrize(("layers", "batch"), fast_first([(2, 2), (2, 3), (1, 2), (4, 2)], 1))
def test_a_sample_is_explained_as_it_is_alone(kind: str, layers: int, batch: int) -> None:
    model, x = State(kind, layers).double().eval(), torch.randn(batch, 5, 6, dtype=F64)
    gm = lg.transform(model, x)
    found = lg.attribute(gm, x, 1)
    alone = torch.cat([lg.attribute(gm, x[i : i + 1], 1).total for i in range(batch)])
    torch.testing.assert_close(found.total, alone)
    assert found.completeness_error.max() < 1e-10


class Tower(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        make = lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)  # noqa: E731
        self.layers = nn.ModuleList(make() for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Dual(nn.Module):
    """Image and text, as many tokens of one as of the other; ``how`` they meet."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.patch, self.embed = nn.Conv2d(3, 8, 4, 4), nn.Embedding(11, 8)
        self.image, self.text, self.both = Tower(2), Tower(2), Tower(2)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        a, b = self.image(self.patch(x).flatten(2).mT), self.text(self.embed(ids))
        if self.how == "product":
            return self.head(a.mean(1) * b.mean(1))
        if self.how == "cross":
            return self.head(self.cross(b, a, a)[0].mean(1))
        return self.head(self.both(torch.cat([a, b], 1)).mean(1))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cross", "product", "joined"])
def test_text_is_not_painted_on_the_picture(how: str) -> None:
    model = Dual(how).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)  # no bias is zero
    x, ids = torch.randn(2, 3, 16, 16, dtype=F64), torch.randint(11, (2, 16))
    gm = lg.transform(model, (x, ids))
    found = lg.attribute(gm, (x, ids), 1, method="fullgrad_plus")
    assert found.values.shape[0] == 2
    assert found.values.ndim == 3
    text = next(m for name, m in found.others.items() if m.shape == (2, 16))
    assert text.abs().sum() > 0
    assert float(found.completeness_error.max()) < 1e-10
    shown = found.values.flatten(1).sum(1) + sum(m.flatten(1).sum(1) for m in found.others.values())
    torch.testing.assert_close(shown + found.unplaced, found.total)
    only = lg.attribute(gm, (x, ids), 1, method="input_x_gradient", resolution="pixels")
    assert only.values.shape == (2, 16, 16)
    # cross-attention whose queries are the text has no gradient to it
    assert [m.shape for m in only.others.values()] == ([] if how == "cross" else [(2, 16)])
    first = lg.attribute(gm, (x, ids), 1, method="fullgrad")
    assert first.values.shape == (2, 4, 4)
    assert float(first.completeness_error.max()) < 1e-10


class Segments(nn.Module):
    """Two inputs of one sequence, added position by position, and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.kind = nn.Embedding(11, 8), nn.Embedding(2, 8)
        self.tower, self.head = Tower(1), nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor, kinds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = (self.word(ids) + self.kind(kinds)) * mask[..., None]
        return self.head(self.tower(x).mean(1))


def test_inputs_of_the_same_positions_share_a_map() -> None:
    model, ids = Segments().double().eval(), torch.randint(11, (2, 5))
    inputs = (ids, ids % 2, torch.ones_like(ids))
    found = lg.attribute(lg.transform(model, inputs), inputs, 1)
    assert not found.others
    torch.testing.assert_close(found.values.sum(1) + found.unplaced, found.total)
    assert found.completeness_error.max() < 1e-10


class Block(nn.Module):
    """Modules inside, a residual, and what plain gradients do not balance: a norm and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.gelu(self.mix(self.norm(x)))


class Named(nn.Module):
    """Blocks under one of the ways in which people name them."""

    def __init__(self, names: list[str], flat: bool) -> None:
        super().__init__()
        self.flat, self.names = flat, names
        holder: Any = self if flat else nn.Module()
        for name in names:
            holder.add_module(name, Block())
        if not flat:
            self.encoder = holder
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.names:
            x = (self if self.flat else self.encoder).get_submodule(name)(x)
        return self.head(x.mean(1))


NAMES = [
    ["b", "a"], ["0", "1", "2"], ["first", "second", "third"], ["block1", "block2"],
    ["encoder_layer_0", "encoder_layer_1", "encoder_layer_2"],
]  # fmt: skip


@pytest.mark.parametrize("names", fast_first(NAMES, 2), ids=lambda n: n[0])
@pytest.mark.parametrize("flat", fast_first([False, True], 1))
def test_blocks_are_found_by_what_they_are(names: list[str], flat: bool) -> None:
    model, x = Named(names, flat).double().eval(), torch.randn(2, 5, 8, dtype=F64)
    gm = lg.transform(model, x)
    assert blocks(gm) == [n if flat else f"encoder.{n}" for n in names]
    found = lg.attribute(gm, x, 1, method="fullgrad_plus")
    assert found.completeness_error.max() < 1e-10
    torch.testing.assert_close(found.values.sum(1) + found.unplaced, found.total)
    # over several blocks the map adds up to more than the output, and says so
    assert (found.total - found.output).abs().max() > 1e-6
    plain = lg.attribute(lg.trace(model, x), x, 1, method="fullgrad_plus")
    assert plain.completeness_error.max() > 1e-6


def test_blocks_of_torchvisions_vit() -> None:
    torchvision = pytest.importorskip("torchvision", reason="needs torchvision (extra: models)")
    model = torchvision.models.VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=5).double().eval()
    gm = lg.transform(model, torch.randn(2, 3, 32, 32, dtype=F64))
    assert blocks(gm) == [f"encoder.layers.encoder_layer_{i}" for i in range(3)]


@pytest.mark.parametrize("change", ["half", "another activation"])
def test_a_module_that_was_changed_is_not_explained(change: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 3))
    x = torch.randn(2, 4)
    module = lg.transform(model, x)
    if change == "half":
        model.half()
    else:
        module.get_submodule("1").approximate = "tanh"  # type: ignore[assignment]
    for ask in (lg.attribute, lg.audit):
        with pytest.raises(ModeError, match="captured"):
            ask(module, x, 0)


class MixerBlock(nn.Module):
    """Two MLPs of one class, one over tokens and one over channels, as timm's Mixer has them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        mlps = (nn.Sequential(nn.Linear(n, 12), nn.GELU(), nn.Linear(12, n)) for n in (5, 8))
        self.tokens, self.channels = mlps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.tokens(self.norm1(x).mT).mT
        return x + self.channels(self.norm2(x))


def test_parts_of_a_block_are_no_blocks() -> None:
    """More of them are alike, but not the whole stream goes through them."""
    blocks_ = nn.ModuleList(MixerBlock() for _ in range(3))

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = blocks_, nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(1))

    model, x = Mixer().double().eval(), torch.randn(2, 5, 8, dtype=torch.float64)
    module = lg.transform(model, x)
    assert blocks(module) == ["blocks.0", "blocks.1", "blocks.2"]
    assert float(lg.attribute(module, x, 0).completeness_error.max()) < 1e-11


class Zipped(nn.Module):
    """A loop over two lists."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        attends = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.attends, self.head = nn.ModuleList(attends), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, attend in zip(self.norms, self.attends, strict=True):
            h = norm(x)
            x = x + attend(h, h, h, need_weights=False)[0]
        return self.head(x.mean(1))


def test_blocks_of_a_loop_over_lists_begin_where_the_whole_stream_enters() -> None:
    x = torch.randn(2, 5, 8, dtype=F64)
    module = lg.transform(Zipped().double().eval(), x)
    found = lg.attribute(module, x, 0, method="fullgrad")
    assert found.layers == ("norms.0",)
    torch.testing.assert_close(found.total, found.output)
    found = lg.attribute(module, x, 0, method="fullgrad_plus")
    assert found.layers == ("norms.0", "norms.1")
    assert found.completeness_error.max() < 1e-12


def test_branches_that_are_explained_are_told() -> None:
    x = torch.randn(2, 5, 8, dtype=F64)
    module = lg.transform(Zipped().double().eval(), x)
    with pytest.warns(BranchWarning, match=r"past each .* \(attends\.0, …, attends\.1\)"):
        lg.attribute(module, x, 0, method="attcat")
    with pytest.raises(InputError, match=r"by='block' needs blocks, and a path leads past each"):
        lg.attribute(module, x, 0, method="fullgrad_plus", by="block")
    with pytest.warns(BranchWarning, match="fullgrad_plus"):
        lg.attribute(lg.transform(Bypassed().double().eval(), x), x, 0, method="fullgrad")


class Bypassed(nn.Module):
    """Two branches beside a sum that no module carries."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(net(8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x.tanh()).mean(-1, keepdim=True)
        return x.mean(1)


class Order(nn.Module):
    """Attention whose tokens lie in front of the samples, as PyTorch's is inside; or flattened samples."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.embed = order, nn.Linear(3, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=order != "tokens first")
        self.norm, self.head = nn.LayerNorm(8), net(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = x.transpose(0, 1) if self.order == "tokens first" else x
        x = x + self.attend(x, x, x, need_weights=self.order == "weights")[0]
        flat = self.norm(x).reshape(-1, 8)
        x = x + self.down(self.up(flat).relu()).reshape(x.shape)
        return self.head(x.mean(0 if self.order == "tokens first" else 1))


@pytest.mark.parametrize("order", fast_first(["tokens first", "samples first", "weights"], 1))
@pytest.mark.parametrize("batch", fast_first([5, 2], 1))
def test_biases_belong_to_their_samples_in_any_order(order: str, batch: int) -> None:
    """A row of a bias is of the sample whose target gives it its gradient, wherever it lies."""
    torch.manual_seed(batch)
    model, x = Order(order).double().eval(), torch.randn(batch, 6, 3, dtype=F64)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    gm = lg.transform(model, x)
    found = lg.attribute(gm, x, 1, method="fullgrad")
    alone = [lg.attribute(gm, x[i : i + 1], 1, method="fullgrad") for i in range(batch)]
    torch.testing.assert_close(found.values, torch.cat([a.values for a in alone]), rtol=1e-10, atol=1e-12)
    assert float(found.completeness_error.max()) < 1e-10
