"""Maps are of what the output is read from: not of blocks or tokens that no gradient comes back to, nor of
rows of another token, nor of text painted on a picture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.attribution import maps
from libragrad_fx.errors import InputError
from libragrad_fx.module.walk import blocks
from tests.attribution.test_order import drawn

F64 = torch.float64
Tensor = torch.Tensor


def layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 12, 0.0, "gelu", batch_first=True)


class Encoder(nn.Module):
    """Two blocks, and two more behind them whose result is a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.more = (nn.ModuleList(layer() for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.layers:
            x = block(x)
        y = x
        for block in self.more:
            y = block(y)
        return x.mean(1), y.mean(1)


def test_blocks_behind_an_output_are_not_its_blocks() -> None:
    x = torch.randn(2, 5, 8, dtype=F64)
    module = lg.transform(drawn(Encoder()), x)
    assert len(blocks(module)) == 4
    first, second = (lambda y, i=i: y[i][:, 1] for i in (0, 1))
    found = lg.attribute_each(module, x, [first, second], method="hirescam")
    assert [a.layers for a in found] == [("layers.1",), ("more.1",)]
    assert all(float(a.values.abs().min()) > 0 for a in found)
    whole = lg.attribute(module, x, first, method="fullgrad_plus")
    assert whole.layers == ("layers.0", "layers.1")
    assert float(whole.completeness_error.max()) < 1e-11


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(8, 8), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x)


class Gated(nn.Module):
    """Blocks on the stream, and others in the branch of a gate; the last of all is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = nn.ModuleList(Block() for _ in range(3))
        self.gate = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.stream[:2]:
            x = block(x)
        self.stream[2](x)
        gate = x
        for block in self.gate:
            gate = block(gate)
        return (x * gate.sigmoid()).mean(1)


def test_blocks_of_a_gate_and_unread_ones_are_none() -> None:
    x = torch.randn(2, 5, 8, dtype=F64)
    module = lg.transform(drawn(Gated()), x)
    assert blocks(module) == ["stream.0", "stream.1"]
    assert float(lg.attribute(module, x, 1).completeness_error.max()) < 1e-11


class Pooled(nn.Module):
    """A vision transformer with a class token, of which the tokens from ``first`` on are read."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first, self.patch = first, nn.Conv2d(3, 8, 4, 4)
        self.cls = nn.Parameter(torch.empty(1, 1, 8))
        self.layers, self.head = nn.ModuleList(layer() for _ in range(2)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(len(x), -1, -1), self.patch(x).flatten(2).mT], 1)
        for block in self.layers:
            x = block(x)
        return self.head(x[:, self.first :].mean(1))


def test_a_class_token_that_nobody_reads_is_not_followed() -> None:
    x = torch.randn(2, 3, 16, 16, dtype=F64)
    unread, among = (lg.transform(drawn(Pooled(first)), x) for first in (1, 0))
    with pytest.raises(InputError, match="no token is read alone"):
        lg.attribute(unread, x, 1, method="rollout")
    assert lg.attribute(among, x, 1, method="rollout").values.shape == (2, 4, 4)


class Masked(nn.Module):
    """Patches, repeated as the texts are, and text in one sequence; attention with a mask from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.embed = nn.Conv2d(3, 8, 4, 4), nn.Embedding(9, 8)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        patches = self.patch(x).flatten(2).mT
        h = torch.cat([patches.repeat(ids.shape[0] // patches.shape[0], 1, 1), self.embed(ids)], 1)
        q, k, v = self.qkv(h).chunk(3, -1)
        full = nn.functional.pad(mask.to(h.dtype), (patches.shape[1], 0), value=1.0)
        scores = q @ k.mT + (1 - full[:, None]) * -30.0
        return self.head((h + scores.softmax(-1) @ v).mean(1))


@pytest.mark.parametrize("floating", [False, True])
def test_a_mask_does_not_make_one_sequence_of_two(floating: bool) -> None:
    mask = torch.ones(2, 6, dtype=F64 if floating else torch.long)
    mask[1, 4:] = 0
    inputs = torch.randn(2, 3, 16, 16, dtype=F64), torch.randint(9, (2, 6)), mask
    module = lg.transform(drawn(Masked()), inputs)
    found = lg.attribute(module, inputs, 1)
    assert found.values.shape == (2, 16, 16)
    assert {n: tuple(m.shape) for n, m in found.others.items() if n != "mask"} == {"ids": (2, 6)}
    shown = found.values.flatten(1).sum(1) + sum(m.sum(1) for m in found.others.values()) + found.unplaced
    torch.testing.assert_close(shown, found.total, rtol=1e-10, atol=1e-12)


class OneToken(nn.Module):
    """Tokens in front of samples, flattened on the way; the output is of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        t, b = x.shape[1], x.shape[0]
        flat = self.second(self.first(x.transpose(0, 1)).relu().reshape(t * b, 8))
        return self.head(flat.reshape(t, b, 8).relu()).transpose(0, 1)


@pytest.mark.parametrize("token", range(6))
def test_one_token_of_the_target_does_not_misplace_biases(token: int) -> None:
    """Two rows of twelve have a gradient: these alone would fit several orders of samples."""
    x = torch.randn(2, 6, 3, dtype=F64)
    found = lg.attribute(lg.transform(drawn(OneToken()), x), x, (token, 1))
    elsewhere = torch.arange(6) != token
    assert not bool(found.values[:, elsewhere].any())
    torch.testing.assert_close(found.values[:, token] + found.unplaced, found.total)
    assert float(found.values[:, token].abs().min()) > 0


def test_rows_that_fit_several_orders_are_of_none() -> None:
    whose = torch.full((6, 1), -1)
    whose[2], whose[3] = 0, 1
    assert maps.rows_of(whose, 2, [0]) is None
    whose[0] = whose[4] = 0
    assert maps.rows_of(whose, 2, [0]) == maps.Rows(0, 1)


class Causal(nn.Module):
    """A convolution over padded time, cut to its length again (as in Mamba), and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.head = (
            nn.Embedding(9, 4),
            nn.Conv1d(4, 4, 4, padding=3),
            nn.Linear(4, 2),
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        mixed = self.conv(x.mT)[..., : x.shape[1]].mT
        return self.head((x + mixed.relu()).mean(1))


def test_padding_makes_no_further_places() -> None:
    ids = torch.randint(9, (2, 6))
    found = lg.attribute(lg.transform(drawn(Causal()), ids), ids, 1)
    assert found.values.shape == (2, 6)
    torch.testing.assert_close(found.values.sum(1) + found.unplaced, found.total)
    assert float(found.completeness_error.max()) < 1e-12


class Named(nn.Module):
    """Hands a dictionary on, with channels in front of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 4, 1), nn.LayerNorm(4)

    def forward(self, held: dict[str, Tensor]) -> dict[str, Tensor]:
        x = held["hidden"]
        return {"hidden": x + self.norm(self.conv(x).relu().mT).mT}


class Dictionaries(nn.Module):
    """Takes one channel (B, T), or tokens."""

    def __init__(self, one: bool) -> None:
        super().__init__()
        self.first = nn.Conv1d(1 if one else 3, 4, 1)
        self.one, self.blocks, self.head = one, nn.ModuleList(Named() for _ in range(2)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        held = {"hidden": self.first(x[:, None] if self.one else x.mT)}
        for block in self.blocks:
            held = block(held)
        return self.head(held["hidden"].mean(2))


@pytest.mark.parametrize("one", [False, True])
def test_channels_are_no_tokens(one: bool) -> None:
    """Four channels, six tokens; and one channel, whose axis comes first."""
    x = torch.randn(2, 6, dtype=F64) if one else torch.randn(2, 6, 3, dtype=F64)
    module = lg.transform(drawn(Dictionaries(one)), x)
    for method in ("fullgrad", "gradcam", "fullgrad_plus"):
        for layers in (None, ["first"]):
            found = lg.attribute(module, x, 1, method=method, layers=layers)
            assert found.values.shape == (2, 6)
            assert not found.others
            torch.testing.assert_close(found.values.sum(1) + found.unplaced, found.total)
