"""Runs an evaluation on a Ray cluster: a chunk of samples is a row of a ``ray.data.Dataset``.

Ray starts a chunk again whose worker died. The folder of results is one that all nodes see.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from libragrad_fx.evaluate.config import Config
from libragrad_fx.evaluate.runner import Bench, Seen, jobs, per_chunk, work
from libragrad_fx.evaluate.store import Store
from libragrad_fx.extras import need


class Worker:
    """One process. It keeps its last model for the next chunk."""

    def __init__(self, config: dict[str, Any], folder: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.bench, self.store = Bench(Config.of(config)), Store(Path(folder))

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        failed: list[str] = []
        work(
            self.bench,
            self.store,
            job["model"],
            job["data"],
            job["chunk"],
            lambda _, why: failed.extend(why),
        )
        return {**job, "failed": sorted(set(failed))}


def evaluate(
    config: Config, folder: str | Path, *, workers: int = 2, seen: Seen | None = None,
    total: Callable[[int], None] | None = None, retry: bool = False,
) -> Path | None:  # fmt: skip
    """As ``runner.evaluate``, by ``workers`` processes of Ray: those of a cluster that ``ray.init`` finds, else
    of this machine.

    Raises:
        LibraGradError: Ray is not installed.
    """
    ray, data = need("ray", "cluster"), need("ray.data", "cluster")
    bench, store = Bench(config), Store(Path(folder).resolve())
    todo = [{"model": m, "data": d, "chunk": c} for m, d, c in jobs(bench)]
    if retry:
        store.forget_failures(bench.all_units())
    if total is not None:
        total(len(todo) * per_chunk(config))
    if not ray.is_initialized():
        path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
        ray.init(log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    gpus = {"num_gpus": 1} if config.device.startswith("cuda") else {}
    threads = max(1, (os.cpu_count() or 1) // workers)
    rows = data.from_items(todo).repartition(len(todo)).map(
        Worker, fn_constructor_args=(config.model_dump(mode="json"), str(store.folder), threads),
        concurrency=workers, num_cpus=1, **gpus,
    )  # fmt: skip
    for row in rows.iter_rows():
        for unit in bench.units(row["model"], row["data"], row["chunk"]) if seen is not None else ():
            seen(unit, row["failed"])
    return store.collect(bench.all_units(), config.model_dump(mode="json"))
