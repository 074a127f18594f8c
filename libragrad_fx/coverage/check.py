"""Checks every promise on one model: a row of the coverage table."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import math
import time
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

import libragrad_fx as lg
from libragrad_fx.account.certificate import casts
from libragrad_fx.account.proof import prove
from libragrad_fx.coverage.suites import SUITES, Subject
from libragrad_fx.errors import LibraGradError
from libragrad_fx.stages import balance, decide
from libragrad_fx.target import as_call

TOLERANCE = 1e-9  # float64, relative (see Result)


@dataclasses.dataclass(frozen=True)
class Result:
    """A row of the table.

    how:          "numeric" (float64, forward, ledger) or "static" (capture, plan, static proof)
    verdict:      "balanced", "unbalanced", "refused" (by an error of ours), "failed" (by any other),
                  "timeout", "memory", or "crashed"
    reason:       why it is not balanced; for "balanced", notes: casts that limit its precision, and
                  where a model in several graphs is cut
    completeness: |⟨x, ∂f/∂x⟩ + Σ⟨b, ∂f/∂b⟩ - f|, relative to the largest of the three
    residual:     of the worst node, on the same scale
    input_share:  ⟨x, ∂f/∂x⟩
    output:       f
    seconds:      the transform alone
    versions:     of torch and of the model's library
    """

    suite: str
    name: str
    family: str
    how: str
    verdict: str
    reason: str = ""
    model: str = ""
    parameters: int | None = None
    nodes: int | None = None
    edits: int | None = None
    seconds: float | None = None
    forward_equal: bool | None = None
    completeness: float | None = None
    residual: float | None = None
    input_share: float | None = None
    output: float | None = None
    versions: str = ""


def check(suite: str, name: str, family: str, static: bool, make: Any) -> Result:
    """Build a subject by ``make()`` and check every promise on it; never raises."""
    how = "static" if static else "numeric"
    warnings.simplefilter("ignore")
    blank = Result(suite, name, family, how, "failed", versions=_versions(suite, family))
    try:
        subject = make()
        blank = dataclasses.replace(
            blank, model=subject.name, parameters=sum(p.numel() for p in subject.model.parameters())
        )
        return _static(blank, subject) if static else _numeric(blank, subject)
    except LibraGradError as e:
        return dataclasses.replace(blank, verdict="refused", reason=f"{type(e).__name__}: {e}")
    except Exception as e:
        return dataclasses.replace(blank, reason=f"{type(e).__name__}: {e}")


def _versions(suite: str, family: str) -> str:
    packages = ("torch", SUITES[suite].package or family)
    return ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)


def _static(blank: Result, subject: Subject) -> Result:
    start = time.perf_counter()
    made = decide(subject.model, subject.inputs, module_calls=False, on_unknown="keep")
    gm = balance(made)
    open_ = (*made.plan.unknown, *made.plan.unbalanced) or prove(gm).open
    return dataclasses.replace(
        blank,
        verdict="unbalanced" if open_ else "balanced",
        reason="; ".join(f"{f.op}: {f.problem}" for f in open_),
        nodes=len(made.trace.graph.nodes),
        edits=len(made.plan.edits),
        seconds=time.perf_counter() - start,
    )


def _numeric(blank: Result, subject: Subject) -> Result:
    model, inputs = precise(subject)
    generic(model, inputs)
    start = time.perf_counter()
    gm = lg.transform(model, inputs)
    seconds = time.perf_counter() - start
    found = lg.verify(model, gm, inputs, subject.target)
    scale = max(abs(found.output), abs(found.input_share), abs(found.bias_share))
    scale = scale or math.nan
    run = found.input_share if found.share_as_run is None else found.share_as_run
    sums = found.completeness_error, found.worst_residual, found.boundary_error, run - found.input_share
    errors = [e / scale for e in sums]
    coarse = casts(gm.captured_graphs.values())
    coarse.pop(torch.float64, None)
    if model is subject.model:
        coarse[torch.float32] = "the model, which does not run in float64"
    tolerance = max([TOLERANCE, *(100 * torch.finfo(d).eps for d in coarse)])
    within = [abs(e) <= tolerance for e in errors]  # False for nan
    reasons = [
        *([] if found.forward_equal else [f"forward differs by {found.max_abs_difference:.2g}"]),
        *([] if found.erased_equal else ["the erased graph is not the original"]),
        *(f"unbalanced: {n}" for n in found.unbalanced),
        *([] if within[0] else [f"completeness error {errors[0]:.2g}"]),
        *([] if within[1] else [f"residual {errors[1]:.2g} at {found.worst_node}"]),
        *([] if within[2] else [f"completeness error behind a block {errors[2]:.2g}"]),
        *([] if within[3] else [f"the graph that runs gives the input {errors[3]:.2g} more"]),
    ]
    notes = [f"casts to {d} inside: {at}" for d, at in coarse.items()]
    notes += [f"in several graphs, cut at {c}" for c in found.cuts]
    return dataclasses.replace(
        blank,
        verdict="unbalanced" if reasons else "balanced",
        reason="; ".join(reasons or notes),
        nodes=found.nodes,
        edits=found.edits,
        seconds=seconds,
        forward_equal=found.forward_equal,
        completeness=errors[0],
        residual=errors[1],
        input_share=found.input_share,
        output=found.output,
    )


def precise(subject: Subject) -> tuple[nn.Module, Any]:
    """The model and its inputs in float64; unchanged if it does not run in that (a float32 table that is no
    buffer, quantised weights)."""
    inputs = pytree.tree_map(_double, subject.inputs)
    args, kwargs = as_call(copy.copy(inputs))
    try:
        model = copy.deepcopy(subject.model).double()
        with torch.no_grad(), torch.random.fork_rng():
            model(*args, **kwargs)
        return model, inputs
    except Exception:
        return subject.model, subject.inputs


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def generic(model: nn.Module, inputs: Any, seed: int = 0) -> None:
    """Give a fresh model generic weights, so that no check passes merely because there is no signal.

    Constant parameters (zero heads and biases, unit scales) get noise, and batch norms get the
    statistics of ``inputs``.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            plain = type(p.data) is torch.Tensor and p.is_floating_point()  # not quantised
            if plain and p.numel() and bool((p == p.flatten()[0]).all()):
                spread = 0.1 if p.ndim < 2 else p[0].numel() ** -0.5
                p.add_(torch.randn(p.shape, generator=generator).to(p) * spread)
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        momenta = [m.momentum for m in norms]
        for m in norms:
            m.train()
            m.momentum = 1.0
        args, kwargs = as_call(copy.copy(inputs))
        if norms:
            model(*args, **kwargs)
        for m, momentum in zip(norms, momenta, strict=True):
            m.eval()
            m.momentum = momentum
