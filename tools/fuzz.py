"""Random small modules with the habits of strangers' code, called in ways they were not captured for.

Counts five outcomes: right, refused, traceback (an error that is not ours), silently wrong, and modules
that fail themselves.

    python tools/fuzz.py --count 300 --seed 0

A module is a chain of steps; each is a habit (control flow on sizes or values, state, caches, writes in
place, containers, instance patches, grad mode, random numbers). An untransformed copy gives the right
answers. Refusals, tracebacks and wrong results are printed with their seed (``--only SEED`` repeats one).
"""

from __future__ import annotations

import argparse
import collections
import copy
import functools
import itertools
import random
import traceback
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import libragrad_fx as lg
from libragrad_fx.errors import LibraGradError

WIDTH = 6
GLOBAL: dict[Any, torch.Tensor] = {}


@functools.lru_cache
def grid(n: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.float64) / 8


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return x * 2

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g * 2


# --- habits: (module, x of (B, WIDTH)) -> (B, WIDTH)

Step = Callable[[Any, torch.Tensor], torch.Tensor]


def one_by_one(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([m.net(v) for v in x])


def chunks(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([m.net(v) for v in x.split(m.k)])


def by_length(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.net(x) / float(len(x))


def branch_on_length(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.net(x) if len(x) > m.k else m.net(x) * 2


def odd(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.net(x) if x.shape[0] % 2 else x + m.net(x)


def branch_on_value(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.net(x) if x.sum() > 0 else m.net(x) * 2


def loop_on_value(m: Any, x: torch.Tensor) -> torch.Tensor:
    for _ in range(int(x.detach().abs().sum()) % 3):
        x = m.net(x) + x
    return x


def hidden(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = 0.0 if m.h is None else m.h
    m.h = m.net(x).detach().mean(0)
    return m.net(x) + h


def counter(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.count += 1
    return m.net(x) * (2 if m.count > m.k else 1)


def history(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.seen.append(float(x.detach().mean()))
    return m.net(x) + len(m.seen) / 4


def running(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
    return m.net(x - m.mean)


def record(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.last = m.net(x)
    return m.last + x


def cached(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.net(x + grid(x.shape[-1]))


def global_cache(m: Any, x: torch.Tensor) -> torch.Tensor:
    key = x.shape[-1]
    if key not in GLOBAL:
        GLOBAL[key] = torch.linspace(0, 1, key, dtype=torch.float64)
    return m.net(x) * GLOBAL[key]


def lazy_buffer(m: Any, x: torch.Tensor) -> torch.Tensor:
    if m.pos is None:
        m.pos = torch.linspace(0, 1, x.shape[-1], dtype=torch.float64)
    return m.net(x + m.pos)


def write_slice(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.net(x).clone()
    y[:, 0] = x[:, 1]
    y[:, 2:4] += 1
    return y


def write_fresh(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y[:, ::2] = m.net(x)[:, ::2]
    return y


def write_own(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.net(x).mul_(2).relu_() + x


def write_input(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = x * 1
    x += 1
    return m.net(x)


def region(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        s = m.net(x).mean()
    return m.net(x) * s


def reentrant(m: Any, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(m.net, x, use_reentrant=True)  # type: ignore[no-any-return]


def function(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.net(Doubled.apply(x))


def python_random(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.net(x) * (1 + random.random())


def numpy_random(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.net(x) * float(1 + np.random.rand())


def torch_random(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.net(x) * torch.rand(x.shape[-1], dtype=x.dtype)


def from_numpy(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.net(x) + torch.as_tensor(np.sqrt(np.arange(x.shape[-1])))


def gate(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(m.net(x))


def attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.net(x)
    return torch.softmax(x @ y.T, -1) @ y


def sort(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.net(x)[torch.argsort(x.detach()[:, 0])]


def mask(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.net(x).masked_fill(x > 1, 0.0)


STEPS: list[Step] = [
    one_by_one, chunks, by_length, branch_on_length, odd, branch_on_value, loop_on_value, hidden, counter,
    history, running, record, cached, global_cache, lazy_buffer, write_slice, write_fresh, write_own,
    write_input, region, reentrant, function, python_random, numpy_random, torch_random, from_numpy, gate,
    attention, sort, mask,
]  # fmt: skip


class Block(nn.Module):
    def __init__(self, step: Step, rng: random.Random) -> None:
        super().__init__()
        act = rng.choice([nn.GELU(), nn.SiLU(), nn.Tanh(), nn.ReLU()])
        norm = rng.choice([nn.LayerNorm(WIDTH), nn.Identity()])
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), norm, act, nn.Linear(WIDTH, WIDTH))
        self.step, self.k = step, rng.choice([1, 2, 3])
        self.h: Any = None
        self.last: Any = None
        self.count, self.seen = 0, []
        self.mean = nn.Buffer(torch.zeros(WIDTH))
        self.register_buffer("pos", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.step(self, x)


class Net(nn.Module):
    """A chain of blocks behind a way of taking inputs."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        steps = rng.sample(STEPS, rng.choice([1, 2, 2, 3]))
        self.blocks = nn.ModuleList(Block(s, rng) for s in steps)
        self.takes = rng.choice(["x", "x", "list", "dict", "args", "flag", "mask"])
        self.gives = rng.choice(["y", "y", "tuple", "dict"])
        self.head = nn.Linear(WIDTH, 3)

    def run(self, x: torch.Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        y = self.head(x)
        return {"y": y, "tuple": (y, x.shape[0]), "dict": {"logits": y, "x": x}}[self.gives]

    def forward(self, first: Any, *more: Any, flag: Any = None) -> Any:
        if self.takes == "list":
            first = sum(first) * len(first)
        elif self.takes == "dict":
            first = sum(first.values()) * (2 if "b" in first else 1)
        elif self.takes == "args":
            first = first + sum(more)
        elif self.takes == "flag" and flag is not None:
            first = first * flag
        elif self.takes == "mask" and more:
            first = first * (more[0].double()[:, None] + (more[0].dtype == torch.bool))
        return self.run(first)


def make_call(takes: str, n: int, rng: random.Random) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = lambda: torch.randn(n, WIDTH, dtype=torch.float64)  # noqa: E731
    if takes == "list":
        return ([x() for _ in range(rng.choice([1, 2, 3]))],), {}
    if takes == "dict":
        return ({k: x() for k in rng.choice([["a"], ["a", "b"], ["b", "a"]])},), {}
    if takes == "args":
        return tuple(x() for _ in range(rng.choice([1, 2, 3]))), {}
    if takes == "flag":
        flag = rng.choice([None, 2.0, 3, True, torch.tensor(2.0, dtype=torch.float64)])
        return (x(),), {} if flag is None else {"flag": flag}
    if takes == "mask":
        m = torch.rand(n) > 0.5
        return (x(), rng.choice([m, m.long(), m.int()])), {}
    return (x(),), {}


def dress(model: nn.Module, rng: random.Random) -> str:
    """What people do to an instance."""
    how = rng.choice(["", "", "", "", "patch", "bind", "compile", "hook", "train"])
    if how == "patch":
        old = model.forward
        model.forward = lambda *a, **k: old(*a, **k)  # type: ignore[method-assign]
    elif how == "bind":
        model.forward = types.MethodType(type(model).forward, model)  # type: ignore[method-assign]
    elif how == "compile":
        model.compile(backend="eager")
    elif how == "hook":
        model.head.register_forward_hook(lambda _m, _a, y: y * 2)  # type: ignore[union-attr]
    elif how == "train":
        model.train()
    return how


def outcome(seed: int) -> tuple[str, str]:
    """(outcome, what happened) of one module."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    GLOBAL.clear()
    grid.cache_clear()
    torch._dynamo.reset()
    model = Net(rng).double().eval()
    twin = copy.deepcopy(model)
    how = dress(model, rng)
    if how == "train":
        twin.train()
    if how == "hook":
        twin.head.register_forward_hook(lambda _m, _a, y: y * 2)
    label = f"{[b.step.__name__ for b in model.blocks]} takes {model.takes}, {how or 'plain'}"
    args, kwargs = make_call(model.takes, rng.choice([1, 2, 4]), rng)
    inputs = lg.target.Arguments(args, kwargs) if args and kwargs else kwargs or args
    if not works(twin, args, kwargs):
        return "the model itself fails", label
    try:
        gm = lg.transform(model, inputs)
    except LibraGradError as e:
        return "refused", f"{label}: {e!s:.300}"
    except Exception:
        return "traceback", f"{label}\n{traceback.format_exc(limit=-4)}"
    for i, n in enumerate([len_of(args), len_of(args), 1, 3, 5, 5]):
        if i:
            args, kwargs = make_call(model.takes, n, rng)
        wanted = called(twin, args, kwargs, i)
        if isinstance(wanted, Exception):
            return "right", label  # from here on the model has no answer
        try:
            got = called(gm, args, kwargs, i, reraise=True)
        except LibraGradError as e:
            return "refused", f"{label}, call {i}: {e!s:.300}"
        except Exception:
            return "traceback", f"{label}, call {i}\n{traceback.format_exc(limit=-4)}"
        for a, b in itertools.zip_longest(*map(torch.utils._pytree.tree_leaves, (wanted, got))):
            same = (
                torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
            )
            if not same:
                return "silently wrong", f"{label}, call {i} with {n} rows"
            if isinstance(a, torch.Tensor) and a.requires_grad != b.requires_grad:
                return "silently wrong", f"{label}, call {i}: requires_grad"
    number = torch.utils._pytree.tree_leaves(model(*args, **kwargs))[0].sum().item()
    if not isinstance(number, (bool, int, float, complex)):  # a symbol of the trace was left in the model
        return "silently wrong", f"{label}: the original gives {type(number).__name__}"
    return "right", label


def len_of(args: Any) -> int:
    return len(next(t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)))


def works(model: nn.Module, args: Any, kwargs: Any) -> bool:
    return not isinstance(called(copy.deepcopy(model), args, kwargs, 0), Exception)


def called(model: nn.Module, args: Any, kwargs: Any, seed: int, reraise: bool = False) -> Any:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    given = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    moving = torch.utils._pytree.tree_map(
        lambda t: t.requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t,
        given,
    )
    try:
        return model(*moving[0], **moving[1])
    except Exception as e:
        if reraise:
            raise
        return e


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    counts: collections.Counter[str] = collections.Counter()
    seeds = [given.only] if given.only is not None else range(given.seed, given.seed + given.count)
    for seed in seeds:
        found, what = outcome(seed)
        counts[found] += 1
        if found not in ("right", "the model itself fails") or given.only is not None:
            print(f"{seed}: {found}: {what}", flush=True)
    print(", ".join(f"{n} {k}" for k, n in counts.most_common()))


if __name__ == "__main__":
    main()
