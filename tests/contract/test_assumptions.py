"""What capture took for granted is checked at each call: another call is captured again, or refused."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import itertools
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import libragrad_fx as lg
from libragrad_fx.capture import export
from libragrad_fx.errors import GuardError, InputError, ModeError
from libragrad_fx.pieces.dynamo import CutModule
from tests.between import fast_first, fast_of

pytestmark = pytest.mark.usefixtures("dynamo_afresh")

F64 = torch.float64


def net(norm: bool = False) -> nn.Sequential:
    """With a norm where it matters: it takes as long to trace as all the rest."""
    middle = nn.LayerNorm(8) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(6, 8), middle, nn.GELU(), nn.Linear(8, 3)).double()


def rows(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 6, dtype=F64)


class Of(nn.Module):
    """A model whose forward is ``f(net, *args)``."""

    def __init__(self, f: Callable[..., Any], norm: bool = False) -> None:
        super().__init__()
        self.net, self.f = net(norm), f

    def forward(self, *args: Any) -> Any:
        return self.f(self.net, *args)


def gradient(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    z = x.clone().requires_grad_()
    return torch.autograd.grad(module(z).sum(), z)[0]


def without_original(gm: Any) -> Any:
    """As a module is that was loaded from a file."""
    made = copy.deepcopy(gm)
    made.origin = None
    return made


# --- the batch


BATCH: dict[str, Callable[..., torch.Tensor]] = {
    "one by one": lambda f, x: torch.stack([f(v) for v in x]),
    "divided by its length": lambda f, x: f(x) / float(len(x)),
    "in chunks": lambda f, x: torch.cat([f(v) for v in x.split(4)]),
    "another branch for one": lambda f, x: f(x) if len(x) > 1 else f(x) * 2,
    "another branch for many": lambda f, x: f(x) if x.shape[0] <= 5 else f(x) * 2,
    "odd and even": lambda f, x: f(x) if x.shape[0] % 2 else f(x) * 2,
    "root of the size": lambda f, x: f(x) * int(x.shape[0] ** 0.5),
    "a number of the size": lambda f, x: f(x) * torch.tensor(float(x.shape[0]), dtype=F64),
    "recursion": lambda f, x: functools.reduce(lambda a, v: a * 0.5 + f(v[None]), x, f(x)),
    "first and last": lambda f, x: f(x[: x.shape[0] // 2]).sum(0) - f(x[-1:]),
    "numpy of the size": lambda f, x: f(x) * float(np.sqrt(len(x))),
    "pairs": lambda f, x: sum(f(a[None] + b[None]) for a, b in itertools.pairwise(x)) + f(x[:1]),
}


@pytest.mark.parametrize("name", fast_first(
    dict.fromkeys(("another branch for one", "divided by its length", *BATCH)), 2
))
@pytest.mark.parametrize("example", fast_first([1, 2, 4], 1))
def test_every_batch_gives_what_the_model_gives(name: str, example: int) -> None:
    model = Of(BATCH[name]).eval()
    gm = lg.transform(model, rows(example))
    for n in (example, 1, 3, 6):
        x = rows(n)
        wanted, got = model(x), gm(x)
        assert torch.equal(wanted, got)
    assert lg.verify(model, gm, rows(3), lambda y: y.sum()).ok
    alone = without_original(gm)  # what does not fit is refused
    for n in (1, 3, 6):
        x = rows(n)
        try:
            got = alone(x)
        except GuardError:
            continue
        assert torch.equal(got, model(x))


def test_a_variant_runs_on_the_modules_own_tree() -> None:
    model = Of(BATCH["one by one"]).eval()
    gm = lg.transform(model, rows(2))
    x, calls = rows(5), []
    gm(x)
    gm.net.get_submodule("0").weight = nn.Parameter(torch.zeros(8, 6, dtype=F64))
    gm.net.get_submodule("2").register_forward_hook(lambda *_: calls.append(1))
    y = gm(x)
    assert torch.equal(y, y[:1].expand_as(y))
    assert len(calls) == 5


# --- containers


Pair = collections.namedtuple("Pair", "u v")
Other = collections.namedtuple("Other", "v u")
CONTAINERS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], list[tuple[Any, ...]]]] = {
    "a longer list": (
        lambda f, xs: sum(f(v) for v in xs),
        ([rows(), rows()],),
        [([rows()] * 3,), ([rows()],), ((rows(), rows()),)],
    ),
    "an extra key": (
        lambda f, d: f(sum(d.values())) * (2 if "k" in d else 1),
        ({"a": rows()},),
        [({"a": rows(), "k": rows()},), ({"k": rows()},)],
    ),
    "the order of keys": (
        lambda f, d: f(next(iter(d.values()))),
        ({"a": rows(), "b": rows()},),
        [({"b": rows(), "a": rows()},), (collections.OrderedDict(b=rows(), a=rows()),)],
    ),
    "nesting": (
        lambda f, d: f(d["a"][0]) + (f(d["b"]["c"]) if "b" in d else 0) + len(d["a"]),
        ({"a": [rows()]},),
        [({"a": [rows(), rows()]},), ({"a": [rows()], "b": {"c": rows()}},)],
    ),
    "more arguments": (
        lambda f, *xs: sum(f(v) for v in xs),
        (rows(), rows()),
        [(rows(), rows(), rows()), (rows(),)],
    ),
    "named tuples": (
        lambda f, p: f(p.u) + 2 * f(p.v),
        (Pair(rows(), rows()),),
        [(Other(rows(), rows()),), (Pair(rows(), rows()),)],
    ),
    "a number in place of a tensor": (
        lambda f, x, s: f(x) * s,
        (rows(), 2.0),
        [(rows(), 3.0), (rows(), torch.tensor(3.0, dtype=F64)), (rows(), 2)],
    ),
    "dtypes": (
        lambda f, x, m: f(x) * (m.double() if m.dtype == torch.bool else 2 * m.double())[:, None],
        (rows(), torch.tensor([True, False, True, True])),
        [(rows(), torch.tensor([1, 0, 1, 1])), (rows(), torch.tensor([1, 0, 1, 1]).int())],
    ),
}


@pytest.mark.parametrize("name", fast_of(CONTAINERS, ["an extra key"]))
def test_every_structure_gives_what_the_model_gives(name: str) -> None:
    f, example, calls = CONTAINERS[name]
    model = Of(f).eval()
    gm = lg.transform(model, example)
    alone = without_original(gm)
    for call in calls:
        wanted = model(*call)
        assert torch.equal(gm(*call), wanted)
        try:
            assert torch.equal(alone(*call), wanted)
        except InputError as e:
            assert "transform(model, inputs)" in str(e)  # noqa: PT017 - either is right


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor, scale: float = 1.0, **more: torch.Tensor) -> torch.Tensor:
        return self.net(x) * scale + sum(self.net(v) for v in more.values())


def test_keywords() -> None:
    model = Keywords().eval()
    gm = lg.transform(model, {"x": rows(), "u": rows()})
    for call in ({}, {"u": rows()}, {"w": rows(), "u": rows()}, {"scale": 2.0}):
        x = rows()
        assert torch.equal(gm(x, **call), model(x, **call))


# --- state


class Stateful(nn.Module):
    def __init__(self, step: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.net, self.step = net(), step
        self.h: Any = None
        self.count = 0
        self.seen: list[int] = []
        self.mean = torch.zeros(6, dtype=F64)
        self.cell = types.SimpleNamespace(n=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.step(self, x)


def hidden(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = torch.zeros(len(x), 3, dtype=F64) if m.h is None else m.h
    m.h = (h + m.net(x)).detach()
    return m.net(x) + h


def running_mean(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.mean = 0.9 * m.mean + 0.1 * x.mean(0).detach()
    return m.net(x - m.mean)


def counter(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.count += 1
    return m.net(x) * (2 if m.count > 3 else 1)


def history(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.seen.append(1)
    return m.net(x) * len(m.seen)


def in_a_cell(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.cell.n += 1
    return m.net(x) * m.cell.n


STATE = [hidden, running_mean, counter, history, in_a_cell]


@pytest.mark.parametrize("step", fast_first(STATE, 2), ids=lambda f: f.__name__)
def test_state_that_forward_leaves_goes_on(step: Any) -> None:
    model, twin = Stateful(step).eval(), None
    twin = copy.deepcopy(model)
    gm = lg.transform(model, rows())
    assert (model.h, model.count, model.seen, model.cell.n) == (None, 0, [], 0)
    assert not model.mean.any()
    for _ in range(5):
        x = rows()
        assert torch.equal(gm(x), twin(x))


def test_a_list_that_is_only_appended_to_is_no_state() -> None:
    def note(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.seen.append(1)
        return m.net(x)

    model = Stateful(note).eval()
    assert not isinstance(lg.transform(model, rows()), CutModule)
    assert model.seen == []


DRAWS = [random.random, np.random.rand, lambda: random.choice([1, 2])]


@pytest.mark.parametrize("draw", fast_first(DRAWS, 1))
def test_random_numbers_of_python_are_drawn_at_each_call(draw: Callable[[], float]) -> None:
    model = Of(lambda f, x: f(x) * float(draw())).eval()
    gm = lg.transform(model, rows())
    found = set()
    for seed in range(4):
        outputs, x = [], rows()
        for m in (model, gm):
            random.seed(seed)
            np.random.seed(seed)
            outputs.append(m(x))
        assert torch.equal(*outputs)
        found.add(float(gm(rows(1).fill_(1.0)).sum()))
    assert len(found) > 1


# --- caches


CACHE: dict[Any, torch.Tensor] = {}


@functools.lru_cache
def grid(n: int) -> torch.Tensor:
    return torch.arange(n, dtype=F64)


class Caching(nn.Module):
    memo: dict[Any, torch.Tensor] = {}  # noqa: RUF012 - shared by all instances, that is the point

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how = net(), how
        self.register_buffer("pos", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[-1]
        if self.how == "lru":
            return self.net(x + grid(n))
        if self.how == "buffer":
            if self.pos is None:
                self.pos = torch.arange(n, dtype=F64)
            return self.net(x + self.pos)
        table = CACHE if self.how == "global" else self.memo
        if n not in table:
            table[n] = torch.arange(n, dtype=F64)
        return self.net(x + table[n])


@pytest.mark.parametrize("how", fast_first(["buffer", "global", "lru", "class"], 2))
@pytest.mark.parametrize("call", [lg.transform, lg.plan, lg.trace])
def test_no_fake_tensor_is_left_behind(how: str, call: Callable[..., Any]) -> None:
    CACHE.clear()
    Caching.memo.clear()
    grid.cache_clear()
    model, x = Caching(how).eval(), rows()
    made = call(model, x)
    assert isinstance(model(x).sum().item(), float)
    kept = (*CACHE.values(), *Caching.memo.values(), grid(6))
    assert all(type(t) is torch.Tensor for t in kept)
    if isinstance(made, nn.Module):
        assert torch.equal(made(x), model(x))


# --- grad mode


class Quiet(torch.autograd.Function):
    """Its forward switches grad mode, as many written for speed do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return x * 2

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g * 2


class Loud(Quiet):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        torch.set_grad_enabled(False)
        return x * 2


class Inner(Quiet):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return x * 2


class Hiding(Quiet):
    """No op leads from what it takes to what it returns."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.detach() * 2


def region(f: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        s = f(x).sum()
    return f(x) * s


def switched(f: Any, x: torch.Tensor) -> torch.Tensor:
    torch.set_grad_enabled(False)
    s = f(x).sum()
    torch.set_grad_enabled(True)
    return f(x) * s


GRAD_MODE: dict[str, Callable[..., torch.Tensor]] = {
    "reentrant": lambda f, x: checkpoint(f, x, use_reentrant=True),
    "reentrant twice": lambda f, x: checkpoint(
        lambda z: checkpoint(f, z, use_reentrant=True) * 1, x, use_reentrant=True
    ),
    "not reentrant": lambda f, x: checkpoint(f, x, use_reentrant=False),
    "a function with no_grad": lambda f, x: Quiet.apply(f(x)),
    "a function that switches": lambda f, x: Loud.apply(f(x)),
    "a function with enable_grad": lambda f, x: Inner.apply(f(x)),
    "a function first": lambda f, x: f(Quiet.apply(x)),
    "a region": region,
    "a switch": switched,
}


GRAD_FAST = ("reentrant", "not reentrant", "a function with enable_grad", "a function with no_grad")


@pytest.mark.filterwarnings("ignore::libragrad_fx.errors.CustomBackwardWarning")
@pytest.mark.filterwarnings("ignore:.*requires_grad=True:UserWarning")
@pytest.mark.parametrize("name", fast_of(GRAD_MODE, GRAD_FAST))
def test_what_comes_behind_has_its_gradient(name: str) -> None:
    last = nn.Linear(3, 3).double()
    model = Of(lambda f, x: (last(GRAD_MODE[name](f, x)), f[0](x)))
    x = rows()
    gm = lg.transform(model, x)
    for i in (0, 1):
        certificate = lg.verify(model, gm, x, lambda y, i=i: y[i].cos().sum() * 0 + (y[i] ** 1).sum())
        assert certificate.ok, str(certificate)
        assert certificate.input_share != 0


@pytest.mark.filterwarnings("ignore::libragrad_fx.errors.CustomBackwardWarning")
def test_a_function_that_hides_its_ops_is_refused() -> None:
    model = Of(lambda f, x: f(Hiding.apply(f[0](x))[:, :6]))
    said = r"does not close|lost its gradient|no differentiable"
    with pytest.raises(lg.errors.LibraGradError, match=said):
        lg.transform(model, rows())


# --- later changes


LATER: dict[str, Callable[[Any], Any]] = {
    "another class": lambda m: m.net.__setattr__("2", nn.Tanh()),
    "nothing": lambda m: m.net.__setattr__("3", nn.Identity()),
    "another at the root": lambda m: setattr(m, "net", nn.Sequential(nn.Linear(6, 3))),
    "a number": lambda m: setattr(m.net.get_submodule("1"), "eps", 1.0),
    "a word": lambda m: setattr(m.net.get_submodule("2"), "approximate", "tanh"),
    "a function": lambda m: setattr(m, "f", lambda f, x: f(x) * 2),
    "the mode of a part": lambda m: m.net.get_submodule("2").train(),
    "gone": lambda m: delattr(m.net, "1"),
    "the size": lambda m: m.net.__setattr__("0", nn.Linear(6, 8, bias=False).double()),
}


@pytest.mark.parametrize("name", fast_first(LATER, 2))
def test_a_change_that_cannot_take_effect_is_refused(name: str) -> None:
    gm = lg.transform(Of(lambda f, x: f(x), norm=True).eval(), rows())
    copied = copy.deepcopy(gm)
    LATER[name](gm)
    with pytest.raises(ModeError, match="when the graph was captured"):
        gm(rows())
    copied(rows())


@pytest.mark.parametrize("convert", [nn.Module.bfloat16, nn.Module.float, lambda m: m.to(torch.float16)])
def test_a_model_that_is_converted_afterwards(convert: Callable[[nn.Module], Any]) -> None:
    model = Of(lambda f, x: f(x)).eval()
    gm = lg.transform(model, rows())
    convert(model)
    with pytest.raises(ModeError, match="was converted"):
        gm(rows())


# --- a forward of its own


def _compiled(m: nn.Module) -> nn.Module:
    m.compile(backend="eager")
    return m


def _part_compiled(m: nn.Module) -> nn.Module:
    m[1].compile(backend="eager")  # type: ignore[operator]
    return m


def _patched(m: nn.Module) -> nn.Module:
    old = m.forward
    m.forward = lambda x: old(x)  # type: ignore[method-assign]
    return m


def _bound(m: nn.Module) -> nn.Module:
    m.forward = types.MethodType(nn.Sequential.forward, m)  # type: ignore[method-assign,assignment]
    return m


def _partial(m: nn.Module) -> nn.Module:
    m.forward = functools.partial(nn.Sequential.forward, m)  # type: ignore[method-assign,arg-type]
    return m


OWN = [_compiled, _patched, lambda m: torch.compile(m, backend="eager"), _part_compiled, _bound, _partial]


@pytest.mark.parametrize("dress", fast_first(OWN, 2))
def test_the_result_is_called_through_its_graph(dress: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    plain, x = net(norm=True), rows()
    wanted = gradient(lg.transform(plain, x), x)
    assert not torch.equal(wanted, gradient(plain, x))
    gm = lg.transform(dress(copy.deepcopy(plain)), x)
    for module in (gm, copy.deepcopy(gm)):
        assert torch.equal(gradient(module, x), wanted)


# --- the check at birth


def test_a_row_that_lies_is_found_at_birth() -> None:
    lie = [{"op": "aten.gelu", "kind": "linear", "stream": ["self"], "why": "a lie"}]
    with pytest.raises(lg.errors.VerificationError, match=r"does not close.*gelu"):
        lg.transform(net(norm=True), rows(), rules=lie)
    lg.transform(net(norm=True), rows(), rules=lie, check=False)


def _cut_in_python(h: torch.Tensor) -> torch.Tensor:
    return h * 2 if bool(h.sum() > 0) else h * 3


@pytest.mark.parametrize("also", [lambda h: h, _cut_in_python], ids=["one graph", "several"])
def test_a_path_that_capture_has_cut_is_found_at_birth(
    also: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward of such a graph is the model's, and its ledger adds up: the gradient tells."""

    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = also(x.sin())
            with torch.no_grad():
                largest = h.double().abs().amax()  # h itself, which is float64
            return h / largest + x

    lg.transform(Scaled(), rows())
    monkeypatch.setattr(export, "drop_returned", lambda graph, book: None)
    with pytest.raises(lg.errors.VerificationError, match=r"gradient of the captured graph.* at input 0"):
        lg.transform(Scaled(), rows())


@pytest.mark.parametrize("changes", [True, False])
def test_a_hook_on_a_tensor_may_read_its_gradient_but_not_change_it(changes: bool) -> None:
    """A graph holds no hook. Of token ids, the embeddings' gradient is compared."""

    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(9, 4).requires_grad_(False), nn.Linear(4, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            h = self.words(ids).mean(1)
            if h.requires_grad:
                h.register_hook(lambda g: g * 2 if changes else None)
            return self.head(h)

    model, ids = Hooked(), torch.randint(9, (3, 5))
    refused = pytest.raises(lg.errors.VerificationError, match=r"at embedding 0 .* a hook on a tensor")
    with refused if changes else contextlib.nullcontext():
        lg.transform(model, ids)
    assert not model.words.weight.requires_grad


# --- containers of their own kind in a model's reach


class MakesAtEachLook(dict):  # type: ignore[type-arg]
    """As transformers' table of activations: what is held is a class, what is got is made of it."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()


class CopiesAreRefused(list):  # type: ignore[type-arg]
    def copy(self) -> Any:
        return list(self)


TABLE = MakesAtEachLook(act=nn.GELU, needs_more=lambda: TABLE.missing)
SIZES = CopiesAreRefused([6, 8])


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(SIZES[0], SIZES[1]).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return TABLE["act"](self.net(x)) * len(SIZES)


def test_a_table_that_makes_what_it_gives() -> None:
    model, x = Looks(), torch.randn(3, 6, dtype=torch.float64)
    kept = dict.copy(TABLE)
    assert torch.equal(lg.transform(model, x)(x), model(x))
    assert dict.copy(TABLE) == kept
