"""Tokens of captured models: which may go, and what the model answers without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import libragrad_fx as lg
from libragrad_fx.errors import InputError
from libragrad_fx.perturb import Seen, Tokens, tokens
from tests.perturb.vit import F64, GRID, Block, N, Vit, pictures, vit

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def found(model: nn.Module, x: Any) -> Tokens:
    return tokens(lg.trace(model, x), x)


@pytest.fixture(scope="module")
def classed() -> tuple[Vit, Tokens]:
    """Read by its class token."""
    model = vit(lambda h: h[:, 0])
    return model, found(model, pictures(2))


@pytest.fixture(scope="module")
def pooled() -> tuple[Vit, Tokens]:
    """Without a class token, read by the mean."""
    model = vit(lambda h: h.mean(1), front=0)
    return model, found(model, pictures(3))


@pytest.fixture(params=["classed", "pooled"])
def either(request: Any) -> tuple[Vit, Tokens]:
    return request.getfixturevalue(request.param)


def drawn(batch: int, keep: int, seed: int = 0) -> Tensor:
    """(batch, keep): other cells for each sample, in no order."""
    draw = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(N, generator=draw)[:keep] for _ in range(batch)])


# --- fewer tokens


def test_what_is_found(either: tuple[Vit, Tokens]) -> None:
    model, of = either
    assert (of.path, of.grid, of.why) == ("blocks.0", GRID, "")
    assert (of.stays, of.cells) == (frozenset(), [*range(N)])
    assert of.layout.apart == tuple(range(model.front))
    assert of.plan is not None


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(2, 5), keep=st.integers(1, N), seed=st.integers(0, 99))
def test_any_subset_is_the_code_on_a_shorter_sequence(
    classed: tuple[Vit, Tokens], pooled: tuple[Vit, Tokens], batch: int, keep: int, seed: int
) -> None:
    """Of each sample another, in batches of any size; a sample does not depend on the others."""
    for model, of in (classed, pooled):
        x, cells = pictures(batch, seed), drawn(batch, keep, seed)
        got = of.seen(x).kept(cells)
        torch.testing.assert_close(got, model.on(x, cells), **CLOSE)
        alone = of.seen(x[[1]]).kept(cells[[1]])
        torch.testing.assert_close(got[[1]], alone, **CLOSE)


def test_all_tokens_are_the_model_in_any_order_of_the_argument(either: tuple[Vit, Tokens]) -> None:
    model, of = either
    x = pictures(4, 7)
    seen = of.seen(x)
    torch.testing.assert_close(seen.logits, model(x), **CLOSE)
    torch.testing.assert_close(seen.kept(drawn(4, N)), model(x), **CLOSE)
    cells = drawn(4, 5)
    assert torch.equal(seen.kept(cells), seen.kept(cells.flip(1)))
    assert not torch.allclose(seen.kept(cells), model(x), atol=1e-3)


def test_a_balanced_graph_has_the_same_tokens(classed: tuple[Vit, Tokens]) -> None:
    model, of = classed
    x, cells = pictures(2, 3), drawn(2, 4)
    other = tokens(lg.transform(model, x), x)
    torch.testing.assert_close(other.seen(x).kept(cells), of.seen(x).kept(cells), **CLOSE)


def test_no_tokens_leave_the_class_token(classed: tuple[Vit, Tokens], pooled: tuple[Vit, Tokens]) -> None:
    x, none = pictures(2), torch.zeros(2, 0, dtype=torch.int64)
    model, of = classed
    torch.testing.assert_close(of.seen(x).kept(none), model.on(x, none), **CLOSE)
    with pytest.raises(InputError, match="at least one cell"):
        pooled[1].seen(x).kept(none)


def test_the_class_token_counts_in_a_mean() -> None:
    model = vit(lambda h: h.mean(1))
    x, cells = pictures(2), drawn(2, 3)
    torch.testing.assert_close(found(model, x).seen(x).kept(cells), model.on(x, cells), **CLOSE)


# --- zeros


@settings(max_examples=10, deadline=None)
@given(keep=st.integers(0, N), seed=st.integers(0, 99))
def test_zeros_are_the_code_on_tokens_that_are_zero(
    classed: tuple[Vit, Tokens], pooled: tuple[Vit, Tokens], keep: int, seed: int
) -> None:
    for model, of in (classed, pooled):
        x, cells = pictures(3, seed), drawn(3, keep, seed)
        on = torch.zeros(3, N, dtype=torch.bool).scatter_(1, cells, True)
        on = torch.cat([torch.ones(3, model.front, dtype=torch.bool), on], 1)
        want = model.behind(torch.where(on[..., None], model.embed(x), 0))
        torch.testing.assert_close(of.seen(x).zeroed(cells), want, **CLOSE)


class Mixer(nn.Module):
    """Mixes its tokens, which lie on a grid (B, H, W, C) or in rows."""

    def __init__(self, rows: bool) -> None:
        super().__init__()
        self.rows, self.patches = rows, nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList([Mix(), Mix()])
        self.head = nn.Linear(8, 3)

    def embed(self, x: Tensor) -> Tensor:
        h = self.patches(x)
        return h.flatten(2).transpose(1, 2) if self.rows else h.permute(0, 2, 3, 1)

    def behind(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h)
        return self.head(h.flatten(1, -2).mean(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.embed(x))


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.up = nn.Linear(N, N), nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        x = h.flatten(1, -2)
        x = x + self.mix(x.transpose(1, 2)).relu().transpose(1, 2)
        return (x + self.up(x).relu()).view(h.shape)


@pytest.mark.parametrize(("rows", "why"), [(True, "needs all tokens"), (False, "rows")])
def test_a_model_that_needs_all_tokens_is_zeroed(rows: bool, why: str) -> None:
    torch.manual_seed(0)
    model = Mixer(rows).to(F64).eval()
    x, cells = pictures(3, 1), drawn(3, 5)
    of = found(model, pictures(2))
    assert of.plan is None
    assert why in of.why
    with pytest.raises(InputError, match="Use zeroed"):
        of.seen(x).kept(cells)
    on = torch.zeros(3, N, dtype=torch.bool).scatter_(1, cells, True)
    h = model.embed(x)
    want = model.behind(torch.where(on.view(3, *h.shape[1:-1], 1), h, 0))
    torch.testing.assert_close(of.seen(x).zeroed(cells), want, **CLOSE)


# --- tokens that are read by their places


class Text(nn.Module):
    """Causal, of ids; read by its first or its last token, or by a place inside."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place, self.words, self.head = place, nn.Embedding(20, 8), nn.Linear(8, 3)
        self.places = nn.Parameter(torch.randn(10, 8))
        self.blocks = nn.ModuleList([Reader(), Reader()])

    def embed(self, ids: Tensor) -> Tensor:
        return self.words(ids) + self.places[: ids.shape[1]]

    def behind(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h)
        return self.head(h[:, self.place])

    def forward(self, ids: Tensor) -> Tensor:
        return self.behind(self.embed(ids))


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("place", [0, -1])
def test_a_token_that_is_read_by_its_place_stays(place: int) -> None:
    torch.manual_seed(0)
    model, ids = Text(place).to(F64).eval(), torch.randint(20, (3, 10))
    of = found(model, ids[:2])
    stays = place % 10
    assert (of.grid, of.stays) == ((10,), {stays})
    assert stays not in of.cells
    cells = torch.tensor([[1, 4, 5], [8, 2, 3], [7, 1, 8]])
    at = torch.cat([cells, torch.full((3, 1), stays)], 1).sort(1).values
    want = model.behind(model.embed(ids).take_along_dim(at[..., None], 1))
    torch.testing.assert_close(of.seen(ids).kept(cells), want, **CLOSE)
    with pytest.raises(InputError, match=f"but .{stays}., each once"):
        of.seen(ids).kept(torch.full((3, 1), stays))
    h, on = model.embed(ids), torch.zeros(3, 10, dtype=torch.bool).scatter_(1, at, True)
    want = model.behind(torch.where(on[..., None], h, 0))
    torch.testing.assert_close(of.seen(ids).zeroed(cells), want, **CLOSE)


def test_texts_of_another_length_have_other_tokens() -> None:
    model, ids = Text(-1).to(F64).eval(), torch.randint(20, (2, 10))
    of = found(model, ids)
    with pytest.raises(InputError, match="anew"):
        of.seen(ids[:, :7])


def test_a_token_inside_that_is_read_by_its_place_is_a_reason() -> None:
    of = found(Text(4).to(F64).eval(), torch.randint(20, (2, 10)))
    assert of.plan is None
    assert "side by side" in of.why
    assert of.stays == frozenset()


# --- refused by an error


class Past(Vit):
    """Reads the picture past its blocks; ``cut``: without a gradient."""

    def __init__(self, cut: bool) -> None:
        super().__init__(lambda h: h[:, 0])
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3))[:, None]
        return self.behind(self.embed(x)) + (mean.detach() if self.cut else mean)


@pytest.mark.parametrize("cut", [False, True])
def test_a_path_past_the_first_block_is_an_error(cut: bool) -> None:
    with pytest.raises(InputError, match=r"past blocks\.0.*mask pixels"):
        found(Past(cut).to(F64).eval(), pictures(2))


def test_models_without_tokens_are_errors() -> None:
    with pytest.raises(InputError, match="no repeated blocks"):
        found(nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 16, 3)).to(F64).eval(), pictures(2))
    with pytest.raises(InputError, match="at least two"):
        found(vit(lambda h: h[:, 0]), pictures(1))


def test_training_is_an_error() -> None:
    with pytest.raises(InputError, match="eval"):
        found(vit(lambda h: h[:, 0]).train(), pictures(2))


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (torch.tensor([[0], [1], [2]]), "B = 2"),
        (torch.tensor([0, 1]), "B = 2"),
        (torch.tensor([[0.0], [1.0]]), "int64"),
        (torch.tensor([[0], [N]]), "each once"),
        (torch.tensor([[0], [-1]]), "each once"),
        (torch.tensor([[0, 1], [3, 3]]), "each once"),
    ],
)
@pytest.mark.parametrize("how", [Seen.kept, Seen.zeroed])
def test_cells_that_are_not_there_are_errors(
    classed: tuple[Vit, Tokens], how: Any, cells: Tensor, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        how(classed[1].seen(pictures(2)), cells)


def test_half_precision_tells_a_convolution_over_tokens_too() -> None:
    """Its order matters little, beside what half precision rounds away."""
    conv = nn.Conv1d(8, 8, 3, padding=1, groups=8).to(torch.bfloat16)
    model = vit(lambda h: h.mean(1) + conv(h.transpose(1, 2)).mean(2) / 1000, 0).to(torch.bfloat16)
    of = found(model, pictures(2).to(torch.bfloat16))
    assert "order" in of.why


def test_blocks_keep_their_hooks_and_buffers(pooled: tuple[Vit, Tokens]) -> None:
    """What a run does to the module is undone."""
    _, of = pooled
    assert isinstance(of.module.get_submodule("blocks.0"), Block)
    before = torch.get_rng_state()
    of.seen(pictures(2)).kept(drawn(2, 3))
    assert torch.equal(torch.get_rng_state(), before)
