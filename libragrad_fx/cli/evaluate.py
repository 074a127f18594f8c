"""``libragrad evaluate``: models by methods by policies by metrics by data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from libragrad_fx.cli.options import app, one_line


@app.command()
def evaluate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Models, data, methods, metrics.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The folder of the results.")
    ] = Path("out/evaluation"),
    rank: Annotated[
        int | None, typer.Option(min=0, help="This process's number. torchrun and SLURM arrays say it.")
    ] = None,
    world: Annotated[int | None, typer.Option(min=1, help="How many processes share the work.")] = None,
    engine: Annotated[
        Literal["process", "ray"], typer.Option(help="Work in this process, or on a Ray cluster.")
    ] = "process",
    workers: Annotated[int, typer.Option(min=1, help="Ray: how many workers.")] = 2,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what failed.")] = False,
) -> None:
    """Do what is not done of an evaluation. It goes on where it was stopped, however that was.

    Results: DIR/results.parquet, a row for each number, and DIR/runs.parquet, what each was made by.
    What fails is a row with an error. The exit code is 1 if there is no number at all.
    """
    from libragrad_fx.evaluate.config import Config
    from libragrad_fx.evaluate.runner import Share
    from libragrad_fx.evaluate.runner import evaluate as run
    from libragrad_fx.evaluate.store import Store

    asked, start = Config.load(config), time.monotonic()
    with _counting() as told:
        if engine == "ray":
            from libragrad_fx.evaluate import cluster

            done = cluster.evaluate(asked, output, workers=workers, retry=retry, **told)
        else:
            done = run(asked, output, share=Share.found(rank, world), retry=retry, **told)
    took = f"{time.monotonic() - start:.0f} s"
    if done is None:
        typer.echo(f"this share is done ({took}); others have work left in {output}")
        return
    numbers, failures = Store(output).counted()
    typer.echo(f"wrote {done}: {numbers} numbers, {failures} failures ({took})")
    if numbers == 0:
        raise typer.Exit(1)


@contextlib.contextmanager
def _counting() -> Iterator[dict[str, Any]]:
    """A progress bar on a terminal; each failure of a model is printed once."""
    console, said = Console(stderr=True), set[str]()
    columns = (
        TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.description}"),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def seen(unit: Any, failed: Sequence[str]) -> None:
            bar.update(task, advance=1, description=f"{unit.model} {unit.method}")
            for why in failed:
                line = f"{unit.model} on {unit.data}: {one_line(why)[:200]}"
                if line not in said:
                    said.add(line)
                    text = f"{line} (first in {unit.metric} of {unit.method}, {unit.policy})"
                    console.print(text, markup=False, highlight=False, soft_wrap=True)

        yield {"seen": seen, "total": lambda n: bar.update(task, total=n)}
