"""What the documentation shows runs, and what it lists is all there is."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch
import typer

import libragrad_fx as lg
from libragrad_fx.cli import app

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "docs/start", "docs/howto", "docs/concepts")
PAGES = [
    "README.md",
    *sorted(p.relative_to(ROOT).as_posix() for d in FOLDERS for p in (ROOT / d).glob("*.md")),
]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"# not run: needs \S")
SLOW = {"docs/howto/libraries.md", "docs/programs.md"}  # models of 224 x 224; a program is traced
NEEDS = {"docs/howto/libraries.md": ("captum", "pytorch_grad_cam", "quantus")}


def blocks(page: str) -> list[tuple[int, str]]:
    """The blocks of Python of a page, but those that say why they are not run; and their first lines."""
    text = (ROOT / page).read_text("utf-8")
    found = [(text.count("\n", 0, m.start(1)), m[1]) for m in BLOCK.finditer(text)]
    return [(line, code) for line, code in found if not NOT_RUN.match(code)]


def named() -> dict[str, Any]:
    """What pages use without saying it: a model of pictures, and two pictures."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    sizes = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = VisionTransformer(num_classes=4, **sizes).eval()
    images = torch.randn(2, 3, 24, 24)
    return {"model": model, "my_model": model, "images": images, "lg": lg}


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] * (p in SLOW), id=p) for p in PAGES if blocks(p)],
)
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order and with one another's names, as a reader types them."""
    for needed in NEEDS.get(page, ()):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    plt = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    monkeypatch.chdir(tmp_path)
    names = named()
    for line, code in blocks(page):
        exec(compile("\n" * line + code, os.fspath(ROOT / page), "exec"), names)
    plt.close("all")


def test_what_is_not_run_is_little() -> None:
    """A mark is for what needs weights, a GPU or other libraries, and not for what is broken."""
    texts = [(ROOT / p).read_text("utf-8") for p in PAGES]
    every = sum(len(BLOCK.findall(t)) for t in texts)
    run = sum(len(blocks(p)) for p in PAGES)
    assert run >= every - 4
    assert run >= 7


def test_commands_have_the_options_that_pages_give_them() -> None:
    """Not run: many want weights. ``--why NODE`` is a node of the model, see ``tests/cli``."""
    group = typer.main.get_command(app)
    lines = [f for p in PAGES for f in re.findall(r"^libragrad (.*)$", (ROOT / p).read_text("utf-8"), re.M)]
    for line in lines:
        name, *words = shlex.split(line, comments=True)
        command = group.get_command(click.Context(group), name)  # type: ignore[attr-defined]
        assert command is not None, line
        known = {o for parameter in command.params for o in (*parameter.opts, *parameter.secondary_opts)}
        assert {w for w in words if re.match("--?[a-z]", w)} <= known, line
    assert len(lines) > 20


def test_every_error_and_warning_is_explained() -> None:
    of_module = [v for v in vars(lg.errors).values() if isinstance(v, type)]
    raised = {v.__name__ for v in of_module if issubclass(v, (lg.errors.LibraGradError, Warning))}
    page = (ROOT / "docs/reference/errors.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == raised - {"LibraGradError"}


PUBLIC = [
    "libragrad_fx", "libragrad_fx.attribution", "libragrad_fx.metrics", "libragrad_fx.metrics.faithfulness",
    "libragrad_fx.metrics.parts", "libragrad_fx.perturb", "libragrad_fx.evaluate",
    "libragrad_fx.evaluate.data",
]  # fmt: skip
"""The modules whose names users import; errors have a table."""


def public(module: str) -> dict[str, Any]:
    """Its functions and classes, by name."""
    if module == "libragrad_fx.evaluate":
        pytest.importorskip("pydantic", reason="pydantic is not installed")
    found = importlib.import_module(module)
    here = [n for n, v in vars(found).items() if getattr(v, "__module__", "") == module]
    names = {n: getattr(found, n) for n in getattr(found, "__all__", here) if n[0] != "_"}
    return {n: v for n, v in names.items() if inspect.isclass(v) or inspect.isfunction(v)}


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_says_what_it_is(module: str) -> None:
    """A docstring of its own: not a parent's, nor the one that ``dataclass`` makes."""
    silent = []
    for name, found in public(module).items():
        said = vars(found).get("__doc__") if inspect.isclass(found) else found.__doc__
        if not said or not said.strip() or said.startswith(f"{name}("):
            silent.append(name)
    assert not silent


def test_modules_with_public_names_are_listed() -> None:
    modules = {v.__name__ for n in lg.__all__ if isinstance(v := getattr(lg, n), ModuleType)}
    assert modules - {"libragrad_fx.errors"} <= {*PUBLIC}
    assert "__version__" in lg.__all__


def shown() -> set[str]:
    """What the reference shows, by full name: mkdocstrings reads the code by griffe."""
    griffe = pytest.importorskip("griffe", reason="the extra docs is not installed")
    code = griffe.load("libragrad_fx", search_paths=[os.fspath(ROOT)], resolve_aliases=True)
    found = set()
    for page in (ROOT / "docs/reference").glob("*.md"):
        for block in re.findall(r"^::: (\S+\n(?: .*\n?)*)", page.read_text("utf-8"), re.MULTILINE):
            name, _, options = block.partition("\n")
            of = code[name.removeprefix("libragrad_fx").lstrip(".")] if "." in name else code
            chosen = re.search(r"members: \[(.*)\]", options)
            own = [n for n, m in of.members.items() if not m.is_alias]
            names = chosen[1].split(", ") if chosen else of.exports or own
            members = [of.members[n] for n in names] if of.is_module else [of]
            found |= {m.canonical_path for m in members if not m.is_module}
    return found


def test_every_public_name_is_in_the_reference() -> None:
    """One that has the name of a file beside it is easily forgotten."""
    there = shown()
    every = [f"{v.__module__}.{v.__qualname__}" for m in PUBLIC for v in public(m).values()]
    assert len(every) > 90
    assert [*filter(lambda name: name not in there, every)] == []
