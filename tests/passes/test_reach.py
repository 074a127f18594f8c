"""What is within reach: ops and habits that were refused, or that failed with somebody else's error."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import libragrad_fx as lg
from libragrad_fx.decide import rulebook
from libragrad_fx.errors import RuleError, UnknownOpError
from libragrad_fx.types import Kind
from tests.rows.one_op import balance
from tests.samples import calls, randn

Tensor = torch.Tensor
X = randn(4, 6)


class Between(nn.Module):
    """A function of (B, 8) and of a parameter (5, 8), behind a linear layer."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f, self.fc, self.p = f, nn.Linear(6, 8), nn.Parameter(torch.randn(5, 8))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.fc(x), self.p)


def weighed(y: Any) -> Tensor:
    y = next(t for t in torch.utils._pytree.tree_leaves(y) if t.requires_grad)
    return (y * torch.arange(y.numel(), dtype=y.dtype).cos().view(y.shape)).sum()


def certified(model: nn.Module, x: Any = X) -> Any:
    module = lg.transform(model, x)
    certificate = lg.verify(model, module, x, weighed)
    assert certificate.ok, certificate
    return module


def of_pairs(y: Tensor) -> Tensor:
    return torch.complex(y, y.flip(0))


HANN = torch.hann_window(8, dtype=torch.float64)
COLUMNS = torch.arange(8).expand(4, 8) // 2
FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "stft": lambda y, p: torch.stft(y, 8, 4, window=HANN, return_complex=True).abs(),
    "istft": lambda y, p: torch.istft(
        torch.stft(y.repeat(1, 4), 8, 4, window=HANN, return_complex=True), 8, 4, window=HANN
    ),
    "scatter_reduce": lambda y, p: y.new_zeros(4, 8).scatter_reduce(1, COLUMNS, y, "amax"),
    "index_reduce": lambda y, p: y.new_zeros(4, 8).index_reduce(
        0, torch.tensor([0, 0, 1, 1]), y, "mean"
    ),
    "remainder": lambda y, p: y % 0.7,
    "fmod": lambda y, p: torch.fmod(y, 0.7),
    "frac": lambda y, p: y.frac(),
    "rot90": lambda y, p: y.rot90(),
    "max_unpool1d": lambda y, p: F.max_unpool1d(
        *F.max_pool1d(y[:, None], 2, return_indices=True), 2
    ),
    "logaddexp": lambda y, p: torch.logaddexp(y, p[:4]),
    "logcumsumexp": lambda y, p: y.logcumsumexp(1),
    "var_mean": lambda y, p: torch.cat(torch.var_mean(y, 1)),
    "std_mean": lambda y, p: torch.stack(torch.std_mean(y)),
    "weighted embedding_bag": lambda y, p: F.embedding_bag(
        COLUMNS, p, per_sample_weights=y, mode="sum"
    ),
    "cdist to prototypes": lambda y, p: torch.cdist(y, p),
    "cdist to itself": lambda y, p: torch.cdist(y, 2 * y + 1, 1.0),
    "pdist": lambda y, p: F.pdist(y),
    "hypot": lambda y, p: torch.hypot(y, p[:4]),
    "multi_dot": lambda y, p: torch.linalg.multi_dot([y, p.T, p]),
    "mse_loss": lambda y, p: F.mse_loss(y, p[:4]),
    "nll_loss": lambda y, p: F.nll_loss(y.log_softmax(1), torch.arange(4)),
    "complex tanh": lambda y, p: torch.tanh(of_pairs(y)).real,
    "complex exp": lambda y, p: torch.exp(of_pairs(y)).imag,
    "complex square": lambda y, p: (of_pairs(y) ** 2).real,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_ops_that_were_refused(name: str) -> None:
    certified(Between(FUNCTIONS[name]))


def test_one_function_has_one_balanced_gradient() -> None:
    """A complex number over its size, by either name; of real numbers ``sgn`` is a step."""
    grads = []
    for f in (lambda z: z.sgn(), lambda z: z / z.abs()):
        module = certified(Between(lambda y, p, f=f: torch.view_as_real(f(of_pairs(y)))))
        x = X.clone().requires_grad_()
        grads.append(torch.autograd.grad(weighed(module(x)), x)[0])
    torch.testing.assert_close(grads[0], grads[1])
    assert grads[0].abs().max() > 0
    for step in (torch.sgn, torch.sign):
        with pytest.raises(lg.errors.NoPathError):
            lg.transform(Between(lambda y, p, step=step: step(y)), X)


# --- a linear op with a constant of its own (C12)

LIBRARY = torch.library.Library("reach_of_tests", "FRAGMENT")
LIBRARY.define("shifted(Tensor x) -> Tensor")
LIBRARY.impl("shifted", lambda x: x * 2 + 1, "CompositeExplicitAutograd")
LIBRARY.impl("shifted", lambda x: x * 2 + 1, "AutogradCPU")
shifted = torch.ops.reach_of_tests.shifted
ROW = {"op": "reach_of_tests.shifted", "kind": "linear", "stream": ["x"], "why": "2 x + 1"}


@pytest.mark.parametrize("f", [
    lambda y, p: shifted(y),
    lambda y, p: y * shifted(torch.zeros_like(y)),
    lambda y, p: y + y * shifted(y.new_zeros(8)),
    lambda y, p: torch.cat([shifted(torch.zeros(4, 8).double()), y]) * shifted(y).repeat(2, 1),
])  # fmt: skip
@pytest.mark.parametrize("said", [{}, {"constant": True}])
def test_a_row_for_an_op_that_adds_something(f: Any, said: Any) -> None:
    model = Between(f)
    module = lg.transform(model, X, rules=[{**ROW, **said}])
    certificate = lg.verify(model, module, X, weighed)
    assert certificate.ok, certificate


def test_a_row_that_denies_its_constant_is_named() -> None:
    model = Between(lambda y, p: torch.tanh(shifted(y)))
    with pytest.raises(lg.errors.VerificationError, match="shifted"):
        lg.transform(model, X, rules=[{**ROW, "constant": False}])


def test_constant_is_for_linear_rows() -> None:
    book = rulebook.load()
    with pytest.raises(RuleError, match="linear"):
        book.extended([{**ROW, "kind": "homogeneous", "constant": True}])
    with pytest.raises(RuleError, match="bool"):
        book.extended([{**ROW, "constant": 1}])


def test_a_row_may_not_hold_for_a_literal() -> None:
    with pytest.raises(UnknownOpError, match="scatter_reduce"):
        lg.transform(
            Between(lambda y, p: y.new_ones(4, 8).scatter_reduce(1, COLUMNS, y, "prod")), X
        )
    row = {"op": "aten.scatter_reduce", "kind": "homogeneous", "stream": ["src"], "why": "w"}
    with pytest.raises(RuleError, match="reduced"):
        rulebook.load().extended([{**row, "unless": {"reduced": "prod"}}])


# --- somebody else's errors (E17)


class Ignores(nn.Module):
    def forward(self, x: Tensor, extra: Any) -> Tensor:
        return x * 2


class Hands(nn.Module):
    """A submodule is handed a parameter that no op reads."""

    def __init__(self, wrapped: Callable[[Any], Any]) -> None:
        super().__init__()
        self.w, self.inner, self.wrapped = nn.Parameter(torch.ones(3)), Ignores(), wrapped
        self.net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.net(x), self.wrapped(self.w))


@pytest.mark.parametrize("wrapped", [lambda w: w, lambda w: [w, w], lambda w: {"w": (w,)}])
def test_a_parameter_that_no_op_reads(wrapped: Any) -> None:
    model = Hands(wrapped)
    module = certified(model)
    seen: list[Any] = []
    module.inner.register_forward_hook(lambda m, args, y: seen.append(args[1]))
    module(X)
    leaf = torch.utils._pytree.tree_leaves(seen[0])[0]
    assert torch.equal(leaf, model.w)


def spectral(x: Tensor) -> Tensor:
    f = torch.fft.rfft(x)
    out = torch.zeros_like(f)
    out[:, :2] = f[:, :2] * 3
    return torch.fft.irfft(out, n=x.shape[-1])


def write_rows(x: Tensor) -> Tensor:
    z = of_pairs(x).clone()
    z[:, 1:3] = z[:, 0:2] * 2
    z[:, 0] *= 3
    return torch.view_as_real(z)


def write_diagonal(x: Tensor) -> Tensor:
    z = of_pairs(x)[:, :4].clone()
    z.diagonal().copy_(z[0] * 2)
    z.unsqueeze(0).diagonal(0, 1, 2)[:] += 1
    return z.real


def write_conjugate(x: Tensor) -> Tensor:
    z = of_pairs(x).clone()
    z[..., 4:] = z[..., :-4].conj()
    z.real[:, 1] = x[:, 0]
    return z.abs()


@pytest.mark.parametrize("f", [spectral, write_rows, write_diagonal, write_conjugate])
def test_writes_into_parts_of_complex_tensors(f: Any) -> None:
    certified(Between(lambda y, p: f(y)))


BALANCED = [r for r in rulebook.load().facts.values() if r.twin and r.kind is not Kind.CUT]


@pytest.mark.parametrize("row", BALANCED, ids=lambda r: r.op.removeprefix("aten."))
def test_batched_backwards(row: Any) -> None:
    """``is_grads_batched`` (and so ``jacobian(vectorize=True)``) gives what one after another gives."""
    call = calls(row)[0]
    made = balance(rulebook.load(), row, call, [next(iter(_carriers(row, call)))])
    x = [t.clone().requires_grad_() for t in made.inputs]
    y = next(t for t in made.module(*x) if t.requires_grad)
    gs = torch.stack([torch.randn_like(y), torch.randn_like(y), torch.randn_like(y)])
    one = [torch.autograd.grad(y, x[0], g, retain_graph=True)[0] for g in gs]
    (all_,) = torch.autograd.grad(y, x[0], gs, is_grads_batched=True)
    torch.testing.assert_close(all_, torch.stack(one), rtol=1e-12, atol=1e-12)


def _carriers(row: Any, call: Any) -> Any:
    from tests.rows.one_op import tensors

    return tensors(call, (*row.stream, *row.factors))


class Wants(nn.Module):
    """``__new__`` has an argument, which no copy gives it."""

    def __new__(cls, width: int) -> Wants:
        return super().__new__(cls)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(6, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x))


class Factory(nn.Module):
    def __new__(cls, kind: str) -> Any:
        return object.__new__({"a": FirstKind, "b": SecondKind}[kind])

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)


class FirstKind(Factory):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.fc(x))


class SecondKind(Factory):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).sigmoid() * x


class Keyed(dict, nn.Module):  # type: ignore[type-arg]
    """A module that is a dictionary as well."""

    def __init__(self, *, width: int) -> None:
        nn.Module.__init__(self)
        self.fc = nn.Linear(6, width)

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.fc(x))


@pytest.mark.parametrize("inner", [
    lambda: Wants(6), lambda: Factory("a"), lambda: Factory("b"), lambda: Keyed(width=6),
])  # fmt: skip
def test_classes_that_are_made_in_their_own_way(inner: Any) -> None:
    certified(nn.Sequential(nn.Linear(6, 6), inner(), nn.Linear(6, 3)).double())


# --- what was put on an instance refers to the copy that runs (fuzz)


class Counts(nn.Module):
    """Gives another answer at each call, by what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.seen = nn.Linear(6, 3).double(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.fc(x) * self.seen


def as_closure(m: Any) -> None:
    old = m.forward
    m.forward = lambda x: old(x)


def as_nested_closure(m: Any) -> None:
    def call(x: Tensor) -> Tensor:
        def inner() -> Tensor:
            return type(m).forward(m, x)

        return inner()

    m.forward = call


def as_partial(m: Any) -> None:
    m.forward = functools.partial(type(m).forward, m)


def as_method(m: Any) -> None:
    m.forward = types.MethodType(lambda self, x: type(m).forward(self, x), m)


@pytest.mark.parametrize("patch", [as_closure, as_nested_closure, as_partial, as_method])
@pytest.mark.filterwarnings("ignore::libragrad_fx.errors.CutWarning")
def test_state_behind_a_patched_forward(patch: Any) -> None:
    model = Counts()
    twin = copy.deepcopy(model)
    patch(model)
    module = lg.transform(model, X)
    assert model.seen == 0
    for _ in range(3):
        assert torch.equal(module(X), twin(X))
    assert model.seen == 0


# --- recorded while it ran: shapes that depend on values, control flow as an op, packed sequences (E18)


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


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "while_loop" else ()) for n in RECORDED]
)
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


@pytest.mark.parametrize("f", [
    lambda y, p: torch.vmap(lambda a: torch.tanh(a) * a)(y),
    lambda y, p: torch.vmap(lambda a, b: a @ b, in_dims=(0, None))(y, p.T),
    lambda y, p: torch.vmap(torch.vmap(lambda a: F.gelu(a) + 1))(y.view(2, 2, 8)),
    lambda y, p: torch.func.vmap(lambda w: F.linear(y, w[None]))(p),
])  # fmt: skip
def test_maps_are_written_out(f: Any) -> None:
    assert isinstance(certified(Between(f)), torch.fx.GraphModule)


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
@pytest.mark.filterwarnings("ignore::libragrad_fx.errors.CustomBackwardWarning")
@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize("write", [
    lambda t, v: t[..., 1:].copy_(v[..., 1:]),
    lambda t, v: t.__setitem__((..., 0), v[..., 0]),
    lambda t, v: t.mul_(0.5).add_(v.tanh()),
    lambda t, v: t.masked_scatter_(v > 0, v),
])  # fmt: skip
def test_writes_by_data_inside_a_function(write: Any, by_value: bool) -> None:
    apply = written(write)

    def f(y: Tensor, p: Tensor) -> Tensor:
        if by_value and float(y.detach().numpy().sum()) > 1e9:
            y = -y
        return apply(y * 2, F.gelu(y + p[0])).sin()

    model = Between(f)
    module = lg.transform(model, X)
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


@pytest.mark.parametrize(("layer", "how"), [
    (nn.LSTM, "state"), (nn.GRU, "data"), (nn.RNN, "both ways"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore::libragrad_fx.errors.CutWarning")
def test_packed_sequences(layer: Any, how: str) -> None:
    model, x = Packed(layer, how).eval(), torch.randn(3, 4, 6)
    module = lg.transform(model, (x, torch.tensor([4, 3, 1])))
    other = x, torch.tensor([3, 3, 2])
    assert torch.equal(module(*other), model(*other))
    certificate = lg.verify(model, module, other, weighed)
    assert certificate.ok, certificate


@pytest.mark.filterwarnings("ignore::libragrad_fx.errors.CutWarning")
def test_sequences_packed_out_of_a_list() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(6, 8)

        def forward(self, sequences: list[Tensor]) -> Tensor:
            packed = nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
            return torch.stack([s[-1] for s in nn.utils.rnn.unpack_sequence(self.rnn(packed)[0])])

    model, call = Model(), ([torch.randn(n, 6) for n in (4, 2, 3)],)
    assert lg.verify(model, lg.transform(model, call), call, weighed).ok


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


@pytest.mark.parametrize("name", [
    "BertForSequenceClassification", pytest.param("GPT2LMHeadModel", marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore::libragrad_fx.errors.CutWarning")
def test_gradient_checkpointing(name: str) -> None:
    """transformers puts a hook on the embedding for it, which is Python of its own."""
    model, call = tiny(name), {"input_ids": torch.arange(14).view(2, 7)}
    model.gradient_checkpointing_enable()
    assert lg.verify(model, lg.transform(model, call), call, weighed).ok


LABELS = {
    "single_label_classification": torch.tensor([0, 2]),
    "multi_label_classification": torch.tensor([[0.0, 1, 1], [1, 0, 0]]),
    "regression": torch.tensor([[0.3, 1, -1], [2, 0, 0.5]]),
}


@pytest.mark.parametrize("problem", LABELS)
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


# --- messages name what a user has (E19)


class WritesData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y.data.clamp_(-1, 1)
        return y * float(y.detach().sum())


class Differentiates(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.jacrev(torch.tanh)(x[0])


class SolvesLeastSquares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.lstsq(x, x.flip(0)).solution


class Nested(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nested.to_padded_tensor(torch.nested.as_nested_tensor([x[:2], x[2:]]), 0.0)


@pytest.mark.parametrize("model", [WritesData, Differentiates, SolvesLeastSquares, Nested])
def test_messages_name_nothing_of_ours(model: Any) -> None:
    with pytest.raises(lg.errors.LibraGradError) as e:
        lg.transform(model(), X)
    assert model.__name__ in str(e.value)
    for ours in ("_Piece", "given_", "held_", "still_", "lifted_tensor", "_add_batch_dim"):
        assert ours not in str(e.value)


# --- what is explained where nobody says is balanced, whatever else is returned


class Heads(nn.Module):
    """A squashed head first, and what it is made of behind it (as MONAI's ViT)."""

    def __init__(self, squash: Callable[[Tensor], Tensor], inside: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 8).double(), nn.Linear(8, 8).double()
        self.squash, self.inside = squash, inside

    def forward(self, x: Tensor) -> Any:
        hidden = F.gelu(self.body(x))
        gate = self.squash(self.head(hidden))
        return gate, [hidden, hidden * gate if self.inside else hidden]


@pytest.mark.parametrize("squash", [torch.tanh, torch.erf, torch.sigmoid, lambda y: y.softmax(-1)])
@pytest.mark.filterwarnings("ignore::libragrad_fx.errors.GateOutputWarning")
def test_a_first_output_that_could_gate_is_balanced(squash: Any) -> None:
    certified(Heads(squash, inside=False))


def test_a_first_output_that_gates_inside_is_said_not_to_be() -> None:
    module = lg.transform(Heads(torch.sigmoid, inside=True), X)
    assert any("keeps autograd's gradient" in note for note in module.plan.notes)


@pytest.mark.parametrize("cell", [nn.GRUCell, nn.LSTMCell, nn.RNNCell])
@pytest.mark.parametrize(
    ("width", "dtype"), [(8, torch.float64), (16, torch.float32), (33, torch.float64)]
)
def test_cells_called_step_by_step(cell: Any, width: int, dtype: torch.dtype) -> None:
    """A GRU cell of PyTorch writes in place into parts of a product, whose layout picks the bits."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.cell, self.head = cell(6, width), nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for step in x.unbind(1):
                state = self.cell(step, state)
            return self.head(state[0] if isinstance(state, tuple) else state)

    module = certified(Model().to(dtype), torch.randn(5, 3, 6, dtype=dtype))
    assert isinstance(module, torch.fx.GraphModule)
