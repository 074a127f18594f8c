"""``libragrad graph``: draw where a backward creates or destroys attribution."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import libragrad_fx as lg
from libragrad_fx.cli.common import guessed_inputs, load_model, target_of, working
from libragrad_fx.cli.options import Checkpoint, ModelName, Pretrained, Seed, TargetIndex, app
from libragrad_fx.errors import InputError


@app.command()
def graph(
    model: ModelName,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FILE", help="Picture: .html .svg .png .pdf .dot .json"),
    ] = None,
    depth: Annotated[int, typer.Option(min=1, help="Names of a module path to tell apart.")] = 2,
    focus: Annotated[str, typer.Option(metavar="MODULE", help="Module to draw op by op: blocks.3")] = "",
    view: Annotated[
        Literal["graph", "streams", "model-explorer"],
        typer.Option(
            help="streams: the residual stream against its branches (.svg .png .pdf)."
            " model-explorer: for Google's tool (.json)."
        ),
    ] = "graph",
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
    target: TargetIndex = None,
    seed: Seed = 0,
) -> None:
    """Print what each module loses and creates under autograd, and what balancing does; or draw it."""
    from libragrad_fx.viz.draw import tree  # here, so that only drawing imports networkx
    from libragrad_fx.viz.flow import streams
    from libragrad_fx.viz.strip import joined, streams_table

    if out is None and (focus or view == "model-explorer"):
        raise InputError("--focus and --view model-explorer are for a file: add -o FILE")
    module = load_model(model, pretrained, checkpoint, seed).module
    with working("capturing the model, two backwards"):
        inputs = guessed_inputs(module, seed)
        chosen = target_of(module, inputs, target)
        if out is None:
            found = lg.gradient_graph(module, inputs, chosen)
            text = streams_table(joined(streams(found))) if view == "streams" else tree(found, depth)
        else:
            text = str(lg.visualize(module, out, inputs, chosen, view=view, depth=depth, focus=focus))
    typer.echo(text)
