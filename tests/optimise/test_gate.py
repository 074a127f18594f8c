"""A gated activation and its product run as one node, with the bits and gradients of the two."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.errors import ModeError
from libragrad_fx.graph.notes import note
from libragrad_fx.optimise.execute import bound
from tests.optimise.test_lean import assert_same
from tests.rows.one_op import ALL_TWINS

F64 = torch.float64
B, N, C = 2, 5, 12
Act = Callable[[torch.Tensor], torch.Tensor]
Cut = Callable[[torch.Tensor, int], Any]

CUTS: dict[str, tuple[Cut, bool]] = {
    "chunk": (lambda y, d: y.chunk(2, d), True),
    "split": (lambda y, d: y.split(y.shape[d] // 2, d), True),
    "sizes": (lambda y, d: y.split([C, C], d), True),
    "slices": (lambda y, d: (y.narrow(d, 0, C), y.narrow(d, C, C)), True),
    "swapped": (lambda y, d: y.chunk(2, d)[::-1], True),
    "interleaved": (lambda y, d: y.unflatten(d, (C, 2)).unbind(d % y.ndim + 1), False),
    "overlapping": (lambda y, d: (y.narrow(d, 0, C), y.narrow(d, 1, C)), False),
    "less than all": (lambda y, d: (y.narrow(d, 0, C - 1), y.narrow(d, C, C - 1)), False),
    "one for both": (lambda y, d: (y.narrow(d, 0, C),) * 2, False),
    "three": (lambda y, d: y.split([8, 8, 8], d)[:2], False),
    "of the tokens": (lambda y, d: y.narrow(d, 0, 2 * C).chunk(2, 1), False),
}


class Gated(nn.Module):
    """fc2(act(a) * b), of a and b from one projection or from two."""

    def __init__(self, act: Act, cut: Cut | None = None, conv: bool = False, last: bool = False):
        super().__init__()
        self.act, self.cut, self.last, self.axis = act, cut, last, 1 if conv else -1
        layer = (lambda i, o: nn.Conv1d(i, o, 1)) if conv else nn.Linear
        self.stem = layer(C, C)
        self.up = layer(C, 2 * C) if cut else nn.ModuleList([layer(C, C), layer(C, C)])
        self.head = nn.LazyLinear(2)
        with torch.no_grad():  # between 0 and 1, where every activation is defined
            for part in [self.up] if cut else self.up:  # type: ignore[union-attr]
                part.weight.mul_(0.1)  # type: ignore[operator,union-attr]
                part.bias.fill_(0.5)  # type: ignore[operator,union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        a, b = self.cut(self.up(y), self.axis) if self.cut else [up(y) for up in self.up]  # type: ignore[union-attr]
        z = b * self.act(a) if self.last else self.act(a) * b
        return self.head(z.flatten(1))


def made(*args: Any, conv: bool = False, **kwargs: Any) -> tuple[Gated, torch.Tensor, Any]:
    torch.manual_seed(0)
    model = Gated(*args, conv=conv, **kwargs).to(F64)
    x = torch.randn(B, *((C, 6) if conv else (6, C)), dtype=F64)
    model(x)  # the head's size
    return model, x, lg.transform(model, x, on_unknown="keep")


def gates(gm: Any) -> list[Any]:
    return [g for n in gm.lean.nodes if (g := note(n).gate) is not None]


HELD = {"tanh", "erf", "sqrt", "rsqrt", "reciprocal"}  # as a factor they only modulate: no half
ACTS = {name: twin.aten_op for name, twin in ALL_TWINS.items() if hasattr(twin, "slopes")}


@pytest.mark.parametrize(
    ("name", "cut", "last"),
    [
        *(  # each twentieth activation once in the fast suite
            pytest.param(
                name, cut, bool(i % 2),
                marks=() if i % 20 == 1 and bool(cut) is bool(i // 2 % 2) else pytest.mark.slow,
            )
            for i, name in enumerate(ACTS)
            for cut in (None, "chunk")
        ),
        *(
            pytest.param("gelu", cut, last, marks=() if last is (cut == "chunk") else pytest.mark.slow)
            for cut in (None, "chunk", "interleaved") for last in (False, True)
        ),
    ],
)  # fmt: skip
def test_every_activation(name: str, cut: str | None, last: bool) -> None:
    model, x, gm = made(ACTS[name], cut and CUTS[cut][0], last=last)
    gate = (int(last), cut != "interleaved", (2, last) if cut == "chunk" else None)
    assert gates(gm) == ([] if name in HELD else [gate])
    assert torch.equal(gm(x), model(x))
    assert_same(gm, x)


# a convolution's features are another axis: the cut along it, and the one along what are tokens elsewhere
CONV = {"chunk", "interleaved", "of the tokens"}
LINEAR = {"chunk", "overlapping", "three"}


@pytest.mark.parametrize(
    ("cut", "conv"),
    [
        pytest.param(cut, conv, marks=() if cut in (CONV if conv else LINEAR) else pytest.mark.slow)
        for cut in CUTS
        for conv in (False, True)
    ],
)
def test_what_nobody_else_reads_is_written_over(cut: str, conv: bool) -> None:
    """And nothing else: any other way to take two factors from one projection is kept as it was."""
    how, over = CUTS[cut]
    model, x, gm = made(nn.functional.gelu, how, conv=conv)
    if conv and cut == "of the tokens":  # which are its features
        over = True
    assert [g[1] for g in gates(gm)] == [over]
    assert lg.verify(model, gm, x, 0).ok
    for module in (gm, copy.deepcopy(gm)):
        assert torch.equal(module(x), model(x))
        assert_same(module, x)


@pytest.mark.parametrize(
    "other",
    [
        lambda y, a, b: a,
        lambda y, a, b: b * 2,
        lambda y, a, b: y.narrow(-1, 3, C).tanh(),
        lambda y, a, b: y.mT.mT.narrow(-1, 0, C).abs(),
    ],
)
def test_what_is_read_again_is_not_written_over(other: Callable[..., torch.Tensor]) -> None:
    class Again(Gated):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.up(self.stem(x))
            a, b = y.chunk(2, -1)
            return self.head((self.act(a) * b + other(y, a, b)).flatten(1))

    torch.manual_seed(0)
    model, x = Again(nn.functional.silu, CUTS["chunk"][0]).to(F64), torch.randn(B, 6, C, dtype=F64)
    model(x)
    gm = lg.transform(model, x)
    assert [g[1] for g in gates(gm)] == [False]
    assert torch.equal(gm(x), model(x))
    assert_same(gm, x)


def test_the_graph_has_one_node_for_it() -> None:
    gm = made(nn.functional.silu, CUTS["chunk"][0])[2]
    names = [getattr(n.target, "__name__", "") for n in bound(gm.lean).nodes]
    assert "gated_silu" in names
    assert not {"silu", "mul", "halved_mul", "scale", "chunk", "getitem"} & set(names)


@pytest.mark.parametrize(
    "act",
    [
        lambda a: nn.functional.gelu(a, approximate="tanh"),
        lambda a: nn.functional.elu(a, 0.5),
        lambda a: nn.functional.celu(a, alpha=0.7),
    ],
)
def test_arguments_of_the_activation_are_kept(act: Act) -> None:
    model, x, gm = made(act)
    assert gates(gm)
    assert torch.equal(gm(x), model(x))
    assert_same(gm, x)


def test_at_zero_the_slope_is_its_limit() -> None:
    _, x, gm = made(nn.functional.silu, CUTS["chunk"][0])
    with torch.no_grad():
        gm.up.weight[:C], gm.up.bias[:C] = 0, 0
    assert_same(gm, x)


def test_an_activation_that_is_read_twice_is_its_own() -> None:
    class Twice(Gated):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = self.up(self.stem(x)).chunk(2, -1)
            h = self.act(a)
            return self.head((h * b + h).flatten(1))

    torch.manual_seed(0)
    model, x = Twice(nn.functional.silu, CUTS["chunk"][0]).to(F64), torch.randn(B, 6, C, dtype=F64)
    model(x)
    gm = lg.transform(model, x)
    assert not gates(gm)
    assert_same(gm, x)


def test_broadcast_factors_are_left_alone() -> None:
    _, x, gm = made(nn.functional.silu, lambda y, d: (y.narrow(d, 0, C), y.narrow(d, C, 1)))
    assert not gates(gm)
    assert_same(gm, x)


@pytest.mark.parametrize("cut", [None, "chunk", "interleaved"])
def test_every_way_to_differentiate(cut: str | None) -> None:
    _, x, gm = made(nn.functional.silu, cut and CUTS[cut][0])
    full = copy.deepcopy(gm)
    full.recompile()
    (want,) = torch.autograd.grad(full(x.requires_grad_())[:, 0].sum(), x)
    y = gm(x)[:, 0].sum()
    kept = [torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2)]
    (batched,) = torch.autograd.grad(
        y, x, torch.ones(3, dtype=F64), retain_graph=True, is_grads_batched=True
    )
    (again,) = torch.autograd.grad(y, x, create_graph=True)
    (last,) = torch.autograd.grad(y, x)
    (in_parts,) = torch.autograd.grad(lg.checkpointed(gm, 3)(x)[:, 0].sum(), x)
    saved = torch.utils.checkpoint.checkpoint(gm, x, use_reentrant=False)
    (computed_twice,) = torch.autograd.grad(saved[:, 0].sum(), x)
    by_func = torch.func.vmap(torch.func.grad(lambda t: gm(t[None])[0, 0]))(x.detach())
    for got in (*kept, *batched, again, last, in_parts, computed_twice, by_func):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_second_derivative_is_refused_and_says_how() -> None:
    _, x, gm = made(nn.functional.silu, CUTS["chunk"][0])
    (first,) = torch.autograd.grad(gm(x.requires_grad_())[:, 0].sum(), x, create_graph=True)
    with pytest.raises(ModeError, match="recompile"):
        torch.autograd.grad(first.sum(), x)
    gm.recompile()
    (first,) = torch.autograd.grad(gm(x)[:, 0].sum(), x, create_graph=True)
    torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("cut", [None, "chunk"])
def test_two_tensors_are_kept(cut: str | None) -> None:
    """The two that the gradient is multiplied with, in the place of what they were made of."""
    _, x, gm = made(nn.functional.silu, cut and CUTS[cut][0])
    gm.requires_grad_(False)
    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (held.append(t), t)[1], lambda t: t):
        gm(x.requires_grad_())
    parameters = {p.untyped_storage().data_ptr() for p in gm.parameters()}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 8 for t in held}
    assert sum(n for at, n in sizes.items() if at not in parameters) == 2 * B * 6 * C
