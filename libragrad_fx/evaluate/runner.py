"""Runs an evaluation: finds what is not done, does it, and writes each result at once.

Work is cut into jobs: a chunk of the samples of a set, by one model. Jobs and the batches in them are the
same for any number of processes. Process r of W takes every W-th job; nobody waits for another. What exists
is skipped. The process that finds all done writes all results as one file.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import libragrad_fx
from libragrad_fx.attribution import Attribution
from libragrad_fx.attribution.formulas import method_of
from libragrad_fx.decide import rulebook
from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.again import AGAIN
from libragrad_fx.evaluate.config import Config, MethodSpec, name_of
from libragrad_fx.evaluate.data import LOADERS, Data, Selection, open_data, selected
from libragrad_fx.evaluate.data.items import sha256
from libragrad_fx.evaluate.examples import example
from libragrad_fx.evaluate.inputs import Sample, sources_of
from libragrad_fx.evaluate.measures import METRICS, Case, Row, cases
from libragrad_fx.evaluate.store import SHOWN, Store, Unit
from libragrad_fx.evaluate.subject import Identity, Subject, loaded, place
from libragrad_fx.explain.kept import AUTOGRAD
from libragrad_fx.models import first_line
from libragrad_fx.version import __version__

Seen = Callable[[Unit, Sequence[str]], None]
"""Called with each unit that is done, and what failed in it."""
Job = tuple[str, str, int]
"""(model, data, chunk)"""
_APART = {
    "__main__.py", "bench.py", "cli", "coverage", "demo", "interop.py", "viz", "evaluate/__init__.py",
    "evaluate/charts.py", "evaluate/cluster.py", "evaluate/report.py", "evaluate/rivalry.py",
    "evaluate/search.py", "evaluate/store.py", "evaluate/strips.py", "evaluate/tables.py",
}  # fmt: skip
"""Files and folders of this package on which no number depends."""


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
        """As given, or as ``torchrun``, a SLURM array (``0-31``) or a Kubernetes indexed job says; the last
        does not say ``world``.

        Raises:
            InputError: one of the two is known, and the other is not.
        """
        if rank is None and "RANK" in os.environ:
            rank, world = _said("RANK"), world or _said("WORLD_SIZE")
        elif rank is None and "SLURM_ARRAY_TASK_ID" in os.environ:
            first, step = _said("SLURM_ARRAY_TASK_MIN") or 0, _said("SLURM_ARRAY_TASK_STEP") or 1
            rank = ((_said("SLURM_ARRAY_TASK_ID") or 0) - first) // step
            world = world or _said("SLURM_ARRAY_TASK_COUNT")
        elif rank is None and "JOB_COMPLETION_INDEX" in os.environ:
            rank = _said("JOB_COMPLETION_INDEX")
        if rank is None and world in (None, 1):
            return Share()
        if rank is None or world is None:
            known = f"this is process {rank}" if world is None else f"there are {world} processes"
            raise InputError(f"{known}, and nothing says {'of how many' if world is None else 'which'}:"
                             " give --rank and --world")  # fmt: skip
        return Share(rank, world)


def _said(name: str) -> int | None:
    """A number that the environment says."""
    value = os.environ.get(name)
    try:
        return None if value is None else int(value)
    except ValueError as e:
        raise InputError(f"the environment says {name}={value!r}, which is no number") from e


@dataclasses.dataclass(frozen=True)
class Bench:
    """A config at work: its models and sets, opened when they are first needed. One model is held.

    device: where models run; what the config says if none.
    """

    config: Config
    device: torch.device | None = None
    _held: dict[str, Subject] = dataclasses.field(default_factory=dict)
    _known: dict[str, Identity] = dataclasses.field(default_factory=dict)

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
        if model not in self._held:
            self._held.clear()
            device = self.device or place(self.config.device)
            self._held[model] = loaded(self.config.models[model], device, self.config.dtype)
            self._known[model] = self._held[model].identity
        return self._held[model]

    def identity(self, model: str) -> Identity:
        return self._known[model] if model in self._known else self.subject(model).identity

    def jobs(self) -> list[Job]:
        """All work: a model's jobs one after another.

        Raises:
            InputError: a model or a set cannot be opened.
        """
        for model in self.config.models:
            self.identity(model)
        sets = {m: spec.data or self.data for m, spec in self.config.models.items()}
        return [(m, d, c) for m, of in sets.items() for d in of for c in range(self.chunks(d))]

    def units(self, model: str, data: str, chunk: int) -> list[Unit]:
        """A job's work, in the order in which it is done."""
        config, (_, chosen) = self.config, self.data[data]
        part, source = slice(chunk * config.chunk, (chunk + 1) * config.chunk), config.data[data]
        loader = source.load.partition(":")[0]
        asked = {**config.metrics.asked, **({SHOWN: config.kept} if chunk == 0 and config.examples else {})}
        samples = [*chosen.ids[part], *chosen.hashes[part]]
        shared = {
            **dataclasses.asdict(self.identity(model)),
            "model": config.models[model].model_dump(mode="json", exclude={"data", "family", "seed"}),
            "data": [loader if loader in LOADERS else source.load, source.args],
            "samples": sha256([text.encode() for text in samples]), "batch": config.batch,
            "device": torch.device(config.device).type, "dtype": config.dtype,
            "precision": torch.get_float32_matmul_precision(), "versions": versions(),
        }  # fmt: skip
        return [
            Unit(model, data, chunk, policy, name_of(method), metric, target, {
                **shared, "policy": [policy, _digest(policy)],
                "method": [method.model_dump(mode="json"), _source(method.method)],
                "metric": metric, "options": spec.model_dump(mode="json", exclude={"targets"}),
                "target": target,
            })
            for policy in config.policies
            for method in config.methods
            for metric, spec in asked.items()
            for target in spec.targets
        ]  # fmt: skip

    def all_units(self) -> Iterator[Unit]:
        return (unit for job in self.jobs() for unit in self.units(*job))


def _source(method: str) -> str:
    """SHA-256 of the file of a method that is a function; "" of one of this package."""
    module, colon, _ = method.rpartition(":")
    return sha256(sources_of([module])) if colon else ""


def _digest(policy: str) -> str:
    return AUTOGRAD if policy == AUTOGRAD else rulebook.load(policy).digest


@functools.cache
def versions() -> dict[str, str]:
    """Of all that numbers depend on. code: SHA-256 of this package's source, but what ``_APART`` names."""
    found = {"python": platform.python_version(), "libragrad-fx": __version__, "torch": torch.__version__}
    for name in ("timm", "transformers", "torchvision", "numpy", "scipy", "scikit-learn", "pillow"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "code": code()}


@functools.cache
def code() -> str:
    """SHA-256 of the source files of this package on which numbers depend."""
    root, found = Path(libragrad_fx.__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if name.parts[0] not in _APART and name.as_posix() not in _APART:
            body = file.read_bytes()
            found.update(f"{name.as_posix()} {len(body)}\n".encode() + body)
    return found.hexdigest()


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
        retry: do again each unit (a chunk by one method and metric) in which something failed.

    Returns:
        The file of all results; None while other processes have work to do.

    Raises:
        InputError: a model or a set that cannot be opened, before any work.
    """
    share, bench, store = share or Share(), Bench(config), Store(Path(folder))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    mine = bench.jobs()[share.rank :: share.world]
    begin(bench, store, mine, retry)
    if total is not None:
        total(sum(len(bench.units(*job)) for job in mine))
    for job in mine:
        work(bench, store, job, seen)
    return store.collect(bench.all_units(), config.model_dump(mode="json"))


def begin(bench: Bench, store: Store, mine: Sequence[Job], retry: bool) -> None:
    """Before work: forget what failed, if asked, and take away results of an earlier state."""
    if retry:
        store.forget_failures(unit for job in mine for unit in bench.units(*job))
    if not all(store.has(unit) for job in mine for unit in bench.units(*job)):
        store.withdraw()


def work(bench: Bench, store: Store, job: Job, seen: Seen | None = None) -> None:
    """Do what is not done of a job, and write it unit by unit."""
    seen = seen or (lambda unit, failed: None)
    left = []
    for unit in bench.units(*job):
        if store.has(unit):
            seen(unit, ())
        else:
            left.append(unit)
    if not left:
        return
    batches = _Batches(bench, *job)
    methods = {name_of(m): m for m in bench.config.methods}
    for unit in left:
        do = batches.examples if unit.metric == SHOWN else batches.measured
        rows, seconds = do(unit, methods[unit.method])
        store.write(
            unit, rows, {"seconds": seconds, "threads": torch.get_num_threads(), "device": batches.device}
        )
        seen(unit, sorted({r["error"] for r in rows if "error" in r}))


class _Batches:
    """The batches of a job, with the maps that several metrics share.

    A batch has pictures of one size, or texts of as many tokens: a chunk with several sizes has batches of
    each, in the samples' order. A sample that cannot be read or prepared is in none.
    """

    def __init__(self, bench: Bench, model: str, data: str, chunk: int) -> None:
        self.config, subject, (source, chosen) = bench.config, bench.subject(model), bench.data[data]
        self.device, self.names = _named(subject.device), source.classes
        size, self.first = self.config.chunk, {*chosen.ids[: bench.config.examples]}
        self.bad: list[tuple[str, str]] = []
        samples: list[Sample] = []
        self.maps: dict[tuple[Any, ...], Any] = {}
        for i, name in [*zip(chosen.indices, chosen.ids, strict=True)][chunk * size : (chunk + 1) * size]:
            try:
                samples.append(subject.inputs.sample(source.get(i)))
            except Exception as e:  # loaders and steps of users fail in any way
                if not recorded(e):
                    raise
                self.bad.append((name, first_line(e)))
        self.cases = cases(subject, samples, self.config.batch)

    def measured(self, unit: Unit, method: MethodSpec) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """The rows of a unit, and seconds by what took them.

        A sample whose content or label is of no use is a row with an error. Where a method, a metric or
        memory fails, each sample of the batch is. A sample without the label, mask or contrast that is
        asked for has no row, nor a method for which a metric is not defined. A number that is not defined
        (nan) is null.
        """
        spec = self.config.metrics.asked[unit.metric]
        seconds = {"attribution": 0.0, "metric": 0.0}
        rows = [self._row(unit, name, None, error=why) for name, why in self.bad]
        for n, whole in enumerate(self.cases):
            each = [*zip(whole.ids, whole.labels, strict=True)]
            try:
                case = whole.contrasted if unit.target == "contrast" else whole
                asked = case.target(unit.target, getattr(spec, "least", 0.0))
                unknown = asked >= case.logits.shape[1]
                classes = asked.masked_fill(unknown, -1)
                numbers = self._numbers(unit, method, n, case, classes, seconds)
            except Exception as e:  # a model, a method or a metric fails in any way
                if not recorded(e):
                    raise
                rows += [self._row(unit, *one, error=first_line(e)) for one in each]
                continue
            for i in unknown.nonzero()[:, 0].tolist():
                said = f"class {int(asked[i])} of a model of {case.logits.shape[1]}"
                rows.append(self._row(unit, *each[i], error=said))
            explained = case.named(classes).tolist()
            for r in numbers:
                value = None if math.isnan(r.value) else r.value
                more = {"measure": r.measure, "value": value, "how": r.how}
                rows.append(self._row(unit, *each[r.sample], explained=explained[r.sample], **more))
        return rows, seconds

    def examples(self, unit: Unit, method: MethodSpec) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """The rows of a unit of maps, of the first samples that have a class to explain, and seconds."""
        spec, rows, took = self.config.kept, [], 0.0
        for n, whole in enumerate(self.cases):
            mine = [i for i, name in enumerate(whole.ids) if name in self.first]
            if not mine:
                continue
            try:
                case = whole.contrasted if unit.target == "contrast" else whole
                classes = case.target(unit.target)
                found, took = self._map(unit, method, n, case, classes, spec.scalar)
                made = [example(case, found, classes, i, self.names) for i in mine]
            except Exception as e:  # a model or a method fails in any way
                if not recorded(e):
                    raise
                made = [{"image": whole.ids[i], "error": first_line(e)} for i in mine]
            of = {k: getattr(unit, k) for k in ("model", "data", "policy", "method", "target")}
            rows += [{**of, **row, "run": unit.key} for row in made if row]
        return rows, {"attribution": took, "metric": 0.0}

    def _numbers(
        self, unit: Unit, method: MethodSpec, n: int, case: Case, classes: torch.Tensor,
        seconds: dict[str, float],
    ) -> list[Row]:  # fmt: skip
        """What a metric says of a batch; its time is added to ``seconds``."""
        if bool((classes < 0).all()) or (unit.metric == "completeness" and not _adds_up(method.method)):
            return []
        spec = self.config.metrics.asked[unit.metric]
        found, took = self._map(unit, method, n, case, classes, spec.scalar)

        def explain(other: Case, known: torch.Tensor) -> Attribution:
            return other.attribution(method, unit.policy, known, spec.scalar)

        def measured() -> list[Row]:
            if unit.metric in METRICS:
                return [*METRICS[unit.metric](case, found, classes, spec)]
            return [*AGAIN[unit.metric](case, found, classes, spec, explain)]

        numbers, measuring = _timed(measured, case)
        seconds["attribution"] += took
        seconds["metric"] += measuring
        return numbers

    def _map(
        self, unit: Unit, method: MethodSpec, n: int, case: Case, classes: torch.Tensor, scalar: str
    ) -> tuple[Any, float]:
        """An attribution and how long it took; kept for the next metric of the method."""
        key = (unit.policy, unit.method, n, case.contrast is None, tuple(classes.tolist()), scalar)
        if key not in self.maps:
            if self.maps and next(iter(self.maps))[:2] != key[:2]:
                self.maps.clear()
            if ":" not in method.method:
                case.subject.captured(case.size, unit.policy)  # takes time of its own, once
            self.maps[key] = _timed(lambda: case.attribution(method, unit.policy, classes, scalar), case)
        return self.maps[key]

    def _row(self, unit: Unit, image: str, label: int | None, **said: Any) -> dict[str, Any]:
        row: Mapping[str, Any] = {
            "model": unit.model, "data": unit.data, "policy": unit.policy, "method": unit.method,
            "metric": unit.metric, "target": unit.target, "image": image, "label": label,
            "run": unit.key,
        }  # fmt: skip
        return {**row, **said}


def _adds_up(method: str) -> bool:
    """Whether a method promises a sum; of a function that nobody knows, it is asked."""
    if ":" in method:
        return True
    known = method_of(method)
    return known.sums or known.path == "line"


def recorded(error: Exception) -> bool:
    """Whether a failure is a result: of a sample, a method or a model. Too little memory is one. What is
    not installed is none, nor a GPU that answers nothing more: they would fail everywhere."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
    lacks = isinstance(error, ImportError) or isinstance(error.__cause__, ImportError)
    return not (lacks or isinstance(error, torch.AcceleratorError))


def _timed(do: Callable[[], Any], case: Case) -> tuple[Any, float]:
    """What it gives, and seconds."""
    start = time.perf_counter()
    found = do()
    if case.subject.device.type != "cpu":
        torch.accelerator.synchronize(case.subject.device)
    return found, time.perf_counter() - start


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
