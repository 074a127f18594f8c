"""LRP-γ, z⁺ and the z-box rule of one op against their formulas, over the op's dense matrix, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from libragrad_fx.graph.schema import bind, spread
from libragrad_fx.module.pickling import graph_of, spelled
from libragrad_fx.ops.share import shared

aten = torch.ops.aten


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


W, K = draw(4, 5, seed=1), draw(6, 2, 3, 3, seed=2)
OPS: dict[str, tuple[Any, str, str, tuple[str, ...], tuple[Any, ...]]] = {
    "linear": (aten.linear.default, "input", "weight", ("bias",), (draw(3, 5), W, draw(4))),
    "linear, no bias": (aten.linear.default, "input", "weight", ("bias",), (draw(2, 3, 5), W, None)),
    "matmul": (aten.matmul.default, "self", "other", (), (draw(2, 3, 5), W.mT)),
    "matmul from the left": (aten.matmul.default, "other", "self", (), (W, draw(2, 5, 3))),
    "mm": (aten.mm.default, "self", "mat2", (), (draw(3, 5), W.mT)),
    "bmm": (aten.bmm.default, "self", "mat2", (), (draw(2, 3, 5), draw(2, 5, 4, seed=1))),
    "addmm": (aten.addmm.default, "mat1", "mat2", ("self",), (draw(4), draw(3, 5), W.mT, 0.5, 2.0)),
    "mv": (aten.mv.default, "vec", "self", (), (W, draw(5))),
    "einsum": (
        aten.einsum.default, "tensors[0]", "tensors[1]", (), ("bnd,hd->bhn", [draw(2, 3, 5), W]),
    ),
    "conv1d": (
        aten.conv1d.default, "input", "weight", ("bias",),
        (draw(2, 3, 9), draw(4, 3, 3, seed=1), draw(4), [2], [1]),
    ),
    "conv2d": (
        aten.conv2d.default, "input", "weight", ("bias",),
        (draw(2, 2, 6, 5), K, draw(6), [2, 1], [1, 2]),
    ),
    "conv2d, groups": (
        aten.conv2d.default, "input", "weight", ("bias",),
        (draw(2, 4, 6, 5), K, draw(6), [1, 1], [1, 1], [2, 1], 2),
    ),
    "conv2d, same": (
        aten.conv2d.padding, "input", "weight", ("bias",), (draw(1, 2, 5, 5), K, None, [1, 1], "same"),
    ),
    "conv2d, no batch": (aten.conv2d.default, "input", "weight", ("bias",), (draw(2, 5, 5), K)),
    "conv3d": (
        aten.conv3d.default, "input", "weight", ("bias",),
        (draw(1, 2, 3, 4, 4), draw(2, 2, 2, 2, 2, seed=1), draw(2)),
    ),
    "conv_transpose2d": (
        aten.conv_transpose2d.input, "input", "weight", ("bias",),
        (draw(2, 6, 3, 3), K, draw(4), [2, 2], [1, 1], [1, 0], 2),
    ),
    "convolution": (
        aten.convolution.default, "input", "weight", ("bias",),
        (draw(2, 2, 5, 5), K, draw(6), [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
    ),
}  # fmt: skip
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "signed": lambda x: x, "not negative": torch.relu, "negative": lambda x: -x.abs(),
    "zero": torch.zeros_like, "tiny": lambda x: x * 1e-200,
}  # fmt: skip


class Call:
    """One call of an op; ``put`` replaces the operand that carries."""

    def __init__(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        self.op, self.value, self.weight, self.offsets, args = OPS[name]
        self.given = bind(self.op, args, {})
        self.x = change(self._get(self.value))

    def _get(self, name: str) -> Any:
        name, _, index = name.partition("[")
        return self.given[name][int(index[0])] if index else self.given[name]

    def put(self, x: Tensor, others: dict[str, Tensor] | None = None) -> tuple[Any, Any]:
        values = {**self.given, **(others or {})}
        name, _, index = self.value.partition("[")
        if index:
            values[name] = [x, *values[name][1:]]
        else:
            values[name] = x
        return spread(self.op, values)

    def plain(self, x: Tensor, others: dict[str, Tensor] | None = None) -> Tensor:
        args, kwargs = self.put(x, others)
        return self.op(*args, **kwargs)

    def twin(self, x: Tensor, *share: Any, others: dict[str, Tensor] | None = None) -> Tensor:
        args, kwargs = self.put(x, others)
        return shared(self.op, self.value, self.weight, self.offsets, *share)(*args, **kwargs)

    def matrix(self) -> Tensor:
        """The op as a matrix: what each element of x, alone and 1, adds to the result."""
        at_zero = self.plain(torch.zeros_like(self.x))
        basis = torch.eye(self.x.numel(), dtype=torch.float64)
        return torch.stack([(self.plain(e.view_as(self.x)) - at_zero).flatten() for e in basis], -1)


def by_gamma(x: Tensor, w: Tensor, g: Tensor, gamma: float) -> Tensor:
    """Relevances R_i of R_j = z_j g_j. Montavon et al. 2019, split by the sign of x (Andéol et al. 2021,
    and the class Gamma of zennit, without a bias): where z is positive, w⁺ is raised for positive x and w⁻
    for negative x; where z is negative, the other way round. ``gamma`` may be infinite.
    """
    relevance = torch.zeros_like(x)
    for row, send in zip(w, g, strict=True):
        z = (row * x).sum()
        positive, negative = row.clamp(min=0), row.clamp(max=0)
        raised = torch.where((x > 0) == (z > 0), positive, negative)
        shares = x * (raised if math.isinf(gamma) else row + gamma * raised)
        if shares.sum() != 0:
            relevance += shares / shares.sum() * z * send
    return relevance


def by_suppression(x: Tensor, w: Tensor, g: Tensor) -> Tensor:
    """LibraGrad's code at 100 %: dissenters, the terms against the sign of their sum, get nothing; the
    others are multiplied by what restores the sum."""
    terms = w * x
    total = terms.sum(-1, keepdim=True)
    conform = torch.where(terms.sign() == total.sign(), terms, 0.0)
    whole = conform.sum(-1, keepdim=True)
    return (torch.where(whole == 0, 0.0, conform * (total / whole)) * g[:, None]).sum(0)


def by_box(x: Tensor, w: Tensor, g: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Montavon et al. 2017: x w - l w⁺ - h w⁻."""
    relevance = torch.zeros_like(x)
    for row, send in zip(w, g, strict=True):
        shares = x * row - low * row.clamp(min=0) - high * row.clamp(max=0)
        if shares.sum() != 0:
            relevance += shares / shares.sum() * (row * x).sum() * send
    return relevance


def relevance(call: Call, *share: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(x times the twin's gradient, the gradient that was sent, the gradient)."""
    x = call.x.clone().requires_grad_()
    y = call.twin(x, *share)
    assert torch.equal(y, call.plain(x))
    g = draw(*y.shape, seed=3)
    (dx,) = torch.autograd.grad(y, x, g)
    assert dx.isfinite().all()
    return (x * dx).detach().flatten(), g.flatten(), dx


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * float(b.abs().max()))


@pytest.mark.parametrize("change", INPUTS)
@pytest.mark.parametrize("name", OPS)
def test_gamma_and_z_plus_are_their_formulas(name: str, change: str) -> None:
    call = Call(name, INPUTS[change])
    w, x = call.matrix(), call.x.flatten()
    for gamma in (0.05, 0.25, 130.0):
        found, g, _ = relevance(call, gamma)
        assert_close(found, by_gamma(x, w, g, gamma))
        assert_close(found.sum(), ((w @ x) * g).sum())
    found, g, _ = relevance(call, None)
    assert_close(found, by_gamma(x, w, g, math.inf))
    assert_close(found, by_suppression(x, w, g))


@pytest.mark.parametrize("name", OPS)
def test_a_box_is_its_formula(name: str) -> None:
    call = Call(name, torch.tanh)
    found, g, _ = relevance(call, None, ((-1.0,), (1.5,)))
    w, x = call.matrix(), call.x.flatten()
    assert_close(found, by_box(x, w, g, torch.full_like(x, -1.0), torch.full_like(x, 1.5)))
    assert_close(found.sum(), ((w @ x) * g).sum())


def test_a_box_by_channels() -> None:
    call = Call("conv2d", torch.sigmoid)
    low, high = (-0.5, 0.0), (1.0, 2.0)
    found, g, _ = relevance(call, None, (low, high), -3)
    ends = [torch.tensor(e).double().view(-1, 1, 1).expand_as(call.x).flatten() for e in (low, high)]
    assert_close(found, by_box(call.x.flatten(), call.matrix(), g, *ends))


def test_a_box_at_its_ends_and_at_zero() -> None:
    """At an end, and where x is 0: nothing infinite, and what is 0 carries nothing."""
    call = Call("linear", lambda x: (x > 0).double())
    found, g, dx = relevance(call, None, ((0.0,), (1.0,)))
    w, x = call.matrix(), call.x.flatten()
    wanted = by_box(x, w, g, torch.zeros_like(x), torch.ones_like(x))
    assert_close(found, torch.where(x == 0, 0.0, wanted))
    assert (dx[call.x == 0] == 0).all()
    for end in (0.0, 1.0):
        relevance(Call("conv2d", lambda x, end=end: torch.full_like(x, end)), None, ((0.0,), (1.0,)))


@pytest.mark.parametrize("share", [(0.25,), (None,), (None, ((-3.0,), (3.0,)))], ids=["γ", "z⁺", "box"])
@pytest.mark.parametrize("name", ["linear", "addmm", "einsum", "conv2d, groups", "conv_transpose2d"])
def test_weights_and_constants_get_autograds_gradient(name: str, share: Any) -> None:
    call = Call(name, lambda x: x)
    names = [n for n in (call.weight, *call.offsets) if "[" not in n]
    others = {n: call.given[n].clone().requires_grad_() for n in names}
    if name == "einsum":
        w = call.given["tensors"][1].clone().requires_grad_()
        others = {"tensors": [call.x, w]}  # type: ignore[dict-item]
    wanted = [w] if name == "einsum" else [*others.values()]
    x = call.x.clone().requires_grad_()
    ys = call.twin(x, *share, others=others), call.plain(x, others)
    g = draw(*ys[0].shape, seed=3)
    both = [torch.autograd.grad(y, [x, *wanted], g) for y in ys]
    for a, b in zip(both[0][1:], both[1][1:], strict=True):
        assert_close(a, b)
    assert not torch.allclose(both[0][0], both[1][0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """And so is what autocast computes in half precision."""
    x, w, b = (t.to(dtype) for t in OPS["linear"][4])
    twin = shared(aten.linear.default, "input", "weight", ("bias",), 0.25)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(twin(leaf, w, b).sum(), leaf)
    single = x.float().requires_grad_()
    (wanted,) = torch.autograd.grad(twin(single, w.float(), b.float()).sum(), single)
    assert torch.equal(dx, wanted.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        leaf = x.float().requires_grad_()
        y = twin(leaf, w.float(), b.float())
        assert torch.equal(y, torch.nn.functional.linear(leaf, w.float(), b.float()))
    (again,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.equal(again, wanted)


@pytest.mark.parametrize("share", [(0.25,), (None,), (None, ((-3.0,), (3.0,)))], ids=["γ", "z⁺", "box"])
def test_vmap_compile_and_export_see_the_same(share: Any) -> None:
    call = Call("conv2d", lambda x: x)
    args, _ = call.put(call.x)
    x, rest = args[0], args[1:]
    twin = shared(call.op, call.value, call.weight, call.offsets, *share)

    def loss(x: Tensor) -> Tensor:
        return twin(x, *rest).square().sum()

    leaf = x.clone().requires_grad_()
    (whole,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x[:, None]), whole[:, None])
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (found,) = torch.autograd.grad(compiled(leaf), leaf)
    torch.testing.assert_close(found, whole)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return twin(x, *rest)

    exported = torch.export.export(Module(), (x,)).module()
    (found,) = torch.autograd.grad(exported(leaf).square().sum(), leaf)
    torch.testing.assert_close(found, whole)


def test_many_gradients_at_once() -> None:
    call = Call("conv2d", lambda x: x)
    x = call.x.clone().requires_grad_()
    y = call.twin(x, 0.25)
    g = draw(3, *y.shape, seed=4)
    (many,) = torch.autograd.grad(y, x, g, is_grads_batched=True, retain_graph=True)
    one = [torch.autograd.grad(y, x, v, retain_graph=True)[0] for v in g]
    torch.testing.assert_close(many, torch.stack(one))


def test_without_a_gradient_it_is_the_op() -> None:
    call = Call("conv2d", lambda x: x)
    with torch.no_grad():
        assert torch.equal(call.twin(call.x, 0.25), call.plain(call.x))


@pytest.mark.parametrize("share", [(0.25,), (None,), (None, ((-1.0, 0.0), (1.0, 2.0)), -3)], ids=str)
def test_one_twin_a_rule_and_it_is_spelled(share: Any) -> None:
    given = (aten.conv2d.default, "input", "weight", ("bias",), *share)
    assert shared(*given) is shared(*given) is not shared(*given[:4], 0.5)
    graph = torch.fx.Graph()
    graph.output(graph.call_function(shared(*given), tuple(graph.placeholder(n) for n in "xw")))
    again = graph_of(spelled(graph))
    assert [n.target for n in again.nodes if n.op == "call_function"] == [shared(*given)]
