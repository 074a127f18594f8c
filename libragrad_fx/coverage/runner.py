"""Every model in a process of its own, with limits on time and memory; results appended to a file."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from libragrad_fx.coverage.check import Result, check
from libragrad_fx.coverage.suites import build
from libragrad_fx.errors import InputError
from libragrad_fx.extras import need

_PRELOAD = ("libragrad_fx.coverage.warm", "timm")
_START = "forkserver"  # its server imports everything once: a start costs milliseconds, not seconds
STOPPED = ("timeout", "memory", "crashed")
"""Verdicts that also depend on the machine: a resumed run checks these models again."""
_POLL = 0.2  # seconds between checks of a process


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits for one model: seconds, GiB of resident memory, CPU threads."""

    seconds: float = 600
    gib: float = 20
    threads: int = 1


def run(
    suite: str,
    names: Mapping[str, str],
    *,
    static: bool,
    file: Path,
    jobs: int = 1,
    limits: Limits = Limits(),
    seen: Callable[[Result], Any] = lambda result: None,
) -> None:
    """Check ``names`` (name -> family) side by side and append each result to ``file``, a line each.

    seen: called with each result at once.
    """
    context: Any = multiprocessing.get_context(_START)
    context.set_forkserver_preload(list(_PRELOAD))
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = threading.Lock()

    def one(name: str) -> Result:
        result = _supervised(context, (suite, name, names[name], static, limits.threads), limits)
        with lock, file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(dataclasses.asdict(result)) + "\n")
        return result

    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(one, n) for n in names]):
            seen(done.result())


def read(file: Path) -> Iterator[Result]:
    """The results in a file; for each model the last one.

    Raises:
        InputError: a line is no result.
    """
    if not file.exists():
        return
    found: dict[str, Result] = {}
    lines = file.read_text("utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):  # half a result: the run was stopped while it wrote
        file.write_text("".join(lines := lines[:-1]), "utf-8")
    for number, line in enumerate(lines, 1):
        try:
            result = Result(**json.loads(line))
        except (TypeError, ValueError) as e:
            raise InputError(f"{file}:{number} is no coverage result: {e}") from e
        found[result.name] = result
    yield from found.values()


def _supervised(context: Any, task: tuple[str, str, str, bool, int], limits: Limits) -> Result:
    psutil = need("psutil", "coverage")
    suite, name, family, static, _ = task
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, *task), daemon=True)
    process.start()
    theirs.close()
    deadline = time.monotonic() + limits.seconds
    ended = Result(suite, name, family, "static" if static else "numeric", "crashed")
    try:
        while not ours.poll(_POLL):
            if time.monotonic() > deadline:
                reason = f"not done in {limits.seconds:g} s"
                return dataclasses.replace(ended, verdict="timeout", reason=reason)
            try:
                used = psutil.Process(process.pid).memory_info().rss / 2**30
            except psutil.NoSuchProcess:
                used = 0.0
            if used > limits.gib:
                reason = f"more than {limits.gib:g} GiB"
                return dataclasses.replace(ended, verdict="memory", reason=reason)
        result = ours.recv()
        process.join(_POLL)  # let it clean up after itself
        return result
    except EOFError:
        process.join()
        return dataclasses.replace(ended, reason=f"the process ended with code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _work(out: Any, suite: str, name: str, family: str, static: bool, threads: int) -> None:
    logging.disable(logging.WARNING)  # model libraries warn of missing pretrained weights
    torch.set_num_threads(threads)
    make = functools.partial(build, suite, name, fill=not static)
    out.send(check(suite, name, family, static, make))
