"""``libragrad explain``: draw a picture's attribution map."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

import libragrad_fx as lg
from libragrad_fx import models
from libragrad_fx.attribution import METHODS
from libragrad_fx.cli.common import dtype_of, load_model, run_once, working, write_file
from libragrad_fx.cli.options import Checkpoint, Pretrained, TargetIndex, app
from libragrad_fx.errors import InputError
from libragrad_fx.extras import need
from libragrad_fx.target import first_tensor, largest

_CAPTIONS = {"fullgrad_plus": "FullGrad+", "input_x_gradient": "Input×Gradient"}
_Name: Any = Literal[tuple(METHODS)]  # type: ignore[valid-type]


@app.command(short_help="Draw what speaks for a class in a picture.")
def explain(
    image: Annotated[Path, typer.Argument(help="Any picture.")],
    model: Annotated[str, typer.Option(help="As MODEL in the other commands.")],
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
    target: TargetIndex = None,
    method: Annotated[
        _Name,  # pyright: ignore[reportInvalidTypeForm]
        typer.Option(help="Gradients are taken at the first block, if the model has blocks."),
    ] = "fullgrad_plus",
    plain: Annotated[bool, typer.Option("--plain", help="Only the map of the plain gradient.")] = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture.")] = Path("out.png"),
) -> None:
    """Draw which parts of a picture speak for a class, and which against it.

    A PNG: the input, the map of the plain gradient and the map of the balanced one, on one scale.
    """
    heatmap = _heatmap()
    picture = models.read_image(image)
    loaded = load_model(model, pretrained, checkpoint, seed=0)
    steps = models.preprocessing(loaded)
    x = steps.to_tensor(picture)[None].to(dtype_of(loaded.module))
    with working("capturing the model") as say:
        sides: dict[str, Any] = {"plain": lg.trace(loaded.module, x)}
        if not plain:
            sides["balanced"] = lg.transform(loaded.module, x)
        logits = first_tensor(run_once(sides["plain"], x))
        if bool(logits.isnan().any()):
            raise InputError(f"{model} answers nan on this picture: there is nothing to draw")
        chosen = target if target is not None else largest(logits)
        say("explaining")
        found = {k: _attribute(gm, x, chosen, method) for k, gm in sides.items()}
    maps = {k: a.values[0] for k, a in found.items()}
    if any(m.ndim != 2 for m in maps.values()):
        raise InputError(f"{model} gives a map over tokens that have no place in the picture")
    title = _title(loaded, logits, chosen)
    name = _CAPTIONS.get(method, method)
    errors = {k: _error(float(a.completeness_error[0])) for k, a in found.items()}
    captions = [(f"{name}, {k}\n{error}", k) for k, error in errors.items()]
    sheet = heatmap.figure(
        steps.seen(x[0]), [(c, maps[k].numpy()) for c, k in captions], title, _weights(loaded)
    )
    write_file(output, lambda file: sheet.savefig(file, format="png"))
    typer.echo(f"{title}\nimage: {steps.note}")
    for k, a in found.items():
        size = "x".join(map(str, maps[k].shape))
        typer.echo(f"{k}: {name} on {size} positions, {errors[k]} of output {float(a.output[0]):.4g}")
    typer.echo(f"wrote {output}")


def _heatmap() -> Any:
    need("matplotlib", "demo")  # fail before minutes of work, not after
    from libragrad_fx.viz import heatmap

    return heatmap


def _error(size: float) -> str:
    return "it promises no sum" if math.isnan(size) else f"completeness error {size:.3g}"


def _attribute(gm: Any, x: torch.Tensor, target: Any, method: str) -> lg.Attribution:
    how = METHODS[method]
    layers = lg.blocks(gm)[:1] or None if how.layers == "input" and not how.path else None
    return lg.attribute(gm, x, target, method=method, layers=layers)


def _title(loaded: models.Loaded, logits: torch.Tensor, target: Any) -> str:
    """``model: class 3 (tiger shark), softmax 12.0%``, without the parts that are not known."""
    index = target[0] if isinstance(target, list) else target
    index = index[0] if isinstance(index, tuple) and len(index) == 1 else index
    if not isinstance(index, int) or logits.ndim != 2 or index >= logits.shape[1]:
        return f"{loaded.name}: {'its only output' if index is None else f'output {index}'}"
    label = models.class_name(loaded, index, logits.shape[1]).partition(",")[0]
    share = float(logits[0].double().softmax(0)[index])
    return f"{loaded.name}: class {index}{f' ({label})' if label else ''}, softmax {share:.1%}"


def _weights(loaded: models.Loaded) -> str:
    return f"weights {loaded.weights}"
