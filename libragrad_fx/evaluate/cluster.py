"""Runs an evaluation on a Ray cluster: a job is a row of a ``ray.data.Dataset``.

Ray starts a job again whose worker died; what its units had written is not done again. The folder of
results is one that all nodes see.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from libragrad_fx.errors import LibraGradError
from libragrad_fx.evaluate.config import Config
from libragrad_fx.evaluate.runner import Bench, Seen, begin, work
from libragrad_fx.evaluate.store import Store
from libragrad_fx.extras import need
from libragrad_fx.models import first_line


class Worker:
    """One process. It keeps its last model for the next job."""

    def __init__(self, config: dict[str, Any], folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.bench, self.store = Bench(Config.of(config)), Store(Path(folder))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        failed: list[list[str]] = []
        job = row["model"], row["data"], row["chunk"]
        work(self.bench, self.store, job, lambda _, why: failed.append([*why]))
        return {**row, "failed": json.dumps(failed)}


def evaluate(
    config: Config, folder: str | Path, *, workers: int = 2, seen: Seen | None = None,
    total: Callable[[int], None] | None = None, retry: bool = False,
) -> Path | None:  # fmt: skip
    """As ``runner.evaluate``, by ``workers`` processes of Ray: of a cluster that ``RAY_ADDRESS`` names,
    else of this machine.

    Raises:
        LibraGradError: Ray is not installed, or a worker cannot go on.
    """
    ray = need("ray", "cluster")
    need("ray.data", "cluster")
    bench, store = Bench(config, torch.device("cpu")), Store(Path(folder).resolve())
    jobs = bench.jobs()
    begin(bench, store, jobs, retry)
    if total is not None:
        total(sum(len(bench.units(*job)) for job in jobs))
    started = not ray.is_initialized()
    if started:
        _start(ray, workers)
    try:
        for row in _rows(ray, config, store, jobs, workers):
            failed = json.loads(row["failed"]) if seen is not None else []
            for unit, why in zip(
                bench.units(row["model"], row["data"], row["chunk"]), failed, strict=False
            ):
                seen(unit, why)  # type: ignore[misc]
    except ray.exceptions.RayError as e:
        raise LibraGradError(f"a worker cannot go on: {first_line(getattr(e, 'cause', None) or e)}") from e
    finally:
        if started:
            ray.shutdown()
    return store.collect(bench.all_units(), config.model_dump(mode="json"))


def _rows(ray: Any, config: Config, store: Store, jobs: Any, workers: int) -> Any:
    """The jobs as they are done, each a task of its own.

    They are put into blocks here: a ``repartition`` is a task, which would wait for ever for a CPU where
    the workers have them all.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    threads = config.threads or max(1, (os.cpu_count() or 1) // workers)
    todo = [{"model": m, "data": d, "chunk": c} for m, d, c in jobs]
    return ray.data.from_items(todo, override_num_blocks=len(todo)).map(
        Worker, fn_constructor_args=(config.model_dump(mode="json"), str(store.folder), threads),
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(todo))), num_cpus=1,
        num_gpus=1 if config.device.startswith("cuda") else 0,
    ).iter_rows()  # fmt: skip


def _start(ray: Any, workers: int) -> None:
    """Ray, where none runs: a cluster that the environment names, else this machine, with a CPU for each
    worker and one more. Workers import what this process can."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray Data gives workers what Ray warns of
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": max(workers + 1, os.cpu_count() or 1)}
    ray.init(
        log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": path}}, **here,
    )  # fmt: skip
    logging.getLogger("ray.data").setLevel(logging.ERROR)
