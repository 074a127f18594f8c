"""``libragrad compile``: an explanation as a file that runs without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import libragrad_fx as lg
from libragrad_fx import models
from libragrad_fx.attribution.formulas import method_of
from libragrad_fx.cli.common import guessed_inputs, load_model
from libragrad_fx.cli.given import items
from libragrad_fx.cli.options import (
    Checkpoint,
    Json,
    ModelName,
    Policy,
    Pretrained,
    Seed,
    answer,
    app,
    method_names,
)
from libragrad_fx.cli.progress import working
from libragrad_fx.errors import InputError
from libragrad_fx.extras import writable
from libragrad_fx.programs import page

_FORMS = {".aoti.pt2": "package", ".pt2": "save", ".onnx": "to_onnx", page.ENDING: "to_page"}
"""The method of ``Program`` for a file's ending."""


@app.command("compile")
def compile_(
    model: ModelName,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Its ending decides: .pt2 for PyTorch, .aoti.pt2 for PyTorch and C++, compiled, .onnx for"
            " ONNX Runtime, .html for a page that explains pictures in a browser.",
        ),
    ],
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
    method: Annotated[
        str, typer.Option(help="See libragrad methods.", autocompletion=method_names)
    ] = "fullgrad_plus",
    policy: Policy = "libra",
    resolution: Annotated[
        Literal["tokens", "pixels"], typer.Option(help="Where methods look that look at one place.")
    ] = "tokens",
    steps: Annotated[
        int, typer.Option(help="Of means over inputs: how many. All of them run as one batch.", min=1)
    ] = 50,
    single: Annotated[
        bool, typer.Option("--single", help="For one sample at a time, not for any batch of more.")
    ] = False,
    runtime: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Of .html: where npm install onnxruntime-web was run; the working folder if not said.",
        ),
    ] = None,
    examples: Annotated[
        list[str] | None,
        typer.Option(metavar="IMAGE|FOLDER|GLOB", help="Of .html: pictures to offer. May be repeated."),
    ] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Forward, balanced backward and method as one file. It is loaded again and its map compared.

    It takes what the model takes (pictures: already normalised), and a target: of each sample the index of
    a class, -1 for the model's own answer. It returns the map first.
    """
    writable(output, [*_FORMS])
    form = next(f for ending, f in _FORMS.items() if output.name.endswith(ending))
    paged = form == _FORMS[page.ENDING]
    method_of(method)  # before any work
    if (examples or runtime) and not paged:
        raise InputError(f"--examples and --runtime are for a page ({page.ENDING})")
    if paged:
        page.require(output, runtime or Path())
    pictures = [models.read_image(item.value) for item in items(examples or [], False)]
    loaded = load_model(model, pretrained, checkpoint, seed)
    module = loaded.module.requires_grad_(False)
    with working("tracing") as say:
        inputs = guessed_inputs(module, seed, single=single or paged)
        processor = None
        if paged:
            page.require_picture(inputs)
            processor = models.processor(loaded)
        program = lg.program(
            module, inputs, method=method, policy=policy, resolution=resolution, steps=steps, seed=seed,
            processor=processor,
        )  # fmt: skip
        say(f"writing {output}")
        if paged:
            about = {"title": loaded.title, "labels": models.categories(loaded)}
            program.to_page(output, pictures or inputs, runtime=runtime or Path(), **about)
        else:
            getattr(program, form)(output, inputs)
    said: dict[str, Any] = {
        "file": str(output), "bytes": output.stat().st_size, "method": method,
        "inputs": program.signature(inputs), "outputs": program.outputs(inputs),
    }  # fmt: skip
    lines = [f"{output}: {said['bytes'] / 2**20:.1f} MiB"]
    lines += [f"takes    {name}: {sizes}" for name, sizes in said["inputs"].items()]
    answer(said, json, "\n".join([*lines, f"returns  {', '.join(said['outputs'])}"]))
