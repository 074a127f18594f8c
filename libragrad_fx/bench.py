"""Measures what a backward costs: several on one model, in turns, so that the machine's moods cancel.

A *side* is a function of the input that does one forward and backward. Each round runs every side
once; ratios are taken within a round.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from libragrad_fx.ops.attention import COUNTED_AS

Side = Callable[[torch.Tensor], object]


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one side.

    seconds: median time of a forward and a backward
    ratio, low, high: median and quartiles, over rounds, of its time divided by the first side's
    peak:  MiB of the tensors alive at once at most, without those alive before
    flops: floating-point operations in matrix products, convolutions and fused attention
    """

    name: str
    seconds: float
    ratio: float
    low: float
    high: float
    peak: float
    flops: int

    def against(self, first: Cost) -> str:
        """A row of a Markdown table."""
        spread = f"{self.ratio:.3f} ({self.low:.3f} to {self.high:.3f})"
        work, memory = _share(self.flops, first.flops), _share(self.peak, first.peak)
        ms, peak = f"{self.seconds * 1e3:.1f}", f"{self.peak:.0f}" if self.peak else ""
        return f"| {self.name} | {ms} | {spread} | {work} | {peak} | {memory} |"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.3f}" if whole else ""


HEAD = (
    "| backward | ms | time, of the first (quartiles) | operations | peak MiB | memory |\n"
    "|---|---|---|---|---|---|"
)


def gradient(f: Callable[[torch.Tensor], torch.Tensor]) -> Side:
    """The side that differentiates the scalar ``f(x)`` by ``x``."""

    def side(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(f(x), x)[0]

    return side


def compare(
    sides: Mapping[str, Side], x: torch.Tensor, rounds: int = 10, seen: Callable[[], object] = lambda: None
) -> list[Cost]:
    """Time every side on ``x``, and count its operations and memory; the counting runs warm it up."""
    flops = {name: _flops(side, x) for name, side in sides.items()}
    peaks = {name: peak(side, x) for name, side in sides.items()}
    return race(sides, x, rounds, peaks, flops, seen)


def race(
    sides: Mapping[str, Side], x: torch.Tensor, rounds: int,
    peaks: Mapping[str, float] | None = None, flops: Mapping[str, int] | None = None,
    seen: Callable[[], object] = lambda: None,
) -> list[Cost]:  # fmt: skip
    """Time every side on ``x``, in turns. Leave out the counts if a side does not run op by op. ``seen`` is
    called after each of the ``rounds * len(sides)`` runs."""
    peaks, flops = peaks or {}, flops or {}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            times[name].append(_seconds(side, x))
            seen()
    first = next(iter(times.values()))
    found = []
    for name, spent in times.items():
        ratios = sorted(t / f for t, f in zip(spent, first, strict=True))
        low, middle, high = _quartiles(ratios)
        median = statistics.median(spent)
        counted = peaks.get(name, 0.0), flops.get(name, 0)
        found.append(Cost(name, median, middle, low, high, *counted))
    return found


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _seconds(side: Side, x: torch.Tensor) -> float:
    _wait(x)
    start = time.perf_counter()
    side(x)
    _wait(x)
    return time.perf_counter() - start


def _wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def peak(side: Side, x: torch.Tensor) -> float:
    """MiB of the tensors alive at once at most, without those alive before."""
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        side(x)
        return (torch.cuda.max_memory_allocated(x.device) - before) / 2**20
    with _Memory() as memory:
        side(x)
    return memory.peak / 2**20


class _Memory(TorchDispatchMode):
    """Sums the storages that ops allocate, as long as they live. Scratch memory inside kernels is not seen,
    and an allocator's cache is not counted; so every run gives the same number."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and _key(t) not in given:
                storage = t.untyped_storage()
                self.alive[_key(t)] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def _key(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


class Operations(TorchDispatchMode):
    """Counts operations by PyTorch's formulas. PyTorch's own counter puts hooks on modules, which would
    switch the lean graph off."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        count = flop_registry.get(COUNTED_AS.get(packet, packet))
        self.total += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


def _flops(side: Side, x: torch.Tensor) -> int:
    with Operations() as counter:
        side(x)
    return counter.total
