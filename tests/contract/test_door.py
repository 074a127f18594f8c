# ruff: noqa: E501 - tables, one case a line
"""Whatever is handed in is answered by a result or by an error of the package, and nothing is left changed.

A message says what was wrong, where, and what to do; no error comes out from inside PyTorch.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import io
import logging
import math
import operator
import os
import pickle
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree
from typer.testing import CliRunner, Result

import libragrad_fx as lg
from libragrad_fx import models
from libragrad_fx.cli import app
from libragrad_fx.decide import rulebook
from libragrad_fx.errors import (
    CaptureError,
    InputError,
    LibraGradError,
    ModeError,
    RuleError,
    UnknownOpError,
)
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.target import select_each

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
NOISE = ("While executing", "Traceback", "file an issue", "\x1b")


def refused(call: Callable[[], Any], *words: str, error: type[Exception] = LibraGradError) -> str:
    """The message of the package's error that answers ``call``; it holds ``words`` and no debris."""
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value).__module__ == "libragrad_fx.errors"
    assert len(text) > 12
    assert all(w in text for w in words), text
    assert not any(n in text for n in NOISE), text
    return text


def table(cases: dict[str, Any], slow: Collection[str] = ()) -> pytest.MarkDecorator:
    """One test a name; those of ``slow`` in the slow suite."""
    each = [pytest.param(n, marks=pytest.mark.slow if n in slow else ()) for n in cases]
    return pytest.mark.parametrize("name", each)


# --- what must be as it was


WITH_KWARGS = "_global_forward_hooks_with_kwargs"


def world() -> tuple[Any, ...]:
    """Global state of PyTorch and Python that a call could leave changed."""
    hooks = [
        len(v)
        for k, v in sorted(vars(torch_module).items())
        if k.startswith("_global_") and k != WITH_KWARGS and isinstance(v, dict)
    ]
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
        torch.get_default_device(), torch.is_autocast_enabled("cpu"), torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cudnn.enabled, torch.are_deterministic_algorithms_enabled(), hooks,
        vars(torch.autograd.Function).get("apply"), logging.root.manager.disable, warnings.showwarning,
        torch.is_anomaly_enabled(), os.getcwd(),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _same_world() -> Iterator[None]:
    before, path = world(), [*sys.path]
    yield
    sys.path[:] = path
    assert world() == before


def inside(model: nn.Module) -> list[Any]:
    """Identity, flags, hooks and versions of everything in a model."""
    found: list[Any] = []
    for name, m in model.named_modules():
        if isinstance(m, torch.jit.ScriptModule):  # its attributes are made anew at each look
            found.append((name, m.training))
            continue
        held = {k: [id(x) for x in (v.values() if isinstance(v, dict) else v)]
                for k, v in vars(m).items() if isinstance(v, (dict, list))}  # fmt: skip
        found.append((name, type(m), m.training, {k: id(v) for k, v in vars(m).items()}, held))
        for k, t in [*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)]:
            found.append((name, k, id(t), t.requires_grad, t._version, t.grad is None))
    return found


@contextlib.contextmanager
def untouched(model: Any) -> Iterator[None]:
    """The model and the random state come out as they went in, whatever happens in between."""
    looks = isinstance(model, nn.Module) and "_modules" in vars(model)
    before, random = inside(model) if looks else [], torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), random)
    if looks:
        assert inside(model) == before


# --- malformed models


class From(nn.Module):
    """A linear layer, and a forward given as a function of it and the input."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(4, 4), forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self.layer, x)


def linear(**kwargs: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4, **kwargs), nn.GELU()).eval()


class NoInit(nn.Module):
    def __init__(self) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class NoInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self) -> torch.Tensor:
        return self.weight * 2


def hooked(register: str, at: int | None) -> nn.Module:
    model = linear()
    getattr(model if at is None else model[at], register)(lambda *_: None)
    return model


def boom(_: Any, x: torch.Tensor) -> Any:
    raise ValueError("boom")


def stops(_: Any, x: torch.Tensor) -> Any:
    raise StopIteration


def writes_parameter(layer: Any, x: torch.Tensor) -> Any:
    layer.weight.data.add_(1)
    return layer(x)


def sparse() -> nn.Module:
    model = linear()
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse())
    return model


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(linear(), {nn.Linear})


def jitted(make: Callable[[nn.Module], Any]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(linear())


NO_PATH = "no differentiable path"
# name: (how to make the model, what to call it with, words of the answer)
BAD_MODELS: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "returns none": (lambda: From(lambda m, x: None), X, NO_PATH),
    "returns ints": (lambda: From(lambda m, x: (1, 2)), X, NO_PATH),
    "returns text": (lambda: From(lambda m, x: "text"), X, NO_PATH),
    "returns indices": (lambda: From(lambda m, x: m(x).argmax(-1)), X, NO_PATH),
    "returns a constant": (lambda: From(lambda m, x: m.weight * 2), X, NO_PATH),
    "switches grad off": (lambda: From(lambda m, x: (torch.set_grad_enabled(False), m(x))[1]), X, NO_PATH),
    "returns an object": (lambda: From(lambda m, x: object()), X, "output"),
    "raises": (lambda: From(boom), X, "ValueError: boom"),
    "stops an iteration": (lambda: From(stops), X, "StopIteration"),
    "writes into its input": (lambda: From(lambda m, x: m(x.mul_(2))), X, "in place"),
    "writes into a parameter": (lambda: From(writes_parameter), X, "could not capture"),
    "has no forward": (nn.Module, X, "forward"),
    "is a list": (lambda: nn.ModuleList([linear()]), X, "forward"),
    "has no init": (NoInit, X, "__init__"),
    "has no inputs": (NoInput, (), NO_PATH),
    "has no inputs and none are given": (NoInput, None, "cannot guess inputs"),
    "has no inputs and one is given": (NoInput, X, "do not fit NoInput.forward()"),
    "is uninitialised": (lambda: nn.Sequential(nn.LazyLinear(4)), X, "uninitialised"),
    "is on meta": (lambda: linear(device="meta"), X, "meta"),
    "is half on meta": (lambda: nn.Sequential(linear(), linear(device="meta")), X, "meta"),
    "is quantised": (quantised, X, ""),
    "is sparse": (sparse, X, "sparse"),
    "is scripted": (lambda: jitted(torch.jit.script), X, "ScriptModule"),
    "is traced": (lambda: jitted(lambda m: torch.jit.trace(m, X)), X, "ScriptModule"),
    "has a backward hook": (lambda: hooked("register_full_backward_hook", 1), X, "hooks: 1."),
}  # fmt: skip


SLOW_MODELS = {
    "writes into a parameter", "writes into its input", "returns an object", "is half on meta",
    "switches grad off",
}  # fmt: skip


@table(BAD_MODELS, SLOW_MODELS)
def test_malformed_models(name: str) -> None:
    make, inputs, words = BAD_MODELS[name]
    model = make()
    inputs = inputs.clone() if isinstance(inputs, torch.Tensor) else inputs
    with untouched(model):
        refused(lambda: lg.transform(model, inputs), words)
    if isinstance(inputs, torch.Tensor):
        assert torch.equal(inputs, X)
        assert not inputs.requires_grad


def test_complex_outputs_are_explained_by_a_real_number_alone() -> None:
    model, x = linear(dtype=torch.complex128)[:1], X.to(torch.complex128)
    gm = lg.transform(model, x)
    for door in (lg.attribute, lg.audit):
        refused(lambda door=door: door(gm, x, 0), "complex", error=InputError)
    assert lg.verify(model, gm, x, lambda y: y.abs()[:, 0]).ok


def test_complex_inputs_are_attributed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)).to(torch.complex128)
    x = torch.randn(2, 3, 6, 6, dtype=torch.complex128)
    found = lg.attribute(lg.transform(model, x), x, lambda y: y.abs().sum((1, 2, 3)))
    assert float(found.completeness_error.max()) < 1e-12


NOT_MODELS = [None, 3, "resnet18", b"", nn.Linear, linear, X, [], {}, (linear(),), ..., torch.float32]  # fmt: skip


@pytest.mark.parametrize("model", NOT_MODELS, ids=lambda m: type(m).__name__)
def test_what_is_no_module(model: Any) -> None:
    for door in (lg.transform, lg.trace, lg.plan, lg.audit):
        refused(lambda door=door: door(model, X), "expected an nn.Module", error=InputError)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_passed_on(interrupt: type[BaseException]) -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        m.seen = x
        raise interrupt

    model = From(forward)
    with untouched(model), pytest.raises(interrupt):
        lg.transform(model, X)


GOOD_MODELS: dict[str, Callable[[], nn.Module]] = {
    "no parameters": lambda: nn.GELU(),
    "dropout in training": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.SiLU()).train(),
    "random in its forward": lambda: From(lambda m, x: m(x) + torch.rand_like(x)),
    "data parallel": lambda: nn.DataParallel(linear()),
    "symbolically traced": lambda: torch.fx.symbolic_trace(linear()),
    "exported": lambda: torch.export.export(linear(), (X,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module(),
    "one number": lambda: From(lambda m, x: m(x).sum()),
    "reads a number": lambda: From(lambda m, x: m(x) * x.sum().item()),
    "mixed leaves": lambda: From(lambda m, x: (m(x), "text", 3, None, x.argmax(-1))),
}  # fmt: skip


def fresh(module: nn.Module, x: Any) -> list[Any]:
    """Leaves of an output, with the same random numbers at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return pytree.tree_leaves(module(x))


@table(GOOD_MODELS)
def test_unusual_models_that_work(name: str) -> None:
    model = GOOD_MODELS[name]()
    with untouched(model):
        gm = lg.transform(model, X)
    assert gm.training == model.training
    for x in (X, X[:1], torch.cat([X, X])):
        for a, b in zip(fresh(gm, x), fresh(model, x), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def branches(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return layer(x) if x.sum() > 0 else -x


# Python that one graph cannot hold: refused, or followed as it is; nothing in between.
BEYOND_GRAPHS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "branches on a value": branches,
    "returns a generator": lambda m, x: (F.gelu(m(x)) for _ in "ab"),
    "maps a submodule": lambda m, x: torch.vmap(m)(F.gelu(x)),
    "differentiates itself": lambda m, x: torch.autograd.grad(F.gelu(m(x)).sum(), x, create_graph=True)[0],
}  # fmt: skip


@table(BEYOND_GRAPHS, {"maps a submodule", "differentiates itself"})
def test_refused_or_right(name: str) -> None:
    model = From(BEYOND_GRAPHS[name])
    with untouched(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is cut in several is said, and not the point here
        try:
            gm = lg.transform(model, X)
        except (CaptureError, UnknownOpError) as e:
            assert not any(n in str(e) for n in NOISE)  # noqa: PT017 - the other outcome is checked below
            return
        for x in (X, X.abs(), -X.abs()):
            a, b = (list(pytree.tree_leaves(f(x.clone().requires_grad_()))) for f in (gm, model))
            a, b = (
                [y for ys in z for y in (ys if not isinstance(ys, torch.Tensor) else [ys])]
                for z in (a, b)
            )
            assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def test_nothing_is_logged(capfd: pytest.CaptureFixture[str]) -> None:
    """What export says to itself before it gives up is a page for each model with a branch."""
    model = From(branches)
    with contextlib.suppress(CaptureError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lg.transform(model, X)
    assert capfd.readouterr() == ("", "")


def test_no_flag_of_captures_hook_is_left() -> None:
    before = len(vars(torch_module)[WITH_KWARGS])
    with contextlib.suppress(CaptureError):
        lg.transform(From(boom), X)
    assert len(vars(torch_module)[WITH_KWARGS]) == before


def test_inferring_inputs_draws_no_random_numbers() -> None:
    model = linear()
    with untouched(model):
        lg.plan(model)


# --- a model that holds, or is, a transformed one


class Net(nn.Module):
    """A picture to five numbers, with arguments to get wrong."""

    def __init__(self, outputs: int = 5) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, outputs)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0
    ) -> torch.Tensor:
        h = F.gelu(self.stem(x)).mean((2, 3)) * scale
        return self.head(h if mask is None else h * mask)


@functools.cache
def net() -> tuple[Net, CapturedModule, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 6, 6)
    return model, lg.transform(model, x), x


@functools.cache
def plain() -> CapturedModule:
    model, _, x = net()
    return lg.trace(model, x)


def test_a_transform_again_checks_what_it_is_given() -> None:
    gm = net()[1]
    refused(lambda: lg.transform(gm, policy="cp_lrp"), "captured already", error=InputError)
    refused(lambda: lg.transform(plain()), "captured already", error=InputError)


@pytest.mark.parametrize(
    "given_",
    [
        {"rules": [{"op": "aten.gelu", "kind": "cut", "why": "w"}]},
        {"rules": "none.yaml"},
        {"on_unknown": "x"},
    ],
)
def test_rules_for_a_transform_again(given_: dict[str, Any]) -> None:
    refused(lambda: lg.transform(net()[1], **given_))


@pytest.mark.parametrize("door", [lg.trace, lg.plan])
def test_the_plain_trace_of_a_balanced_module(door: Callable[..., Any]) -> None:
    _, gm, x = net()
    refused(lambda: door(gm, x), "original model", error=InputError)


def test_a_model_that_holds_a_transformed_one() -> None:
    _, gm, x = net()
    text = refused(lambda: lg.transform(nn.Sequential(gm, nn.GELU()), x), "0")
    assert "add a row" not in text


# --- malformed inputs


def quantised_input() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.randn(2, 3, 6, 6), 0.1, 0, torch.qint8)


def nested_input() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.randn(3, 6, 6)] * 2)


P = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
BAD_INPUTS: dict[str, Callable[[], Any]] = {
    "text": lambda: "x", "bytes": lambda: b"x", "a number": lambda: 1.5, "a path": lambda: Path("x"),
    "a module": lambda: linear(), "a generator": lambda: (t for t in [P]), "a set": lambda: {1},
    "an array": lambda: P.numpy(), "a list of arrays": lambda: [P.numpy()], "a device": lambda: P.device,
    "nested tuples": lambda: ((P,),), "nested lists": lambda: [[P]], "a dict in a dict": lambda: {"x": {"x": P}},
    "nothing": lambda: (), "an empty dict": lambda: {}, "a key too many": lambda: {"x": P, "y": P},
    "a wrong key": lambda: {"image": P}, "a number for a key": lambda: {0: P}, "a size": lambda: P.shape,
    "too many": lambda: (P, None, 1.0, P), "a list of images": lambda: [P, P, P],
    "no batch": lambda: P[0], "a number in a tensor": lambda: P.sum(), "an axis too many": lambda: P[None],
    "four channels": lambda: torch.randn(2, 4, 6, 6), "no pixels": lambda: torch.randn(2, 3, 0, 0),
    "too few pixels": lambda: torch.randn(2, 3, 2, 2), "another batch": lambda: (P, torch.randn(3, 4)),
    "integers": lambda: P.long(), "bools": lambda: P > 0, "complex": lambda: P.to(torch.complex64),
    "double": lambda: P.double(), "half": lambda: P.half(), "on meta": lambda: P.to("meta"),
    "sparse": lambda: P.to_sparse(), "quantised": quantised_input, "nested": nested_input,
}  # fmt: skip
SAME_GUARD = {"on meta", "sparse"}  # it fits what was captured; an op refuses it


@table(BAD_INPUTS, {"nested"})
def test_inputs_to_transform(name: str) -> None:
    model = net()[0]
    given_ = BAD_INPUTS[name]()
    with untouched(model):
        refused(lambda: lg.transform(model, given_))


def call(module: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, (tuple, list)) else module(inputs)


@table(BAD_INPUTS)
def test_inputs_to_forward(name: str) -> None:
    """An error of the package, or where the original's own signature or op refuses, that very error."""
    model, gm, _ = net()
    given_ = [BAD_INPUTS[name]() for _ in range(2)]
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - whatever the model says
        call(model, given_[0])
    with pytest.raises(Exception) as ours, untouched(gm):  # noqa: PT011
        call(gm, given_[1])
    if not isinstance(ours.value, InputError):
        assert type(ours.value) is type(theirs.value)
        assert (
            str(ours.value).partition("forward()")[2] == str(theirs.value).partition("forward()")[2]
        )
        assert isinstance(ours.value, TypeError) or name in SAME_GUARD


@table(BAD_INPUTS)
@pytest.mark.parametrize("door", ["verify", "audit", "attribute"])
def test_inputs_to_what_looks(name: str, door: str) -> None:
    """Refused by the package; what fits the graph and not its ops, by the op itself without debris."""
    model, gm, _ = net()
    first, given_ = (model, gm) if door == "verify" else (gm,), BAD_INPUTS[name]()
    look: Any = lambda: getattr(lg, door)(*first, given_, 0)  # noqa: E731
    with untouched(model):
        if name not in SAME_GUARD:
            refused(look, error=InputError)
            return
        with pytest.raises((RuntimeError, NotImplementedError)) as caught:
            look()
    assert not any(n in str(caught.value) for n in NOISE)


@pytest.mark.parametrize("door", [lg.audit, lg.attribute])
def test_an_empty_batch_has_nothing_to_explain(door: Callable[..., Any]) -> None:
    _, gm, x = net()
    refused(lambda: door(gm, x[:0], 0), "empty", error=InputError)


@pytest.mark.parametrize("door", [lg.audit, lg.attribute])
def test_inputs_made_in_inference_mode(door: Callable[..., Any]) -> None:
    _, gm, x = net()
    with torch.inference_mode():
        made = x.clone()
    shown = torch.as_tensor(door(gm, made, 0).output).sum()
    assert float(shown) == pytest.approx(float(gm(x).detach()[:, 0].sum()))


@pytest.mark.parametrize("door", [lg.audit, lg.attribute, functools.partial(lg.verify, net()[0])])
def test_called_in_inference_mode(door: Callable[..., Any]) -> None:
    _, gm, x = net()
    with torch.inference_mode():
        door(gm, x, 0)


FITTING: dict[str, Callable[[], Any]] = {
    "a list": lambda: [P], "a dict": lambda: {"x": P, "mask": None, "scale": 1.0},
    "an ordered dict": lambda: collections.OrderedDict(x=P), "a parameter": lambda: nn.Parameter(P.clone()),
    "a named tuple": lambda: collections.namedtuple("Inputs", "x")(P), "a leaf": lambda: P.clone().requires_grad_(),
    "no leaf": lambda: P.clone().requires_grad_() * 1,
}  # fmt: skip


@table(FITTING)
def test_inputs_that_fit(name: str) -> None:
    model, gm, _ = net()
    given_ = FITTING[name]()
    leaves = [t for t in pytree.tree_leaves(given_) if isinstance(t, torch.Tensor)]
    with untouched(model):
        account, shown = lg.audit(gm, given_, 0), lg.attribute(gm, given_, 0)
        assert lg.verify(model, gm, given_, 0).ok
    assert account.output == pytest.approx(float(model(P).detach()[:, 0].sum()))
    assert shown.values.shape == (2, 6, 6)
    assert all(t.grad is None for t in leaves if t.is_leaf)


DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.uint8,
]


@settings(max_examples=150, deadline=None)
@given(shape=st.lists(st.integers(0, 7), max_size=5), dtype=st.sampled_from(DTYPES), data=st.data())
@example(shape=[3, 3, 6, 6], dtype=torch.float32, data=None)
@example(shape=[0, 3, 6, 6], dtype=torch.float32, data=None)
def test_any_tensor_gives_the_originals_bits_or_an_error(
    shape: list[int], dtype: torch.dtype, data: Any
) -> None:
    model, gm, _ = net()
    if data is not None and data.draw(st.booleans()):  # most shapes do not fit at all
        shape = [*shape[:1], 3, 6, 6]
    x = torch.ones(shape, dtype=dtype)
    try:
        y = gm(x)
    except InputError as e:
        assert "x was captured" in str(e)  # noqa: PT017 - the other outcome is checked below
    except RuntimeError as e:
        with pytest.raises(RuntimeError) as theirs:
            model(x)
        assert str(e) == str(theirs.value)  # noqa: PT017
    else:
        assert torch.equal(y, model(x))


# --- malformed targets


def wanted(target: Any, shape: tuple[int, ...]) -> list[tuple[int, ...]] | None:
    """The entry that each sample's target names, as the documentation reads; None: none."""
    if isinstance(target, (torch.Tensor, np.ndarray)):
        target = target.tolist()
    if isinstance(target, tuple) or hasattr(target, "__index__"):
        target = [target] * shape[0]
    if not isinstance(target, list) or len(target) != shape[0]:
        return None
    rows = [tuple(t) if isinstance(t, (tuple, list)) else (t,) for t in target]
    for row in rows:
        if len(row) != len(shape) - 1:
            return None
        if any(isinstance(i, bool) or not hasattr(i, "__index__") for i in row):
            return None
        if not all(-n <= operator.index(i) < n for i, n in zip(row, shape[1:], strict=True)):
            return None
    return rows


ODD = st.one_of(
    st.none(), st.booleans(), st.floats(), st.text(max_size=2), st.binary(max_size=2), st.sampled_from(["0", "12", 1j, ..., slice(1)]),
)  # fmt: skip
NUMBER = st.one_of(st.integers(-6, 6), st.integers(), st.integers(0, 4).map(np.int64))
ENTRY = st.one_of(NUMBER, NUMBER, ODD)
SEQUENCE = st.one_of(st.lists(ENTRY, max_size=3), st.lists(ENTRY, max_size=3).map(tuple))
TARGETS = st.one_of(
    ENTRY, SEQUENCE, st.lists(SEQUENCE, max_size=3), st.sets(st.integers(0, 4), max_size=3),
    st.dictionaries(st.integers(0, 2), st.integers(0, 4), max_size=3),
    st.lists(st.integers(-6, 6), max_size=3).map(torch.tensor), st.lists(st.floats(0, 4), max_size=3).map(torch.tensor),
    st.lists(st.integers(-6, 6), max_size=3).map(np.array),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(target=TARGETS, shape=st.sampled_from([(2, 5), (1, 5), (2, 3, 4), (3,)]))
@example(target="12", shape=(2, 5))
@example(target=[1.7, 2.9], shape=(2, 5))
@example(target={2, 1}, shape=(2, 5))
@example(target={0: 3, 1: 3}, shape=(2, 5))
@example(target=b"\x01\x02", shape=(2, 5))
@example(target=True, shape=(2, 5))
@example(target=np.int64(1), shape=(2, 5))
def test_a_target_names_entries_or_is_refused(target: Any, shape: tuple[int, ...]) -> None:
    y = torch.arange(math.prod(shape)).reshape(shape).float()
    rows = wanted(target, shape)
    if target is None and len(shape) == 1:
        rows = [()] * shape[0]
    if rows is None:
        refused(lambda: select_each(y, target), error=InputError)
    else:
        assert select_each(y, target).tolist() == [float(y[(i, *r)]) for i, r in enumerate(rows)]


def test_a_target_for_an_output_of_one_number() -> None:
    assert "-1" not in refused(lambda: select_each(torch.tensor(1.0), 0), "None", error=InputError)


def test_a_target_on_meta() -> None:
    refused(
        lambda: select_each(torch.ones(2, 5), torch.zeros(2, device="meta").long()),
        error=InputError,
    )


BAD_CALLABLES: dict[str, Callable[[Any], Any]] = {
    "none": lambda y: None, "a number": lambda y: 3.0, "detached": lambda y: y.detach()[:, 1],
    "a constant": lambda y: torch.ones(2), "integers": lambda y: y.argmax(1), "nothing": lambda y: y[:0, 0],
    "complex": lambda y: torch.view_as_complex(y[:, :2].contiguous()),
}  # fmt: skip


@table(BAD_CALLABLES)
@pytest.mark.parametrize("door", [lg.audit, lg.attribute], ids=["audit", "attribute"])
def test_a_callable_that_returns_what_cannot_be_explained(
    name: str, door: Callable[..., Any]
) -> None:
    _, gm, x = net()
    refused(lambda: door(gm, x, BAD_CALLABLES[name]), "callable", error=InputError)


@pytest.mark.parametrize("target", [torch.sum, lambda y: y, lambda y: y[:, :3].reshape(-1)])
def test_attribute_wants_one_number_a_sample(target: Callable[..., Any]) -> None:
    _, gm, x = net()
    assert lg.audit(gm, x, target).completeness_error < 1e-5  # a sum is all that audit takes
    refused(lambda: lg.attribute(gm, x, target), "the target gave", error=InputError)


def test_an_error_of_the_callable_is_its_own() -> None:
    _, gm, x = net()
    with pytest.raises(ZeroDivisionError):
        lg.audit(gm, x, lambda y: 1 / 0)
    assert torch.is_grad_enabled()


# --- other arguments

BAD_ARGUMENTS: dict[str, Callable[[], Any]] = {
    "attribute: method": lambda: lg.attribute(net()[1], P, 0, method=["fullgrad_plus"]),  # type: ignore[arg-type]
    "attribute: the root as a layer": lambda: lg.attribute(net()[1], P, 0, layers=[""]),
    "attribute: two layers": lambda: lg.attribute(net()[1], P, 0, method="input_x_gradient", layers=["stem", "head"]),
    "attribute: a number for layers": lambda: lg.attribute(net()[1], P, 0, layers=3),  # type: ignore[arg-type]
    "attribute: numbers as layers": lambda: lg.attribute(net()[1], P, 0, layers=[0]),  # type: ignore[list-item]
    "attribute: text for layers": lambda: lg.attribute(net()[1], P, 0, layers="stem"),
    "attribute: no module": lambda: lg.attribute(None, P, 0),  # type: ignore[arg-type]
    "blocks: the model itself": lambda: lg.blocks(net()[0]),  # type: ignore[arg-type]
    "verify: swapped": lambda: lg.verify(net()[1], net()[0], P, 0),  # type: ignore[arg-type]
    "verify: no module": lambda: lg.verify(net()[0], None, P, 0),  # type: ignore[arg-type]
    "verify: no model": lambda: lg.verify(None, net()[1], P, 0),  # type: ignore[arg-type]
    "verify: a plain trace": lambda: lg.verify(net()[0], plain(), P, 0),
    "verify: tolerance": lambda: lg.verify(net()[0], net()[1], P, 0, tolerance="small"),  # type: ignore[arg-type]
    "transform: on_unknown": lambda: lg.transform(net()[0], P, on_unknown="ignore"),
    "transform: on_unknown is a list": lambda: lg.transform(net()[0], P, on_unknown=[]),  # type: ignore[arg-type]
    "certificate: other JSON": lambda: lg.Certificate.from_json("[]"),
}  # fmt: skip


@table(BAD_ARGUMENTS)
def test_other_arguments(name: str) -> None:
    if name.startswith("certificate"):  # documented: as json's own
        with pytest.raises(ValueError, match="not a certificate"):
            BAD_ARGUMENTS[name]()
    else:
        refused(BAD_ARGUMENTS[name])


def test_a_certificate_of_another_model_fails() -> None:
    _, gm, x = net()
    torch.manual_seed(1)
    for outputs in (5, 7):
        certificate = lg.verify(Net(outputs).eval(), gm, x, 0)
        assert not certificate.forward_equal
        assert not certificate.ok


@pytest.mark.parametrize("tolerance", [-1.0, math.nan])
def test_a_tolerance_that_nothing_meets(tolerance: float) -> None:
    model, gm, x = net()
    assert not lg.verify(model, gm, x, 0, tolerance=tolerance).ok


def test_a_model_of_two_dtypes_fails_as_the_model_does() -> None:
    model = nn.Sequential(linear(), linear(dtype=torch.float64))
    with pytest.raises(RuntimeError) as theirs:
        model(X)
    with untouched(model):
        try:
            gm = lg.transform(model, X)
        except CaptureError as e:
            assert "dtype" in str(e)  # noqa: PT017 - refused at once would be as good
            return
    with pytest.raises(RuntimeError) as ours:
        gm(X)
    assert str(ours.value) == str(theirs.value)


# --- nothing that only looks may change a model


class Counter(nn.Module):
    """A buffer that the forward updates, in either mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), nn.Buffer(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return F.gelu(self.layer(x)) * self.calls


def counter() -> nn.Module:
    return Counter().eval()


def trained() -> nn.Module:
    steps = (nn.Linear(4, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Dropout(0.3), nn.Linear(4, 3))
    return nn.Sequential(*steps).train()


@functools.cache
def writer(make: Callable[[], nn.Module]) -> tuple[nn.Module, CapturedModule]:
    model = make()
    return model, lg.transform(model, X)


@pytest.mark.parametrize("make", [counter, trained])
@pytest.mark.parametrize("look", [
    lambda m, gm: lg.verify(m, gm, X, 1), lambda m, gm: lg.audit(gm, X, 1), lambda m, gm: lg.attribute(gm, X, lambda y: y[:, 1], layers=[])
], ids=["verify", "audit", "attribute"])  # fmt: skip
def test_looking_leaves_buffers_and_random_state(
    make: Callable[[], nn.Module], look: Callable[..., Any]
) -> None:
    model, gm = writer(make)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with contextlib.suppress(InputError):  # attribute: a vector has no positions
        look(model, gm)
    after = model.state_dict()
    changed = [k for k, v in before.items() if not torch.equal(v, after[k])]
    model.load_state_dict(before)
    assert changed == []
    assert torch.equal(torch.get_rng_state(), random)


def test_a_model_that_counts_is_certified() -> None:
    model, gm = writer(counter)
    assert lg.verify(model, gm, X, 1).forward_equal


def test_modes_that_do_not_match() -> None:
    model, gm = writer(trained)
    gm.eval()
    try:
        refused(lambda: lg.verify(model, gm, X, 1), "train", error=ModeError)
        with pytest.raises(ModeError, match="train"):
            gm(X)
    finally:
        gm.train()


# --- malformed rules

RELU = {"op": "aten.relu", "kind": "homogeneous", "stream": ["self"], "why": "w"}
BAD_RULES: dict[str, Any] = {
    "a number": 3, "true": True, "bytes": b"x", "a tensor": torch.ones(2), "one row": RELU,
    "numbers": [3], "nones": [None], "pairs": [["op", "x"]], "an empty row": [{}],
    "a number for a key": [{1: 2}], "keys of two types": [{1: 2, "a": 3}],
    "a missing file": "none.yaml", "a folder": ".", "no name": "", "a name with a zero": "a\0.yaml", "a long name": "a" * 5000,
    "a list in a list": [{**RELU, "stream": [["self"]]}], "no tensor argument": [{**RELU, "op": "aten.gelu", "stream": ["approximate"]}],
    "a word as a gate output": [{**RELU, "gate_outputs": ["x"]}],
    "degree 0": [{**RELU, "degree": 0}], "degree nan": [{**RELU, "degree": math.nan}], "degree true": [{**RELU, "degree": True}],
    "a huge degree": [{**RELU, "degree": 10**400}], "at_zero nan": [{**RELU, "at_zero": math.nan}],
    "at_zero infinite": [{**RELU, "at_zero": math.inf}], "at_zero true": [{**RELU, "at_zero": True}],
    "rank true": [{**RELU, "rank": True}], "no kind": [{**RELU, "kind": None}], "an unknown key": [{**RELU, "colour": 1}],
}  # fmt: skip


@table(BAD_RULES)
def test_rules_in_code(name: str) -> None:
    refused(lambda: rulebook.load(rules=BAD_RULES[name]), error=RuleError)


BAD_POLICIES: dict[str, Any] = {
    "none": None, "a number": 3, "a list": ["libra"], "no name": "", "a folder": Path("rules"), "the facts": "ops",
    "a missing file": "none.yaml", "a way out": "../libra", "a zero": "a\0", "a long name": "a" * 5000,
}  # fmt: skip


@table(BAD_POLICIES)
def test_policies(name: str) -> None:
    refused(lambda: rulebook.load(BAD_POLICIES[name]), error=RuleError)


@functools.cache
def shipped(file: str) -> Any:
    return yaml.safe_load((rulebook.rules_folder() / file).read_text("utf-8"))


SCALAR = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2), st.just(".nan"), st.text("ab.[", max_size=3)
)
VALUE = st.one_of(
    SCALAR,
    st.lists(SCALAR, max_size=2),
    st.dictionaries(st.text("ab", max_size=2), SCALAR, max_size=2),
)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_shipped_file_with_one_thing_wrong(data: st.DataObject, tmp_path: Path) -> None:
    """A row loses a key, gains one, says something else, or comes twice: refused with its place."""
    file = data.draw(st.sampled_from(["ops.yaml", "libra.yaml", "cp_lrp.yaml", "gim.yaml"]))
    facts = file == "ops.yaml"
    all_rows = shipped(file) if facts else shipped(file)["rows"]
    rows = [
        dict(r)
        for r in data.draw(
            st.lists(st.sampled_from(all_rows), min_size=1, max_size=3, unique_by=id)
        )
    ]
    row = data.draw(st.sampled_from(rows))
    key = data.draw(st.sampled_from(sorted(row)))
    needed = ("op", "kind", "why") if facts else ("kind", "site", "action", "cite")
    surely = True  # is the result wrong for certain? another value may happen to be right
    match data.draw(st.sampled_from(["drop", "add", "rename", "twice", "replace"])):
        case "drop":
            del row[key]
            surely = key in needed
        case "add":
            row[data.draw(st.text("xyz", min_size=1, max_size=3))] = data.draw(VALUE)
        case "rename":
            row[key + "s"] = row.pop(key)
        case "twice":
            rows.append(dict(row))
        case "replace":
            assume(key not in ("why", "cite"))  # any text will do there
            row[key] = data.draw(VALUE)
            surely = key in ("kind", "site", "action", "op", "stream", "vjp") and row[key] not in (
                None,
                [],
            )
            surely = surely or (key in needed and row[key] is None)
    path = tmp_path / "rules.yaml"
    path.write_text(
        yaml.safe_dump(rows if facts else {"policy": "p", "rows": rows}, sort_keys=False)
    )
    try:
        rulebook.load(rules=path) if facts else rulebook.load(path)
    except RuleError as e:
        assert str(e).startswith(f"{path}:")  # noqa: PT017 - the other outcome is checked below
    else:
        assert not surely, path.read_text()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cut=st.integers(0, 4000), put=st.binary(max_size=4), skip=st.integers(0, 40))
def test_a_shipped_file_with_bytes_lost(cut: int, put: bytes, skip: int, tmp_path: Path) -> None:
    whole = (rulebook.rules_folder() / "libra.yaml").read_bytes()
    path = tmp_path / "policy.yaml"
    path.write_bytes(whole[:cut] + put + whole[cut + skip :])
    try:
        book = rulebook.load(path)
    except RuleError as e:
        assert str(e).startswith(f"{path}:")  # noqa: PT017
    else:
        assert book.rows


# --- malformed checkpoints


class Trap:
    """Unpickled, it would leave a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2))


def bent(text: str) -> Callable[[Path], Any]:
    return lambda file: file.write_text(text)


def saved(**changes: Any) -> Callable[[Path], None]:
    """A state dict with entries replaced; None takes one out."""
    weights = {k.replace("_", "."): v for k, v in changes.items()}
    body = {k: v for k, v in {**small().state_dict(), **weights}.items() if v is not None}
    return lambda file: torch.save(body, file)


def cut_short(file: Path) -> None:
    save = save_file if file.suffix == ".safetensors" else torch.save
    save(small().state_dict(), file)
    file.write_bytes(file.read_bytes()[:-7])


def quantised_weight() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2, 2), 1.0, 0, torch.qint8)


def zipped(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("archive/data.pkl", pickle.dumps(Trap(file.with_name("ran"))))
        z.writestr("archive/version", "3")


BAD_CHECKPOINTS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "empty": ("a.pt", Path.touch, "neither"),
    "empty safetensors": ("a.safetensors", Path.touch, "neither"),
    "text": ("a.pt", bent("hello"), "neither"),
    "text as safetensors": ("a.safetensors", bent("hello"), "neither"),
    "a huge header": ("a.safetensors", bent("\x7f" * 8 + "{}"), "neither"),
    "truncated": ("a.pt", cut_short, "neither"),
    "truncated safetensors": ("a.safetensors", cut_short, "neither"),
    "a folder": ("a.pt", Path.mkdir, "no checkpoint file"),
    "a missing file": ("a.pt", lambda file: None, "no checkpoint file"),
    "another name": ("a.bin", lambda file: save_file(small().state_dict(), file), "neither"),
    "a list": ("a.pt", lambda file: torch.save([1, 2], file), "holds list"),
    "a tensor": ("a.pt", lambda file: torch.save(torch.ones(2), file), "holds Tensor"),
    "nothing": ("a.pt", lambda file: torch.save({}, file), "2 missing"),
    "a number among tensors": ("a.pt", saved(epoch=3), "epoch"),
    "numbers for names": ("a.pt", lambda file: torch.save({0: torch.ones(2)}, file), "holds 0"),
    "a key missing": ("a.pt", saved(**{"0_bias": None}), "1 missing (0.bias)"),
    "a key too many": ("a.pt", saved(extra=torch.ones(1)), "1 unexpected (extra)"),
    "another shape": ("a.pt", saved(**{"0_weight": torch.ones(3, 2)}), "(3, 2) in the file"),
    "no shape": ("a.pt", saved(**{"0_weight": torch.tensor(1.0)}), "() in the file"),
    "sparse": ("a.pt", saved(**{"0_weight": torch.eye(2).to_sparse()}), "0.weight"),
    "meta": ("a.pt", saved(**{"0_weight": torch.ones(2, 2, device="meta")}), "0.weight"),
    "quantised": ("a.pt", saved(**{"0_weight": quantised_weight()}), "0.weight"),
    "complex": ("a.pt", saved(**{"0_weight": torch.ones(2, 2, dtype=torch.complex64)}), "0.weight"),
    "a whole model": ("a.pt", lambda file: torch.save(small(), file), "neither"),
    "arrays": ("a.pt", lambda file: torch.save({"0.weight": np.ones((2, 2))}, file), "neither"),
    "code": ("a.pt", lambda file: torch.save({"0.weight": Trap(file.with_name("ran"))}, file), "neither"),
    "code, bare": ("a.pkl", lambda file: file.write_bytes(pickle.dumps(Trap(file.with_name("ran")))), "neither"),
    "code, zipped": ("a.pt", zipped, "neither"),
    "code, named safetensors": ("a.safetensors", zipped, "neither"),
    "code, old format": ("a.pt", lambda file: torch.save([Trap(file.with_name("ran"))], file, _use_new_zipfile_serialization=False), "neither"),
}  # fmt: skip


@table(BAD_CHECKPOINTS)
def test_checkpoints(name: str, tmp_path: Path) -> None:
    file_name, write, words = BAD_CHECKPOINTS[name]
    file = tmp_path / file_name
    write(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(
            lambda: models.resolve(f"{__name__}:small", checkpoint=file), words, error=InputError
        )
    assert not (tmp_path / "ran").exists()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(at=st.floats(0, 1), put=st.binary(min_size=1, max_size=8), safe=st.booleans())
def test_checkpoints_with_bytes_changed(at: float, put: bytes, safe: bool, tmp_path: Path) -> None:
    """Tensors of the right shape, or a refusal."""
    file = tmp_path / ("a.safetensors" if safe else "a.pt")
    (save_file if safe else torch.save)(small().state_dict(), file)
    body = bytearray(file.read_bytes())
    place = int(at * len(body))
    body[place : place + len(put)] = put
    file.write_bytes(body)
    with contextlib.suppress(InputError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models.resolve(f"{__name__}:small", checkpoint=file)


def test_checkpoints_that_fit(tmp_path: Path) -> None:
    weights = {k: v.half() for k, v in small().state_dict().items()}
    for i, body in enumerate([weights, {"state_dict": weights}, {"model": weights}]):
        file = tmp_path / f"{i}.pt"
        torch.save(body, file, _use_new_zipfile_serialization=bool(i))
        loaded = models.resolve(f"{__name__}:small", checkpoint=file).module.state_dict()
        assert all(torch.equal(v, weights[k].float()) for k, v in loaded.items())


# --- malformed images


def encoded(kind: str, size: tuple[int, int] = (50, 40), mode: str = "RGB", **kwargs: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, kind, **kwargs)
    return buffer.getvalue()


def png_of(width: int, height: int, pixels: bytes = b"") -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


PNG, JPEG, GIF = (encoded(k) for k in ("PNG", "JPEG", "GIF"))
BAD_IMAGES: dict[str, tuple[str, bytes]] = {
    "empty": ("a.png", b""), "text": ("a.png", b"not a picture"), "zeros": ("a.png", bytes(999)),
    "a signature alone": ("a.png", PNG[:8]), "a header alone": ("a.png", PNG[:20]),
    "half a PNG": ("a.png", PNG[: len(PNG) // 2]), "half a JPEG": ("a.jpg", JPEG[: len(JPEG) // 2]),
    "a little of a JPEG": ("a.jpg", JPEG[:30]), "half a GIF header": ("a.gif", GIF[:9]),
    "a wrong checksum": ("a.png", PNG[:29] + b"\0\0\0\0" + PNG[33:]), "a huge header": ("a.png", png_of(60000, 60000)),
    "a header of all bits": ("a.png", png_of(2**31 - 1, 2**31 - 1)), "no pixels": ("a.png", png_of(0, 0)),
    "too few pixels": ("a.png", png_of(50, 40, bytes(10))), "a drawing": ("a.svg", b"<svg/>"),
    "a PDF": ("a.pdf", b"%PDF-1.4"), "PostScript": ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF"),
    "a cut TIFF": ("a.tif", b"II*\0\x08\0\0\0\0\0"), "a cut BMP": ("a.bmp", b"BM" + bytes(60)),
    "a cut WebP": ("a.webp", b"RIFF\x10\0\0\0WEBPVP8 "), "a cut PPM": ("a.ppm", b"P6 3 3 255 "),
}  # fmt: skip


@table(BAD_IMAGES)
def test_images_that_are_none(name: str, tmp_path: Path) -> None:
    file = tmp_path / BAD_IMAGES[name][0]
    file.write_bytes(BAD_IMAGES[name][1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, before it gives up
        refused(lambda: models.read_image(file), "cannot read", str(file), error=InputError)


NOWHERE = {"missing": "none.png", "a folder": ".", "a zero": "a\0.png", "a long name": "a" * 5000}


@table(NOWHERE)
def test_images_that_are_nowhere(name: str) -> None:
    refused(lambda: models.read_image(NOWHERE[name]), "no image file", error=InputError)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    whole=st.sampled_from([PNG, JPEG, GIF]),
    at=st.floats(0, 1),
    put=st.binary(max_size=6),
    keep=st.booleans(),
)
def test_images_with_bytes_changed(
    whole: bytes, at: float, put: bytes, keep: bool, tmp_path: Path
) -> None:
    """A picture or a refusal."""
    place = int(at * len(whole))
    file = tmp_path / "a.png"
    file.write_bytes(whole[:place] + put + (whole[place + len(put) :] if keep else b""))
    with contextlib.suppress(InputError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own about metadata
        assert models.read_image(file).mode == "RGB"


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16"]
)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (50, 40)], ids=str)
def test_images_of_every_kind(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    file = tmp_path / ("a.png" if mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else "a.tif")
    grey = np.random.default_rng(0).integers(1, 256, (size[1], size[0]), dtype=np.uint8)
    if mode == "I;16":
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(grey)
        picture = (
            picture
            if mode in ("1", "L", "I", "F")
            else picture.convert("LA" if mode == "PA" else "RGB")
        ).convert(mode)
    picture.save(file)
    read = models.read_image(file)
    assert (read.mode, read.size) == ("RGB", size)
    if mode in ("L", "LA", "RGB", "RGBA", "I", "F", "I;16"):
        assert np.array_equal(np.asarray(read)[..., 0], grey)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation(kind: str, tmp_path: Path) -> None:
    first, second = Image.new("RGB", (4, 3), "red"), Image.new("RGB", (4, 3), "blue")
    file = tmp_path / f"a.{kind.lower()}"
    first.save(
        file,
        kind,
        save_all=True,
        append_images=[second],
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    assert models.read_image(file).getpixel((2, 1)) == (255, 0, 0)


# --- the command line


class Tiny(Net):
    """As ``Net``, with the example that tells its input size."""

    def __init__(self, end: Callable[[torch.Tensor], Any] = lambda y: y) -> None:
        super().__init__()
        self.example_input_array, self.end = torch.randn(2, 3, 8, 8), end

    def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
        return self.end(super().forward(x))


def explained() -> nn.Module:
    return Tiny()


def one_number() -> nn.Module:
    return Tiny(torch.sum)


def not_a_number() -> nn.Module:
    return Tiny(lambda y: y * math.nan)


def says_nothing() -> nn.Module:
    return Tiny(lambda y: None)


def branching() -> nn.Module:
    return Tiny(lambda y: y if y.sum() > 0 else -y)


def on_meta() -> nn.Module:
    return Tiny().to("meta")


def with_bad_example() -> nn.Module:
    model = Tiny()
    model.example_input_array = "example"  # type: ignore[assignment]
    return model


def four_channels() -> nn.Module:
    model = Tiny()
    model.example_input_array = torch.randn(2, 4, 8, 8)
    return model


def leaves() -> nn.Module:
    sys.exit(3)


def needs_more(size: int) -> nn.Module:
    return Tiny()


value = 3
HERE = f"{__name__}:"
GOOD = f"{HERE}explained"


def run(*args: object) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CliRunner().invoke(app, [str(a) for a in args], prog_name="libragrad")


BAD_COMMANDS: dict[str, tuple[list[object], str]] = {
    "no such command": (["nope"], "No such command"),
    "no model": (["plan"], "Missing argument"),
    "a word too many": (["plan", GOOD, "more"], "unexpected extra argument"),
    "no such option": (["plan", GOOD, "--nope"], "No such option"),
    "an option without a value": (["plan", GOOD, "--policy"], "requires an argument"),
    "an empty model": (["plan", ""], "timm has no model ''"),
    "a model with a space": (["plan", "a b"], "timm has no model"),
    "a colon": (["plan", ":"], "cannot import"),
    "no factory": (["plan", HERE], "cannot import"),
    "no package": (["plan", ":small"], "cannot import"),
    "a relative package": (["plan", "..x:small"], "cannot import"),
    "torchvision of nothing": (["plan", "torchvision:"], "torchvision has no model"),
    "a hub name": (["plan", "hf-hub:a/b"], "cannot import"),
    "a factory that is a number": (["plan", f"{HERE}value"], "not callable"),
    "a factory that wants more": (["plan", f"{HERE}needs_more"], "missing 1 required"),
    "a factory that leaves": (["plan", f"{HERE}leaves"], "leaves"),
    "a bad example": (["plan", f"{HERE}with_bad_example"], "got str"),
    "an example that does not fit": (["audit", f"{HERE}four_channels"], "4 channels"),
    "a model that returns nothing": (["verify", f"{HERE}says_nothing"], NO_PATH),
    "a model on meta": (["verify", f"{HERE}on_meta"], "meta"),
    "a model that branches": (["plan", f"{HERE}branching"], "control flow"),
    "an empty policy": (["plan", GOOD, "--policy", ""], "no policy ''"),
    "a policy that is missing": (["plan", GOOD, "--policy", "none.yaml"], "no policy"),
    "rules that are a folder": (["plan", GOOD, "--rules", "."], "cannot be read"),
    "rules that are a picture": (["plan", GOOD, "--rules", "photo.png"], "photo.png:1: cannot be read"),
    "a dtype": (["verify", GOOD, "--dtype", "float16"], "--dtype"),
    "a word for a target": (["verify", GOOD, "--target", "x"], "--target"),
    "a part of a target": (["verify", GOOD, "--target", "1.5"], "--target"),
    "a huge target": (["verify", GOOD, "--target", 10**20], "does not fit"),
    "a word for a seed": (["audit", GOOD, "--seed", "x"], "--seed"),
    "a huge seed": (["audit", GOOD, "--seed", 2**70], "seed"),
    "a checkpoint that is a folder": (["verify", GOOD, "--checkpoint", "."], "no checkpoint file"),
    "a checkpoint that is a picture": (["verify", GOOD, "--checkpoint", "photo.png"], "neither"),
    "no picture": (["explain", "--model", GOOD], "Missing argument"),
    "no model to explain": (["explain", "photo.png"], "--model"),
    "a glob of nothing": (["explain", "*.gif", "--model", GOOD], "no pictures in '*.gif'"),
    "a picture cut short": (["explain", "cut.png", "--model", GOOD], "cut.png"),
    "no such method": (["explain", "photo.png", "--model", GOOD, "--method", "scorecam"], "no method 'scorecam'"),
    "a model for other pictures": (["explain", "photo.png", "--model", f"{HERE}four_channels"], "does not take one image"),
    "a model of tables": (["explain", "photo.png", "--model", f"{HERE}small"], "does not take one image"),
    "output under a file": (["explain", "photo.png", "--model", GOOD, "-o", "cut.png/a.png"], "cannot write"),
    "a picture of no numbers": (["explain", "photo.png", "--model", f"{HERE}not_a_number"], "nan"),
    "no pictures": (["demo", "--images", 0], "--images"),
    "too many pictures": (["demo", "--images", 65], "--images"),
}  # fmt: skip


@table(BAD_COMMANDS)
def test_commands(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one line that says it (after the usage, where the arguments are at fault), no file."""
    (tmp_path / "photo.png").write_bytes(PNG)
    (tmp_path / "cut.png").write_bytes(PNG[:300])
    back = os.getcwd()
    monkeypatch.chdir(tmp_path)
    done = run(*BAD_COMMANDS[name][0])
    left = sorted(p.name for p in tmp_path.iterdir())
    monkeypatch.chdir(back)
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    lines = [
        x for x in done.stderr.splitlines() if x and not x.startswith(("Usage: ", "Try ", "note: "))
    ]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(("error: ", "Error: "))
    assert BAD_COMMANDS[name][1] in lines[0]
    assert not any(n in done.output for n in NOISE)
    assert left == ["cut.png", "photo.png"]
    assert capfd.readouterr() == ("", "")


def test_a_model_of_one_number_is_verified() -> None:
    done = run("verify", f"{HERE}one_number", "--json")
    assert done.exit_code == 0, done.output
    assert lg.Certificate.from_json(done.stdout).ok


def test_explain_a_picture_of_one_pixel_that_moves(tmp_path: Path) -> None:
    """An animation with a palette and a transparent colour, one pixel large."""
    frames = [Image.new("P", (1, 1), i) for i in (0, 1)]
    for frame in frames:
        frame.putpalette([255, 0, 0, 0, 0, 255])
    file, out = tmp_path / "a.gif", tmp_path / "out.png"
    frames[0].save(file, save_all=True, append_images=frames[1:], transparency=1)
    done = run("explain", file, "--model", GOOD, "-o", out)
    assert done.exit_code == 0, done.output
    with Image.open(out) as drawn:
        assert drawn.size[0] > 100
