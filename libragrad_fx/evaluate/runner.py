"""Runs an evaluation: finds what is not done, does it, and writes each result at once.

Work is cut into chunks of samples, the same for any number of processes. Process r of W takes every W-th
chunk of all models and sets; nobody waits for another. What exists is skipped. The process that finds all done writes all results
as one file.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from libragrad_fx.decide import rulebook
from libragrad_fx.errors import InputError, LibraGradError
from libragrad_fx.evaluate.config import Config, MethodSpec, name_of
from libragrad_fx.evaluate.data import Data, Item, Selection, open_data, prepared, selected
from libragrad_fx.evaluate.measures import METRICS, Case
from libragrad_fx.evaluate.store import Store, Unit
from libragrad_fx.evaluate.subject import Subject, loaded
from libragrad_fx.explain.kept import AUTOGRAD
from libragrad_fx.models import first_line
from libragrad_fx.version import __version__

Seen = Callable[[Unit, Sequence[str]], None]
"""Called with each unit that is done, and what failed in it."""


@dataclasses.dataclass(frozen=True)
class Share:
    """Which part of the work: that of process ``rank`` of ``world``."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise InputError(f"ranks of {self.world} processes are 0 to {self.world - 1}, got {self.rank}")

    @staticmethod
    def found(rank: int | None = None, world: int | None = None) -> Share:
        """As given, or as ``torchrun``, a SLURM array or a Kubernetes indexed job says.

        Raises:
            InputError: one of the two is known, and the other is not.
        """
        of = os.environ
        for r, w in (("RANK", "WORLD_SIZE"), ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")):
            if rank is None and r in of:
                rank = int(of[r]) - int(of.get("SLURM_ARRAY_TASK_MIN", 0) if r.startswith("SLURM") else 0)
                world = int(of[w]) if world is None and w in of else world
        if rank is None and "JOB_COMPLETION_INDEX" in of:
            rank = int(of["JOB_COMPLETION_INDEX"])
        if rank is None and world in (None, 1):
            return Share()
        if rank is None or world is None:
            raise InputError(f"rank {rank} of {world} processes: give both --rank and --world")
        return Share(rank, world)


@dataclasses.dataclass(frozen=True)
class Bench:
    """A config at work: its models and sets, opened when they are first needed. One model is held."""

    config: Config

    @functools.cached_property
    def data(self) -> dict[str, tuple[Data, Selection]]:
        found = {}
        for name, spec in self.config.data.items():
            data = open_data({"load": spec.load, "args": spec.args} if spec.args else spec.load)
            found[name] = data, selected(data, spec.count, spec.seed, spec.keep)
        return found

    def chunks(self, data: str) -> int:
        return -(-len(self.data[data][1]) // self.config.chunk)

    def subject(self, model: str) -> Subject:
        held: dict[str, Subject] = self.__dict__.setdefault("_held", {})
        if model not in held:
            held.clear()
            held[model] = loaded(self.config.models[model], self.config.device, self.config.dtype)
        return held[model]

    def units(self, model: str, data: str, chunk: int) -> list[Unit]:
        """The work on one chunk, in the order in which it is done."""
        config, (_, chosen) = self.config, self.data[data]
        part = slice(chunk * config.chunk, (chunk + 1) * config.chunk)
        shared = {
            "weights": self.subject(model).weights, "model": config.models[model].model_dump(mode="json"),
            "samples": [*zip(chosen.ids[part], chosen.hashes[part], strict=True)], "batch": config.batch,
            "device": _device(config.device), "dtype": config.dtype, "versions": versions(),
        }  # fmt: skip
        return [
            Unit(model, data, chunk, policy, name_of(method), metric, target, {
                **shared, "policy": _digest(policy), "method": method.model_dump(mode="json"), "metric": metric,
                "options": spec.model_dump(mode="json", exclude={"targets"}), "target": target,
            })
            for policy in config.policies
            for method in config.methods
            for metric, spec in config.metrics.asked.items()
            for target in spec.targets
        ]  # fmt: skip

    def all_units(self) -> Iterator[Unit]:
        for model in self.config.models:
            for data in self.data:
                for chunk in range(self.chunks(data)):
                    yield from self.units(model, data, chunk)


def _digest(policy: str) -> str:
    return AUTOGRAD if policy == AUTOGRAD else rulebook.load(policy).digest


def _device(name: str) -> str:
    device = torch.device(name)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def versions() -> dict[str, str]:
    """Of all that numbers depend on."""
    found = {"python": platform.python_version(), "libragrad-fx": __version__, "torch": torch.__version__}
    for name in ("timm", "transformers", "torchvision", "numpy", "scipy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# --- the work


def evaluate(
    config: Config, folder: str | Path, *, share: Share | None = None, seen: Seen | None = None,
    total: Callable[[int], None] | None = None, retry: bool = False,
) -> Path | None:  # fmt: skip
    """Do this process's share of an evaluation, and go on where an earlier run stopped.

    Args:
        folder: of the results: ``results.parquet`` with a row for each number, ``runs.parquet`` with what
            each was made by, and ``parts`` of which both are made.
        share: this process's; all of it by default.
        seen: is told each unit that is done.
        total: is told how many units there are to do, once that is known.
        retry: try again what failed.

    Returns:
        The file of all results; None while other processes have work to do.

    Raises:
        InputError: a model or a set that cannot be opened.
    """
    share, bench, store = share or Share(), Bench(config), Store(Path(folder))
    mine = jobs(bench)[share.rank :: share.world]
    if retry:
        for job in mine:
            store.forget_failures(bench.units(*job))
    if total is not None:
        total(len(mine) * per_chunk(config))
    for job in mine:
        work(bench, store, *job, seen=seen)
    return store.collect(bench.all_units(), config.model_dump(mode="json"))


def jobs(bench: Bench) -> list[tuple[str, str, int]]:
    """(model, data, chunk): a model's one after another."""
    return [(m, d, c) for m in bench.config.models for d in bench.data for c in range(bench.chunks(d))]


def per_chunk(config: Config) -> int:
    """The units of one chunk."""
    targets = sum(len(spec.targets) for spec in config.metrics.asked.values())
    return len(config.policies) * len(config.methods) * targets


def work(bench: Bench, store: Store, model: str, data: str, chunk: int, seen: Seen | None = None) -> None:
    """Do what is not done of one chunk, and write it unit by unit."""
    seen = seen or (lambda unit, failed: None)
    units = bench.units(model, data, chunk)
    for unit in units:
        if store.has(unit):
            seen(unit, ())
    left = [u for u in units if not store.has(u)]
    if not left:
        return
    batches = _Batches(bench, model, data, chunk)
    methods = {name_of(m): m for m in bench.config.methods}
    for unit in left:
        rows, seconds = batches.measured(unit, methods[unit.method])
        store.write(unit, rows, seconds)
        seen(unit, sorted({r["error"] for r in rows if r["error"]}))


class _Batches:
    """The batches of a chunk, with the maps that several metrics share."""

    def __init__(self, bench: Bench, model: str, data: str, chunk: int) -> None:
        self.bench, self.config, self.model = bench, bench.config, model
        subject, (source, chosen) = bench.subject(model), bench.data[data]
        size = self.config.chunk
        self.bad: list[tuple[str, str]] = []
        self.cases: list[tuple[list[Item], Case]] = []
        items = []
        for i, name in [*zip(chosen.indices, chosen.ids, strict=True)][chunk * size : (chunk + 1) * size]:
            try:
                item = source.get(i)
                items.append((item, *prepared(item, subject.steps)))
            except (LibraGradError, OSError) as e:
                self.bad.append((name, first_line(e)))
        for start in range(0, len(items), self.config.batch):
            part = items[start : start + self.config.batch]
            inputs = subject.batch([x for _, x, _ in part])
            case = Case(subject, inputs, [i.label for i, *_ in part], [m for *_, m in part])
            self.cases.append(([i for i, *_ in part], case))
        self.maps: dict[tuple[Any, ...], Any] = {}

    def measured(self, unit: Unit, method: MethodSpec) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """The rows of a unit. What fails is a row with an error: of a sample, or of a batch's samples."""
        spec = self.config.metrics.asked[unit.metric]
        seconds = {"attribution": 0.0, "metric": 0.0}
        rows = [self._row(unit, None, image=name, error=why) for name, why in self.bad]
        for n, (items, case) in enumerate(self.cases):
            try:
                classes = case.target(unit.target, getattr(spec, "least", 0.0))
                found, took = self._map(unit, method, n, case, classes, spec.scalar)
                seconds["attribution"] += took
                start = time.perf_counter()
                numbers = [*METRICS[unit.metric](case, found, classes, spec)]
                seconds["metric"] += time.perf_counter() - start
            except (LibraGradError, RuntimeError, ValueError, IndexError, TypeError) as e:
                rows += [self._row(unit, item, error=first_line(e)) for item in items]
                continue
            for r in numbers:
                more = {"measure": r.measure, "value": r.value, "how": r.how}
                rows.append(self._row(unit, items[r.sample], explained=int(classes[r.sample]), **more))
        return rows, seconds

    def _map(
        self, unit: Unit, method: MethodSpec, n: int, case: Case, classes: torch.Tensor, scalar: str
    ) -> tuple[Any, float]:
        """An attribution and how long it took; kept for the next metric of the method."""
        key = (unit.policy, unit.method, n, tuple(classes.tolist()), scalar)
        if key not in self.maps:
            if self.maps and next(iter(self.maps))[:2] != key[:2]:
                self.maps.clear()
            start = time.perf_counter()
            found = case.attribution(method, unit.policy, classes, scalar)
            self.maps[key] = found, time.perf_counter() - start
        return self.maps[key]

    def _row(self, unit: Unit, item: Item | None, **said: Any) -> dict[str, Any]:
        spec = self.config.models[self.model]
        row: Mapping[str, Any] = {
            "model": unit.model, "family": spec.family or unit.model, "seed": spec.seed, "data": unit.data,
            "policy": unit.policy, "method": unit.method, "metric": unit.metric, "target": unit.target,
            "image": item.id if item else None, "label": item.label if item else None, "run": unit.key,
        }  # fmt: skip
        empty = {"explained": None, "measure": None, "value": None, "how": None, "error": None}
        return {**row, **empty, **said}
