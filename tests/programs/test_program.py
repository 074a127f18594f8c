"""A program answers as ``attribute`` does: one flat graph, on any batch, saved and without this package."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import libragrad_fx as lg
from libragrad_fx.attribution import METHODS
from libragrad_fx.errors import InputError, VerificationError
from libragrad_fx.programs import Program
from libragrad_fx.programs.flat import Flat
from tests.between import fast_first, fast_of
from zoo.small import SMALL, samples, small

F64 = torch.float64
NEAR = 1e-14  # of the largest value, in float64


class Tiny(nn.Module):
    """Tokens of a picture, attention, a gated MLP, a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, 8))
        layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0])


@functools.cache
def tiny() -> tuple[nn.Module, torch.Tensor]:
    """For tests that do not change it: it is captured once."""
    torch.manual_seed(0)
    return Tiny().double().eval(), torch.randn(3, 3, 16, 16, dtype=F64)


class Shallow(nn.Module):
    """Quick to trace, for what is the same for every model."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.gelu(self.stem(x)).mean((2, 3)))


def shallow() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Shallow().double().eval(), torch.randn(3, 3, 16, 16, dtype=F64)


@functools.cache
def plain() -> Program:
    return lg.program(*tiny())


def alike(got: lg.Attribution, want: lg.Attribution, near: float = NEAR) -> None:
    """The same answer but for rounding; a field that promises nothing is nan in both."""
    for name, value in vars(want).items():
        mine = getattr(got, name)
        if isinstance(value, torch.Tensor):
            top = float(want.values.abs().max())
            torch.testing.assert_close(mine, value, rtol=1e-12, atol=near * max(top, 1), equal_nan=True)
        elif name in ("others", "stages", "parts"):
            assert mine.keys() == value.keys()
            for key, m in value.items():
                torch.testing.assert_close(mine[key], m, rtol=1e-12, atol=near * float(m.abs().max()))
        elif name not in ("target", "labels"):
            assert mine == value, name


def asked(name: str) -> tuple[Any, Any, Any, Any]:
    """A kind of model, its inputs, what its program is made with, and called with."""
    made = small(name)
    fixed = made.target if callable(made.target) else None
    return made, made.inputs, fixed, None if fixed is not None else made.target


REFUSED = {
    "vilt": "captured anew at each call: there is no graph",
}
SINGLE_PRECISION = {"efficientvit": 1e-6}
"""Models that compute their attention in float32, whatever they are given."""
FAST = ("table",)  # the cheapest; tests below are about a plain transformer
KINDS = [*FAST, *(name for name in SMALL if name not in (*REFUSED, *FAST))]


@pytest.mark.parametrize("name", fast_first(KINDS, len(FAST)))
def test_every_kind(name: str) -> None:
    """FullGrad+ of every kind of model, forward to the bit."""
    made, inputs, fixed, target = asked(name)
    program = lg.program(made.model, inputs, method="fullgrad_plus", target=fixed)
    want = lg.attribute(made.model, inputs, made.target, method="fullgrad_plus")
    alike(program(inputs, target), want, SINGLE_PRECISION.get(name, NEAR))


RECURRENT = [(kind, dtype) for kind in (nn.LSTM, nn.GRU, nn.RNN) for dtype in (torch.float32, F64)]


@pytest.mark.parametrize(("kind", "dtype"), fast_first(RECURRENT, 1))
def test_a_recurrent_layer_serves_any_batch(kind: type[nn.RNNBase], dtype: torch.dtype) -> None:
    """oneDNN's kernel for an LSTM in float32, which rounds otherwise under grad mode."""
    torch.manual_seed(0)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = kind(4, 5, 1, batch_first=True, bidirectional=True), nn.Linear(10, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.net(x)[0][:, -1])

    model, near = Last().to(dtype), 1e-6 if dtype is torch.float32 else NEAR
    program = lg.program(model, torch.randn(3, 2, 4, dtype=dtype))
    for batch in (2, 5):
        x, target = torch.randn(batch, 2, 4, dtype=dtype), [0, 1, 2, 1, 0][:batch]
        want = lg.attribute(model, x, target, method="input_x_gradient")
        alike(program(x, target), want, near)
        kept = program.fitting(x)
        output = kept.run(*kept.given(x, [target]))[program.outputs(x).index("model")]
        with torch.no_grad():
            assert torch.equal(output, model(x))
    assert [said.partition("for ")[2][:9] for said in program.said()[1:]] == ["any batch"]


def test_a_forward_that_differs_in_a_bit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = shallow()
    read = Flat.answers

    def other(*given: Any) -> Any:
        answers, output = read(*given)
        return answers, torch.nextafter(output, output + 1)

    monkeypatch.setattr(Flat, "answers", other)
    with pytest.raises(VerificationError, match=r"differs from the model's, by .* at most"):
        lg.program(model, x)


def test_a_graph_that_is_wrong_for_another_batch_serves_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was decided by the size of the batch, but the map of two samples is another."""
    model, x = shallow()
    read = Flat.answers

    def other(self: Flat, found: Any) -> Any:
        answers, output = read(self, found)
        twice = lambda a: dataclasses.replace(a, values=a.values * 2)  # noqa: E731
        return ([(twice(a), i) for a, i in answers] if len(output) == 2 else answers), output

    monkeypatch.setattr(Flat, "answers", other)
    program = lg.program(model, x)
    assert "for 3 samples" in str(program)


@pytest.mark.parametrize("each", [True, False], ids=["for each sample", "for all"])
def test_a_target_has_tensors_of_its_own(each: bool) -> None:
    """They are constants. With one for each sample, the graph is for so many."""
    model, x = shallow()
    weights = torch.randn(*[3] * each, 5, dtype=F64)
    score = lambda y: (y * weights).sum(1)  # noqa: E731
    program = lg.program(model, x, target=score)
    for batch in (x,) if each else (x, torch.cat([x, x + 1])):
        alike(program(batch), lg.attribute(model, batch, score, method="input_x_gradient"))
    assert ("for 3 samples" if each else "for any batch") in str(program)
    assert len(program.said()) == 2


class Alibi(nn.Module):
    """PyTorch has no ``baddbmm`` for a free size."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes, self.head = nn.Parameter(torch.randn(1, 1, 6)), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).mT.reshape(-1, 6, 4)
        p = torch.baddbmm(self.slopes, x, x.mT, alpha=0.5).softmax(-1)
        return self.head((p @ x).mean(1))


class Resized(nn.Module):
    """PyTorch writes the mean of a pool in place, and has the resize as an op and as many: other bits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(36, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x.reshape(-1, 1, 4, 6)).to(memory_format=torch.channels_last)
        pooled = nn.functional.adaptive_avg_pool2d(x, 1)
        return self.head((nn.functional.interpolate(x, size=(3, 3), mode="bilinear") + pooled).flatten(1))


class Queries(nn.Module):
    """Attention to what is made of zeros, as a detector's first: its values lie dense, or bits change."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(5, 16))
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.read, self.head = nn.Linear(4, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = self.place.expand(len(x), -1, -1)
        none = torch.zeros_like(at)
        q, k, v = (f(y).unflatten(-1, (2, 8)).transpose(1, 2) for f, y in
                   ((self.q, none + at), (self.k, none + at), (self.v, none)))  # fmt: skip
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((y + self.read(x.flatten(2).mT.reshape(-1, 6, 4)).mean(1, keepdim=True)).mean(1))


class Spread(nn.Module):
    """A sum that rounds by how an expanded tensor lies, and a view that only its copy allows."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.gate, self.head = nn.Parameter(torch.randn(40, 30)), nn.Linear(4, 24), nn.Linear(1, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = self.p.t()[None].expand(len(x), 30, 40).contiguous()
        y = (at.sigmoid() * x.flatten(1)[:, :1, None]).sum((1, 2))[:, None]
        wide = self.gate.weight[None].expand(len(x), 24, 4).reshape(len(x), 96)
        return self.head(y + (wide.sigmoid() * x.flatten(1).repeat(1, 4)).sum(1, keepdim=True))


def resized(how: str, dims: int = 2, **options: Any) -> tuple[int, nn.Module]:
    return dims, nn.Upsample(scale_factor=1.5, mode=how, **options)


class Smoothed(nn.Module):
    """A picture made smaller, without aliases."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(x, size=(4, 3), mode="bilinear", antialias=True)


class Written(nn.Module):
    """A convolution whose result is of its input's size, and a write that PyTorch's pass removes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.first(x))
        y[:, :1] *= 2
        return y


PICTURED = {
    "convolution": (2, nn.Conv2d(2, 3, 1)),
    "bilinear": resized("bilinear"),
    "written": (2, Written()),
    "wide": (2, nn.Conv2d(2, 3, 3, padding=1)),
    "of a channel": (2, nn.Conv2d(2, 2, 3, groups=2)),
    "transposed": (2, nn.ConvTranspose2d(2, 3, 2, 2)),
    "of a line": (1, nn.Conv1d(2, 3, 3)),
    "of a volume": (3, nn.Conv3d(2, 3, 1)),
    "corners": resized("bilinear", align_corners=True),
    "bicubic": resized("bicubic"),
    "nearest": resized("nearest"),
    "exact": resized("nearest-exact"),
    "linear": resized("linear", 1),
    "line": resized("nearest", 1),
    "trilinear": resized("trilinear", 3),
    "volume": resized("nearest", 3),
    "smoothed": (2, Smoothed()),
    "pooled": (2, nn.AdaptiveAvgPool2d((4, 3))),
    "pooled volume": (3, nn.AdaptiveAvgPool3d((4, 3, 2))),
}
"""Layers whose kernels PyTorch chooses by the number of samples, or that read all sizes; their axes."""
SAMPLES = 20  # from 16 on, oneDNN has all convolutions


def pictured(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    dims, layer = PICTURED[name]
    x = torch.randn(SAMPLES, 2, *[6] * dims)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(layer(x)[0].numel(), 5)).eval(), x


@pytest.mark.parametrize("name", fast_first(PICTURED, 3))
def test_pictures_come_in_any_batch(name: str) -> None:
    model, x = pictured(name)
    program = lg.program(model, x[:2])
    alike(program(x, 1), lg.attribute(model, x, 1, method="input_x_gradient"), 1e-6)
    assert len(program.said()) == 2
    assert "for any batch" in str(program)


@pytest.mark.parametrize("kind", fast_first([Resized, Spread, Alibi, Queries], 2))
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(F64, marks=pytest.mark.slow)])
def test_forms_that_a_tracer_may_change(kind: type[nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = kind().eval().to(dtype), torch.randn(3, 2, 3, 4, dtype=dtype)
    for method in ("input_x_gradient", "fullgrad"):
        program = lg.program(model, x, method=method)  # to the bit, or it is refused
        for batch in (x, x[:2]):
            want = lg.attribute(model, batch, 1, method=method)
            found = program(batch, 1)
            alike(found, want, 1e-6 if dtype is torch.float32 else NEAR)
            assert torch.equal(found.output, model(batch)[:, 1])


@pytest.mark.slow
def test_other_layouts_are_traced_for_themselves() -> None:
    """Of the pictures, and of the model's own tensors."""
    model, x = tiny()
    program = lg.program(model, x)
    want = lg.attribute(model, x, 1, method="input_x_gradient")
    for other in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
        alike(program(other, 1), want)
    model.to(memory_format=torch.channels_last)
    alike(program(x, 1), want)


@pytest.mark.slow
def test_models_in_several_graphs_have_no_program() -> None:
    made = small("vilt")
    with pytest.raises(InputError, match=r"it has no program. Use attribute\(\)"):
        lg.program(made.model, made.inputs)


EVERY = [name for name in METHODS if name != "random"]
MEANS = [name for name, how in METHODS.items() if how.path] + ["path_averaged(fullgrad)"]
OTHER = {"baseline": 0.5, "steps": 3, "seed": 4}
"""Options of means, none of them the usual one."""


@pytest.mark.parametrize("method", fast_of([*EVERY, "path_averaged(fullgrad)"], ["input_x_gradient"]))
def test_every_method(method: str) -> None:
    """One graph serves batches of two and of five; one of a single sample is traced for itself."""
    model, x = tiny()
    how = OTHER if method in MEANS else {}
    program = lg.program(model, x, method=method, **how)
    for batch in (x, x[:2], torch.randn(5, 3, 16, 16, dtype=F64)):
        targets = [i % 5 for i in range(len(batch))]
        alike(program(batch, targets), lg.attribute(model, batch, targets, method=method, **how))
    assert len(program._kept) == 1
    alike(program(x[:1], 2), lg.attribute(model, x[:1], 2, method=method, **how))
    assert len(program._kept) == 2


@pytest.mark.parametrize("method", fast_of(MEANS, ["smoothgrad"]))
def test_means_are_one_forward(method: str) -> None:
    """All places of a path are one batch, so a graph has as many products for three steps as for two."""
    model, x = shallow() if "legrad" not in method else tiny()
    programs = [lg.program(model, x, method=method, steps=n) for n in (2, 3)]
    products = [
        sum("mm" in str(n.target) or "convolution" in str(n.target) for n in p.graph(x).graph.nodes)
        for p in programs
    ]
    assert products[0] == products[1]
    want = lg.attribute(model, x[:2], [1, 4], method=method, steps=3)
    alike(programs[1](x[:2], [1, 4]), want)


@pytest.mark.slow
def test_a_mean_of_several_targets_and_of_a_callable() -> None:
    model, x = shallow()
    method = "path_averaged(input_x_gradient)"
    program = lg.program(model, x, method=method, targets=2, steps=3)
    for mine, target in zip(program.each(x, [2, [0, 1, 4]]), (2, [0, 1, 4]), strict=True):
        alike(mine, lg.attribute(model, x, target, method=method, steps=3))
    margin = lambda y: y[:, 0] - y[:, 1]  # noqa: E731
    got = lg.program(model, x, target=margin, method="smoothgrad", steps=3)(x)
    alike(got, lg.attribute(model, x, margin, method="smoothgrad", steps=3))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "swin", "bert", "llama", "videomae", "timesformer"])
@pytest.mark.parametrize("method", MEANS)
def test_means_of_every_kind(name: str, method: str) -> None:
    """Of pictures, tokens, texts and videos, where the method has an answer."""
    made, inputs, fixed, target = asked(name)
    if lg.methods(made.model, inputs, made.target).get(method):
        with pytest.raises(InputError):
            lg.program(made.model, inputs, method=method, target=fixed, steps=2)
        return
    want = lg.attribute(made.model, inputs, made.target, method=method, steps=2)
    alike(lg.program(made.model, inputs, method=method, target=fixed, steps=2)(inputs, target), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin", "bert"])
def test_one_graph_serves_any_batch(name: str) -> None:
    """Of windows that are padded, and of tokens with a mask, which could be of one row for all."""
    made, inputs, _, _ = asked(name)
    program = lg.program(made.model, inputs)
    assert all("(B, " in form for form in [*program.signature(inputs).values()][:-1])
    more = pytree.tree_map(lambda t: torch.cat([t, t.flip(0)]), inputs)
    alike(program(more, 1), lg.attribute(made.model, more, 1, method="input_x_gradient"))
    assert len(program._kept) == 1


class Mean(Tiny):
    """Reads all tokens, the class token among them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def test_a_class_token_among_others_is_followed() -> None:
    """Which token that is, a traced run is told: it has no values to ask."""
    torch.manual_seed(0)
    model, x = Mean().double().eval(), torch.randn(3, 3, 16, 16, dtype=F64)
    found = lg.program(model, x, method="rollout")(x[:2], 1)
    alike(found, lg.attribute(model, x[:2], 1, method="rollout"))


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"layers": "stages", "by": "module", "policy": "attn_lrp"},  # at once, and each by itself
    {"layers": "stages"}, {"by": "module"}, {"policy": "attn_lrp"},
    {"by": "block"}, {"by": "head"}, {"resolution": "pixels"}, {"policy": "autograd"},
], ids=str)  # fmt: skip
def test_options(options: dict[str, Any]) -> None:
    model, x = tiny()
    method = "input_x_gradient" if "resolution" in options else "fullgrad_plus"
    got = lg.program(model, x, method=method, **options)(x, [1, 2, 3])
    alike(got, lg.attribute(model, x, [1, 2, 3], method=method, **options))


def test_the_models_own_answer() -> None:
    (model, x), program = tiny(), plain()
    own = model(x).argmax(1)
    got = program(x)
    alike(got, lg.attribute(model, x, method="input_x_gradient"))
    assert got.target == tuple((int(i),) for i in own)
    alike(program(x, -1), program(x, 4))  # counted from the end, as anywhere


def test_parameters_are_the_models() -> None:
    """What is trained later counts, and nobody's gradients or buffers change."""
    model, x = shallow()
    program = lg.program(model, x)
    with torch.no_grad():
        model.head.weight.mul_(2)
    alike(program(x, 1), lg.attribute(model, x, 1, method="input_x_gradient"))
    assert all(p.grad is None for p in model.parameters())
    graph = program.graph(x)
    assert not [n for n in graph.graph.nodes if n.op == "call_function" and "detach" in str(n.target)]


def test_an_autocast_around_a_program_changes_nothing() -> None:
    model, x = shallow()
    model, x = model.float(), x.float()
    program = lg.program(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        other = lg.program(model, x)
        found = [p(images).values for p in (program, other) for images in (x, x[:1])]
    assert torch.equal(found[0], program(x).values)
    assert all(map(torch.equal, found[:2], found[2:]))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_answers_as_the_program_does(copied: Any) -> None:
    model, x = shallow()
    program = lg.program(model, x)
    assert torch.equal(copied(program)(x).values, program(x).values)


def test_no_answer_of_a_model_is_explained_if_it_is_nan() -> None:
    model, x = shallow()
    program = lg.program(model, x)
    x[1] = torch.nan
    for ask in (program, functools.partial(lg.attribute, model, method="input_x_gradient")):
        with pytest.raises(InputError, match="answers nan"):
            ask(x)
        assert ask(x, target=1).values.isnan().flatten(1).any(1).tolist() == [False, True, False]


def test_a_callable_is_part_of_the_graph() -> None:
    model, x = shallow()
    margin = lambda y: y[:, 0] - y[:, 1]  # noqa: E731
    program = lg.program(model, x, target=margin)
    alike(program(x), lg.attribute(model, x, margin, method="input_x_gradient"))
    with pytest.raises(InputError, match="part of this program"):
        program(x, 1)


def test_one_row_is_all_that_a_class_token_costs() -> None:
    """The last block's tokenwise ops go back through one row, and attention through v alone."""
    graph = plain().graph(tiny()[1]).graph
    shapes = [tuple(n.meta["val"].shape) for n in graph.nodes if n.target is torch.ops.aten.mm.default]
    rows = [s[0].node.expr if isinstance(s[0], torch.SymInt) else s[0] for s in shapes]
    # the head, both layers of the MLP, attention's output
    assert sum(str(r) == str(rows[0]) for r in rows) >= 4


def test_refusals() -> None:
    model, x = tiny()
    with pytest.raises(InputError, match=r"random answers without the model: use attribute\(\)"):
        lg.program(model, x, method="random")
    with pytest.raises(InputError, match="argument of each call"):
        lg.program(model, x, target=3)
    program = plain()
    with pytest.raises(InputError, match="out of range"):
        program(x, 7)
    with pytest.raises(InputError, match="2 targets"):
        program(x, [1, 2])
    with pytest.raises(InputError, match=r"\.pt2"):
        program.save("program.onnx", x)


class Meeting(nn.Module):
    """What a sample answers depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.read, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.read(self.stem(x).tanh().mean(1)).tanh()
        return self.head(x * x.mean(0, keepdim=True))


@pytest.mark.slow
def test_means_that_are_refused() -> None:
    """Where a graph is for one batch size, or samples meet each other."""
    made = small("tabular")
    with pytest.raises(InputError, match="all its steps as one batch, and this model's graph is for one"):
        lg.program(made.model, made.inputs, method="integrated_gradients")
    made = small("clip")
    meeting = Meeting().double().eval(), torch.randn(3, 2, 4, dtype=F64)
    for model, x in ((made.model, made.inputs), meeting):
        for method in ("path_averaged(fullgrad)", "integrated_gradients"):
            with pytest.raises(InputError, match="an answer of this model depends on other samples"):
                lg.program(model, x, method=method)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fullgrad_plus", "input_x_gradient", "genatt"])
def test_several_targets_in_one_graph(method: str) -> None:
    """As one by one: given ones, the largest entries, and both; of any batch, and of one sample."""
    model, x = tiny()
    program = lg.program(model, x, method=method, targets=3)
    for batch in (x, x[:2], x[:1]):
        ranks = model(batch).topk(3, 1).indices.T.tolist()
        for asked, meant in ((None, ranks), ([4, -5, 2], [4, 0, 2]), ([1, None, None], [1, *ranks[:2]])):
            found = program.each(batch, asked)
            want = [lg.attribute(model, batch, target, method=method) for target in meant]
            for mine, theirs in zip(found, want, strict=True):
                alike(mine, theirs)
            assert [f.target for f in found] == [
                tuple((t,) for t in ([m] * len(batch) if isinstance(m, int) else m)) for m in meant
            ]
    assert len(program._kept) == 2


def test_several_targets_of_more_axes() -> None:
    made, inputs, _, _ = asked("llama")
    program = lg.program(made.model, inputs, targets=2)
    shape = program.fitting(inputs).flat.sizes
    targets = [[tuple(0 for _ in shape), tuple(n - 1 for n in shape)], tuple(n // 2 for n in shape)]
    for mine, target in zip(program.each(inputs, targets), targets, strict=True):
        alike(mine, lg.attribute(made.model, inputs, target, method="input_x_gradient"), 1e-6)


def test_several_targets_that_do_not_fit() -> None:
    model, x = tiny()
    with pytest.raises(InputError, match="6 targets of an output with 5 entries"):
        lg.program(model, x, targets=6)
    with pytest.raises(InputError, match="how many a call explains"):
        lg.program(model, x, targets=0)
    with pytest.raises(InputError, match="how many a call explains"):
        lg.program(model, x, targets=2, target=lambda y: y[:, 0])
    with pytest.raises(InputError, match="how many a call explains"):
        lg.program(model, x, targets=True)
    program = lg.program(model, x, targets=2)
    with pytest.raises(InputError, match="a list of 2 targets"):
        program.each(x, 3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"call each\(inputs, targets\)"):
        program(x, 1)
    with pytest.raises(InputError, match="a list of 2 targets"):
        program.each(x, [1])


@pytest.mark.slow
def test_several_targets_are_saved_for_any_batch(tmp_path: Path) -> None:
    model, x = tiny()
    program = lg.program(model, x, method="fullgrad_plus", targets=2)
    assert program.signature(x)["target"] == "int64 (B, 2)"
    more = torch.randn(4, 3, 16, 16, dtype=F64)
    found = saved(program, x, [more, torch.tensor([[0, -1], [1, -2], [4, 4], [2, 0]])], tmp_path)
    ranks = model(more).topk(2, 1).indices
    meant = {"values": [0, 1, 4, 2], "target_2.values": [int(ranks[0, 0]), int(ranks[1, 1]), 4, 0]}
    assert torch.equal(found["model"], model(more))
    for values, target in meant.items():
        want = lg.attribute(model, more, target)
        torch.testing.assert_close(found[values], want.values, rtol=1e-12, atol=1e-14)


BARE = """
import sys, torch
torch.set_num_threads(1)  # as here: bits may depend on it
assert not any("libragrad" in path for path in sys.path)
program = torch.export.load(sys.argv[1]).module()
given = torch.load(sys.argv[2])
torch.save(program(*given), sys.argv[3])
assert not any("libragrad_fx" in name for name in sys.modules)
"""


def saved(
    program: Program, inputs: Any, given: list[torch.Tensor], folder: Path
) -> dict[str, torch.Tensor]:
    """What a saved program says in a process of its own."""
    names = ("program.pt2", "given.pt", "found.pt")
    paths = [folder / name for name in names]
    program.save(paths[0], inputs)
    torch.save(given, paths[1])
    bare = [sys.executable, "-I", "-c", BARE, *map(str, paths)]
    subprocess.run(bare, check=True, cwd=folder, timeout=300)
    return dict(zip(program.outputs(inputs), torch.load(paths[2]), strict=True))


@pytest.mark.slow
def test_saved_for_any_batch(tmp_path: Path) -> None:
    model, x = tiny()
    program = lg.program(model, x, method="fullgrad_plus")
    more = torch.randn(4, 3, 16, 16, dtype=F64)
    found = saved(program, x, [more, torch.tensor([0, 1, 2, -1])], tmp_path)
    own = int(model(more)[3].argmax())
    want = lg.attribute(model, more, [0, 1, 2, own])
    torch.testing.assert_close(found["values"], want.values, rtol=1e-12, atol=1e-14)
    assert torch.equal(found["model"], model(more))
    assert found["chosen"].tolist() == [0, 1, 2, own]


@pytest.mark.slow
def test_a_mean_is_saved_with_its_noise(tmp_path: Path) -> None:
    model, x = tiny()
    program = lg.program(model, x, method="smoothgrad", steps=3, seed=2)
    more = torch.randn(4, 3, 16, 16, dtype=F64)
    found = saved(program, x, [more, torch.tensor([0, 1, 2, 3])], tmp_path)
    want = lg.attribute(model, more, [0, 1, 2, 3], method="smoothgrad", steps=3, seed=2)
    torch.testing.assert_close(found["values"], want.values, rtol=1e-12, atol=1e-14)
    assert torch.equal(found["model"], model(more))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_saved(name: str, tmp_path: Path) -> None:
    made, inputs, fixed, target = asked(name)
    program = lg.program(made.model, inputs, target=fixed)
    leaves = [t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
    kept = program.fitting(inputs).flat
    index = [kept.index([target], leaves)] if kept.indexed else []
    found = saved(program, inputs, [*leaves, *index], tmp_path)
    want = program(inputs, target)
    top = float(want.values.abs().max())
    near = SINGLE_PRECISION.get(name, 1e-13)
    torch.testing.assert_close(found["values"], want.values, rtol=1e-12, atol=near * top)


@pytest.mark.parametrize("name", fast_first(["tabular", "clip", "t5"], 1))
def test_one_sample_of_several_inputs(name: str) -> None:
    made, inputs, fixed, target = asked(name)
    one = samples(inputs, slice(0, 1))
    if isinstance(target, list):
        target = target[:1]
    got = lg.program(made.model, one, target=fixed)(one, target)
    alike(got, lg.attribute(made.model, one, made.target if fixed else target, method="input_x_gradient"))
