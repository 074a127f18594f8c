"""The graph that runs has the forward and every gradient of the one that is proved, for less work."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import libragrad_fx as lg
from libragrad_fx.bench import Operations
from libragrad_fx.errors import GateOutputWarning
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.ops.attention import scaled_dot_product_attention
from libragrad_fx.ops.graft import graft
from libragrad_fx.ops.insert import is_scale
from libragrad_fx.ops.places import whole
from libragrad_fx.ops.product import halved_mul
from libragrad_fx.optimise.execute import bound
from libragrad_fx.rewrite.erase import erase, spell
from tests.between import fast_first, fast_of
from tests.models.zoo import ZOO, build
from tests.rows.one_op import ALL_TWINS

F64 = torch.float64


def backward(gm: CapturedModule, x: torch.Tensor, full: bool) -> tuple[Any, list[Any]]:
    """Output and all gradients; ``full`` has a listener, so the whole graph runs."""
    child = next(m for m in gm.modules() if m is not gm)
    hook = child.register_forward_hook(lambda *_: None) if full else None
    x = x.clone().requires_grad_(x.is_floating_point())
    y = gm(x)
    first = y[0] if isinstance(y, tuple) else y
    wanted = [t for t in (x, *gm.parameters()) if t.requires_grad]
    grads = torch.autograd.grad(first.sum(), wanted, allow_unused=True)
    if hook is not None:
        hook.remove()
    return first, [
        torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)
    ]


def assert_same(gm: CapturedModule, x: torch.Tensor) -> None:
    (y, short), (z, full) = backward(gm, x, full=False), backward(gm, x, full=True)
    assert torch.equal(y, z)
    for a, b in zip(short, full, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * (1 + float(b.abs().max())))


ZOO_FAST = ("tanh_gelu", "gated_conv", "fused_attention")


@pytest.mark.parametrize("name", fast_of(ZOO, ZOO_FAST))
def test_zoo(name: str) -> None:
    model, x = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GateOutputWarning)
        gm = lg.transform(model, x)
    assert spell(erase(gm.lean)) == gm.history.original
    if next((m for m in gm.modules() if m is not gm), None) is not None:
        assert_same(gm, x)


B, N, H, D = 2, 5, 3, 4
C = H * D


LAYOUTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "timm": lambda y: y.reshape(-1, N, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0),
    "chunk": lambda y: [t.unflatten(-1, (H, D)).transpose(1, 2) for t in y.chunk(3, -1)],
    "split": lambda y: [t.reshape(-1, N, H, D).transpose(1, 2) for t in y.split([C, C, C], -1)],
    "slices": lambda y: [y[..., i : i + C].unflatten(-1, (H, D)).transpose(1, 2) for i in (0, C, 2 * C)],
    "heads inside": lambda y: y.reshape(-1, N, H, 3 * D).transpose(1, 2).chunk(3, -1),
    "interleaved": lambda y: y.reshape(-1, N, H, D, 3).permute(4, 0, 2, 1, 3).unbind(0),
    "copied": lambda y: [  # as nn.MultiheadAttention does it, tokens first
        t.reshape(N, -1, D).transpose(0, 1).reshape(-1, H, N, D)
        for t in y.transpose(0, 1).unflatten(-1, (3, C)).movedim(2, 0).contiguous()
    ],
    "features first": lambda y: y.mT.reshape(-1, 3, H, D, N).mT.unbind(1),
}  # fmt: skip


class Fused(nn.Module):
    """Attention whose q, k and v come out of one projection."""

    def __init__(self, layout: str, written: bool, kind: str = "linear", bias: bool = True) -> None:
        super().__init__()
        self.layout, self.written, self.kind = layout, written, kind
        self.stem = nn.Linear(C, C)
        self.qkv = (
            nn.Conv1d(C, 3 * C, 1, bias=bias) if kind == "conv" else nn.Linear(C, 3 * C, bias=bias)
        )
        self.proj = nn.Linear(C, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.qkv(x.mT).mT if self.kind == "conv" else self.qkv(x)
        q, k, v = LAYOUTS[self.layout](y)
        if self.written:
            z = torch.softmax(q @ k.mT, -1) @ v
        else:
            z = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(z.transpose(1, 2).flatten(2)).mean(1)


LAYOUTS_FAST = ("timm", "chunk", "heads inside")


@pytest.mark.parametrize("written", fast_first([False, True], 1))
@pytest.mark.parametrize("layout", fast_of(LAYOUTS, LAYOUTS_FAST))
def test_every_layout_of_a_fused_projection_is_seen(layout: str, written: bool) -> None:
    model = Fused(layout, written).to(F64)
    x = torch.randn(B, N, C, dtype=F64)
    gm = lg.transform(model, x)
    assert sum(n.target is graft for n in gm.lean.nodes) == 1
    assert lg.verify(model, gm, x, 0).ok
    assert_same(gm, x)
    assert_same(gm, torch.randn(4, N, C, dtype=F64))  # another batch size
    assert_same(copy.deepcopy(gm), x)


@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_and_no_bias(bias: bool) -> None:
    model = Fused("chunk", False, "conv", bias).to(F64)
    x = torch.randn(B, N, C, dtype=F64)
    gm = lg.transform(model, x)
    assert sum(n.target is graft for n in gm.lean.nodes) == 1
    assert_same(gm, x)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((2, 3), (3,)), ((1, 3), (2, 1))])
def test_a_halved_product_is_half_of_autograds(shapes: Any) -> None:
    a, b = (torch.randn(s, dtype=F64, requires_grad=True) for s in shapes)
    y, z = halved_mul(a, b), a * b
    assert torch.equal(y, z)
    g = torch.randn_like(y)
    pairs = zip(*(torch.autograd.grad(t, (a, b), g) for t in (y, z)), strict=True)
    for got, plain in pairs:
        torch.testing.assert_close(got, plain / 2)


@pytest.mark.parametrize(("width", "fused"), [(8, False), (256, True)])
def test_a_large_product_halves_its_gradient_itself(width: int, fused: bool) -> None:
    """Of a small one a scale does it: the twin saves a pass over memory and costs a call."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, width), nn.Linear(4, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.a(x) * self.b(x)).mean((1, 2))

    x = torch.randn(2, 200, 4, dtype=F64)
    gm = lg.transform(Gated().to(F64), x)
    assert any(n.target is halved_mul for n in gm.lean.nodes) is fused
    assert_same(gm, x)


class Scan(nn.Module):
    """A product of two values at each step; the steps are joined in the end."""

    def __init__(self, join: Callable[[list[torch.Tensor]], torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.join = nn.Linear(C, C), nn.Linear(C, C), join

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.a(x), self.b(x)
        steps = [(a[:, i, None] @ b[:, i, :, None]).squeeze(-1) for i in range(N)]
        return self.join(steps).flatten(1)


@pytest.mark.parametrize(
    ("join", "left"),
    fast_first([
        (lambda steps: torch.stack(steps, 1), 1),
        (lambda steps: torch.cat([s.mT for s in steps], -1), 1),
        (lambda steps: torch.cat([torch.stack(steps[:2], 1), torch.stack(steps[2:], 1)], 1), 1),
        (lambda steps: torch.stack([*steps[:-1], steps[0]], 1), 1),
        (lambda steps: torch.stack(steps, 1) + steps[0][:, None], N),  # which is read again
        (lambda steps: torch.stack([*steps[:-1], steps[-1].detach()], 1), N - 1),
        (lambda steps: torch.stack([steps[0] * 2, *steps[1:]], 1), N),
    ], 1),
)  # fmt: skip
def test_equal_scales_of_what_is_joined_become_one(join: Any, left: int) -> None:
    x = torch.randn(B, N, C, dtype=F64)
    gm = lg.transform(Scan(join).to(F64), x)
    assert sum(map(is_scale, gm.lean.nodes)) == left
    assert spell(erase(gm.lean)) == gm.history.original
    assert_same(gm, x)
    assert_same(copy.deepcopy(gm), x)


class Mlp(nn.Module):
    def __init__(
        self, act: Callable[[torch.Tensor], torch.Tensor], conv: bool, twice: bool
    ) -> None:
        super().__init__()
        self.act, self.twice = act, twice
        self.stem, self.fc2 = nn.Linear(C, C), nn.Linear(2 * C, 2)
        self.fc1 = nn.Conv1d(C, 2 * C, 1) if conv else nn.Linear(C, 2 * C)
        with torch.no_grad():  # between 0 and 1, where every activation is defined
            self.fc1.weight.mul_(0.1)
            self.fc1.bias.fill_(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        y = self.fc1(y.mT) if isinstance(self.fc1, nn.Conv1d) else self.fc1(y)
        z = self.act(y) + y if self.twice else self.act(y)
        return self.fc2(z.mT if isinstance(self.fc1, nn.Conv1d) else z).sum(1)


OVER = {name: twin.over for name, twin in ALL_TWINS.items() if hasattr(twin, "over")}


@pytest.mark.parametrize(
    ("name", "conv"), fast_first([("gelu", True), *((name, False) for name in OVER)], 8)
)
def test_an_activation_writes_over_a_product_that_nobody_else_reads(name: str, conv: bool) -> None:
    x = torch.randn(B, N, C, dtype=F64)
    gm = lg.transform(Mlp(ALL_TWINS[name].aten_op, conv, False).to(F64), x, on_unknown="keep")
    assert any(n.target is OVER[name] for n in bound(gm.lean).nodes)
    assert_same(gm, x)


def test_a_product_with_another_reader_is_not_written_over() -> None:
    model, x = Mlp(nn.functional.gelu, False, True).to(F64), torch.randn(B, N, C, dtype=F64)
    gm = lg.transform(model, x)
    assert not any(n.target in OVER.values() for n in bound(gm.lean).nodes)
    assert_same(gm, x)


def test_what_is_written_over_is_read_by_no_second_backward() -> None:
    """Slopes are written over where the graph goes with the backward, and nowhere else."""
    model = Mlp(nn.functional.gelu, False, False).to(F64)
    x = torch.randn(B, N, C, dtype=F64, requires_grad=True)
    gm = lg.transform(model, x)
    y = gm(x)[:, 0].sum()
    kept = [torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2)]
    (batched,) = torch.autograd.grad(
        y, x, torch.ones(3, dtype=F64), retain_graph=True, is_grads_batched=True
    )
    (with_graph,) = torch.autograd.grad(y, x, create_graph=True)
    (last,) = torch.autograd.grad(y, x)
    for again in (*kept, with_graph):
        assert torch.equal(again, last)
    for segments in range(1, 7):  # what enters a part is kept for its second run
        (again,) = torch.autograd.grad(lg.checkpointed(gm, segments)(x)[:, 0].sum(), x)
        assert torch.equal(again, last)
    by_func = torch.func.vmap(torch.func.grad(lambda t: gm(t[None])[0, 0]))(x.detach())
    for again in (*batched, by_func):
        torch.testing.assert_close(again, last)


def test_what_a_user_replaces_is_what_runs() -> None:
    model = Mlp(nn.functional.gelu, False, False).to(F64)
    x = torch.randn(B, N, C, dtype=F64)
    gm = lg.transform(model, x)
    other = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    assert torch.equal(
        torch.func.functional_call(gm, other, (x,)), torch.func.functional_call(model, other, (x,))
    )
    model.fc1, gm.fc1 = (copy.deepcopy(m) for m in [nn.Linear(C, 2 * C).to(F64)] * 2)
    assert torch.equal(gm(x), model(x))
    gm.fc2.weight = model.fc2.weight = nn.Parameter(torch.randn(2, 2 * C, dtype=F64))
    assert torch.equal(gm(x), model(x))
    nn.utils.parametrizations.weight_norm(gm.stem)
    with torch.no_grad():
        gm.stem.parametrizations.weight.original0.mul_(2)
    with torch.no_grad():
        model.stem.weight.mul_(2)
    torch.testing.assert_close(gm(x), model(x))


def test_the_backward_costs_what_the_live_rows_cost() -> None:
    """Of a fused projection 1/3 comes back, and no weight gradient that nobody asked for."""
    model = Fused("timm", True).to(F64)
    x = torch.randn(B, N, C, dtype=F64, requires_grad=True)
    gm = lg.transform(model, x)
    y = gm(x)[:, 0].sum()
    with Operations() as counted:
        torch.autograd.grad(y, x)
    tokens, linears = B * N, C * 2 + C * C + C * C  # proj, the rows of v, stem
    assert counted.total == 2 * (tokens * linears + B * H * N * N * D)  # and Pᵀ g


def test_hooks_choose_the_whole_graph_and_leave_again() -> None:
    model = Fused("timm", False).to(F64)
    x = torch.randn(B, N, C, dtype=F64)
    gm = lg.transform(model, x)
    seen: list[Any] = []
    hook = gm.qkv.register_forward_hook(lambda m, i, o: seen.append(o))
    gm(x.requires_grad_())
    assert seen[0].requires_grad  # a listener can ask for the gradient there
    hook.remove()
    gm(x)
    assert len(seen) == 1
    doubled = gm.qkv.register_forward_hook(lambda m, i, o: 2 * o)
    assert not torch.equal(gm(x), model(x))
    doubled.remove()
    assert torch.equal(gm(x), model(x))


def test_a_graph_changed_by_hand_runs_as_it_is() -> None:
    model = Fused("timm", False).to(F64)
    x = torch.randn(B, N, C, dtype=F64)
    gm = lg.transform(model, x)
    for node in gm.graph.nodes:
        if node.op == "output":
            with gm.graph.inserting_before(node):
                node.args = (gm.graph.call_function(torch.neg, (node.args[0],)),)
    gm.recompile()
    assert gm.lean is None
    assert torch.equal(gm(x), -model(x))


def test_attention_lets_the_fused_projection_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps q and k, not the v that lies between them."""
    monkeypatch.setattr("libragrad_fx.kernels.blocks._SMALL", 0)
    x = torch.randn(B, H, N, 3 * D, requires_grad=True)
    fused = x * 2
    held = StorageWeakRef(fused.untyped_storage())
    y = scaled_dot_product_attention(*fused.chunk(3, -1))
    q, k, v = (t.detach().clone().requires_grad_() for t in fused.chunk(3, -1))
    del fused
    assert held.expired()
    plain = nn.functional.scaled_dot_product_attention(q.detach(), k.detach(), v)
    g = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(got[..., 2 * D :] / 2, torch.autograd.grad(plain, v, g)[0])
    assert not got[..., : 2 * D].any()


def test_what_is_no_plain_part_is_left_alone() -> None:
    """Of half of the tokens some features come back: the whole product is recorded, as ever."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.Linear(C, 3 * C), nn.Linear(C, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.up(x).chunk(2, 1)[0].chunk(3, -1)
            return self.head(torch.softmax(q @ k.mT, -1) @ v).mean(1)

    model, x = Halves().to(F64), torch.randn(B, 2 * N, C, dtype=F64)
    gm = lg.transform(model, x)
    assert all(n.target is not graft for n in gm.lean.nodes)
    assert_same(gm, x)


def test_a_slice_that_takes_all_copies_no_gradient() -> None:
    class Slices(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            aten, x = torch.ops.aten, super().forward(x)
            everything = [aten.slice.Tensor(x, 1, 0, end) for end in (None, N, 2**63 - 1)]
            some = aten.slice.Tensor(x, 1, 0, N - 1), aten.slice.Tensor(x, -1, 1), x[:, ::2]
            return sum(t.sum((1, 2)) for t in (*everything, *some))[:, None]  # type: ignore[union-attr]

    x = torch.randn(B, N, C, dtype=F64)
    gm = lg.transform(nn.Sequential(Slices(C, C)).to(F64), x)
    counted = [n.target is whole for n in gm.lean.nodes if getattr(n.target, "aten_op", n.target)
               is torch.ops.aten.slice.Tensor]  # fmt: skip
    assert counted.count(True) >= 3
    assert counted.count(False) == 3
    assert_same(gm, x)
    assert_same(copy.deepcopy(gm), x)
    assert spell(erase(gm.lean)) == spell(erase(gm.graph))


def nodes_of(y: torch.Tensor) -> list[str]:
    """Names of the autograd nodes that lead to ``y``."""
    seen, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [n for n, _ in node.next_functions]
    return [n.name() for n in seen]


class Steps(nn.Module):
    """A scan over the axis of its steps, of which it reads ``places``."""

    def __init__(self, places: list[int], axis: int, keep: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.places, self.axis, self.keep = places, axis, keep

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, state = self.inner(x), 0.0
        for i in self.places:
            step = y.select(self.axis, i)
            state = state * step.sigmoid() + step
        return (state, y.sum()) if self.keep else state


STEPS = {
    "all": ([0, 1, 2, 3], 1, ["UnbindBackward0"]),
    "from behind, and twice": ([-1, 2, 1, 3], -2, ["UnbindBackward0"]),
    "half": ([3, 1], 1, ["UnbindBackward0"]),
    "few": ([2, 2], 1, ["SelectBackward0"] * 2),
    "the batch, whose size is free": ([0, 1], 0, ["SelectBackward0"] * 2),
}


@pytest.mark.parametrize("keep", [False, True], ids=["alone", "read as a whole too"])
@pytest.mark.parametrize(("places", "axis", "want"), fast_first(STEPS.values(), 2), ids=STEPS)
def test_steps_of_a_scan_have_one_gradient(
    places: list[int], axis: int, want: list[str], keep: bool
) -> None:
    model, x = Steps(places, axis, keep).double(), torch.randn(2, 4, 6, dtype=F64)
    gm = lg.transform(model, x)
    for runs in (gm, copy.deepcopy(gm)):
        assert_same(runs, x)
        out = runs(x.clone().requires_grad_())
        y = out[0] if keep else out
        assert torch.equal(y, model(x)[0] if keep else model(x))
        assert sorted(n for n in nodes_of(y) if n[:6] in ("Unbind", "Select")) == want


def test_the_only_place_of_an_axis_is_a_view_backwards_too() -> None:
    class Column(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ x.mT.softmax(1).sum(2, keepdim=True))[:, :, 0].relu()

    x = torch.randn(2, 4, 6, dtype=F64)
    gm = lg.transform(Column(), x)
    y = gm(x.requires_grad_())
    assert torch.equal(y, Column()(x))
    names = nodes_of(y)
    assert "SelectBackward0" not in names
    assert any(n.startswith("SqueezeBackward") for n in names)


@pytest.mark.parametrize(("dead", "grafts"), [(1, 0), (C, 2)], ids=["few rows", "a third"])
def test_live_parts_are_grafted_where_enough_rows_are_dead(dead: int, grafts: int) -> None:
    """Two parts are two products backwards, in place of one."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(C, dead + 2 * C)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.inner(x).split([dead, C, C], -1)
            gate = q.mean(-1, keepdim=True).softmax(1)
            return v.relu() * (gate * k.abs()).sum(1, keepdim=True)

    x = torch.randn(2, N, C, dtype=F64)
    gm = lg.transform(Two().double(), x)
    assert gm.lean is not None
    assert sum(n.target is graft for n in gm.lean.nodes) == grafts
    x = x.requires_grad_()
    short = torch.autograd.grad(gm(x).sum(), x)[0]
    gm.recompile()
    torch.testing.assert_close(short, torch.autograd.grad(gm(x).sum(), x)[0], rtol=1e-12, atol=1e-12)


class Residual(nn.Module):
    """A residual block; ``again`` reads a convolution's result a second time."""

    def __init__(self, act: nn.Module, again: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.norm1, self.norm2 = (nn.BatchNorm2d(3) for _ in range(2))
        self.act, self.again = act, again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        z = self.act(y + x)
        return z * y if self.again else z


ACTS = {
    "relu": (nn.ReLU(), "relu_"),
    "hardtanh, which reads its operand": (nn.Hardtanh(-0.3, 0.5), None),
    "leaky": (nn.LeakyReLU(0.1), "leaky_relu_"),
    "leaky, the other way": (nn.LeakyReLU(-0.1), None),
}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(("act", "name"), fast_first(ACTS.values(), 2), ids=ACTS)
def test_what_no_backward_reads_is_written_over(act: Any, name: str | None, again: bool) -> None:
    model, x = Residual(act, again).double().eval(), torch.randn(2, 3, 5, 5, dtype=F64)
    gm = lg.transform(model, x)
    names = [getattr(n.target, "__name__", "") for n in bound(gm.lean).nodes]
    assert names.count(name) == (2 if name else 0)
    assert names.count("add_") == (not again)  # the norm's result is read once more
    for runs in (gm, copy.deepcopy(gm)):
        kept = x.clone()
        assert_same(runs, x)
        assert torch.equal(runs(x), model(x))
        assert torch.equal(x, kept)
    batched = torch.func.vmap(lambda z: gm(z[None])[0])(x)
    torch.testing.assert_close(batched, model(x))


def test_what_is_computed_once_is_not_written_over() -> None:
    class Ramp(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ramp = torch.arange(4.0, dtype=F64) + torch.ones(4, dtype=F64)
            return (ramp + x.sum(0)).tanh()

    x = torch.randn(2, 4, dtype=F64)
    gm = lg.transform(Ramp(), x)
    for _ in range(3):
        assert torch.equal(gm(x), Ramp()(x))


def test_a_group_norms_gradient_keeps_its_memory_format() -> None:
    x = torch.randn(2, 6, 5, 4, dtype=F64).to(memory_format=torch.channels_last).requires_grad_()
    y = ALL_TWINS["group_norm"](x, 2, None, None, 1e-5)
    g = torch.randn_like(y)
    dx = torch.autograd.grad(y, x, g)[0]
    assert dx.is_contiguous(memory_format=torch.channels_last)
    flat = torch.autograd.grad(
        ALL_TWINS["group_norm"](z := x.detach().contiguous().requires_grad_(), 2, None, None, 1e-5), z, g
    )[0]
    torch.testing.assert_close(dx, flat, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_sum_is_written_over_a_scaled_branch(frozen: bool) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.gamma = nn.Parameter(torch.randn(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.inner(x) * self.gamma + x).tanh() * x.sigmoid()

    model = Scaled().double().requires_grad_(not frozen)
    x = torch.randn(2, 3, 4, dtype=F64)
    gm = lg.transform(model, x)
    assert "add_" in [getattr(n.target, "__name__", "") for n in bound(gm.lean).nodes]
    kept = x.clone()
    assert_same(gm, x)
    assert torch.equal(gm(x), model(x))
    assert torch.equal(x, kept)


class Sum(nn.Module):
    """A sum that may be written over its first operand."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * 2 + y


def test_a_sum_is_written_over_where_it_fits_alone() -> None:
    """Dtypes and the free sizes may be others than at capture."""
    model, x = Sum(), torch.randn(2, 3, 4)
    gm = lg.transform(model, (x, x))
    assert "add_" in [getattr(n.target, "__name__", "") for n in bound(gm.lean).nodes]
    for one, other in ((x, x.double()), (x[:1], x), (x, x[:1])):
        got, want = gm(one, other), model(one, other)
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = gm(x, x), model(x, x)
    assert got.dtype == want.dtype == torch.float32
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["gelu", "tanh", "silu"])
def test_second_derivatives_hold_the_slope(name: str) -> None:
    """What a slope is written over has a history; the slope is a constant."""
    gm = lg.transform(Mlp(ALL_TWINS[name].aten_op, False, False).to(F64), torch.randn(B, N, C, dtype=F64))
    x = torch.randn(B, N, C, dtype=F64, requires_grad=True)
    found = []
    for _ in range(2):
        (g,) = torch.autograd.grad(gm(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), (x, *gm.parameters()), allow_unused=True))
        gm.recompile()  # the whole graph from here
    for short, full in zip(*found, strict=True):
        assert (short is None) == (full is None)
        if short is not None:
            torch.testing.assert_close(short, full, rtol=1e-10, atol=1e-10)


def test_steps_that_the_user_gets_can_be_written_to() -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            y = x.tanh()
            return y[:, 0], y[:, 1]

    x = torch.randn(3, 2, 4, dtype=F64)
    for part in lg.transform(Halves(), x)(x.requires_grad_()):
        part.mul_(2)


@pytest.mark.parametrize("again", [False, True])
def test_an_activation_writes_over_a_view_of_a_product(again: bool) -> None:
    """As in networks that go from maps to tokens before it; not if the product is read once more."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x)
            z = nn.functional.gelu(y.flatten(2).transpose(1, 2)).sum(1)
            return z + y.amax((2, 3)) if again else z

    model, x = Tokens().double(), torch.randn(2, 3, 5, 5, dtype=F64)
    gm = lg.transform(model, x)
    assert any(n.target is OVER["gelu"] for n in bound(gm.lean).nodes) == (not again)
    for runs in (gm, copy.deepcopy(gm)):
        assert_same(runs, x)
        assert torch.equal(runs(x), model(x))
    for segments in range(1, 6):
        z = x.clone().requires_grad_()
        (twice,) = torch.autograd.grad(lg.checkpointed(gm, segments)(z).sum(), z)
        torch.testing.assert_close(twice, torch.autograd.grad(gm(z).sum(), z)[0])
