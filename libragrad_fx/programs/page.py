"""A program as a page for browsers: what is known about the model, gathered for ``viz.browser``."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from PIL import Image
from torch.utils import _pytree as pytree

from libragrad_fx.errors import InputError
from libragrad_fx.explain.inputs import items_of, opened, picture_steps
from libragrad_fx.explain.pixels import Pixels, pixels
from libragrad_fx.extras import need, writing
from libragrad_fx.models import label_of
from libragrad_fx.module.captured import anchor
from libragrad_fx.programs import leave
from libragrad_fx.programs.call import Program, tensors_of
from libragrad_fx.target import described
from libragrad_fx.version import __version__
from libragrad_fx.viz import browser, heatmap, words

ENDING = ".html"


def require(path: Path, runtime: Path) -> Path:
    """What can be known before the work: the runtime's folder.

    Raises:
        InputError: another ending, a path that cannot be written, or no runtime.
        LibraGradError: a package that makes the page is not installed.
    """
    leave.require_ending("to_page", path, ENDING)
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
    need("jinja2", "onnx")
    leave.require_onnx()
    return browser.runtime(runtime)


def require_picture(call: Any) -> torch.Tensor:
    """The one tensor of a call.

    Raises:
        InputError: it is no picture that a page can make.
    """
    tensors = tensors_of(call)
    forms = [(t.ndim == 4 and t.shape[1] in (1, 3), t.dtype == torch.float32) for t in tensors]
    if forms != [(True, True)]:
        raise InputError(
            "a page explains pictures, whose tensor is float32 (B, C, H, W) with 1 or 3 channels; this"
            f" model takes {described(tensors)}"
        )
    return tensors[0]


def write(
    program: Program, path: Path, inputs: Any, runtime: Path, title: str, labels: Sequence[str]
) -> Path:
    """See ``Program.to_page``."""
    engine, pictures = require(path, runtime), _pictures(inputs)
    if not pictures:
        require_picture(inputs)
    steps = pixels(picture_steps(program.model, program.processor), pictures)
    call = steps(pictures[0])[None].to(anchor(program.model)) if pictures else _first(inputs)
    about = _about(program, call, steps, labels)
    about["title"] = title or type(program.model).__name__
    about["examples"] = [heatmap.data_uri(steps.resized(picture)) for picture in pictures]
    with tempfile.TemporaryDirectory() as folder:
        file = program.to_onnx(Path(folder) / "program.onnx", call)
        text = browser.html(about, file.read_bytes(), engine)
    with writing(path):
        path.write_text(text, "utf-8")
    return path


def _pictures(inputs: Any) -> list[Image.Image]:
    """Pictures, or paths of them, opened; of tensors none."""
    return [*map(opened, items_of(inputs) or [])]


def _first(inputs: Any) -> Any:
    """The first sample of tensors."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t[:1], inputs)


def _about(program: Program, call: Any, steps: Pixels, labels: Sequence[str]) -> dict[str, Any]:
    """What ``browser.js`` reads.

    Raises:
        InputError: the model does not give logits of classes, or the map is none over a picture.
    """
    size = tuple(require_picture(call).shape[2:])
    if size != steps.size:
        raise InputError(f"the model's pictures are {size}, its preprocessing gives {steps.size}")
    found = program(call)
    outputs = program.fitting(call).flat.sizes
    if len(outputs) != 1 or outputs[0] < 2 or program.target is not None:
        raise InputError(
            f"a page shows the answers of a classifier, logits (B, K); this output is (B, *{outputs})"
        )
    if found.values.ndim != 3:
        raise InputError(f"a page draws maps (B, H, W); this one is {tuple(found.values.shape)}")
    if isinstance(labels, str) or not all(isinstance(name, str) for name in labels):
        raise InputError("labels are a list of texts, one for each class")
    if len(labels) not in (0, outputs[0]):
        raise InputError(f"{len(labels)} labels for a model of {outputs[0]} classes")
    names = [*labels] or [label_of(program.model, i) for i in range(outputs[0])]
    rules = (
        f"policy {PurePath(found.policy).name}, rules {found.digest[:12]}" if found.policy else "no policy"
    )
    return {
        "pixels": dataclasses.asdict(steps), "labels": names if any(names) else [],
        "method": words.method_name(found.method), "side": words.side_name(found.policy),
        "made": f"Made by libragrad_fx {__version__} ({rules}). Microsoft's ONNX Runtime runs it (MIT).",
    }  # fmt: skip
