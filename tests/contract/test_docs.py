"""What the documentation shows runs, and what it lists is all there is."""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import libragrad_fx as lg

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "docs/start", "docs/howto", "docs/concepts")
PAGES = [
    "README.md",
    *sorted(p.relative_to(ROOT).as_posix() for d in FOLDERS for p in (ROOT / d).glob("*.md")),
]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"# not run: needs \S")
SLOW = {"docs/howto/libraries.md", "docs/programs.md"}  # models of 224 x 224; a traced program
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


def test_every_error_and_warning_is_explained() -> None:
    of_module = [v for v in vars(lg.errors).values() if isinstance(v, type)]
    raised = {v.__name__ for v in of_module if issubclass(v, (lg.errors.LibraGradError, Warning))}
    page = (ROOT / "docs/reference/errors.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == raised - {"LibraGradError"}


def test_every_public_name_says_what_it_is() -> None:
    """A docstring of its own: not a parent's, nor the one that ``dataclass`` makes."""
    silent = []
    for name in lg.__all__:
        found = getattr(lg, name)
        if not (callable(found) or isinstance(found, ModuleType)):
            continue  # a number or a text has its type's
        said = vars(found).get("__doc__") if inspect.isclass(found) else found.__doc__
        if not said or not said.strip() or said.startswith(f"{name}("):
            silent.append(name)
    assert not silent
    assert "__version__" in lg.__all__
