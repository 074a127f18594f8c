"""``libragrad evaluate``: models by methods by policies by metrics by data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

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


@app.command(short_help="Measure explanations of models on data, from one file.")
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
    """
    from libragrad_fx import evaluate as evaluating
    from libragrad_fx.evaluate import cluster

    asked, console = evaluating.Config.load(config), Console(stderr=True)
    columns = (
        TextColumn("evaluating"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    failures: dict[str, int] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def seen(unit: object, failed: object) -> None:
            bar.update(task, advance=1)
            for why in failed:  # type: ignore[attr-defined]
                line = f"{unit.model} {unit.method} {unit.metric}: {one_line(why)[:200]}"  # type: ignore[attr-defined]
                if failures.setdefault(line, 0) == 0:
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
                failures[line] += 1

        told = {"seen": seen, "total": lambda n: bar.update(task, total=n), "retry": retry}
        if engine == "ray":
            done = cluster.evaluate(asked, output, workers=workers, **told)
        else:
            share = evaluating.Share.found(rank, world)
            done = evaluating.evaluate(asked, output, share=share, **told)
    if done is None:
        typer.echo(f"this share is done; others have work left in {output}")
    else:
        typer.echo(f"wrote {done}")
