"""Progress, on stderr: a bar on a terminal, elsewhere a line a minute. What models and libraries print
meanwhile goes to stderr too: stdout is for results."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_NOW = TextColumn("{task.description}", markup=False)
_EVERY = 60.0  # seconds between lines where there is no terminal
_PACE = 900.0  # seconds that the pace is taken of: a step of an evaluation takes minutes


@dataclasses.dataclass(frozen=True)
class Bar:
    """What is counted."""

    progress: Progress
    task: TaskID

    def of(self, total: int) -> None:
        """How many there are, once that is known."""
        self.progress.update(self.task, total=total)

    def at(self, what: str) -> None:
        """What is worked on now."""
        self.progress.update(self.task, description=what)
        _tell(self.progress)

    def step(self) -> None:
        """One more is done."""
        self.progress.advance(self.task)
        _tell(self.progress)

    def upto(self, count: int) -> None:
        """So many are done, those of an earlier run among them."""
        self.progress.update(self.task, completed=count)

    def line(self, text: str) -> None:
        """A line on stderr, on a terminal above the bar."""
        self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """A spinner with the time so far. Yields a function that changes its text."""
    with _shown(SpinnerColumn(), _NOW, TimeElapsedColumn()) as progress:
        task = progress.add_task(what, total=None, told=0.0, what="")

        def at(text: str) -> None:
            progress.update(task, description=text)
            _tell(progress)

        yield at


@contextlib.contextmanager
def counting(what: str, total: int | None = None) -> Iterator[Bar]:
    """A bar: how many are done of how many, the time so far, and what is left of it at this pace."""
    columns = TextColumn(what, markup=False), BarColumn(), MofNCompleteColumn()
    with _shown(*columns, TimeElapsedColumn(), TimeRemainingColumn(), _NOW) as progress:
        yield Bar(progress, progress.add_task("", total=total, told=0.0, what=what))


@contextlib.contextmanager
def _shown(*columns: ProgressColumn) -> Iterator[Progress]:
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with (
        Progress(
            *columns, console=console, disable=hidden, transient=True, redirect_stdout=False,
            speed_estimate_period=_PACE,
        ) as progress,
        contextlib.redirect_stdout(sys.stderr),
    ):  # fmt: skip
        yield progress


def _tell(progress: Progress) -> None:
    """What a bar would show, as a line, if the last one is old: for the logs of a cluster."""
    (task,) = progress.tasks
    so_far = task.elapsed or 0.0
    if progress.console.is_terminal or so_far < task.fields["told"] + _EVERY:
        return
    progress.update(task.id, told=so_far)
    done = f"{task.completed:g} of {task.total:g}" if task.total else ""
    times = [(so_far, "so far"), *([(task.time_remaining, "left")] if task.time_remaining else [])]
    said = [f"{datetime.timedelta(seconds=round(t))} {which}" for t, which in times]
    what = " ".join(filter(None, (task.fields["what"], done)))
    progress.console.print(
        ", ".join(filter(None, (what, *said, task.description))),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
