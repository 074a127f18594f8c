"""``libragrad report``: the tables and curves of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from libragrad_fx.cli.options import Json, answer, app


@app.command()
def report(
    results: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that `evaluate` wrote.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="HTML that stands alone, or .md.")
    ] = Path("out/report.html"),
    base: Annotated[str, typer.Option(metavar="POLICY", help="What is compared with.")] = "autograd",
    policy: Annotated[str, typer.Option(metavar="POLICY", help="What is compared.")] = "libra",
    json: Json = False,
) -> None:
    """Write a report: losses first, then a table for each measure, with paired intervals."""
    from libragrad_fx.evaluate import report as reporting

    file = reporting.report(results, output, (base, policy))
    answer({"file": str(file)}, json, f"wrote {file}")
