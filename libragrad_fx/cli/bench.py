"""``libragrad bench``: time the balanced backward against autograd's."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import torch
import typer

import libragrad_fx as lg
from libragrad_fx.attribution import METHODS
from libragrad_fx.cli.common import guessed_inputs, load_model
from libragrad_fx.cli.options import Json, ModelName, Seed, answer, app
from libragrad_fx.cli.progress import counting, working
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
    json: Json = False,
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
    with counting("timing", rounds * len(sides)) as bar:
        timed = race if methods else compare
        found = timed(sides, x, rounds, seen=bar.step)
    about = {"model": model, "shape": [*x.shape], "dtype": str(x.dtype), "threads": threads}
    about["torch"] = torch.__version__
    lines = [
        f"{model}, {tuple(x.shape)}, {x.dtype}, {threads} threads, torch {torch.__version__}", HEAD,
        *(c.against(found[0]) for c in found), *(f"{name}: {why}" for name, why in refused.items()),
    ]  # fmt: skip
    costs = [dataclasses.asdict(c) for c in found]
    answer({**about, "costs": costs, "refused": refused}, json, "\n".join(lines))
