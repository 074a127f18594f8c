"""Which models run without some of their tokens: ``docs/tokens.jsonl`` and ``docs/tokens.md``.

    python tools/tokens.py [--only NAME ...] [--seconds 600]
    python tools/tokens.py --page

Each model is looked at in a process of its own, and its result is a line of the file. What is there is not
done again, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pages
import torch
from tqdm.auto import tqdm

import libragrad_fx as lg
from libragrad_fx.errors import InputError
from libragrad_fx.perturb import tokens

RESULTS, PAGE = Path("docs/tokens.jsonl"), Path("docs/tokens.md")
COVERED = Path("docs/coverage/timm.jsonl")
"""Where ``libragrad coverage`` found the smallest model of each module."""
SIDE = 112
SMALLER: tuple[dict[str, int], ...] = ({"img_size": SIDE, "depth": 2}, {"img_size": SIDE}, {"depth": 2}, {})
REASONS = {
    "in rows": "tokens lie on a grid or in windows, which convolutions and windowed attention read",
    "by their places": "an op takes some of the tokens by their places",
    "the order": "an op reads tokens by their order",
    "the number": "the answer depends on the number of tokens",
    "needs all tokens|one token less": "an op is as large as the number of tokens",
    "": "other reasons",
}
"""By words of what the plan says."""


def names() -> dict[str, str]:
    """The smallest model of each module of timm."""
    rows = map(json.loads, COVERED.read_text("utf-8").splitlines())
    return {row["family"]: row["model"] for row in rows if row.get("model")}


def built(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model in eval mode and two pictures for it, as small as it takes them."""
    import timm

    create: Any = timm.create_model
    for options in SMALLER:
        torch.manual_seed(0)
        try:
            model = create(name, **options).eval()
            full = (model.pretrained_cfg or {}).get("input_size", (3, 224, 224))
            sides = [options["img_size"]] * 2 if "img_size" in options else full[1:]
            randomise(model)
            x = torch.randn(2, full[0], *sides, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                model(x)
        except Exception:
            if not options:
                raise
            continue
        return model, x
    raise AssertionError


def randomise(model: torch.nn.Module) -> None:
    """No parameter is zero or one: a head that starts at zero hides what is in front of it."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            width = p[0].numel() if p.ndim > 1 and p.shape[0] > 1 else 4
            p.copy_(torch.randn(p.shape, generator=draw) / width**0.5)


def measure(name: str) -> dict[str, Any]:
    """What a line of the results says beside names."""
    model, x = built(name)
    start = time.perf_counter()
    module = lg.trace(model, x)
    traced = time.perf_counter()
    row: dict[str, Any] = {"picture": list(x.shape[1:])}
    try:
        found = tokens(module, x)
    except InputError as e:
        return row | {"verdict": "none", "why": str(e)}
    seen = found.seen(x)
    how, cells = ("drops", seen.kept) if found.plan else ("zeroed", seen.zeroed)
    whole = cells(torch.tensor([found.cells] * 2))
    half = cells(torch.tensor([found.cells[::2]] * 2))
    scale = float(seen.logits.abs().max())
    return row | {
        "verdict": how, "why": found.why, "path": found.path, "grid": list(found.grid),
        "apart": len(found.layout.apart), "stays": sorted(found.stays),
        "trace_s": round(traced - start, 1), "tokens_s": round(time.perf_counter() - traced, 1),
        "all": float((whole - seen.logits).abs().max()) / scale,
        "half": float((half - seen.logits).abs().max()) / scale,
    }  # fmt: skip


def asked(name: str, seconds: float) -> dict[str, Any]:
    """``measure`` in a process of its own."""
    command = [sys.executable, __file__, "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"verdict": "stopped", "why": f"not done in {seconds:g} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or [""])[-1]
        return {"verdict": "failed", "why": f"exit status {done.returncode}: {said[:200]}"}
    return json.loads(lines[-1])


def sweep(only: list[str], seconds: float) -> None:
    before = {row["family"] for row in rows() if row["verdict"] not in ("stopped", "failed")}
    left = {f: n for f, n in names().items() if (f in only if only else f not in before)}
    for family, name in tqdm(left.items(), desc="models"):
        row = {"family": family, "model": name, **asked(name, seconds)}
        with RESULTS.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")


def rows() -> list[dict[str, Any]]:
    """The last result of each model."""
    lines = RESULTS.read_text("utf-8").splitlines() if RESULTS.exists() else []
    last = {row["family"]: row for row in map(json.loads, lines)}
    return [last[family] for family in sorted(last)]


# --- the page


def page() -> None:
    found = rows()
    kinds = {kind: [r for r in found if r["verdict"] == kind] for kind in ("drops", "zeroed", "none")}
    counts = [[kind, str(len(some))] for kind, some in kinds.items()]
    counts += [["not looked at", str(len(names()) - sum(map(len, kinds.values())))]]
    head = ("module", "model", "tokens", "apart", "change of the answer with all tokens", "with half")
    apart = lambda r: str(r["apart"] + len(r["stays"]))  # noqa: E731
    drops = [
        (r["family"], r["model"], grid(r), apart(r), f"{r['all']:.0e}", f"{r['half']:.0e}")
        for r in kinds["drops"]
    ]
    none = [(r["family"], r["model"], r["why"]) for r in kinds["none"]]
    parts = {
        "versions": f"torch {version('torch')}, timm {version('timm')}",
        "side": str(SIDE),
        "summary": pages.table(("tokens", "models"), counts),
        "drops": pages.table(head, drops),
        "zeroed": "\n\n".join(grouped(kinds["zeroed"])),
        "none": pages.table(("module", "model", "why"), none),
    }
    pages.fill("tokens.md", parts, PAGE)


def grid(row: Mapping[str, Any]) -> str:
    return " x ".join(map(str, row["grid"]))


def grouped(zeroed: list[dict[str, Any]]) -> Iterator[str]:
    """A table for each kind of reason."""
    for words, meaning in REASONS.items():
        mine = [r for r in zeroed if re.search(words, r["why"])]
        zeroed = [r for r in zeroed if r not in mine]
        if mine:
            head = ("module", "model", "tokens", "in front of", "the plan says")
            lines = [(r["family"], r["model"], grid(r), f"`{r['path']}`", r["why"]) for r in mine]
            yield f"**{len(mine)}: {meaning}**\n\n{pages.table(head, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="modules of timm to look at, again")
    parser.add_argument("--seconds", type=float, default=600, help="for each model")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    if not options.page:
        sweep(options.only, options.seconds)
    page()


if __name__ == "__main__":
    main()
