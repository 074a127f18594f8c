"""``libragrad search-policy``: is there a policy better than the paper's?"""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer

from libragrad_fx.cli.options import Json, answer, app
from libragrad_fx.cli.progress import counting
from libragrad_fx.extras import writable


@app.command("search-policy")
def search_policy(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Models, data, and the two sides.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The folder of the search.")
    ] = Path("out/search"),
    json: Json = False,
) -> None:
    """Search over the rows of a policy, and compare the best with libra on what was not searched.

    It goes on where it was stopped. DIR gets found.json and a policy for each model that is compared.
    """
    from libragrad_fx.evaluate import search as searching

    asked = searching.SearchConfig.load(config)
    writable(output, folder=True)
    with counting("searching", asked.trials) as bar:
        found = searching.search(asked, output, lambda i, _: bar.upto(i + 1))
    lines = [f"best of {found.trials}: {found.value:+.3f}, libra {found.libra:+.3f} on the search set"]
    for model, pair in found.compared.items():
        d = pair.difference
        lines.append(
            f"{model}: found - libra {d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}], {pair.wins} wins,"
            f" {pair.losses} losses of {d.n}"
        )
    file = output / "found.json"
    lines.append(f"wrote {file}")
    answer(json_format.loads(file.read_text("utf-8")), json, "\n".join(lines))
