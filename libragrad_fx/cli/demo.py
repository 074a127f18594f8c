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
    images: Annotated[int, typer.Option(min=1, max=64, help="Examples shown of each small model.")] = 4,
    pictures: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write the pictures too, as files.")
    ] = None,
    browser: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where npm install onnxruntime-web was run: beside the page, write one that explains"
            " pictures in the browser, and link it.",
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    json: Json = False,
) -> None:
    """Write a page that shows what balancing changes. Needs no network.

    One self-contained HTML file: plain and balanced maps of photographs by a pretrained vision transformer
    (if its weights were fetched), of digits by two small trained models, and of sentences by a small
    decoder; with their errors, the certificates, and every change that was made to the backward.
    """
    from libragrad_fx.demo import build as builder  # here, because its dependencies are optional
    from libragrad_fx.demo import data

    writable(output, (".html",))
    if pictures is not None:
        writable(pictures, folder=True)
    beside = output.with_name(f"{output.stem}-browser.html")
    with working("loading") as say:
        if browser is not None:
            say(f"writing {beside}")
            builder.browser_page(beside, browser)
        text = builder.page(images, say, beside.name if browser else "")
    with writing(output):
        output.write_bytes(text.encode())
    files = list[str]()
    if pictures is not None:
        shown = data.scenes(builder.MEASURED, "test", builder.SEED).images[:images]
        for i, picture in enumerate(data.as_pictures(shown)):
            with writing(path := pictures / f"{i}.png"):
                picture.save(path)
            files.append(str(path))
    lines = [f"wrote {output}", *([f"wrote {beside}"] if browser else [])]
    lines += [f"wrote {images} pictures to {pictures}"] if pictures else []
    made = {"file": str(output), "browser": str(beside) if browser else None, "pictures": files}
    answer(made, json, "\n".join(lines))
    if show:
        webbrowser.open(output.resolve().as_uri())
