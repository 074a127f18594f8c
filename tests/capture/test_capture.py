"""Capture and normal form: what a model may do inside its forward, handled or refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.capture.examples import example_call
from libragrad_fx.capture.export import capture
from libragrad_fx.capture.normal import normalize
from libragrad_fx.errors import (
    CaptureError,
    CustomBackwardWarning,
    CutWarning,
    ExportError,
    InputError,
    UnknownOpError,
)
from libragrad_fx.pieces.tape import transform_by_tape
from libragrad_fx.types import Trace
from tests.between import fast_first

F64 = torch.float64


def trace_of(model: nn.Module, x: Any) -> Trace:
    return normalize(model, capture(model, *example_call(model, x)))


def targets(model: nn.Module, x: Any) -> list[str]:
    return [str(n.target) for n in trace_of(model, x).graph.nodes if n.op == "call_function"]


def same_as_eager(model: nn.Module, x: torch.Tensor) -> None:
    """Forward to the bit, and the plain trace's gradient is autograd's own."""
    gm = lg.trace(model, x)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = gm(mine), model(theirs)
    assert torch.equal(y, z)
    (a,), (b,) = (torch.autograd.grad(o.sum(), i) for o, i in ((y, mine), (z, theirs)))
    assert torch.equal(a, b)


class Region(nn.Module):
    """What is computed without grad must stay without grad."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            held = self.a(x) * 2
        return self.b(x) * held + held


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.a(x)
        with torch.autocast("cpu", enabled=False):
            return self.b(h.float())


class Slices(nn.Module):
    """In-place writes into slices of an intermediate value."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x).clone()
        h[:, 1:3] += x[:, :2]
        h[:, 0] = 1.0
        h[:, 3] = x[:, 2]
        h.relu_()
        return h


class Detached(nn.Module):
    """A straight-through estimator: rounding forward, identity backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (x.round() - x).detach()


class Counter(nn.Module):
    """A buffer that the forward updates."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * 2 + self.calls


class Writes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        return x + 1


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x * 3


@pytest.mark.parametrize("make", fast_first([Region, Detached, Slices], 2))
def test_forward_and_gradient_are_eagers(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    same_as_eager(make().to(F64), torch.randn(2, 4, dtype=F64))


def test_autocast_region_keeps_its_dtypes() -> None:
    torch.manual_seed(0)
    same_as_eager(Autocast(), torch.randn(2, 4))


def test_no_grad_region_is_a_cut_and_a_bias() -> None:
    torch.manual_seed(0)
    model, x = Region().to(F64), torch.randn(2, 4, dtype=F64)
    certificate = lg.verify(model, lg.transform(model, x), x, target=1)
    assert certificate.ok, str(certificate)


class Differences(nn.Module):
    """One composite op without a fact, which capture decomposes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.diff(x, prepend=x[:, :1])


class BeforeRegion(nn.Module):
    """A submodule returns the one value that a region in another mode, and all behind it, read."""

    def __init__(self, last: nn.Module, region: Callable[[], Any]) -> None:
        super().__init__()
        self.a, self.last, self.region = nn.Linear(4, 4), last, region

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.last(self.a(x))
        with self.region():
            k = h.sin()
        return (h + k).relu_()  # no operand of this write is known to be fresh


@pytest.mark.parametrize(
    "last", fast_first([nn.Dropout(0.5), Differences()], 1), ids=["idle dropout", "composite op"]
)
@pytest.mark.parametrize(
    "region", fast_first([torch.no_grad, lambda: torch.autocast("cpu", enabled=False)], 1),
    ids=["no_grad", "autocast"],
)  # fmt: skip
def test_a_value_before_a_region_keeps_its_readers(last: nn.Module, region: Callable[[], Any]) -> None:
    """Export forgets that the submodule's mark reads its value, whose node capture then erases."""
    torch.manual_seed(0)
    same_as_eager(BeforeRegion(last, region).to(F64).eval(), torch.randn(2, 4, dtype=F64))


@pytest.mark.parametrize("make", [Slices, Detached])
def test_balanced(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make().to(F64), torch.randn(2, 4, dtype=F64)
    certificate = lg.verify(model, lg.transform(model, x), x, target=1)
    assert certificate.ok, str(certificate)


def test_copy_is_normalised_away() -> None:
    names = targets(Slices(), torch.randn(2, 4))
    assert "aten.copy.default" not in names
    assert not [n for n in names if n.startswith("aten.view.") or n == "aten._unsafe_view.default"]


def test_buffers_are_updated_like_the_models() -> None:
    model, x = Counter(), torch.randn(2, 4)
    gm = lg.transform(model, x)
    assert float(model.calls) == 0
    assert torch.equal(gm(x), x * 2 + 1)
    assert torch.equal(gm(x), x * 2 + 2)


@pytest.mark.parametrize(
    ("model", "message"), [(Writes(), "in place"), (Branches(), "control flow")], ids=str
)
def test_refused_by_name(model: nn.Module, message: str) -> None:
    """As one graph; ``transform`` alone has a second way (``tests/pieces/test_cuts.py``)."""
    with pytest.raises(CaptureError, match=message):
        lg.trace(model, torch.randn(2, 4))


def test_backward_hooks_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    handle = model[1].register_full_backward_hook(lambda *_: None)
    with pytest.raises(CaptureError, match=r"hooks: 1\."):
        lg.transform(model, torch.randn(2, 4))
    handle.remove()
    lg.transform(model, torch.randn(2, 4))


@pytest.mark.filterwarnings("ignore::libragrad_fx.errors.CutWarning")
@pytest.mark.parametrize("where", ["", "0", "1"])
def test_forward_hooks_run(where: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU()).double()
    model.get_submodule(where).register_forward_hook(lambda _m, _a, y: y * y)
    model.get_submodule(where).register_forward_pre_hook(lambda _m, args: (args[0] + 1,))
    x = torch.randn(2, 4, dtype=torch.float64)
    gm = lg.transform(model, x)
    assert torch.equal(gm(x), model(x))
    assert lg.verify(model, gm, x, 1).ok
    with pytest.raises(CaptureError, match=r"hooks: "):
        lg.plan(model, x)


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g * 7


class UsesCustom(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Custom.apply(x) + 1


def test_a_custom_backward_is_named() -> None:
    with pytest.warns(CustomBackwardWarning, match="Custom"):
        lg.transform(UsesCustom(), torch.randn(2, 4))


class Unknown(nn.Module):
    """Two live ops without a row, and one that is not live."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.linalg.inv(x @ x.mT + torch.eye(4, dtype=x.dtype))
        z = torch.linalg.matrix_exp(y) @ torch.linalg.pinv(y)
        return z + torch.linalg.slogdet(x.detach())[1][:, None, None]


def test_unknown_ops_are_listed_all_at_once() -> None:
    x = torch.randn(2, 4, 4, dtype=F64)
    with pytest.raises(UnknownOpError) as caught:
        lg.transform(Unknown(), x)
    text = str(caught.value)
    assert "2 ops" in text
    assert "linalg_pinv" in text
    assert "linalg_matrix_exp" in text
    assert "test_capture.py:" in text
    assert "add a row: {op: aten.linalg_matrix_exp" in text


def test_unknown_ops_can_be_kept_and_are_named() -> None:
    x = torch.randn(2, 4, 4, dtype=F64)
    gm = lg.transform(Unknown(), x, on_unknown="keep")
    certificate = lg.verify(Unknown(), gm, x, target=(0, 0))
    assert not certificate.ok
    assert certificate.forward_equal
    assert len(certificate.unbalanced) == 2


def test_rows_can_be_added_in_code() -> None:
    rows = [
        {"op": "aten.linalg_inv", "kind": "cut", "why": "held for this study"},
        {"op": "aten.linalg_matrix_exp", "kind": "cut", "why": "held for this study"},
    ]
    x = torch.randn(2, 4, 4, dtype=F64)
    with pytest.raises(CaptureError, match="no differentiable path"):
        lg.transform(Unknown(), x, rules=rows)


# --- inputs


def test_inputs_are_inferred_from_the_first_layer() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert lg.transform(conv)(torch.randn(5, 3, 224, 224)).shape == (5, 2)
    mlp = nn.Sequential(nn.Linear(7, 3), nn.ReLU(), nn.Linear(3, 2))
    assert lg.transform(mlp)(torch.randn(5, 7)).shape == (5, 2)
    ids = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 2))
    assert lg.transform(ids)(torch.zeros(5, 16, dtype=torch.int64)).shape == (5, 16, 2)


def test_one_clear_error_when_they_cannot_be() -> None:
    class Opaque(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    with pytest.raises(InputError, match=r"tried .* Pass an example"):
        lg.transform(Opaque())


def test_example_must_fit_forward() -> None:
    with pytest.raises(InputError, match="forward"):
        lg.transform(nn.Linear(4, 4), {"nonsense": torch.randn(2, 4)})
    with pytest.raises(InputError, match="example inputs must be"):
        lg.transform(nn.Linear(4, 4), "text")


def test_an_embedding_starts_the_signal() -> None:
    model = nn.Sequential(nn.Embedding(11, 8), nn.GELU(), nn.Flatten(), nn.Linear(24, 3)).to(F64)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    gm = lg.transform(model, ids)
    certificate = lg.verify(model, gm, ids, target=1)
    assert certificate.ok, str(certificate)
    assert certificate.edits == 1
    assert abs(certificate.input_share) > 1e-3


def test_no_path_is_an_error() -> None:
    class Cut(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.detach() * 2

    with pytest.raises(CaptureError, match="no differentiable path"):
        lg.transform(Cut(), torch.randn(2, 3))


def test_transform_of_a_transform_is_itself() -> None:
    gm = lg.transform(nn.Sequential(nn.Linear(4, 4), nn.GELU()), torch.randn(2, 4))
    assert lg.transform(gm) is gm
    with pytest.raises(InputError, match="captured already"):
        lg.transform(gm, policy="cp_lrp")


def test_two_outputs_one_a_gate() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = self.head(x)
            return logits, logits.softmax(-1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm = lg.transform(Both(), torch.randn(2, 4))
    (note,) = gm.plan.notes
    assert "softmax" in note
    assert gm.plan.edits == ()


class Writes(nn.Module):
    """A network that writes in place, ``how`` it does."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.linear, self.norm, self.how = nn.Linear(4, 4), nn.BatchNorm1d(4), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.how(self.norm(self.linear(x)), x)


def _seen_before(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    twice = y * 2
    return y.mul_(x).add_(twice)


def _another_name(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    flat = y.view(-1)
    y.relu_()
    return flat.reshape(-1, 4) + y


def _nothing_dropped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    same = nn.functional.dropout(
        y, 0.5, False
    )  # eval: ``y`` itself, though its schema does not say
    same.sigmoid_()
    return y + x


def _a_part(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y[:, 0] = 0
    y.t().mul_(2)
    return y.clamp_(-1, 1)


@pytest.mark.parametrize(
    "how", fast_first([lambda y, x: nn.functional.silu(y, inplace=True), lambda y, x: y.relu_().add_(x),
                       _seen_before, _another_name, _nothing_dropped, _a_part], 4),
    ids=["activation", "residual", "seen before", "another name", "nothing dropped", "a part"],
)  # fmt: skip
def test_writing_in_place(how: Any) -> None:
    model, x = Writes(how).to(F64).eval(), torch.randn(3, 4, dtype=F64)
    gm = lg.transform(model, x)
    assert not any(
        getattr(getattr(n.target, "_schema", None), "is_mutable", 0) for n in gm.graph.nodes
    )
    assert lg.verify(model, gm, x, 1).ok


def test_one_example_for_two_arguments_leaves_them_two() -> None:
    class Sum(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x.tanh() + 2 * y

    x, y = torch.randn(2, 2, 4).unbind(0)
    assert torch.equal(lg.transform(Sum(), (x, x))(x, y), Sum()(x, y))


class _Region(nn.Module):
    """Writes with a gradient into what a ``no_grad`` region has made."""

    def __init__(self, write: Any, view: Any = lambda g: g) -> None:
        super().__init__()
        self.fc, self.write, self.view = nn.Linear(4, 4).double(), write, view

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            g = self.view(self.fc(x))
        self.write(g, x)
        return (g + x).sin()


def _part(g: torch.Tensor, x: torch.Tensor) -> None:
    g[:, 1:3] += x[:, 1:3]


def _flat(g: torch.Tensor, x: torch.Tensor) -> None:
    g.view(-1).mul_(x.reshape(-1))
    g.add_(1).relu_()


def _recorded(model: nn.Module, x: torch.Tensor) -> nn.Module:
    how: Any = {"policy": "libra", "rules": None, "balanced": False, "on_unknown": "keep"}
    with warnings.catch_warnings(action="ignore", category=CutWarning):
        return transform_by_tape(model, (x,), {}, None, RuntimeError("recorded"), **how)


@pytest.mark.parametrize("by", [lg.trace, _recorded])
@pytest.mark.parametrize("write", fast_first(
    [lambda g, x: g.mul_(x), _part, _flat, lambda g, x: g.copy_(x)], 1
))
def test_a_write_behind_no_grad_keeps_its_gradient(write: Any, by: Any) -> None:
    _require_gradient_kept(_Region(write), by)


@pytest.mark.parametrize("by", [lg.trace, _recorded])
@pytest.mark.parametrize("view", [lambda g: g.view(-1).view(3, 4), lambda g: g.mT.reshape(4, 3).mT])
def test_a_view_that_a_no_grad_region_has_made_may_be_written_to(view: Any, by: Any) -> None:
    """As LayoutLMv3's bias of positions. PyTorch forbids a write that has a gradient."""
    _require_gradient_kept(_Region(lambda g, x: g.t().mul_(2), view), by)


def _require_gradient_kept(model: nn.Module, by: Any) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    traced = by(model, x)
    want, got = (torch.autograd.grad(m(x).sum(), x)[0] for m in (model, traced))
    assert torch.equal(traced(x), model(x))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


RETURNED: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda h: h.double(),
    lambda h: nn.functional.dropout(h, 0.5, training=False),
    lambda h: nn.functional.alpha_dropout(h.resolve_conj(), training=False),
    lambda h: torch.broadcast_tensors(h, h[:1])[0],
    lambda h: +torch.atleast_2d(h.type_as(h)),
    lambda h: h.view(h.shape),  # another tensor
    torch.sin,
]


@pytest.mark.parametrize("by", [lg.trace, _recorded])
@pytest.mark.parametrize("op", fast_first(RETURNED, 2))
def test_no_grad_cuts_no_tensor_that_it_returns_as_it_was(op: Any, by: Any) -> None:
    """Nor what is read of that tensor later, outside of the region."""

    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = x.sin()
            with torch.no_grad():
                a = op(h)
                largest = a.abs().amax()
            return (a * h + h / largest + x).cos()

    _require_gradient_kept(Scaled(), by)


@pytest.mark.parametrize("by", [lg.trace, _recorded])
@pytest.mark.parametrize("write", [torch.relu_, lambda h: h[0].zero_(), lambda h: h.view(-1).mul_(2)])
def test_a_write_inside_no_grad_into_what_has_a_gradient_is_refused(write: Any, by: Any) -> None:
    """Autograd does not see such a write: its gradient is that of the old values, at the new ones."""

    class Inside(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h, mask = x * 2, torch.zeros_like(x)
            with torch.no_grad():
                mask.copy_(x > 0)  # has no gradient
                write(h[:2])
            return (h * x * mask).sin()

    with pytest.raises(ExportError, match="in a no_grad region, into a tensor that carries a gradient"):
        by(Inside(), torch.randn(3, 4))


def test_a_write_through_detach_is_refused() -> None:
    """PyTorch takes the alias again after the write, and the gradient of what was written would be lost."""

    class Through(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = x * 2
            return h.detach().mul_(x).sin()

    with pytest.raises(ExportError, match=r"clone\(\) it first"):
        lg.trace(Through(), torch.randn(3, 4))
