"""Which attribution methods answer for which kinds of models: ``docs/attribution.md``.

    python tools/attribution.py [--only vit,hf/bert] [-o docs/attribution.md]
    python tools/attribution.py --suite hf [--limit 90]
    python tools/attribution.py --columns program,stages [--suite hf]

Every method is asked of every model: those of ``zoo/small.py`` and of the coverage sample, or with
``--suite`` all of a suite of ``libragrad coverage``; each in a process of its own with ``--limit`` seconds.
A cell is the shape of the map, or why there is none; anything but an answer or an error of ours is
``FAILED``; of a program, the batches that it serves. With ``--columns``, other cells are kept as they are.
Results are kept in ``docs/attribution.jsonl``, and the page is made of them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import logging
import multiprocessing
import queue
import re
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pages import fill, table
from tqdm.auto import tqdm

import libragrad_fx as lg
from libragrad_fx.attribution import METHODS
from libragrad_fx.coverage.check import generic, precise
from libragrad_fx.coverage.suites import SUITES, build
from libragrad_fx.errors import LibraGradError
from libragrad_fx.extras import need
from zoo import SAMPLE
from zoo.small import SMALL, small

LIBRARIES = ("timm", "torch", "torchvision", "transformers")
RESULTS = Path("docs/attribution.jsonl")
FAILED = "FAILED "
COLUMNS = [*METHODS, "stages", "error", "program"]
Cells = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="models, separated by commas")
    parser.add_argument("--suite", default="", help="all models of these suites, separated by commas")
    parser.add_argument("--columns", default=",".join(COLUMNS), help="all by default, separated by commas")
    parser.add_argument("--limit", type=int, default=90, help="seconds for one model")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/attribution.md"))
    options = parser.parse_args()
    need("transformers", "coverage")  # imported once, before the processes
    kinds = [*SMALL, *("/".join(key) for key in SAMPLE)]
    whole = [f"{s}/{n}" for s in options.suite.split(",") if s for n in SUITES[s].names()]
    asked = options.columns.split(",")
    if unknown := {*asked} - {*COLUMNS}:
        parser.error(f"no columns: {', '.join(sorted(unknown))}; there are {', '.join(COLUMNS)}")
    for name in tqdm([n for n in options.only.split(",") if n] or whole or kinds):
        _keep(name, apart(name, asked, options.limit))
    page(_kept(), options.output)


# --- one model


def apart(name: str, asked: Sequence[str], limit: int) -> Cells:
    """``row`` in a process of its own, which is ended when its time is up."""
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    process = context.Process(target=lambda: found.put(row(name, asked)), daemon=True)
    process.start()
    deadline = time.monotonic() + limit
    while process.is_alive() and time.monotonic() < deadline:
        with contextlib.suppress(queue.Empty):
            return found.get(timeout=1)
    with contextlib.suppress(queue.Empty):  # it has ended since
        return found.get(timeout=1)
    ended = not process.is_alive()
    process.kill()
    return dict.fromkeys(asked, "!the process ended" if ended else f"!not done in {limit} s")


def row(name: str, asked: Sequence[str]) -> Cells:
    """What is answered for one model, in each of these columns."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # model libraries warn of missing pretrained weights
    torch.set_flush_denormal(True)  # random weights make numbers that are slow
    try:
        model, inputs, target = made(name)
        module = lg.transform(model, inputs, check=False)
    except LibraGradError as e:
        return dict.fromkeys(asked, "!" + reason(str(e)))

    def ask(**options: Any) -> lg.Attribution:
        return lg.attribute(module, inputs, target, steps=2, **options)

    how: dict[str, Any] = {m: lambda m=m: sizes(ask(method=m)) for m in METHODS}
    how["stages"] = lambda: ", ".join(map(size, ask(method="fullgrad", layers="stages").stages.values()))
    how["error"] = lambda: error(ask(method="fullgrad"))
    how["program"] = lambda: batches(lg.program(module, inputs))
    return {column: cell(how[column]) for column in asked}


def made(name: str) -> tuple[torch.nn.Module, Any, Any]:
    """A model in float64 if it runs in that, its inputs, and what to explain."""
    if name in SMALL:
        found = small(name)
        return found.model, found.inputs, found.target
    subject = build(*name.split("/", 1))
    model, inputs = precise(subject)
    generic(model, inputs)
    return model, inputs, subject.target


def cell(answer: Any) -> str:
    """What is answered, or the reason why not, behind a ``!``."""
    try:
        return answer()
    except LibraGradError as e:
        return "!" + reason(str(e))
    except Exception as e:
        return f"!{FAILED}{type(e).__name__}"


def reason(text: str) -> str:
    """An error of ours without what differs from model to model."""
    text = text.partition("\n")[0].partition(":")[0].partition(";")[0]
    text = re.sub(r" of shape \([\d, ]+\)", "", text)
    text = re.sub(r"^(\w+) (needs|follows|goes)", r"the method \2", text)
    return re.sub(r"(and|block,) \S+ has none", r"\1 a block has none", text)


def size(m: torch.Tensor) -> str:
    return "x".join(map(str, m.shape[1:]))


def sizes(found: lg.Attribution) -> str:
    every = [found.values, *found.others.values(), found.unplaced]
    if not all(bool(m.isfinite().all()) for m in every):
        return f"!{FAILED}not finite"
    return " + ".join(map(size, every[:-1]))


def batches(program: lg.Program) -> str:
    """What a program says of the batches that it serves."""
    return program.said()[-1].partition(" for ")[2].partition(";")[0].removesuffix(" of more than one")


def error(found: lg.Attribution) -> str:
    return f"{float((found.completeness_error / found.expected).abs().max()):.0e}"


# --- results


def _kept() -> dict[str, Cells]:
    lines = RESULTS.read_text("utf-8").splitlines() if RESULTS.exists() else []
    return {found["name"]: found["cells"] for found in map(json.loads, lines)}


def _keep(name: str, cells: Cells) -> None:
    found = _kept()
    found[name] = found.get(name, {}) | cells
    lines = (json.dumps({"name": n, "cells": c}) for n, c in found.items())
    RESULTS.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def page(rows: Mapping[str, Cells], output: Path) -> None:
    """Both tables, the counts, and the reasons, whose letters all of them share."""
    kinds = {n: rows[n] for n in SMALL if n in rows}
    sample = {"/".join(k): rows["/".join(k)] for k in SAMPLE if "/".join(k) in rows}
    letters = _letters([*kinds.values(), *sample.values()])
    parts = {
        "versions": ", ".join(f"{n} {importlib.metadata.version(n)}" for n in LIBRARIES),
        "kinds": _table(kinds, letters),
        "sample": _table(sample, letters),
        "reasons": "\n".join(f"- *{letter}*: {r}" for r, letter in letters.items()),
        "counts": _counts(rows),
        "programs": _programs(rows),
    }
    fill("attribution.md", parts, output)


def _letters(rows: Sequence[Cells]) -> dict[str, str]:
    reasons = dict.fromkeys(c[1:] for cells in rows for c in cells.values() if c.startswith("!"))
    return {r: chr(ord("a") + i) for i, r in enumerate(reasons)}


def _table(rows: Mapping[str, Cells], letters: Mapping[str, str]) -> str:
    shown = lambda c: f"*{letters[c[1:]]}*" if c.startswith("!") else c  # noqa: E731
    lines = ([n, *(shown(cells.get(c, "")) for c in COLUMNS)] for n, cells in rows.items())
    return table(["model", *COLUMNS], lines)


def _counts(rows: Mapping[str, Cells]) -> str:
    """Of each suite that was run as a whole, how many cells are answers, and how many each reason has."""
    suites = [s for s in SUITES if sum(n.startswith(f"{s}/") for n in rows) > len(SAMPLE)]
    mine = {s: [c for n, c in rows.items() if n.startswith(f"{s}/")] for s in suites}
    cells = {s: [c[m] for c in mine[s] for m in METHODS if m in c] for s in suites}
    said = {s: Counter(c if c[0] == "!" else "" for c in cells[s]) for s in suites}
    return _counted(mine, said)


def _programs(rows: Mapping[str, Cells]) -> str:
    """Likewise of programs."""
    mine = {s: [c for n, c in rows.items() if n.startswith(f"{s}/") and "program" in c] for s in SUITES}
    mine = {s: each for s, each in mine.items() if len(each) > len(SAMPLE)}
    return _counted(mine, {s: Counter(c["program"] for c in each) for s, each in mine.items()})


def _counted(mine: Mapping[str, Sequence[Cells]], said: Mapping[str, Counter[str]]) -> str:
    """A line for each thing said, answers first."""
    every = sum(said.values(), Counter[str]())
    lines = [["models", *(str(len(each)) for each in mine.values())]]
    lines += [
        [key.removeprefix("!") or "**answered**", *(str(said[s][key]) for s in mine)]
        for key, _ in sorted(every.items(), key=lambda pair: (pair[0][:1] == "!", -pair[1]))
    ]
    return table(["", *mine], lines)


if __name__ == "__main__":
    main()
