"""Which attribution methods answer for which kinds of models: ``docs/attribution.md``.

    python tools/attribution.py [--only vit,bert] [-o docs/attribution.md]

Every method is asked of every model of ``zoo/small.py``. A cell is the shape of the map, or a number that
stands for the reason why there is none; anything but an answer or an error of ours ends the program.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from pages import table
from tqdm.auto import tqdm

import libragrad_fx as lg
from libragrad_fx.attribution import METHODS
from libragrad_fx.errors import InputError
from zoo.small import SMALL, small

LIBRARIES = ("timm", "torch", "transformers")
PAGE = """# What attribution answers for which models

Made by `python tools/attribution.py`, with {versions}. Tiny models with random parameters, of
`zoo/small.py`, balanced by `libra`, float64. A map is written as its size: `4x4` patches, `6` tokens,
columns or steps of time, `2x4x4` frames by patches; `6 + 4`: a second map, of another input. A letter says
why there is none; the reasons are below. No method fails in another way.

{table}

`error` is the largest |total - expected| of FullGrad, relative to what is expected (Llama computes its
norms in float32); `stages` are the sizes of the maps of `layers="stages"`.

{reasons}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="models, separated by commas")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/attribution.md"))
    options = parser.parse_args()
    names = [n for n in options.only.split(",") if n] or [*SMALL]
    warnings.simplefilter("ignore")
    rows = {name: row(name) for name in tqdm(names)}
    options.output.write_text(page(rows), "utf-8")


def row(name: str) -> dict[str, str]:
    """What each method answers for one model."""
    made = small(name)
    module = lg.transform(made.model, made.inputs)
    cells = {m: cell(lambda m=m: sizes(ask(module, made, method=m))) for m in METHODS}
    cells["stages"] = cell(
        lambda: ", ".join(map(size, ask(module, made, method="fullgrad", layers="stages").stages.values()))
    )
    cells["error"] = cell(lambda: error(ask(module, made, method="fullgrad")))
    return cells


def ask(module: torch.nn.Module, made: Any, **options: Any) -> lg.Attribution:
    return lg.attribute(module, made.inputs, made.target, steps=2, **options)


def cell(answer: Any) -> str:
    """What is answered, or the reason why not, behind a ``!``."""
    try:
        return answer()
    except InputError as e:
        return "!" + reason(str(e))


def reason(text: str) -> str:
    """An error of ours without what differs from model to model."""
    text = text.partition(":")[0]
    text = re.sub(r"^(\w+) (needs|follows|goes)", r"the method \2", text)
    return re.sub(r"and \S+ has none", "and a block has none", text)


def size(m: torch.Tensor) -> str:
    return "x".join(map(str, m.shape[1:]))


def sizes(found: lg.Attribution) -> str:
    return " + ".join(map(size, [found.values, *found.others.values()]))


def error(found: lg.Attribution) -> str:
    return f"{float((found.completeness_error / found.expected).abs().max()):.0e}"


def page(rows: dict[str, dict[str, str]]) -> str:
    reasons = [
        *dict.fromkeys(c[1:] for cells in rows.values() for c in cells.values() if c.startswith("!"))
    ]
    letters = {r: chr(ord("a") + i) for i, r in enumerate(reasons)}
    lines = []
    for name, cells in rows.items():
        shown = [f"*{letters[c[1:]]}*" if c.startswith("!") else c for c in cells.values()]
        lines.append([name, *shown])
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in LIBRARIES)
    said = "\n".join(f"- *{letter}*: {r}" for r, letter in letters.items())
    shown_all = table(["model", *METHODS, "stages", "error"], lines)
    return PAGE.format(versions=versions, table=shown_all, reasons=said)


if __name__ == "__main__":
    main()
