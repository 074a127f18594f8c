"""``libragrad explain``: draw what speaks for an answer in pictures and texts."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

import libragrad_fx as lg
from libragrad_fx import models
from libragrad_fx.attribution.formulas import method_of
from libragrad_fx.cli.common import load_model
from libragrad_fx.cli.given import RAW, Item, items, place, places, raw_place
from libragrad_fx.cli.options import (
    Checkpoint,
    Json,
    Pretrained,
    Seed,
    answer,
    app,
    method_names,
    one_line,
    policy_names,
)
from libragrad_fx.cli.progress import counting
from libragrad_fx.errors import InputError, LibraGradError
from libragrad_fx.explain import Against
from libragrad_fx.extras import need
from libragrad_fx.models import first_line
from libragrad_fx.viz import paper, sheet
from libragrad_fx.viz.console import texts

_POLICIES = {"plain": "autograd", "balanced": "libra"}  # other names of policies
Grid = list[list[lg.Attribution]]


@app.command()
def explain(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE|FOLDER|GLOB|TEXT…", help="Pictures; or texts, of a language model."),
    ],
    model: Annotated[str, typer.Option(help="As MODEL in the other commands.")],
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME,…",
            help="Methods, a row for each: see libragrad methods.",
            autocompletion=method_names,
        ),
    ] = "fullgrad_plus",
    target: Annotated[
        str | None,
        typer.Option(
            metavar="N|NAME,…", help="Classes or next tokens, by number or name; else its own answer."
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="N|NAME", help="Another, which is subtracted: why not that?")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many of its largest answers.")] = 1,
    policy: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="How the gradient is balanced; plain: not at all.",
            autocompletion=policy_names,
        ),
    ] = "libra",
    compare: Annotated[
        str, typer.Option(metavar="NAME,…", help="Policies to draw beside it: --compare plain.")
    ] = "",
    resolution: Annotated[
        Literal["tokens", "pixels"], typer.Option(help="Where methods look that look at one place.")
    ] = "tokens",
    scale: Annotated[
        Literal["method", "all", "each"], typer.Option(help="Which maps share a scale.")
    ] = "method",
    sign: Annotated[
        Literal["all", "positive", "negative", "absolute_value"] | None,
        typer.Option(help="Which part of the values is drawn."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE|FOLDER",
            help="Its ending decides: .png .svg .pdf .html, or raw values only: .npz .safetensors .json."
            " {name} stands for the name of each input.",
        ),
    ] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Draw which parts of pictures or texts speak for an answer, and which against it.

    A row for each method; a column for each answer and policy; raw values beside the picture (.npz). An
    input that fails is reported, and the rest goes on.
    """  # fmt: skip
    if target is not None and top > 1:
        raise InputError("give --target or --top, not both")
    if against is not None and target is None:
        raise InputError("--against needs --target, to compare with")
    methods = _parts(method)
    policies = list(dict.fromkeys(_POLICIES.get(p, p) for p in [*_parts(compare), policy]))
    for name in methods:
        method_of(name)
    if place(output or "out.png").suffix in (".png", ".svg", ".pdf"):
        need("matplotlib", "demo")  # fail before minutes of work, not after
    loaded = load_model(model, pretrained, checkpoint, seed)
    of_texts = models.reads_texts(loaded.module)
    given = items(inputs, of_texts)
    files = places(output, [item.name for item in given])
    processor = None if of_texts else models.processor(loaded)
    options = {"top": top, "processor": processor, "resolution": resolution, "seed": seed}
    targets = _targets(loaded, of_texts, target, against)

    def grid_of(item: Item, step: Callable[[], None]) -> Grid:
        rows: Grid = []
        for name in methods:
            row = []
            for side in policies:
                row.append(lg.attribute_each(
                    loaded.module, item.value, targets, method=name, policy=side, **options))  # fmt: skip
                step()
            rows.append([_checked(loaded, a) for answers in zip(*row, strict=True) for a in answers])
        return rows

    asked = _Asked(loaded, files, {"scale": scale, "sign": sign}, len(methods), len(policies))
    told, lines, failed = _each(given, grid_of, asked)
    answer({"model": model, "weights": loaded.weights, "inputs": told}, json, "\n".join(lines))
    if failed:
        typer.echo("\n".join(f"failed: {text}" for text in failed), err=True)
        raise typer.Exit(1)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What decides how answers are written."""

    loaded: models.Loaded
    files: Sequence[Path]
    look: dict[str, Any]
    methods: int
    policies: int


def _parts(text: str) -> list[str]:
    return [part for part in (p.strip() for p in text.split(",")) if part]


def _targets(
    loaded: models.Loaded, texts: bool, target: str | None, against: str | None
) -> list[Any] | None:
    """Each target as a number or a name. Of next tokens (texts), a space in front is part of the name."""
    known = {name: i for i, name in enumerate(models.categories(loaded))}

    def one(text: str) -> Any:
        text = text if texts else text.strip()
        return int(text) if text.strip().lstrip("-").isdigit() else known.get(text, text)

    if target is None:
        return None
    found = [one(part) for part in target.split(",")]
    return found if against is None else [Against(t, one(against)) for t in found]


def _checked(loaded: models.Loaded, found: lg.Attribution) -> lg.Attribution:
    """With the names of classes that a model does not know itself.

    Raises:
        InputError: the model answers nan.
    """
    if bool(found.output.isnan().any()):
        raise InputError("the model answers nan: there is nothing to draw")
    names = models.categories(loaded)
    index = _index(found)
    if names and not found.labels[0] and isinstance(index, int) and 0 <= index < len(names):
        return dataclasses.replace(found, labels=(names[index],))
    return found


def _index(found: lg.Attribution) -> Any:
    """What is explained of the first sample: of a tuple, its last entry."""
    first = found.target[0]
    return first[-1] if isinstance(first, tuple) else first


# --- one by one


def _each(
    given: Sequence[Item], grid_of: Any, asked: _Asked
) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Explain and write each input. What JSON says of them, and what lines; what failed, and why. A single
    one raises its error."""
    failed, pages, told, lines = list[str](), list[Any](), list[Any](), list[str]()
    console = Console(file=sys.stdout)  # as it is now, and not while progress is shown
    book = len(given) > 1 and len(set(asked.files)) == 1
    with counting("explaining", asked.methods * asked.policies * len(given)) as bar:
        for item, file in zip(given, asked.files, strict=True):
            bar.at(item.name)
            try:
                grid = grid_of(item, bar.step)
                page = _page(item, grid, asked)
                written = _save_raw(item, grid, file, asked)
                if book:
                    pages.append(page)
                elif file.suffix not in RAW:
                    written.insert(0, paper.save([page], file))
            except Exception as e:  # of several, one that fails in any way must not stop the others
                if len(given) == 1:
                    raise
                said = one_line(e) if isinstance(e, LibraGradError) else first_line(e)
                failed.append(f"{item.value}: {said}")
                continue
            told.append(_told(item, grid, [*written, *([file] if book else [])]))
            lines += [*_lines(item, page, console), _wrote(written)]
    if pages:
        lines.append(f"wrote {paper.save(pages, asked.files[0])}")
    return told, lines, failed


def _told(item: Item, grid: Grid, files: Sequence[Path]) -> dict[str, Any]:
    """What JSON says of an input."""
    maps = [
        {
            "method": a.method, "policy": a.policy, "target": a.target[0] if a.target else None,
            "label": a.labels[0], "output": float(a.output[0]),
            "completeness_error": float(a.completeness_error[0]),
        }
        for row in grid
        for a in row
    ]  # fmt: skip
    return {"input": str(item.value), "files": [str(f) for f in files], "maps": maps}


def _wrote(files: Sequence[Path]) -> str:
    """All files if they are few, else the first and how many more there are."""
    if len(files) <= 4:
        return f"wrote {', '.join(map(str, files))}"
    others = files[-1].parent / f"{files[0].stem}.*{files[-1].suffix}"
    return f"wrote {files[0]}, and {len(files) - 1} files {others}"


def _page(item: Item, grid: Grid, asked: _Asked) -> Any:
    name = item.value.name if isinstance(item.value, Path) else item.name
    return sheet.sheet(grid, f"{name}, {asked.loaded.title}", **asked.look)


def _save_raw(item: Item, grid: Grid, file: Path, asked: _Asked) -> list[Path]:
    """Each map as a file of its own; its name says what tells it from the others."""
    shared = asked.files.count(file) > 1
    written = []
    for row in grid:
        for found in row:
            index = _index(found)
            parts = [
                *([item.name] if shared else []),
                *([found.method] if asked.methods > 1 else []),
                *([found.policy or "plain"] if asked.policies > 1 else []),
                *([index] if len(row) > asked.policies else []),
            ]
            written.append(found.save(raw_place(file, parts)))
    return written


def _lines(item: Item, page: Any, console: Console) -> list[str]:
    """What is printed of one input; texts in colour where the terminal has some."""
    found = [", ".join(c.caption) for row in page.rows for c in row.cells]
    shown = texts(page)
    if not shown:
        return [f"{item.value}", *(f"  {text}" for text in found)]
    lines = []
    for caption, text in shown:
        with console.capture() as held:
            console.print(text, soft_wrap=True, highlight=False)
        lines += [caption, f"  {held.get().rstrip()}"]
    return lines
