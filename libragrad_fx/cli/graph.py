"""``libragrad graph``: draw where a backward creates or destroys attribution."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import libragrad_fx as lg
from libragrad_fx.cli.common import guessed_inputs, load_model, target_of
from libragrad_fx.cli.options import Checkpoint, Json, ModelName, Pretrained, Seed, TargetIndex, answer, app
from libragrad_fx.cli.progress import working
from libragrad_fx.errors import InputError


@app.command()
def graph(
    model: ModelName,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Picture: .html .svg .png .pdf .dot .json"),
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
    json: Json = False,
) -> None:
    """Print what each module loses and creates under autograd, and what balancing does; or draw it."""
    from libragrad_fx.viz.draw import modules, tree  # here, so that only drawing imports networkx
    from libragrad_fx.viz.flow import streams
    from libragrad_fx.viz.strip import joined, streams_table
    from libragrad_fx.viz.write import check_path

    if output is not None:
        check_path(output, view)
    elif focus or view == "model-explorer":
        raise InputError("--focus and --view model-explorer are for a file: add -o FILE")
    module = load_model(model, pretrained, checkpoint, seed).module
    with working("capturing the model, two backwards"):
        inputs = guessed_inputs(module, seed)
        chosen = target_of(module, inputs, target)
        found: Any = None
        if output is None:
            found = lg.gradient_graph(module, inputs, chosen)
        else:
            lg.visualize(module, output, inputs, chosen, view=view, depth=depth, focus=focus)
    if output is not None:
        answer({"file": str(output)}, json, f"wrote {output}")
    elif view == "streams":
        joins = joined(streams(found))
        answer({"joins": [dataclasses.asdict(j) for j in joins]}, json, streams_table(joins))
    else:
        rows = modules(found, depth)
        answer({"modules": rows}, json, tree(rows))
