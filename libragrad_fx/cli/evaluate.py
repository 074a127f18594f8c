"""``libragrad evaluate``: models by methods by policies by metrics by data."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from libragrad_fx.cli.options import Json, answer, app, one_line
from libragrad_fx.cli.progress import Bar, counting
from libragrad_fx.extras import writable


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
    json: Json = False,
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
    writable(output, folder=True)
    with counting("evaluating") as bar:
        told: dict[str, Any] = {"seen": _seen(bar), "total": bar.of}
        if engine == "ray":
            from libragrad_fx.evaluate import cluster

            done = cluster.evaluate(asked, output, workers=workers, retry=retry, **told)
        else:
            done = run(asked, output, share=Share.found(rank, world), retry=retry, **told)
    took = time.monotonic() - start
    if done is None:
        text = f"this share is done ({took:.0f} s); others have work left in {output}"
        answer({"results": None, "seconds": took}, json, text)
        return
    numbers, failures = Store(output).counted()
    said = {"results": str(done), "numbers": numbers, "failures": failures, "seconds": took}
    answer(said, json, f"wrote {done}: {numbers} numbers, {failures} failures ({took:.0f} s)")
    if numbers == 0:
        raise typer.Exit(1)


def _seen(bar: Bar) -> Callable[[Any, Sequence[str]], None]:
    """What is done with each unit: it is counted, and each failure of a model is printed once."""
    said = set[str]()

    def seen(unit: Any, failed: Sequence[str]) -> None:
        bar.at(f"{unit.model} {unit.method}")
        bar.step()
        for why in failed:
            line = f"{unit.model} on {unit.data}: {one_line(why)[:200]}"
            if line not in said:
                said.add(line)
                bar.line(f"{line} (first in {unit.metric} of {unit.method}, {unit.policy})")

    return seen
