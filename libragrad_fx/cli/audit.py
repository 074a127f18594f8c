"""``libragrad audit``: show which nodes create or destroy attribution."""

from __future__ import annotations

from typing import Annotated

import typer

import libragrad_fx as lg
from libragrad_fx.cli.common import guessed_inputs, load_model, target_of
from libragrad_fx.cli.options import Checkpoint, Json, ModelName, Pretrained, Seed, TargetIndex, answer, app
from libragrad_fx.cli.progress import working


@app.command()
def audit(
    model: ModelName,
    balanced: Annotated[bool, typer.Option("--balanced", help="Audit the balanced backward.")] = False,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
    target: TargetIndex = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Show where a backward creates or destroys attribution: the ledger, its worst nodes first."""
    module = load_model(model, pretrained, checkpoint, seed).module
    with working("capturing the model") as say:
        inputs = guessed_inputs(module, seed)
        gm = lg.transform(module, inputs) if balanced else lg.trace(module, inputs)
        say("one backward")
        account = lg.audit(gm, inputs, target_of(module, inputs, target))
    answer(account, json)
