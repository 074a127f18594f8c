"""A program as one HTML file that explains pictures in the browser, from disk and without a network."""

from __future__ import annotations

import base64
import gzip
import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from libragrad_fx.errors import InputError
from libragrad_fx.viz.heatmap import COVER, QUANTILE
from libragrad_fx.viz.palette import POSITIVE, SIGNED
from libragrad_fx.viz.template import markup, rendered, script

RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
"""Of ONNX Runtime, what a page needs: its JavaScript, and itself as WebAssembly."""
_PLACES = ("", "dist", "node_modules/onnxruntime-web/dist")
_MOST = 2**29 - 2**10  # characters of a string: browsers have no longer ones


def runtime(folder: str | Path) -> Path:
    """Where ``RUNTIME`` lies: in a folder, or where npm puts it there.

    Raises:
        InputError: it is not there.
    """
    for place in (Path(folder) / p for p in _PLACES):
        if all((place / name).is_file() for name in RUNTIME):
            return place
    raise InputError(
        f"a page runs its program with onnxruntime-web, which is not in {str(folder)!r}: run"
        " npm install onnxruntime-web there, or give the folder where you did"
    )


def html(about: Mapping[str, Any], program: bytes, folder: Path) -> str:
    """The page.

    Args:
        about: what ``browser.js`` reads of the model: see ``programs.page``.
        program: an ONNX file.
        folder: of ``runtime``.

    Raises:
        InputError: a program that is too large for a browser.
    """
    here = importlib.resources.files("libragrad_fx.viz")
    packed = [packing(program), *(packing((folder / name).read_bytes()) for name in RUNTIME)]
    if len(packed[0]) > _MOST:
        raise InputError(f"a page holds no program of {len(program) / 2**20:.0f} MiB: write .onnx")
    drawing = {"signed": SIGNED, "positive": POSITIVE, "quantile": QUANTILE, "cover": COVER}
    return rendered(
        "viz/browser.html", "onnx", about=about, data=script({**about, **drawing}, "onnx"),
        parts=dict(zip(("program", "engine", "wasm"), packed, strict=True)),
        script=markup(here.joinpath("browser.js").read_text("utf-8"), "onnx"),
    )  # fmt: skip


def packing(content: bytes) -> str:
    """A file as text: gzip, then base64. The same bytes give the same text."""
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode()
