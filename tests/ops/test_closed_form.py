"""Every balanced twin against an independent form: autograd through the op written out, with what
LibraGrad holds constant in ``.detach()``. Float64; also the gradients of weights and biases.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from libragrad_fx.bench import Operations
from libragrad_fx.decide import rulebook
from libragrad_fx.kernels import blocks
from libragrad_fx.ops import TWINS
from libragrad_fx.ops import attention as attention_twins
from tests.rows.one_op import ALL_TWINS
from tests.samples import call_of, positive, randn

pytestmark = pytest.mark.usefixtures("no_attention_is_small")
aten = torch.ops.aten
TOLERANCE = 1e-10
Tensor = torch.Tensor


def assert_same_gradients(
    twin: Callable[..., Any],
    written_out: Callable[..., Any],
    inputs: list[Tensor],
    atol: float = 0.0,
) -> None:
    """Outputs and the gradient of every input, relative to the largest entry."""
    sides = []
    for fn in (twin, written_out):
        moving = [x.detach().clone().requires_grad_() for x in inputs]
        y = fn(*moving)
        ys = [t for t in (y if isinstance(y, (tuple, list)) else [y]) if t.requires_grad]
        torch.manual_seed(3)
        gs = [torch.randn_like(t) for t in ys]
        got = torch.autograd.grad(ys, moving, gs, allow_unused=True, materialize_grads=True)
        sides.append(([t.detach() for t in ys], got))
    (y1, g1), (y2, g2) = sides
    for a, b in zip((*y1, *g1), (*y2, *g2), strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= TOLERANCE * b.abs().max() + atol
    assert any(g.any() for g in g2)


# --- secants: x * gate(x) with the gate held, f(0) beside it

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "silu": lambda x: 1 / (1 + torch.exp(-x)),
    "mish": lambda x: torch.tanh(torch.log(1 + torch.exp(x))),
    "hardswish": lambda x: ((x + 3) / 6).clamp(0, 1),
    "elu": lambda x: torch.where(x > 0, 1.0, (torch.exp(x) - 1) / x),
    "celu": lambda x: torch.where(x > 0, 1.0, (torch.exp(x) - 1) / x),
    "selu": lambda x: (
        1.0507009873554805 * torch.where(x > 0, 1.0, 1.6732632423543772 * (torch.exp(x) - 1) / x)
    ),
    "square": lambda x: x,
    "pow": lambda x: x * x,
    "sqrt": lambda x: 1 / torch.sqrt(x),
    "rsqrt": lambda x: x**-1.5,
    "reciprocal": lambda x: x**-2.0,
}
SECANTS = {  # f(0) and f; the gate is (f(x) - f(0)) / x
    "tanh": (0.0, torch.tanh), "tan": (0.0, torch.tan), "sinh": (0.0, torch.sinh),
    "sin": (0.0, torch.sin), "asinh": (0.0, torch.asinh), "atan": (0.0, torch.atan),
    "erf": (0.0, torch.erf), "expm1": (0.0, torch.expm1), "log1p": (0.0, torch.log1p),
    "exp": (1.0, torch.exp), "exp2": (1.0, torch.exp2), "cos": (1.0, torch.cos),
    "cosh": (1.0, torch.cosh), "erfc": (1.0, torch.erfc), "sigmoid": (0.5, torch.sigmoid),
    "hardsigmoid": (0.5, torch.nn.functional.hardsigmoid),
    "i0": (1.0, torch.i0), 
    "special_i1": (0.0, torch.special.i1), 
    "special_entr": (0.0, torch.special.entr),
    "acos": (math.pi / 2, torch.acos), "erfinv": (0.0, torch.erfinv),
    "asin": (0.0, torch.asin), "atanh": (0.0, torch.atanh), "sinc": (1.0, torch.sinc),
    "special_ndtr": (0.5, lambda x: 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
    "softplus": (math.log(2), torch.nn.functional.softplus),
    "log_sigmoid": (-math.log(2), torch.nn.functional.logsigmoid),
}  # fmt: skip


@pytest.mark.parametrize("name", GATES)
def test_gates(name: str) -> None:
    extra = (3,) if name == "pow" else ()
    x = positive(4, 5) if name in ("sqrt", "rsqrt", "reciprocal") else randn(4, 5)
    gate = GATES[name]
    assert_same_gradients(lambda x: ALL_TWINS[name](x, *extra), lambda x: x * gate(x).detach(), [x])


@pytest.mark.parametrize("name", SECANTS)
def test_secants(name: str) -> None:
    zero, f = SECANTS[name]
    x = positive(4, 5) - 0.45 if name in ("log1p", "asin", "atanh", "special_entr") else randn(4, 5)
    x = x / x.abs().max() * 0.9 if name in ("asin", "acos", "atanh", "erfinv") else x
    assert_same_gradients(ALL_TWINS[name], lambda x: zero + x * ((f(x) - zero) / x).detach(), [x])


def test_parametrised_activations() -> None:
    x = randn(4, 5)
    inner = lambda x: math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)  # noqa: E731
    tanh_gelu = lambda x: x * (0.5 * (1 + torch.tanh(inner(x)))).detach()  # noqa: E731
    assert_same_gradients(lambda x: ALL_TWINS["gelu"](x, approximate="tanh"), tanh_gelu, [x])
    celu = lambda x: x * torch.where(x > 0, 1.0, 0.7 * (torch.exp(x / 0.7) - 1) / x).detach()  # noqa: E731
    assert_same_gradients(lambda x: ALL_TWINS["celu"](x, 0.7), celu, [x])
    zero = math.log(2) / 2
    softplus = lambda x: zero + x * ((torch.log(1 + torch.exp(2 * x)) / 2 - zero) / x).detach()  # noqa: E731
    assert_same_gradients(lambda x: ALL_TWINS["softplus"](x, 2.0, 20.0), softplus, [x])


def test_pow_tensor() -> None:
    x, e = positive(4, 5), randn(5)
    form = lambda x: x * (x ** (e - 1)).detach()  # noqa: E731
    assert_same_gradients(lambda x: ALL_TWINS["pow_tensor"](x, e), form, [x])


@pytest.mark.parametrize("base", [2, 0.3])
def test_pow_scalar(base: float) -> None:
    form = lambda x: 1 + x * ((base**x - 1) / x).detach()  # noqa: E731
    assert_same_gradients(lambda x: ALL_TWINS["pow_scalar"](base, x), form, [randn(4, 5)])


@pytest.mark.parametrize("zeros", [0, 1])
def test_products_of_all(zeros: int) -> None:
    """1/n of autograd's gradient to each of n factors, also where some are zero."""
    x, count = randn(4, 3), torch.arange(1, 4)
    x[0, :zeros] = 0.0
    fewer = lambda y, n: y.detach() + (y - y.detach()) / n  # noqa: E731
    for twin, plain, n in (
        (ALL_TWINS["prod"], torch.prod, 12),
        (lambda x: ALL_TWINS["prod_dim"](x, 1), lambda x: x.prod(1), 3),
        (lambda x: ALL_TWINS["prod_dim"](x, 0, True), lambda x: x.prod(0, True), 4),
        (lambda x: ALL_TWINS["cumprod"](x, -1), lambda x: x.cumprod(-1), count),
    ):
        assert_same_gradients(twin, lambda x, f=plain, n=n: fewer(f(x), n), [x])


@pytest.mark.parametrize(("name", "base"), [("log", math.e), ("log2", 2), ("log10", 10)])
def test_logarithms(name: str, base: float) -> None:
    form = lambda x: (x - 1) * (torch.log(x) / math.log(base) / (x - 1)).detach()  # noqa: E731
    assert_same_gradients(ALL_TWINS[name], form, [positive(4, 5)])


@pytest.mark.parametrize(
    ("name", "zero"), [("logit", 0.5), ("lgamma", 1)]
)
def test_what_is_infinite_at_zero(name: str, zero: float) -> None:
    plain = getattr(torch, name)
    form = lambda x: (x - zero) * (plain(x) / (x - zero)).detach()  # noqa: E731
    assert_same_gradients(ALL_TWINS[name], form, [torch.rand(4, 5).double() + int(zero)])


@pytest.mark.parametrize("name", [n for n, f in ALL_TWINS.items() if hasattr(f, "takes_complex")])
def test_of_complex_values(name: str) -> None:
    """The secant of a complex number, as a product with a number that is held."""
    op, extra = ALL_TWINS[name].aten_op, (3,) if name == "pow" else ()
    z = torch.complex(randn(4, 5), randn(4, 5))
    try:
        y = op(z, *extra)
    except (RuntimeError, NotImplementedError):
        return  # PyTorch has no such function
    zero = op(torch.zeros_like(z), *extra) if name not in ("rsqrt", "reciprocal") else 0.0

    def sides(parts: Tensor, twin: bool) -> Tensor:
        z = torch.view_as_complex(parts)
        form = lambda: zero + z * ((y - zero) / z).detach()  # noqa: E731
        return torch.view_as_real(ALL_TWINS[name](z, *extra) if twin else form())

    assert_same_gradients(
        lambda p: sides(p, True), lambda p: sides(p, False), [torch.view_as_real(z).contiguous()]
    )


def test_sgn() -> None:
    def sides(z: Tensor, twin: bool) -> Tensor:
        z = torch.view_as_complex(z)
        return torch.view_as_real(ALL_TWINS["sgn"](z) if twin else z / z.abs().detach())

    assert_same_gradients(lambda z: sides(z, True), lambda z: sides(z, False), [randn(4, 5, 2)])


@pytest.mark.parametrize("axes", [[1], [0, 2], None, []])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("correction", [0, 1, None])
def test_moments(axes: Any, kept: bool, correction: Any) -> None:
    """x - mean(x) times itself, one of the two held; and likewise over the deviation."""
    over, held = tuple(axes or range(3)), {"keepdim": kept}

    def var(x: Tensor) -> Tensor:
        centred = x - x.mean(over, keepdim=True)
        count = math.prod(x.shape[a] for a in over) - (1 if correction is None else correction)
        return (centred * centred.detach()).sum(over, **held) / count

    def std(x: Tensor) -> Tensor:
        deviation = torch.sqrt(var(x)).detach()
        return var(x) / deviation

    x, options = randn(3, 4, 2), {"correction": correction, **held}
    for name, form in (("var_mean", var), ("std_mean", std)):
        twin = lambda x, name=name: ALL_TWINS[name](x, axes, **options)  # noqa: E731
        assert_same_gradients(twin, lambda x, f=form: (f(x), x.mean(over, **held)), [x])


def test_softmax() -> None:
    def form(x: Tensor) -> Tensor:
        z = torch.exp(x).sum(-1, keepdim=True).detach()
        return 1 / z + x * ((torch.exp(x) - 1) / x).detach() / z

    assert_same_gradients(lambda x: ALL_TWINS["softmax"](x, -1), form, [randn(4, 5)])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("of_classes", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_cross_entropy(smoothing: float, reduction: str, of_classes: bool, weighted: bool) -> None:
    """PyTorch's own on log-probabilities, of which a softmax is known: their logsumexp is zero."""
    target = torch.tensor([1, 0, -100, 4]) if of_classes else randn(4, 5).softmax(1)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    weight = positive(5) if weighted else None
    number = {"none": 0, "mean": 1, "sum": 2}[reduction]

    def form(x: Tensor) -> Tensor:
        p = x - torch.logsumexp(x, 1, keepdim=True).detach()
        if of_classes:
            kept = (target >= 0)[:, None].double()
            wanted, smooth = F.one_hot(target.clamp(0), 5) * kept, kept / 5
        else:
            wanted, smooth = target, torch.full_like(target, 0.2)
        shares = ((1 - smoothing) * wanted + smoothing * smooth) * (1 if weight is None else weight)
        loss = -(p * shares).sum(1)
        if reduction != "mean":
            return loss if reduction == "none" else loss.sum()
        counted = 4 if not of_classes else (wanted * (1 if weight is None else weight)).sum()
        return loss.sum() / counted

    x = randn(4, 5)
    wanted = F.cross_entropy(x, target, weight, **options)
    assert torch.allclose(form(x), wanted)
    twin = lambda x: ALL_TWINS["cross_entropy_loss"](x, target, weight, number, -100, smoothing)  # noqa: E731
    assert_same_gradients(twin, form, [x])


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_binary_cross_entropy(reduction: str) -> None:
    target, weight, more = torch.rand(4, 5).double(), positive(5), positive(5)

    def form(x: Tensor) -> Tensor:
        each = lambda x: F.binary_cross_entropy_with_logits(  # noqa: E731
            x, target, weight, pos_weight=more, reduction="none"
        )
        zero = each(torch.zeros_like(x))
        y = zero + x * ((each(x) - zero) / x).detach()
        return y if reduction == "none" else getattr(y, reduction)()

    number = {"none": 0, "mean": 1, "sum": 2}[reduction]
    twin = ALL_TWINS["binary_cross_entropy_with_logits"]
    assert_same_gradients(lambda x: twin(x, target, weight, more, number), form, [randn(4, 5)])


def test_log_softmax() -> None:
    form = lambda x: x - torch.log(torch.exp(x).sum(1, keepdim=True)).detach()  # noqa: E731
    assert_same_gradients(lambda x: ALL_TWINS["log_softmax"](x, 1), form, [randn(2, 3, 4)])


@pytest.mark.parametrize("dim", [-1, 0])
def test_glu(dim: int) -> None:
    def form(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim)
        return a * (1 / (1 + torch.exp(-b))).detach()

    assert_same_gradients(lambda x: ALL_TWINS["glu"](x, dim), form, [randn(4, 6)])


# --- normalisers


def normalised(x: Tensor, axes: tuple[int, ...], eps: float, centred: bool = True) -> Tensor:
    x = x - x.mean(axes, keepdim=True) if centred else x
    return x / torch.sqrt((x * x).mean(axes, keepdim=True) + eps).detach()


@pytest.mark.parametrize("affine", [True, False])
def test_norms_over_the_last_dimensions(affine: bool) -> None:
    for shape in ([5], [4, 5]):
        axes = tuple(range(-len(shape), 0))
        x, w, b = randn(3, 4, 5), randn(*shape), randn(*shape)
        inputs = [x, w, b] if affine else [x]
        layer = lambda x, w=None, b=None: ALL_TWINS["layer_norm"](x, shape, w, b)  # noqa: B023, E731
        form = lambda x, w=1.0, b=0.0: normalised(x, axes, 1e-5) * w + b  # noqa: B023, E731
        assert_same_gradients(layer, form, inputs)
        rms = lambda x, w=None: ALL_TWINS["rms_norm"](x, shape, w, 1e-6)  # noqa: B023, E731
        rms_form = lambda x, w=1.0: normalised(x, axes, 1e-6, False) * w  # noqa: B023, E731
        assert_same_gradients(rms, rms_form, inputs[:2])
        default = torch.finfo(torch.float64).eps
        rms_form = lambda x, w=1.0: normalised(x, axes, default, False) * w  # noqa: B023, E731
        assert_same_gradients(lambda x: ALL_TWINS["rms_norm"](x, shape), rms_form, [x])  # noqa: B023


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", ["group_norm", "instance_norm", "batch_norm"])
def test_norms_over_positions(name: str, affine: bool) -> None:
    x, w, b = randn(3, 4, 5, 2), randn(4), randn(4)
    axes = {"group_norm": (2, 3, 4), "instance_norm": (2, 3), "batch_norm": (0, 2, 3)}[name]

    def twin(x: Tensor, w: Any = None, b: Any = None) -> Tensor:
        if name == "group_norm":
            return ALL_TWINS[name](x, 2, w, b)
        return ALL_TWINS[name](x, w, b, None, None, True, 0.1, 1e-5, False)

    def form(x: Tensor, w: Any = None, b: Any = None) -> Tensor:
        view = x.unflatten(1, (2, 2)) if name == "group_norm" else x
        hat = normalised(view, axes, 1e-5).reshape(x.shape)
        return hat if w is None else hat * w.view(1, 4, 1, 1) + b.view(1, 4, 1, 1)

    assert_same_gradients(twin, form, [x, w, b] if affine else [x])


# --- attention

ATTENTION: dict[str, tuple[int, int, dict[str, Any]]] = {  # queries, heads of k and v, arguments
    "plain": (6, 4, {}),
    "scale": (6, 4, {"scale": 0.3}),
    "bool mask": (6, 4, {"attn_mask": "bool"}),
    "float mask": (6, 4, {"attn_mask": "float"}),
    "mask of one row": (6, 4, {"attn_mask": "row"}),
    "mask a head": (6, 4, {"attn_mask": "head"}),
    "mask a sample and head": (6, 4, {"attn_mask": "both"}),
    "causal": (7, 4, {"is_causal": True}),
    "grouped": (6, 2, {"enable_gqa": True}),
    "chunks": (150, 4, {}),
    "causal chunks": (150, 4, {"is_causal": True}),
    "masked chunks": (150, 4, {"attn_mask": "float"}),
}


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: bool, scale: float) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -math.inf, dtype=q.dtype).triu(1)
    if mask is not None:
        scores = scores + (
            torch.zeros_like(scores).masked_fill(~mask, -math.inf)
            if mask.dtype == torch.bool
            else mask
        )
    return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(scores, -1).detach(), v)


@pytest.mark.parametrize("cached", [1, 150, 2**18, None])
@pytest.mark.parametrize("learned_mask", [False, True])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(
    name: str, learned_mask: bool, cached: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By blocks of one head of one sample, of some heads, of everything at once; by PyTorch's own
    kernel, as what is small."""
    constants = {"_SMALL": 2**16}
    if cached is not None:
        constants = {"_SMALL": 0, "_CACHED": cached, "_ROWS": 256 if cached > 150 else 4}
    for constant, value in constants.items():
        monkeypatch.setattr(f"libragrad_fx.kernels.blocks.{constant}", value)
    queries, heads, given = ATTENTION[name]
    arguments = dict(given)
    keys = queries if arguments.get("is_causal") else 9
    q, k, v = randn(2, 4, queries, 8), randn(2, heads, keys, 8), randn(2, heads, keys, 8)
    masks = {
        "bool": torch.rand(2, 1, queries, keys) > 0.3,
        "float": randn(queries, keys),
        "row": randn(1, keys),
        "head": randn(1, 4, queries, keys),
        "both": randn(2, 4, queries, keys),
    }
    mask = masks.get(arguments.pop("attn_mask", ""))
    if mask is not None and mask.dtype == torch.bool:
        mask[..., 0] = True  # a row without a key has no softmax
    learned = learned_mask and mask is not None and mask.dtype != torch.bool
    scale = arguments.get("scale", 8**-0.5)
    causal = arguments.get("is_causal", False)
    sdpa = ALL_TWINS["scaled_dot_product_attention"]
    twin = lambda q, k, v, m=mask: sdpa(q, k, v, m, **arguments)  # noqa: E731
    form = lambda q, k, v, m=mask: attention(q, k, v, m, causal, scale)  # noqa: E731
    assert_same_gradients(twin, form, [q, k, v, mask] if learned else [q, k, v], atol=1e-13)


@pytest.mark.parametrize("few", [0, 256], ids=["computed again", "kept"])
@pytest.mark.parametrize("mask", [None, "float", "bool"])
def test_probabilities_of_few_keys_are_kept(
    mask: str | None, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where PyTorch's kernel has them anyway; the backward is one product then, and not two."""
    monkeypatch.setattr(blocks, "_SMALL", 0)
    monkeypatch.setattr(attention_twins, "_FEW", few)
    q, k, v = randn(2, 3, 5, 8), randn(2, 3, 7, 8), randn(2, 3, 7, 8)
    added = {"float": randn(5, 7), "bool": randn(5, 7) < 1}.get(mask or "")
    sdpa = ALL_TWINS["scaled_dot_product_attention"]
    with sdpa_kernel(SDPBackend.MATH):
        twin = lambda q, k, v: sdpa(q, k, v, added)  # noqa: E731
        form = lambda q, k, v: attention(q, k, v, added, False, 8**-0.5)  # noqa: E731
        assert_same_gradients(twin, form, [q, k, v], atol=1e-13)
        with Operations() as work:
            y = twin(q, k, v.requires_grad_())
            forward = work.total
            torch.autograd.grad(y.sum(), v)
        assert torch.equal(y, torch.nn.functional.scaled_dot_product_attention(q, k, v, added))
    assert (work.total - forward) / (forward / 2) == (2 if few == 0 else 1)


V_CASES = (
    "plain", "none seen", "causal", "grouped", "bias a head", "no keys", "no queries", "wide v",
)  # fmt: skip


@pytest.mark.parametrize("small", [0, 2**16], ids=["in blocks", "by PyTorch's kernel"])
@pytest.mark.parametrize("name", V_CASES)
def test_the_gradient_of_v_is_its_written_form(
    name: str, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_SMALL", small)
    heads, wide, causal = {"grouped": 2}.get(name, 4), {"wide v": 9}.get(name, 8), name == "causal"
    queries, keys = {"no keys": (6, 0), "no queries": (0, 6)}.get(name, (6, 6))
    q, k, g = randn(2, 4, queries, 8), randn(2, heads, keys, 8), randn(2, queries, 4, wide).transpose(1, 2)
    seen = (torch.rand(2, 1, 6, keys) > 0.5) & (torch.arange(6) != 3)[:, None]
    mask = {"none seen": seen, "bias a head": randn(1, 4, 6, keys)}.get(name)
    scores = q @ k.repeat_interleave(4 // heads, 1).mT * 0.3
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        scores = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -math.inf)
    args = g, q, k, mask, scores.logsumexp(-1), causal, 0.3
    found, want = attention_twins.attention_value(*args), attention_twins.written_out(*args)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-14)
    like = attention_twins.attention_value(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
    assert (found.shape, found.dtype) == (like.shape, like.dtype)
    assert found.is_contiguous()
    assert like.is_contiguous()


# --- recurrent layers: gates and tanh-secants held, step by step


def hold_tanh(z: Tensor) -> Tensor:
    return z * (torch.tanh(z) / z).detach()


def hold_sigmoid(z: Tensor) -> Tensor:
    return torch.sigmoid(z).detach()


def cell(name: str, x: Tensor, state: list[Tensor], p: dict[str, Tensor]) -> list[Tensor]:
    gi = x @ p["w_ih"].T + p.get("b_ih", 0.0)
    gh = state[0] @ p["w_hh"].T + p.get("b_hh", 0.0)
    if name == "lstm":
        i, f, n, o = (gi + gh).chunk(4, -1)
        c = hold_sigmoid(f) * state[1] + hold_sigmoid(i) * hold_tanh(n)
        h = hold_sigmoid(o) * hold_tanh(c)
        return [h @ p["w_hr"].T if "w_hr" in p else h, c]
    if name == "gru":
        (ri, zi, ni), (rh, zh, nh) = gi.chunk(3, -1), gh.chunk(3, -1)
        z = hold_sigmoid(zi + zh)
        return [(1 - z) * hold_tanh(ni + hold_sigmoid(ri + rh) * nh) + z * state[0]]
    z = gi + gh
    return [hold_tanh(z) if name == "rnn_tanh" else z * (z > 0)]


def layers(
    name: str, x: Tensor, hx: list[Tensor], cells: list[dict[str, Tensor]], directions: int
) -> list[Tensor]:
    finals: list[list[Tensor]] = []
    for layer in range(len(cells) // directions):
        sides = []
        for d in range(directions):
            at = layer * directions + d
            state, steps = [h[at] for h in hx], range(x.shape[0])
            outputs: dict[int, Tensor] = {}
            for t in reversed(steps) if d else steps:
                state = cell(name, x[t], state, cells[at])
                outputs[t] = state[0]
            sides.append(torch.stack([outputs[t] for t in steps]))
            finals.append(state)
        x = torch.cat(sides, -1)
    return [x, *(torch.stack(s) for s in zip(*finals, strict=True))]


SHAPES = [  # layers, bidirectional, batch first, biases, size of the projection
    (1, False, False, True, 0), (2, True, False, True, 0), (1, False, True, True, 0),
    (2, False, False, False, 0), (1, True, True, False, 0), (2, True, False, True, 2),
    (1, False, False, False, 2),
]  # fmt: skip
GATE_COUNT = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
RECURRENT = [(n, s) for n, s in itertools.product(GATE_COUNT, SHAPES) if n == "lstm" or not s[-1]]


@pytest.mark.parametrize(("name", "shape"), RECURRENT)
def test_recurrent(name: str, shape: tuple[int, bool, bool, bool, int]) -> None:
    count, bidirectional, batch_first, bias, proj = shape
    inputs, hidden, directions = 3, 4, 1 + bidirectional
    keys = ["w_ih", "w_hh", *(["b_ih", "b_hh"] if bias else []), *(["w_hr"] if proj else [])]
    params: list[Tensor] = []
    for at in range(count * directions):
        width = inputs if at < directions else (proj or hidden) * directions
        rows = GATE_COUNT[name] * hidden
        sizes = {"w_ih": (rows, width), "w_hh": (rows, proj or hidden), "w_hr": (proj, hidden)}
        params += [randn(*sizes.get(k, (rows,))) for k in keys]
    widths = [proj or hidden, hidden] if name == "lstm" else [hidden]
    hx = [randn(count * directions, 2, w) for w in widths]

    def twin(x: Tensor, *rest: Tensor) -> Any:
        states, weights = list(rest[: len(hx)]), list(rest[len(hx) :])
        start = states if name == "lstm" else states[0]
        return ALL_TWINS[name](x, start, weights, bias, count, 0.0, False, bidirectional, batch_first)

    def form(x: Tensor, *rest: Tensor) -> Any:
        weights = rest[len(hx) :]
        n = len(keys)
        cells = [
            dict(zip(keys, weights[i : i + n], strict=True)) for i in range(0, len(weights), n)
        ]
        x = x.transpose(0, 1) if batch_first else x
        y, *finals = layers(name, x, list(rest[: len(hx)]), cells, directions)
        return [y.transpose(0, 1) if batch_first else y, *finals]

    x = randn(2, 5, inputs) if batch_first else randn(5, 2, inputs)
    assert_same_gradients(twin, form, [x, *hx, *params])


@pytest.mark.parametrize("name", GATE_COUNT)
def test_only_the_rows_that_carry_are_pulled_through(name: str) -> None:
    """Gates are computed again, the value's rows run once forwards and once back; no weight's gradient."""
    steps, batch, width, gates = 5, 2, 4, GATE_COUNT[name]
    weights = [randn(gates * width, width).requires_grad_() for _ in range(2)]
    biases = [randn(gates * width).requires_grad_() for _ in range(2)]
    x = randn(steps, batch, width).requires_grad_()
    h = torch.zeros(1, batch, width, dtype=x.dtype)
    start = [h, h] if name == "lstm" else h
    y = ALL_TWINS[name](x, start, [*weights, *biases], True, 1, 0.0, False, False, False)[0]
    with Operations() as counter:
        torch.autograd.grad(y.sum(), x)
    row = 2 * steps * batch * width * width  # of the input; and of the state
    first = row // steps  # the state that is no input gets no gradient at the first step
    assert counter.total == 2 * gates * row + 2 * row + 2 * row - first


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", ["lstm_cell", "gru_cell"])
def test_a_cell_is_a_layer_of_one_step(name: str, biased: bool) -> None:
    layer, gates = name.removesuffix("_cell"), GATE_COUNT[name.removesuffix("_cell")]
    x, states = randn(2, 3), [randn(2, 4) for _ in range(2 if layer == "lstm" else 1)]
    params = [randn(4 * gates, 3), randn(4 * gates, 4)]
    params += [randn(4 * gates), randn(4 * gates)] if biased else []

    def cell(x: Tensor, *rest: Tensor) -> Any:
        hx, p = rest[: len(states)], rest[len(states) :]
        return ALL_TWINS[name](x, [*hx] if layer == "lstm" else hx[0], *p)

    def one_step(x: Tensor, *rest: Tensor) -> Any:
        hx, p = [h[None] for h in rest[: len(states)]], [*rest[len(states) :]]
        start = hx if layer == "lstm" else hx[0]
        made = ALL_TWINS[layer](x[None], start, p, biased, 1, 0.0, False, False, False)[1:]
        return [s[0] for s in made] if layer == "lstm" else made[0][0]

    assert_same_gradients(cell, one_step, [x, *states, *params])


# --- the table itself

TESTED = {
    *GATES, *SECANTS, *GATE_COUNT, "pow_tensor", "pow_scalar", "prod", "prod_dim", "cumprod",
    "cross_entropy_loss", "binary_cross_entropy_with_logits", "lstm_cell", "gru_cell",
    "log", "log2", "log10", "logit", "lgamma", "sgn", "var_mean", "std_mean",
    "softmax", "log_softmax", "glu",
    "layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm",
    "scaled_dot_product_attention",
}  # fmt: skip


def test_every_twin_has_a_closed_form() -> None:
    assert set(ALL_TWINS) == TESTED
    assert set(TWINS) <= TESTED, "a twin that no row names is dead code"


EULER = ("aten.sqrt", "aten.rsqrt", "aten.reciprocal")  # measured from 0, which is not f(0) of all
AT_ZERO = [
    row for row in rulebook.load().facts.values() if row.at_zero is not None and row.op not in EULER
]


@pytest.mark.parametrize("row", AT_ZERO, ids=lambda r: r.op)
def test_at_zero_is_the_value_at_zero(row: Any) -> None:
    packet = row.op.split(".")[1]
    call = call_of(packet, (torch.zeros(2, dtype=torch.float64),), {})
    assert call.op(*call.args).tolist() == pytest.approx(
        [row.at_zero] * (1 if packet == "glu" else 2), abs=1e-15
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(3, 0), (0, 3), (0, 0)])
def test_attention_without_tokens(
    queries: int, keys: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_CHEAP", 0)
    q, k, v = (randn(1, 2, n, 4) for n in (queries, keys, keys))
    mask = torch.zeros(queries, keys, dtype=torch.float64) if masked else None
    y = attention_twins.scaled_dot_product_attention(q, k, v.requires_grad_(), mask)
    assert torch.equal(y, torch.nn.functional.scaled_dot_product_attention(q, k, v, mask))
    assert torch.autograd.grad(y.sum(), v)[0].shape == v.shape


def test_a_group_norm_of_no_samples() -> None:
    x = randn(0, 4, 5, 5).requires_grad_()
    y = ALL_TWINS["group_norm"](x, 2, None, None, 1e-5)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
