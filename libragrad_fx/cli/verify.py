"""``libragrad verify``: check every promise."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import typer

import libragrad_fx as lg
from libragrad_fx.cli.common import guessed_inputs, load_model, target_of
from libragrad_fx.cli.options import (
    Checkpoint,
    Json,
    ModelName,
    Policy,
    Pretrained,
    Rules,
    Seed,
    TargetIndex,
    answer,
    app,
)
from libragrad_fx.cli.progress import working


@app.command()
def verify(
    model: ModelName,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
    target: TargetIndex = None,
    dtype: Annotated[
        Literal["float32", "float64"],
        typer.Option(help="What to compute in; float64 is the sharper."),
    ] = "float32",
    policy: Policy = "libra",
    rules: Rules = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Check every promise on random inputs and print the certificate; exit 1 if one is broken.

    Same output to the bit, the original graph under the edits, every node balanced, nothing lost.
    """
    module = load_model(model, pretrained, checkpoint, seed).module.to(getattr(torch, dtype))
    with working("capturing the model") as say:
        inputs = guessed_inputs(module, seed)
        gm = lg.transform(module, inputs, policy=policy, on_unknown="keep", rules=rules)
        say("checking")
        certificate = lg.verify(module, gm, inputs, target_of(module, inputs, target))
    answer(certificate, json)
    if not certificate.ok:
        raise typer.Exit(1)
