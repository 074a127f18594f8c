"""The result behaves as its original does: any dtype, layout, batch, ambient mode, thread, gradient."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import libragrad_fx as lg
from libragrad_fx.decide.rulebook import rules_folder
from libragrad_fx.module.captured import CapturedModule

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
TARGET = 1


class Transformer(nn.Module):
    """Tokens, one block: fused attention, LayerNorm, GELU."""

    def __init__(self, heads: int = 2, width: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        shape = (b, n, 3, self.heads, c // self.heads)
        q, k, v = self.qkv(self.norm1(x)).reshape(shape).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + self.proj(mixed)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


class ConvNet(nn.Module):
    """BatchNorm, SiLU, squeeze-and-excite, a max pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.reduce, self.expand = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.silu(self.norm(self.stem(x)))
        gate = self.expand(self.reduce(h.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head(F.max_pool2d(h * gate, 2).mean((2, 3)))


class Gated(nn.Module):
    """RMSNorm as language models write it (in float32, cast back) and SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.gate, self.up = nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=False)
        self.down, self.head = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        h = self.weight * h.to(x.dtype)
        return self.head(x + self.down(F.silu(self.gate(h)) * self.up(h))).mean(1)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "transformer": (Transformer, (2, 5, 8)),
    "conv": (ConvNet, (2, 3, 6, 6)),
    "gated": (Gated, (2, 5, 8)),
}
NAMES = pytest.mark.parametrize("name", MODELS)


class Case(NamedTuple):
    """A model, its transform and an input. Shared by the tests, so what one changes it puts back."""

    model: nn.Module
    gm: CapturedModule
    x: torch.Tensor

    def copied(self) -> Case:
        return Case(copy.deepcopy(self.model), copy.deepcopy(self.gm), self.x.clone())


def build(
    make: Callable[[], nn.Module], shape: tuple[int, ...], **place: Any
) -> tuple[nn.Module, torch.Tensor]:
    """A model in eval mode with parameters of order one, and an input; the same at every call."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.6)
        for b in model.buffers():
            if b.is_floating_point():
                b.uniform_(0.5, 1.5)
    return model.to(**place), torch.randn(shape).to(**place)


@functools.cache
def case(name: str, dtype: torch.dtype = torch.float32) -> Case:
    """Captured in float32 and converted, where the graph has no casts of its own; else captured."""
    model, x = build(*MODELS[name], dtype=dtype)
    if dtype is torch.float32 or case(name).gm.record.dtype_pins:
        return Case(model, lg.transform(model, x), x)
    return Case(model, copy.deepcopy(case(name).gm).to(dtype), x)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in every bit: -0.0 is not 0.0, and a nan is the same nan."""
    if a.dtype != b.dtype or a.shape != b.shape or a.stride() != b.stride():
        return False
    kind = BITS[a.element_size()]
    return torch.equal(a.detach().contiguous().view(kind), b.detach().contiguous().view(kind))


def agree(one: Case, x: torch.Tensor) -> bool:
    """The forward's bits, with an input that requires grad, with one that does not, without grad."""
    model, gm = one.model, one.gm
    moving = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for _ in "ab"]
    with torch.no_grad():
        still = same_bits(gm(x), model(x))
    return still and same_bits(gm(x), model(x)) and same_bits(gm(moving[0]), model(moving[1]))


def imbalance(module: nn.Module, x: torch.Tensor) -> float:
    """Completeness error in units of the largest flow through a node."""
    account = lg.audit(module, x, TARGET)
    return account.completeness_error / max(abs(r.out) for r in account.rows)


@functools.cache
def plain_imbalance(name: str, dtype: torch.dtype) -> float:
    return imbalance(case(name, dtype).model, case(name, dtype).x)


def gradient(f: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x)[:, TARGET].sum(), x)[0]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


def rounding(name: str, dtype: torch.dtype) -> float:
    """Eps of the coarsest dtype on the way: ``gated`` normalises in float32 whatever it is given."""
    coarsest = [dtype, torch.float32] if name == "gated" else [dtype]
    return max(torch.finfo(d).eps for d in coarsest)


# --- dtypes and autocast


DTYPES_FAST = {
    (torch.float64, "conv"), (torch.bfloat16, "conv"), (torch.float32, "gated"),
    (torch.float16, "transformer"),
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "name"), [
    pytest.param(dtype, name, marks=() if (dtype, name) in DTYPES_FAST else pytest.mark.slow)
    for dtype in DTYPES for name in MODELS
], ids=str)  # fmt: skip
def test_every_dtype_has_the_same_bits_and_balance(name: str, dtype: torch.dtype) -> None:
    one = case(name, dtype)
    assert agree(one, one.x)
    bound = 3 * rounding(name, dtype)
    assert imbalance(one.gm, one.x) < bound
    if dtype is torch.bfloat16:  # the coarsest: what autograd itself leaves is seen even there
        assert bound < plain_imbalance(name, dtype)
    certificate = lg.verify(one.model, one.gm, one.x, TARGET)
    assert certificate.forward_equal
    assert certificate.erased_equal
    assert not certificate.unbalanced


def test_a_float64_model_that_normalises_in_float32_is_certified() -> None:
    one = case("gated", torch.float64)
    assert lg.verify(one.model, one.gm, one.x, TARGET).ok


def test_the_default_tolerance_can_fail_in_half_precision() -> None:
    """A certificate must be able to refuse what autograd itself leaves."""
    one = case("conv", torch.bfloat16)
    certificate = lg.verify(one.model, one.gm, one.x, TARGET)
    largest = max(abs(r.out) for r in lg.audit(one.gm, one.x, TARGET).rows)
    assert certificate.tolerance < largest * plain_imbalance("conv", torch.bfloat16)


@NAMES
def test_inside_autocast(name: str) -> None:
    one = case(name)
    with torch.autocast("cpu", torch.bfloat16):
        assert one.gm(one.x).dtype is torch.bfloat16
        assert agree(one, one.x)
        assert imbalance(one.gm, one.x) < 3 * torch.finfo(torch.bfloat16).eps
        inside = gradient(one.gm, one.x)
    assert inside.dtype is torch.float32
    outside = gradient(one.gm, one.x)
    assert float((inside - outside).abs().max()) < 0.1 * float(outside.abs().max())
    assert agree(one, one.x)  # and nothing of it is left


def test_a_certificate_made_inside_autocast() -> None:
    one = case("conv")
    with torch.autocast("cpu", torch.bfloat16):
        assert lg.verify(one.model, one.gm, one.x, TARGET).ok


def test_transformed_inside_autocast_it_is_the_model_outside() -> None:
    model, _, x = case("transformer")
    with torch.autocast("cpu", torch.bfloat16):
        made = Case(model, lg.transform(model, x), x)
        assert agree(made, x)
    assert agree(made, x)


def test_transformed_without_grad_it_is_the_model_under_grad() -> None:
    model, gm, x = case("conv")
    with torch.inference_mode():
        made = lg.transform(model, x)
        assert same_bits(gm(x), model(x))
    assert agree(Case(model, made, x), x)
    assert torch.equal(gradient(made, x), gradient(gm, x))


# --- layouts and batch sizes


def strided(x: torch.Tensor) -> torch.Tensor:
    """Every other entry of a larger tensor, along each axis but the first."""
    wide = torch.zeros(x.shape[0], *(2 * n for n in x.shape[1:]), dtype=x.dtype)
    view = wide[(slice(None), *[slice(None, None, 2)] * (x.ndim - 1))]
    return view.copy_(x)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "strided": strided,
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "expanded batch": lambda x: x[:1].expand(3, *x.shape[1:]),
    "expanded in all": lambda x: x.flatten()[0].expand(x.shape),
    "conjugate of real": lambda x: torch.complex(x, x).conj().real,
    "negative bit": lambda x: torch.complex(x, x).conj().imag,
    "batch of 1": lambda x: x[:1],
    "batch of 3": lambda x: torch.cat([x, x[:1]]),
    "batch of 7": lambda x: torch.cat([x, x.flip(1), x + 1, x[:1]]),
}


@NAMES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_batches(name: str, layout: str) -> None:
    one = case(name)
    x = LAYOUTS[layout](one.x)
    assert agree(one, x)
    assert close(
        gradient(one.gm, x), gradient(one.gm, x.clone(memory_format=torch.contiguous_format))
    )
    assert lg.verify(one.model, one.gm, x, TARGET).ok


@NAMES
def test_an_empty_batch(name: str) -> None:
    model, gm, x = case(name)
    y = gm(x[:0])
    assert y.shape == model(x[:0]).shape == (0, 4)
    assert gradient(gm, x[:0]).shape == x[:0].shape


@pytest.mark.parametrize("weights", [False, True], ids=["input", "input and weights"])
def test_channels_last(weights: bool) -> None:
    one = case("conv").copied()
    x = one.x.to(memory_format=torch.channels_last)
    if weights:
        one.model.to(memory_format=torch.channels_last)
        one.gm.to(memory_format=torch.channels_last)
        assert one.gm.stem.weight.stride() == one.model.stem.weight.stride()
    assert agree(one, x)
    assert agree(one, one.x)
    assert lg.verify(one.model, one.gm, x, TARGET).ok
    if not weights:
        return
    again = Case(one.model, lg.transform(one.model, x), x)  # and with such an example
    assert agree(again, x)
    assert agree(again, one.x)


# --- special values


class Signs(nn.Module):
    """Element by element: zeros keep their sign through a gate, a scale and a stop."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x) * F.hardtanh(x).abs() * torch.rsqrt(x * x + 1)


@functools.cache
def signs() -> Case:
    model, x = Signs().eval(), torch.randn(2, 4)
    return Case(model, lg.transform(model, x), x)


SPECIAL = (
    math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 1e-38, 3.4e38, -3.4e38, 1.0,
)  # fmt: skip


def test_zeros_keep_their_sign() -> None:
    y = signs().gm(torch.tensor([[0.0, -0.0, 1.0, -1.0]]))
    assert y.signbit().tolist() == [[False, True, False, True]]


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["signs", *MODELS]),
    places=st.lists(st.tuples(st.integers(0, 7), st.sampled_from(SPECIAL)), min_size=1, max_size=8),
)
@example(name="transformer", places=[(0, math.nan)])
@example(name="conv", places=[(3, math.inf)])
@example(name="gated", places=[(i, -0.0) for i in range(8)])
def test_special_values_pass_as_in_the_original(name: str, places: list[tuple[int, float]]) -> None:
    one = signs() if name == "signs" else case(name)
    x = one.x.clone()
    for at, value in places:
        x.view(-1)[at] = value
    assert agree(one, x)
    assert gradient(lambda z: one.gm(z).flatten(1), x).shape == x.shape


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_is_not_certified(value: float) -> None:
    """Nothing that is compared with a nan may count as passed."""
    one = case("transformer")
    x = one.x.clone()
    x[0, 0, 0] = value
    certificate = lg.verify(one.model, one.gm, x, TARGET)
    assert certificate.forward_equal
    assert not certificate.ok


# --- what requires grad


@contextlib.contextmanager
def requiring(module: nn.Module, names: set[str]) -> Iterator[None]:
    """Only these parameters require grad; afterwards all do and none has one."""
    for n, p in module.named_parameters():
        p.requires_grad_(n in names)
    try:
        yield
    finally:
        for p in module.parameters():
            p.requires_grad_()
            p.grad = None


def reached(one: Case, names: set[str]) -> set[str]:
    """Which of the input and the parameters get a gradient when ``names`` require one."""
    with requiring(one.model, names):
        x = one.x.clone().requires_grad_("x" in names)
        y = one.gm(x)
        assert same_bits(y, one.model(x))
        if y.requires_grad:
            y[:, TARGET].sum().backward()
        tensors = {"x": x, **dict(one.gm.named_parameters())}
        return {n for n, t in tensors.items() if t.grad is not None}


@functools.cache
def reachable(name: str) -> frozenset[str]:
    one = case(name)
    return frozenset(reached(one, {"x", *dict(one.model.named_parameters())}))


@NAMES
def test_what_a_balanced_gradient_reaches(name: str) -> None:
    cut = {"x", *dict(case(name).model.named_parameters())} - reachable(name)
    gates = {"reduce.weight", "reduce.bias", "expand.weight", "expand.bias"}
    assert cut == (gates if name == "conv" else set())


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(list(MODELS)))
def test_any_subset_may_require_grad(data: st.DataObject, name: str) -> None:
    one = case(name)
    parameters = dict(one.model.named_parameters())
    names = data.draw(st.sets(st.sampled_from(["x", *parameters])))
    assert reached(one, names) == names & reachable(name)


@NAMES
def test_the_gradient_does_not_depend_on_what_else_requires_one(name: str) -> None:
    one = case(name)
    whole = gradient(one.gm, one.x)
    with requiring(one.model, set()):
        assert close(gradient(one.gm, one.x), whole)


# --- weights, and several transforms of one model


def changed(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        k: v * 1.25 + 0.1 if v.is_floating_point() else v + 1
        for k, v in module.state_dict().items()
    }


@NAMES
def test_weights_go_both_ways(name: str) -> None:
    one = case(name)
    model, gm, x = one.copied()
    assert list(gm.state_dict()) == list(model.state_dict())
    before, other = one.model(x), changed(model)
    gm.load_state_dict(other, strict=True)
    model.load_state_dict(gm.state_dict(), strict=True)
    assert agree(Case(model, gm, x), x)
    gm.load_state_dict(one.model.state_dict(), strict=True)
    assert same_bits(gm(x), before)
    with pytest.raises(RuntimeError, match="extra"):
        gm.load_state_dict({**other, "extra": torch.zeros(1)})


@NAMES
def test_the_model_and_its_result_share_weights(name: str) -> None:
    """What is loaded into either, or stepped by an optimizer of either, both see."""
    one = case(name)
    kept = {k: v.clone() for k, v in one.model.state_dict().items()}
    before = one.gm(one.x)
    for holder in (one.model, one.gm):
        holder.load_state_dict(changed(one.model))
        assert not torch.equal(one.gm(one.x), before)
        assert agree(one, one.x)
        one.model.load_state_dict(kept)
        assert same_bits(one.gm(one.x), before)
    step = torch.optim.SGD(one.gm.parameters(), 0.1)
    one.gm(one.x).sum().backward()
    step.step()
    step.zero_grad(set_to_none=True)
    assert agree(one, one.x)
    assert not torch.equal(one.gm(one.x), before)
    one.model.load_state_dict(kept)


@pytest.fixture(scope="module")
def pair() -> tuple[Case, CapturedModule]:
    """Two transforms of one model; the second by another policy."""
    model, x = build(*MODELS["transformer"])
    return Case(model, lg.transform(model, x), x), lg.transform(model, x, policy="ali_lrp")


def test_two_policies_over_one_model(pair: tuple[Case, CapturedModule]) -> None:
    (model, first, x), second = pair
    assert first.plan.policy == "libra"
    assert second.plan.policy == "ali_lrp"
    assert all(p is q for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert same_bits(first(x), second(x))
    found = [gradient(f, x) for f in (model, first, second)]
    assert not any(close(found[i], found[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    third = lg.transform(
        model, x, policy=rules_folder() / "libra.yaml"
    )  # the file that a name names
    assert torch.equal(gradient(third, x), found[1])
    assert third.plan.to_json() == first.plan.to_json()
    assert third.code == first.code
    assert torch.equal(gradient(model, x), found[0])


def test_what_is_done_to_one_is_not_done_to_the_other(pair: tuple[Case, CapturedModule]) -> None:
    (model, first, x), second = pair
    seen: list[str] = []
    handle = first.norm1.register_forward_hook(lambda *_: seen.append("first"))
    second(x)
    model(x)
    assert seen == []
    first(x)
    handle.remove()
    assert seen == ["first"]
    first.train()
    assert not second.training
    assert not model.training
    assert not model.norm1.training
    first.eval()
    second.norm1.label = 1
    assert not hasattr(first.norm1, "label")
    assert not hasattr(model.norm1, "label")
    twin = copy.deepcopy(second).double()
    assert next(twin.parameters()).dtype is torch.float64
    assert next(first.parameters()).dtype is next(model.parameters()).dtype is torch.float32


# --- threads


@NAMES
def test_threads_get_what_one_thread_gets(name: str) -> None:
    _, gm, _ = case(name)
    xs = [torch.randn(2, *MODELS[name][1][1:], generator=torch.Generator().manual_seed(i))
          for i in range(6)]  # fmt: skip

    def work(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.clone().requires_grad_()
        y = gm(x)
        return y.detach(), torch.autograd.grad(y[:, TARGET].sum(), x)[0]

    wanted, found = [work(x) for x in xs], [[] for _ in xs]
    start = threading.Barrier(len(xs))

    def run(i: int) -> None:
        torch.set_num_threads(1)  # a thread's own setting: a sum over threads has other bits
        start.wait()
        found[i].extend(work(xs[i]) for _ in range(5))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(xs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for (y, g), results in zip(wanted, found, strict=True):
        assert len(results) == 5
        assert all(same_bits(y, a) and same_bits(g, b) for a, b in results)


def test_transforms_in_several_threads() -> None:
    model, gm, x = case("conv")
    apply = vars(torch.autograd.Function).get("apply")
    found: list[Any] = [None] * 3

    def run(i: int) -> None:
        try:
            found[i] = lg.transform(model, x)
        except Exception as e:
            found[i] = e

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(found))]
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:  # patched by several at once, it may be left patched
        left = vars(torch.autograd.Function).get("apply")
        if left is not apply:
            torch.autograd.Function.apply = apply
    assert left is apply
    assert all(isinstance(f, CapturedModule) and f.code == gm.code for f in found), found


# --- an accelerator, where there is one


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestCuda:
    """The same promises on the kernels of an accelerator."""

    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    @NAMES
    def test_bits_and_balance(self, name: str, dtype: torch.dtype) -> None:
        model, x = build(*MODELS[name], device="cuda", dtype=dtype)
        one = Case(model, lg.transform(model, x), x)
        assert agree(one, x)
        assert imbalance(one.gm, x) < 8 * rounding(name, dtype)
        certificate = lg.verify(model, one.gm, x, TARGET)
        assert certificate.forward_equal
        assert certificate.device.startswith("cuda")

    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    @pytest.mark.parametrize(
        "backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )
    def test_attention_kernels(self, backend: SDPBackend, dtype: torch.dtype) -> None:
        if backend is SDPBackend.FLASH_ATTENTION and dtype is torch.float32:
            pytest.skip("no flash attention kernel for float32")
        model, x = build(lambda: Transformer(2, 64), (2, 16, 64), device="cuda", dtype=dtype)
        gm = lg.transform(model, x)
        with sdpa_kernel(backend):
            assert agree(Case(model, gm, x), x)
            assert imbalance(gm, x) < 8 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("exact", [False, True])
    def test_convolutions_in_tf32(self, exact: bool) -> None:
        """As wide as they are in practice, they differ from float32 by what ten bits leave."""
        convs = [nn.Conv2d(3 if i == 0 else 64, 64, 3, padding=1) for i in range(4)]
        parts = [m for conv in convs for m in (conv, nn.BatchNorm2d(64), nn.ReLU())]
        model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)).eval().cuda()
        x = torch.randn(4, 3, 32, 32, device="cuda")
        with torch.backends.cudnn.flags(allow_tf32=not exact):
            gm = lg.transform(model, x)
            certificate = lg.verify(model, gm, x, TARGET)
        assert certificate.ok, certificate
        assert (certificate.tolerance > 1e-3 * abs(certificate.output)) is not exact

    @NAMES
    def test_inside_autocast(self, name: str) -> None:
        model, x = build(*MODELS[name], device="cuda")
        gm = lg.transform(model, x)
        with torch.autocast("cuda", torch.float16):
            assert agree(Case(model, gm, x), x)
            assert imbalance(gm, x) < 8 * torch.finfo(torch.float16).eps

    @NAMES
    def test_moved_to_the_device(self, name: str) -> None:
        model, gm, x = case(name).copied()
        model.cuda()
        gm.cuda()
        assert agree(Case(model, gm, x.cuda()), x.cuda())
