"""``libragrad demo``: write the demo page."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from libragrad_fx.cli.options import Json, answer, app
from libragrad_fx.cli.progress import working
from libragrad_fx.extras import writable, writing


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.html", help="The page.")] = Path(
        "out/demo.html"
    ),
    images: Annotated[int, typer.Option(min=1, max=64, help="Pictures shown for each model.")] = 6,
    pictures: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write the pictures too, as files.")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    json: Json = False,
) -> None:
    """Write a page that shows the difference on two small trained models. Needs no network.

    One self-contained HTML file: plain and balanced heat maps of a vision transformer and a mixer,
    their errors, the certificates, and every change that was made to the backward.
    """
    from libragrad_fx.demo import build as builder  # here, because its dependencies are optional
    from libragrad_fx.demo import data

    writable(output, (".html",))
    if pictures is not None:
        writable(pictures, folder=True)
    with working("two models") as say:
        text = builder.page(images, say)
    with writing(output):
        output.write_bytes(text.encode())
    files = list[str]()
    if pictures is not None:
        shown = data.scenes(builder.MEASURED, "test", builder.SEED).images[:images]
        for i, picture in enumerate(data.as_pictures(shown)):
            with writing(path := pictures / f"{i}.png"):
                picture.save(path)
            files.append(str(path))
    said = f"wrote {output}" + (f"\nwrote {images} pictures to {pictures}" if pictures else "")
    answer({"file": str(output), "pictures": files}, json, said)
    if show:
        webbrowser.open(output.resolve().as_uri())
