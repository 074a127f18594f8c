"""Every method against an independent dense reference, loops over hooks of the eager model; and Captum."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import captum.attr
import pytest
import timm
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.attribution import METHODS, maps
from libragrad_fx.attribution.internals import run
from libragrad_fx.errors import InputError
from libragrad_fx.module.captured import CapturedModule
from tests.attribution.once import DEPTH, HEADS, SMALL, traced, transformed, vit
from tests.between import fast_first

F64 = torch.float64
Tensor = torch.Tensor
TARGET, TOKENS = 2, 17


@dataclasses.dataclass
class Seen:
    """By block: input and gradient, probabilities and theirs, stream behind attention, output."""

    h: list[Tensor]
    g: list[Tensor]
    a: list[Tensor]
    da: list[Tensor]
    streams: list[Tensor]
    ends: list[Tensor]


def observed(model: nn.Module, x: Tensor, runs: nn.Module) -> Seen:
    """Values by hooks of ``model``, gradients by hooks of ``runs``."""
    a, streams, ends, h, v, o = ([] for _ in range(6))
    handles = []
    for block in model.blocks:
        handles.append(block.attn.attn_drop.register_forward_hook(lambda m, i, y: a.append(y.detach())))
        handles.append(block.norm2.register_forward_hook(lambda m, i, y: streams.append(i[0].detach())))
        handles.append(block.register_forward_hook(lambda m, i, y: ends.append(y.detach())))
    model(x)
    for handle in handles:
        handle.remove()
    handles = []
    for block in runs.blocks:
        handles.append(block.register_forward_hook(lambda m, i, y: h.append(i[0])))
        handles.append(block.attn.qkv.register_forward_hook(lambda m, i, y: v.append(y)))
        handles.append(block.attn.proj.register_forward_hook(lambda m, i, y: o.append(i[0])))
    logits = runs(x)
    for handle in handles:
        handle.remove()
    grads = torch.autograd.grad(logits[:, TARGET].sum(), [*h, *o])
    da = []
    for qkv, g in zip(v, grads[DEPTH:], strict=True):
        value = qkv.detach().unflatten(-1, (3, HEADS, -1))[:, :, 2].transpose(1, 2)
        da.append(g.unflatten(-1, (HEADS, -1)).transpose(1, 2) @ value.mT)
    return Seen([t.detach() for t in h], list(grads[:DEPTH]), a, da, streams, ends)


# --- the formulas once more, token by token


def cam(seen: Seen, layers: list[int], weight: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    total = torch.zeros(len(seen.h[0]), TOKENS, dtype=F64)
    for l in layers:  # noqa: E741
        for b in range(len(total)):
            for c in range(seen.h[l].shape[-1]):
                h, g = seen.h[l][b, :, c], seen.g[l][b, :, c]
                total[b] += weight(h, g) * h
    return total


def grad_cam(h: Tensor, g: Tensor) -> Tensor:
    return g.mean()


def x_grad_cam(h: Tensor, g: Tensor) -> Tensor:
    return (g * h.abs()).sum() / (h.abs().sum() + 1e-7)


def rolled(steps: list[Tensor]) -> Tensor:
    result = []
    for b in range(len(steps[0])):
        r = torch.eye(TOKENS, dtype=F64)
        for step in steps:
            r = (0.5 * step[b] + 0.5 * torch.eye(TOKENS, dtype=F64)) @ r
        result.append(r[0])
    return torch.stack(result)


def att_cat(seen: Seen) -> Tensor:
    total = torch.zeros(len(seen.h[0]), TOKENS, dtype=F64)
    for l in range(DEPTH - 1):  # noqa: E741
        for b in range(len(total)):
            for j in range(TOKENS):
                attended = seen.a[l][b, :, :, j].mean()
                total[b, j] += attended * (seen.h[l + 1][b, j] @ seen.g[l + 1][b, j])
    return total


def token_tm(seen: Seen) -> Tensor:
    one = torch.eye(TOKENS, dtype=F64)

    def turned(a: Tensor, b: Tensor) -> Tensor:
        likeness = torch.stack([s @ t / (s.norm() * t.norm()) for s, t in zip(a, b, strict=True)])
        return torch.diag(b.norm(dim=1) / (a.norm(dim=1) + 1e-8) * likeness.softmax(0))

    rows = []
    for b in range(len(seen.h[0])):
        c = torch.diag(seen.h[0][b].norm(dim=1))
        for l in range(DEPTH):  # noqa: E741
            e, between, after = seen.h[l][b], seen.streams[l][b], seen.ends[l][b]
            weights, gradient = seen.a[l][b].mean(0), seen.da[l][b].relu().mean(0)
            c = (one + (weights @ turned(e, between)) * gradient) @ c
            c = (one + turned(between, after)) @ c
        rows.append(c[0])
    return torch.stack(rows)


def le_grad(model: nn.Module, runs: nn.Module, tail: nn.Module, x: Tensor) -> Tensor:
    """Block by block: the logits of what stands behind it, as if it were the last."""
    ends, v, o = [], [], []
    handles = []
    for block in runs.blocks:
        handles.append(block.register_forward_hook(lambda m, i, y: ends.append(y)))
        handles.append(block.attn.qkv.register_forward_hook(lambda m, i, y: v.append(y)))
        handles.append(block.attn.proj.register_forward_hook(lambda m, i, y: o.append(i[0])))
    runs(x)
    for handle in handles:
        handle.remove()
    total = torch.zeros(len(x), TOKENS, dtype=F64)
    for end, qkv, at in zip(ends, v, o, strict=True):
        leaf = end.detach().requires_grad_()
        (g,) = torch.autograd.grad(tail(leaf)[:, TARGET].sum(), leaf)
        (g,) = torch.autograd.grad(end, at, g, retain_graph=True)
        value = qkv.detach().unflatten(-1, (3, HEADS, -1))[:, :, 2].transpose(1, 2)
        da = g.unflatten(-1, (HEADS, -1)).transpose(1, 2) @ value.mT
        for b in range(len(x)):
            for h in range(HEADS):
                for query in range(TOKENS):
                    total[b] += da[b, h, query].clamp(min=0) / (HEADS * TOKENS * DEPTH)
    return total


class Tail(nn.Module):
    """What a vision transformer does behind its blocks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.norm, self.head = model.norm, model.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)[:, 0])


def test_legrad_against_a_dense_reference(case: Any) -> None:
    written, fused, x, _ = case
    model, tail = vit(fused=False), Tail(vit(fused=False))
    if written.plan:
        tail = lg.transform(tail, torch.randn(3, TOKENS, 24, dtype=F64))
    want = le_grad(model, written if written.plan else model, tail, x)
    for module in (written, fused):
        got = lg.attribute(module, x, TARGET, method="legrad")
        tokens = torch.cat([got.prefix, got.values.flatten(1)], 1)
        torch.testing.assert_close(tokens, want, rtol=1e-10, atol=1e-14)


REFERENCE: dict[str, Callable[[Seen], Tensor]] = {
    "hirescam": lambda s: (s.h[-1] * s.g[-1]).sum(-1),
    "gradcam": lambda s: cam(s, [DEPTH - 1], grad_cam),
    "gradcam_plus": lambda s: cam(s, [*range(DEPTH)], grad_cam),
    "xgradcam": lambda s: cam(s, [DEPTH - 1], x_grad_cam),
    "xgradcam_plus": lambda s: cam(s, [*range(DEPTH)], x_grad_cam),
    "raw_attention": lambda s: s.a[-1].mean(1)[:, 0],
    "rollout": lambda s: rolled([a.mean(1) for a in s.a]),
    "genatt": lambda s: rolled([(a * d).relu().mean(1) for a, d in zip(s.a, s.da, strict=True)]),
    "attcat": att_cat,
    "tokentm": token_tm,
}


@pytest.fixture(scope="module", params=["plain", "balanced"])
def case(request: Any) -> tuple[CapturedModule, CapturedModule, Tensor, Seen]:
    """Written out and fused attention, of one model; and what hooks show of it."""
    torch.manual_seed(0)
    x = torch.randn(3, 3, 32, 32, dtype=F64)
    make = transformed if request.param == "balanced" else traced
    written, fused = make(fused=False), make()
    runs = vit(fused=False) if request.param == "plain" else written
    return written, fused, x, observed(vit(fused=False), x, runs)


@pytest.mark.parametrize("name", REFERENCE)
def test_against_a_dense_reference(name: str, case: Any) -> None:
    written, fused, x, seen = case
    want = REFERENCE[name](seen)
    for module in (written, fused):
        got = lg.attribute(module, x, TARGET, method=name)
        tokens = torch.cat([got.prefix, got.values.flatten(1)], 1)
        torch.testing.assert_close(tokens, want, rtol=1e-10, atol=1e-12)


def test_what_has_another_reference_or_none() -> None:
    """Sums over channels: FullGrad and its like are tested by their definition, paths against Captum."""
    elsewhere = {
        "fullgrad", "fullgrad_plus", "input_x_gradient_plus", "skip_plus", "random", "smoothgrad", "legrad",
    }  # fmt: skip
    assert set(METHODS) == {*REFERENCE, *CAPTUM, *elsewhere}


def test_fullgrad_and_skip_plus_are_sums_of_what_is_tested(case: Any) -> None:
    """FullGrad at one layer is Input×Gradient there and the biases behind; SkipPLUS starts at half."""
    module, _, x, _ = case
    paths = lg.blocks(module)
    whole = lg.attribute(module, x, TARGET, method="fullgrad_plus", layers=paths[DEPTH // 2 :])
    skipped = lg.attribute(module, x, TARGET, method="skip_plus")
    assert torch.equal(whole.values, skipped.values)
    first = lg.attribute(module, x, TARGET, method="fullgrad_plus", layers=paths[:1])
    assert torch.equal(first.values, lg.attribute(module, x, TARGET, method="fullgrad").values)


def test_input_x_gradient_plus_is_the_sum_over_block_inputs(case: Any) -> None:
    """FullGrad+ without biases, the paper's ablation; it promises no sum."""
    module, _, x, _ = case
    paths = lg.blocks(module)
    each = [lg.attribute(module, x, TARGET, method="input_x_gradient", layers=[p]) for p in paths]
    found = lg.attribute(module, x, TARGET, method="input_x_gradient_plus")
    torch.testing.assert_close(found.values, sum(e.values for e in each), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.total, sum(e.total for e in each), rtol=1e-12, atol=1e-14)
    assert bool(found.expected.isnan().all())
    whole = lg.attribute(module, x, TARGET, method="fullgrad_plus")
    biases = lg.attribute(module, x, TARGET, method="fullgrad", layers=paths[:1]).values - each[0].values
    torch.testing.assert_close(whole.values - biases, found.values, rtol=1e-9, atol=1e-12)
    assert float((whole.values - found.values).abs().max()) > 1e-3


def test_fullgrad_is_complete_when_balanced(case: Any) -> None:
    """And only then."""
    module, _, x, _ = case
    for method in ("fullgrad", "fullgrad_plus", "skip_plus"):
        found = lg.attribute(module, x, TARGET, method=method)
        assert (float(found.completeness_error.max()) <= 1e-11) is bool(module.plan)


def test_smoothgrad_is_a_mean_of_gradients(case: Any) -> None:
    module, _, x, _ = case
    draw, total = torch.Generator().manual_seed(4), torch.zeros(3, 32, 32, dtype=F64)
    for _ in range(5):
        noise = torch.randn(x.shape[1:], generator=draw, dtype=F64)
        at = torch.stack([s + 0.15 * (s.max() - s.min()) * noise for s in x])
        total += lg.attribute(module, at, TARGET, method="gradient", resolution="pixels").values / 5
    got = lg.attribute(module, x, TARGET, method="smoothgrad", steps=5, seed=4, resolution="pixels")
    torch.testing.assert_close(got.values, total, rtol=1e-10, atol=1e-14)


def test_random_is_positive_and_adds_up_to_one(case: Any) -> None:
    module, _, x, _ = case
    a, b = (lg.attribute(module, x, TARGET, method="random", seed=s) for s in (0, 1))
    assert bool((a.values >= 0).all())
    torch.testing.assert_close(a.total, torch.ones(3, dtype=F64))
    assert not torch.equal(a.values, b.values)
    assert torch.equal(a.values, lg.attribute(module, x, TARGET, method="random").values)


# --- Captum, where it has the method

CAPTUM: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "gradient": lambda m, x: captum.attr.Saliency(m).attribute(x, target=TARGET, abs=False),
    "input_x_gradient": lambda m, x: captum.attr.InputXGradient(m).attribute(x, target=TARGET),
    "integrated_gradients": lambda m, x: captum.attr.IntegratedGradients(m).attribute(x, target=TARGET),
}


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stages = nn.Sequential(*(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(3)
        ))  # fmt: skip
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


@functools.cache
def cnn(balanced: bool) -> tuple[CapturedModule, Tensor]:
    """For tests that do not change it."""
    x = torch.randn(2, 3, 8, 8, dtype=F64)
    return (lg.transform if balanced else lg.trace)(Cnn().double().eval(), x), x


@pytest.mark.parametrize("name", CAPTUM)
@pytest.mark.parametrize("balanced", [False, True])
def test_against_captum(name: str, balanced: bool) -> None:
    """On a network without layer norms: one makes 1e4 of a rounding error near a baseline of zeros."""
    module, x = cnn(balanced)
    want = CAPTUM[name](module, x.clone().requires_grad_()).sum(1)
    got = lg.attribute(module, x, TARGET, method=name, resolution="pixels")
    torch.testing.assert_close(got.values, want.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("balanced", [False, True])
def test_integrated_gradients_at_a_layer_against_captum(balanced: bool) -> None:
    model, x = Cnn().double().eval(), torch.randn(2, 3, 8, 8, dtype=F64)
    module = (lg.transform if balanced else lg.trace)(model, x)
    layered = captum.attr.LayerIntegratedGradients(module, module.get_submodule("stem"))
    # the baseline of the layer is what the layer makes of Captum's baseline: none here, by a layer of zeros
    found = lg.attribute(module, x, TARGET, method="integrated_gradients")
    assert found.layers == ("stages.0",)
    with torch.no_grad():
        model.stem.bias.zero_()
    want = layered.attribute(x, torch.zeros_like(x), target=TARGET, n_steps=50).sum(1)
    found = lg.attribute(module, x, TARGET, method="integrated_gradients")
    torch.testing.assert_close(found.values, want.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", [pytest.param("plain", marks=pytest.mark.slow), "balanced"], indirect=True)
def test_path_averaged_is_a_mean_of_maps(case: Any) -> None:
    """Of maps at k/n of the first block's input, by hand: the rest of the network on a scaled input."""
    module, _, x, _ = case
    rest = Rest(vit(fused=False))
    tokens = rest.tokens(x)
    runs = (lg.transform if module.plan else lg.trace)(rest, tokens)
    for method in ("input_x_gradient", "xgradcam_plus", "attcat"):
        total = torch.zeros(3, TOKENS, dtype=F64)
        for k in range(1, 5):
            total += lg.attribute(runs, k / 4 * tokens, TARGET, method=method).values / 4
        got = lg.attribute(module, x, TARGET, method=f"path_averaged({method})", steps=4)
        tokens_of = torch.cat([got.prefix, got.values.flatten(1)], 1)
        torch.testing.assert_close(tokens_of, total, rtol=1e-9, atol=1e-12)
        assert bool(got.completeness_error.isnan().all())


class Rest(nn.Module):
    """A vision transformer from its tokens on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.blocks, self.norm, self.head = model.blocks, model.norm, model.head
        self.before = (model.patch_embed, model._pos_embed)

    def tokens(self, x: Tensor) -> Tensor:
        for step in self.before:
            x = step(x)
        return x.detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x))[:, 0])


@pytest.mark.parametrize("balanced", [False, True])
def test_gradcam_against_captum(balanced: bool) -> None:
    module, x = cnn(balanced)
    layer = module.get_submodule("stages.1")  # its output is the input of the last block
    want = captum.attr.LayerGradCam(module, layer).attribute(x, target=TARGET)[:, 0]
    got = lg.attribute(module, x, TARGET, method="gradcam")
    assert got.layers == ("stages.2",)
    torch.testing.assert_close(got.values, want.detach(), rtol=1e-10, atol=1e-12)


# --- what a model has not


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.attention])
def test_a_model_without_attention_says_so(name: str) -> None:
    module, x = cnn(True)
    with pytest.raises(InputError, match=f"{name} needs attention"):
        lg.attribute(module, x, TARGET, method=name)


def test_windows_are_no_attention_over_tokens() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(2, 2), num_heads=(2, 2),
                              embed_dim=8, num_classes=5).double().eval()  # fmt: skip
    x = torch.randn(2, 3, 56, 56, dtype=F64)
    module = lg.transform(model, x)
    with pytest.raises(InputError, match="within windows"):
        lg.attribute(module, x, TARGET, method="rollout")
    assert lg.attribute(module, x, TARGET, method="xgradcam_plus").values.shape[0] == 2


def test_without_a_class_token_there_is_no_row_to_read() -> None:
    sizes = SMALL | {"global_pool": "avg"}
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_heads=2, class_token=False, **sizes)
    x = torch.randn(2, 3, 32, 32, dtype=F64)
    module = lg.transform(model.double().eval(), x)
    with pytest.raises(InputError, match="use attcat"):
        lg.attribute(module, x, TARGET, method="genatt")
    assert lg.attribute(module, x, TARGET, method="attcat").prefix is None


@pytest.mark.parametrize("name", ["gradient", "smoothgrad", "integrated_gradients"])
def test_some_take_one_layer(name: str, case: Any) -> None:
    module, _, x, _ = case
    with pytest.raises(InputError, match="takes one layer"):
        lg.attribute(module, x, TARGET, method=name, layers=["blocks.0", "blocks.1"])


@pytest.mark.parametrize("name", ["fullgrad_plus", "gradcam", "rollout"])
def test_pixels_are_no_sum_over_blocks(name: str, case: Any) -> None:
    module, _, x, _ = case
    with pytest.raises(InputError, match="look at one place"):
        lg.attribute(module, x, TARGET, method=name, resolution="pixels")


@pytest.mark.parametrize(
    "name", ["nonsense", "path_averaged(nonsense)", "path_averaged(smoothgrad)", "path_averaged", 3, None]
)
def test_no_such_method(name: Any, case: Any) -> None:
    module, _, x, _ = case
    with pytest.raises(InputError, match="There are random, gradient"):
        lg.attribute(module, x, TARGET, method=name)


class Layer(nn.Module):
    """Attention and a residual: a third of the ops of PyTorch's encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.proj(y.transpose(1, 2).flatten(2))


class Reads(nn.Module):
    """Two layers, and what of their result is returned."""

    def __init__(self, read: Callable[[Tensor], Tensor], causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read, self.causal, self.head = read, causal, nn.Linear(8, 5)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() if self.causal else None
        for layer in self.layers:
            x = layer(x, mask)
        return self.read(self.head(x))


@pytest.mark.parametrize(
    ("read", "target", "row"),
    fast_first([
        (lambda y: y[:, 0], TARGET, 0),
        (lambda y: y[:, -1], TARGET, -1),
        (lambda y: y[:, 3:4].squeeze(1), TARGET, 3),
        (lambda y: y[:, -1:].flatten(1), TARGET, -1),
        (lambda y: y, (4, TARGET), 4),
        (lambda y: (y, y[:, 0]), (4, TARGET), 4),  # what else is read alone is not what is explained
    ], 3),
)  # fmt: skip
@pytest.mark.parametrize("causal", fast_first([True, False], 1))
def test_attention_is_followed_to_the_token_that_is_read(
    read: Any, target: Any, row: int, causal: bool
) -> None:
    model, x = Reads(read, causal).double().eval(), torch.randn(2, 6, 8, dtype=F64)
    module = lg.trace(model, x)
    seen = run(module, x, lg.blocks(module), attention=True).back(target)
    want = seen.attention[-1].weights.mean(1)[:, row]
    got = lg.attribute(module, x, target, method="raw_attention")
    torch.testing.assert_close(got.values, want, rtol=1e-12, atol=0)


COMPUTED = [
    lambda y: y[torch.arange(len(y)), y[..., 0].argmax(1)],
    lambda y: y.gather(1, y[..., :1].argmax(1, keepdim=True).expand(-1, -1, 5)).squeeze(1),
]


@pytest.mark.parametrize("read", fast_first(COMPUTED, 1))
def test_attention_is_followed_to_a_token_that_the_model_computes(read: Any) -> None:
    """Each sample's own: by rollout of the probabilities, written out."""
    model, x = Reads(read).double().eval(), torch.randn(5, 6, 8, dtype=F64)
    with torch.no_grad():
        rows = Reads(lambda y: y).double().eval()(x)[..., 0].argmax(1)
    assert len(rows.unique()) > 1
    module = lg.transform(model, x)
    seen = run(module, x, lg.blocks(module), attention=True).back(TARGET)
    first, last = ((a.weights.mean(1) + torch.eye(6, dtype=F64)) / 2 for a in seen.attention)
    want = (last @ first)[torch.arange(5), rows]
    got = lg.attribute(module, x, TARGET, method="rollout").values
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    alone = [lg.attribute(module, one, TARGET, method="rollout").values for one in x.split(1)]
    torch.testing.assert_close(got, torch.cat(alone), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("read", [lambda y: y.mean(1), lambda y: y.mean(1, keepdim=True)[:, -1]])
def test_where_no_token_is_read_alone_it_says_so(read: Any) -> None:
    model, x = Reads(read).double().eval(), torch.randn(2, 6, 8, dtype=F64)
    with pytest.raises(InputError, match="no token is read alone"):
        lg.attribute(lg.transform(model, x), x, TARGET, method="rollout")


@pytest.mark.parametrize("length", fast_first([7, 5], 1))
def test_two_sequences_of_tokens_are_not_followed_as_one(length: int) -> None:
    """Were they as many: an encoder's blocks and a decoder's are not one chain."""

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = (
                nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))
                for _ in range(2)
            )

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            for a, b in zip(self.left, self.right, strict=True):
                x, y = a(x), b(y)
            return x.mean(1) * y.mean(1)

    inputs = torch.randn(2, 5, 8, dtype=F64), torch.randn(2, length, 8, dtype=F64)
    module = lg.transform(Towers().double().eval(), inputs)
    for method in ("attcat", "legrad"):
        with pytest.raises(InputError, match="follows one sequence"):
            lg.attribute(module, inputs, TARGET, method=method)
    left = ["left.0", "left.1"]
    assert lg.attribute(module, inputs, TARGET, method="attcat", layers=left).values.shape == (2, 5)


def test_a_decoder_as_long_as_its_encoder_is_another_sequence() -> None:
    class Block(nn.Module):
        """Attention within a sequence, and to another one."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.cross = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)
            self.inner.batch_first = self.cross.batch_first = True

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x = x + self.inner(x, x, x)[0]
            return x + self.cross(x, y, y)[0]

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.start = nn.ModuleList(Block() for _ in range(4)), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.start(x)
            for block in self.blocks[:2]:
                x = block(x, x)
            for block in self.blocks[2:]:
                y = block(y, x)
            return y[:, -1]

    x = torch.randn(2, 5, 8, dtype=F64)
    module = lg.transform(Both().double().eval(), x)
    for method in ("rollout", "attcat", "legrad"):
        with pytest.raises(InputError, match="follows one sequence"):
            lg.attribute(module, x, TARGET, method=method)
    decoder = ["blocks.2", "blocks.3"]
    assert lg.attribute(module, x, TARGET, method="rollout", layers=decoder).values.shape == (2, 5)


def test_heads_by_features_are_no_grid() -> None:
    """Behind a block with 2 heads of 2 x 2, the 17 tokens are still a class token and 4 x 4 patches."""
    found = maps.guessed("x", (2, 17, 24), [(2, 24, 4, 4), (2, 2, 2, 12), (2, 12, 2, 2)], (32, 32))
    assert found.parts[0].grid == (4, 4)
