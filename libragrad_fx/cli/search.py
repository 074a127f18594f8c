"""``libragrad search-policy``: is there a policy better than the paper's?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from libragrad_fx.cli.options import app


@app.command("search-policy")
def search_policy(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Models, data, and the two sides.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The folder of the search.")
    ] = Path("out/search"),
) -> None:
    """Search over the rows of a policy, and compare the best with libra on what was not searched.

    It goes on where it was stopped. DIR gets found.json and a policy for each model that is compared.
    """
    from libragrad_fx.evaluate import search as searching

    asked = searching.SearchConfig.load(config)
    console = Console(stderr=True)
    columns = (TextColumn("searching"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=asked.trials)
        found = searching.search(asked, output, lambda number, _: bar.update(task, completed=number + 1))
    typer.echo(f"best of {found.trials}: {found.value:+.3f}, libra {found.libra:+.3f} on the search set")
    for model, pair in found.compared.items():
        d = pair.difference
        typer.echo(
            f"{model}: found - libra {d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}], {pair.wins} wins,"
            f" {pair.losses} losses of {d.n}"
        )
    typer.echo(f"wrote {output / 'found.json'}")
