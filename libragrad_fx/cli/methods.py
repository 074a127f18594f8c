"""``libragrad methods``: list what explains a model, and why the rest does not."""

from __future__ import annotations

import libragrad_fx as lg
from libragrad_fx.attribution import METHODS
from libragrad_fx.cli.common import guessed_inputs, load_model
from libragrad_fx.cli.options import Json, ModelName, Policy, Seed, answer, app, one_line
from libragrad_fx.cli.progress import working
from libragrad_fx.viz.text import table


@app.command()
def methods(model: ModelName, policy: Policy = "libra", seed: Seed = 0, json: Json = False) -> None:
    """Try every attribution method on a model, and say which it supports: of the others why not, and what
    to use instead."""
    module = load_model(model, False, None, seed).module
    with working("trying each method"):
        found = lg.methods(module, guessed_inputs(module, seed, single=True), policy=policy)
    rows = [
        (name, "no" if why else "yes", one_line(why) or METHODS[name].source) for name, why in found.items()
    ]
    lines = table(("method", "supported", "source, or why not"), rows)
    lines.append(f"{sum(not why for why in found.values())} of {len(found)} are supported")
    answer(found, json, "\n".join(lines))
