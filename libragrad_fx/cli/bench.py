"""``libragrad bench``: time the balanced backward against autograd's."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

import libragrad_fx as lg
from libragrad_fx.attribution import METHODS
from libragrad_fx.cli.common import guessed_inputs, load_model, working
from libragrad_fx.cli.options import ModelName, Seed, app
from libragrad_fx.errors import InputError
from libragrad_fx.target import middle, select


@app.command()
def bench(
    model: ModelName,
    batch: Annotated[int, typer.Option(min=1, help="Samples at once.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each side is run.")] = 10,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    weights: Annotated[
        bool, typer.Option("--weights", help="Leave parameters requiring gradients.")
    ] = False,
    methods: Annotated[
        bool, typer.Option("--methods", help="Every attribution method instead, on the balanced backward.")
    ] = False,
    seed: Seed = 0,
) -> None:
    """Run forward and backward to the input, plain and balanced in turns, and print what they cost.

    "operations" is the share of the plain side's matrix products that is left: the time ratio if
    everything else were free.
    """
    from libragrad_fx.bench import HEAD, compare, gradient, race

    torch.set_num_threads(threads)
    module = load_model(model, False, None, seed).module
    module.requires_grad_(weights)
    with working("capturing the model") as say:
        inputs = guessed_inputs(module, seed)
        (x,) = inputs if isinstance(inputs, tuple) and len(inputs) == 1 else (None,)
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            raise InputError(f"bench times the gradient of one image-like input; {model} takes others")
        x = torch.randn(batch, *x.shape[1:], dtype=x.dtype)
        gm = lg.transform(module, x)
        sides = {
            n: gradient(lambda z, m=m: select(m(z), middle))
            for n, m in (("plain", module), ("balanced", gm))
        }
        refused: dict[str, str] = {}
        for name in METHODS if methods else ():
            say(f"trying {name}")
            side = lambda z, m=name: lg.attribute(gm, z, middle, method=m)  # noqa: E731
            try:
                side(x)
                sides[name] = side
            except InputError as e:
                refused[name] = str(e)
        say("timing")
        found = race(sides, x, rounds) if methods else compare(sides, x, rounds)
    typer.echo(f"{model}, {tuple(x.shape)}, {x.dtype}, {threads} threads, torch {torch.__version__}")
    typer.echo("\n".join([HEAD, *(c.against(found[0]) for c in found)]))
    for name, why in refused.items():
        typer.echo(f"{name}: {why}")
