"""``libragrad coverage``: check whole model libraries."""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from libragrad_fx.cli.options import app, one_line
from libragrad_fx.errors import InputError
from libragrad_fx.extras import writing


@app.command()
def coverage(
    suite: Annotated[
        Literal["timm", "timm-all", "torchvision", "hf", "openclip", "community"] | None,
        typer.Option(
            help="What to check. timm: the smallest model of every module. hf, community: in a checkout."
        ),
    ] = None,
    only: Annotated[
        str, typer.Option("--filter", metavar="GLOB", help="Only names that match: 'vit_*'.")
    ] = "*",
    static: Annotated[bool, typer.Option("--static", help="Capture, plan and prove; run nothing.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Models checked side by side.")] = 1,
    resume: Annotated[bool, typer.Option(help="Keep what is in the results file, check the rest.")] = True,
    seconds: Annotated[float, typer.Option(min=1, help="Time limit a model.")] = 600,
    memory: Annotated[float, typer.Option(min=1, help="Memory limit a model, in GiB.")] = 20,
    results: Annotated[
        Path, typer.Option(metavar="DIR", help="One file of results (JSON lines) a suite.")
    ] = Path("out/coverage"),
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all results in DIR as a page.")
    ] = None,
) -> None:
    """Check every promise on the models of a library, each in a process of its own.

    Each result is appended to the file at once; a stopped run resumes there.
    """
    from libragrad_fx import coverage as cover

    if suite is None and report is None:
        raise InputError("nothing to do: give --suite, or --report to render what is there")
    if suite is not None:
        file = results / f"{suite}{'-static' if static else ''}.jsonl"
        fitting = {n: f for n, f in cover.SUITES[suite].names().items() if fnmatch.fnmatch(n, only)}
        if not fitting:
            raise InputError(f"no name of {suite} matches {only!r}")
        if not resume:
            file.unlink(missing_ok=True)
        done = {r.name for r in cover.read(file) if r.verdict not in cover.STOPPED}
        names = {n: f for n, f in fitting.items() if n not in done}
        limits = cover.Limits(seconds, memory, max(1, (os.cpu_count() or 1) // jobs))
        with _counting(f"{suite}{', static' if static else ''}", len(names)) as seen:
            cover.run(suite, names, static=static, file=file, jobs=jobs, limits=limits, seen=seen)
        found = list(cover.read(file))
        balanced = sum(r.verdict == "balanced" for r in found)
        typer.echo(f"{suite}: {balanced} of {len(found)} balanced, {len(names)} checked now; {file}")
    if report is not None:
        files = sorted(results.glob("*.jsonl"))
        if not files:
            raise InputError(f"there are no results in {str(results)!r}")
        with writing(report):
            report.write_bytes(cover.render(r for f in files for r in cover.read(f)).encode())
        typer.echo(f"wrote {report}")


@contextlib.contextmanager
def _counting(what: str, total: int) -> Iterator[Any]:
    """A progress bar on a terminal; models that are not balanced are printed at once."""
    console = Console(stderr=True)
    with Progress(
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.description}"), console=console, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=total)

        def seen(result: Any) -> None:
            bar.update(task, advance=1, description=result.name)
            if result.verdict != "balanced":
                text = f"{result.name}: {result.verdict}: {one_line(result.reason)[:200]}"
                console.print(text, markup=False, highlight=False, soft_wrap=True)

        yield seen
