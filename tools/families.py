"""Figures for every architecture family of the paper and for the small zoo: ``docs/families.md``.

    python tools/families.py [--deep] [-o docs/families.md]

For each model, at registered depth with random parameters: graph nodes, edits, seconds of the transform,
forward equality in three dtypes, completeness error and largest node residual in float64, and the largest
relative difference of the input gradient from an independent reference.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import libragrad_fx as lg
from libragrad_fx.errors import GateOutputWarning, ModeError
from tests.models import reference as ref
from tests.models.zoo import ZOO, build

TARGET = 3
HEAD = (
    "model", "nodes", "edits", "transform s", "f32", "f64", "bf16", "completeness", "residual",
    "gradient vs reference", "plain completeness",
)  # fmt: skip


def equal(gm: torch.nn.Module, model: torch.nn.Module, x: torch.Tensor, dtype: torch.dtype) -> bool:
    model, x = copy.deepcopy(model).to(dtype), x.to(dtype)
    try:
        gm = copy.deepcopy(gm).to(dtype)
    except ModeError:
        gm = lg.transform(model, x)
    x = x.clone().requires_grad_()
    return torch.equal(gm(x), model(x))


def measure(name: str, model: Any, x: torch.Tensor, target: int, reference: bool) -> tuple[str, ...]:
    start = time.perf_counter()
    gm = lg.transform(model, x)
    seconds = time.perf_counter() - start
    certificate = lg.verify(model, gm, x, target=target)
    scale = max(1.0, abs(certificate.output))
    bits = [
        "yes" if equal(gm, model, x, d) else "NO" for d in (torch.float32, torch.float64, torch.bfloat16)
    ]
    plain = lg.audit(model, x, target=target).completeness_error / scale
    return (
        name, str(certificate.nodes), str(certificate.edits), f"{seconds:.1f}", *bits,
        f"{certificate.completeness_error / scale:.1e}", f"{certificate.worst_residual / scale:.1e}",
        f"{gradient_difference(gm, model, x, target):.1e}" if reference else "", f"{plain:.1e}",
    )  # fmt: skip


def gradient_difference(gm: Any, model: Any, x: torch.Tensor, target: int) -> float:
    expected = ref.reference(model, x, target).grad_input
    x = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(gm(x)[:, target].sum(), x)
    return float((got - expected).abs().max() / expected.abs().max())


def rows(deep: bool) -> Iterator[tuple[str, ...]]:
    families = [*ref.FAMILIES, *((*ref.DEEP, *ref.VARIANTS) if deep else ())]
    for _, name, kwargs in tqdm(families, desc="families"):
        model = ref.create(name, **kwargs).double()
        ref.randomise(model, seed=0)
        size = (getattr(model, "patch_embed", None) or model.stem).img_size
        x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        yield measure(name, model, x, TARGET, reference=True)
    for name in tqdm(ZOO, desc="zoo"):
        model, x = build(name)
        yield measure(name, model, x, 1, reference=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deep", action="store_true", help="the paper's 24 to 32 block models too")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/families.md"))
    options = parser.parse_args()
    warnings.simplefilter("ignore", GateOutputWarning)
    lines = [
        "# The families of the paper, and networks that no rule names",
        "",
        f"Made by `python tools/families.py{' --deep' if options.deep else ''}` with torch"
        f" {torch.__version__}, {torch.get_num_threads()} CPU threads. Registered depth, random"
        " parameters (biases, betas, tokens and layer scales too), batch 2; errors in float64,",
        "relative to max(1, |f|). Families that exist at base width and up only are narrowed to 192",
        "channels. `plain` is autograd's own gradient on the same model.",
        "",
        f"| {' | '.join(HEAD)} |",
        f"|{'---|' * len(HEAD)}",
        *(f"| {' | '.join(row)} |" for row in rows(options.deep)),
    ]
    options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
