"""Progress, on stderr if that is a terminal; elsewhere nothing is shown. What models and libraries print
meanwhile goes to stderr too: stdout is for results."""

from __future__ import annotations

import contextlib
import dataclasses
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

    def step(self) -> None:
        """One more is done."""
        self.progress.advance(self.task)

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
        task = progress.add_task(what, total=None)
        yield lambda text: progress.update(task, description=text)


@contextlib.contextmanager
def counting(what: str, total: int | None = None) -> Iterator[Bar]:
    """A bar: how many are done of how many, the time so far, and what is left of it at this pace."""
    columns = TextColumn(what, markup=False), BarColumn(), MofNCompleteColumn()
    with _shown(*columns, TimeElapsedColumn(), TimeRemainingColumn(), _NOW) as progress:
        yield Bar(progress, progress.add_task("", total=total))


@contextlib.contextmanager
def _shown(*columns: ProgressColumn) -> Iterator[Progress]:
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with (
        Progress(
            *columns, console=console, disable=hidden, transient=True, redirect_stdout=False
        ) as progress,
        contextlib.redirect_stdout(sys.stderr),
    ):
        yield progress
