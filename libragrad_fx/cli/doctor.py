"""``libragrad doctor``: say what is installed, what is missing, and how to get it."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

import libragrad_fx as lg
from libragrad_fx.cli.options import Json, answer, app, one_line
from libragrad_fx.cli.progress import working
from libragrad_fx.demo import sources
from libragrad_fx.viz.text import table

_REQUIRED = ("numpy", "pillow", "pyyaml", "rich", "safetensors", "typer")
_GRAPHVIZ = "dot"


class Extra(NamedTuple):
    """A package that is not required. extra: of this package, which brings it."""

    module: str
    package: str
    extra: str
    use: str


_EXTRAS = (
    Extra("timm", "timm", "models", "models by name"),
    Extra("torchvision", "torchvision", "models", "torchvision:NAME"),
    Extra("transformers", "transformers", "models", "language models"),
    Extra("matplotlib", "matplotlib", "demo", "libragrad explain, demo, graph"),
    Extra("jinja2", "jinja2", "demo", "libragrad demo, graph"),
    Extra("sklearn", "scikit-learn", "demo", "pictures of the demo"),
    Extra("tqdm", "tqdm", "demo", "the demo's training"),
    Extra("graphviz", "graphviz", "graph", "static pictures of a graph"),
    Extra("open_clip", "open_clip_torch", "coverage", "libragrad coverage --suite openclip"),
    Extra("psutil", "psutil", "coverage", "libragrad coverage"),
    Extra("scipy", "scipy", "evaluate", "intervals of metrics"),
    Extra("ot", "POT", "evaluate", "metrics.emd_score"),
    Extra("captum", "captum", "dev", "Captum's methods on a balanced graph"),
    Extra("pytorch_grad_cam", "grad-cam", "dev", "pytorch-grad-cam on a balanced graph"),
    Extra("model_explorer", "ai-edge-model-explorer", "dev", "tests of its format"),
    Extra("gguf", "gguf", "real", "weights of SmolLM2"),
    Extra("accelerate", "accelerate", "real", "weights of SmolLM2"),
    Extra("onnx", "onnx", "real", "weights of DINOv2"),
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing. found: its version, name or place, or ""; hint: what it is for, or how to get it."""

    group: str
    name: str
    found: str
    hint: str = ""


@app.command()
def doctor(json: Json = False) -> None:
    """Say which versions are installed, whether optional packages can be imported, which devices there are,
    and whether the real weights and data are here that tools and tests use.

    Nothing is fetched. A missing thing is no failure: what needs it says so.
    """
    with working("importing what is optional"):
        found = tuple(examine())
    answer([dataclasses.asdict(f) for f in found], json, report(found))


def examine() -> Iterator[Finding]:
    """Everything that was looked at, group by group."""
    yield Finding("required", "libragrad", lg.__version__)
    yield Finding("required", "python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    yield Finding("required", "torch", torch.__version__)
    for name in _REQUIRED:
        yield Finding("required", name, _version(name))
    for extra in _EXTRAS:
        yield _imported(extra)
    dot = shutil.which(_GRAPHVIZ) or ""
    hint = "static pictures of a graph" if dot else "the program Graphviz: apt-get install graphviz"
    yield Finding("optional", _GRAPHVIZ, dot, hint)
    yield Finding("devices", "cpu", platform.machine(), f"{torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(i).total_memory / 2**30
        yield Finding("devices", f"cuda:{i}", torch.cuda.get_device_name(i), f"{memory:.0f} GiB")
    if torch.backends.mps.is_available():
        yield Finding("devices", "mps", "Metal")
    yield from _data()
    yield _tried()


def report(found: tuple[Finding, ...]) -> str:
    """As a text, one table a group."""
    lines = []
    for group in dict.fromkeys(f.group for f in found):
        rows = [(f.name, f.found or "missing", f.hint) for f in found if f.group == group]
        lines += ["", *table((group, "", ""), rows)]
    return "\n".join(lines[1:])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _imported(extra: Extra) -> Finding:
    """Whether a package can be imported: one that is installed may be broken."""
    get = f"pip install {extra.package} (of the extra {extra.extra!r})"
    try:
        importlib.import_module(extra.module)
    except Exception as e:  # a broken package raises what it likes
        absent = isinstance(e, ModuleNotFoundError) and e.name == extra.module
        why = "" if absent else f"; it raises {type(e).__name__}: {one_line(e)[:100]}"
        return Finding("optional", extra.package, "", f"{extra.use}: {get}{why}")
    return Finding("optional", extra.package, _version(extra.package) or "yes", extra.use)


def _tried() -> Finding:
    """A small network, transformed, verified and explained here and now."""
    start, nn = time.monotonic(), torch.nn
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)).eval()
    x = torch.randn(2, 6)
    try:
        certificate = lg.verify(net, lg.transform(net, x), x, 1)
        whole = float(lg.attribute(net, x, 1, method="fullgrad").completeness_error.max())
    except Exception as e:  # whatever is broken on this machine
        return Finding("self-test", "a small network", "", f"{type(e).__name__}: {one_line(e)[:200]}")
    said = "balanced" if certificate.ok and whole < 1e-4 else "NOT balanced: please report it"
    return Finding("self-test", "a small network", said, f"{time.monotonic() - start:.1f} s")


def _data() -> Iterator[Finding]:
    """What ``tools/fetch.py`` gets, which is in a checkout only, as ``zoo/`` is."""
    if importlib.util.find_spec("zoo") is None:
        yield Finding("data", "all", "", "for tools and tests, in a checkout: python tools/fetch.py")
        return
    for name, source in sources.SOURCES.items():
        place = str(sources.folder() / name) if sources.fetched(name) else ""
        yield Finding("data", name, place, sources.missing(name) or source.about)
