"""Calls the stages in order, as far as the balanced module: capture, normalize, analyze, plan, rewrite."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from libragrad_fx.account.birth import Reference, reference
from libragrad_fx.capture.examples import example_call
from libragrad_fx.capture.export import capture
from libragrad_fx.capture.fit import require_fit
from libragrad_fx.capture.free import FIXED, USUAL, Free, token_lengths
from libragrad_fx.capture.normal import normalize
from libragrad_fx.capture.state import copied, untouched
from libragrad_fx.decide import rulebook
from libragrad_fx.decide.plan import plan as make_plan
from libragrad_fx.decide.plan import require_matched
from libragrad_fx.decide.roles import analyze
from libragrad_fx.decide.rulebook import RuleBook
from libragrad_fx.decide.sites import sites
from libragrad_fx.errors import ExportError, InputError
from libragrad_fx.module.captured import CapturedModule, InGraphs
from libragrad_fx.module.variants import fits
from libragrad_fx.rewrite.edits import rewrite
from libragrad_fx.rewrite.erase import require_same_graph, spell
from libragrad_fx.types import Analysis, History, Plan, Trace

ONE_AT_A_TIME = threading.RLock()  # torch.export changes global state while it traces


@dataclasses.dataclass(frozen=True)
class Decision:
    """A captured model, and all decisions about it; nothing is rewritten yet.

    reference: what the original returned, for the check at birth
    free:      the sizes that are free in ``trace``
    """

    trace: Trace
    analysis: Analysis
    plan: Plan
    reference: Reference | None = None
    free: Free = FIXED


def decide(
    model: torch.nn.Module,
    inputs: Any,
    policy: str | Path = "libra",
    on_unknown: str = "raise",
    rules: Any = None,
    *,
    module_calls: bool = True,
    piece: bool = False,
    static: Container[str] = (),
    computed: Container[str] = (),
    check: bool = True,
    free: Free = USUAL,
) -> Decision:
    """Every stage before the rewrite.

    piece: the model is a part of a larger one: its shapes are fixed, and every output carries.
    static, computed: see ``analyze``.
    check: run the model before it is traced: see ``birth``.
    free: the sizes to leave free; fewer, if the model fixes some.
    """
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"expected an nn.Module, got {type(model).__name__}")
    if on_unknown not in ("raise", "keep"):
        raise InputError(f"on_unknown must be 'raise' or 'keep', got {on_unknown!r}")
    if isinstance(model, InGraphs):
        raise InputError("this module was captured already; give the original model")
    book = rulebook.load(policy, rules)
    with _collected_later(), ONE_AT_A_TIME:
        require_fit(model)
        with untouched(model):
            args, kwargs = example_call(model, inputs)
            known = reference(model, args, kwargs) if check and not piece else None
            if known is not None and known.unfit:
                raise ExportError(f"{type(model).__name__} is no graph: {known.unfit}")
            trace, free = _traced(model, args, kwargs, book, module_calls, FIXED if piece else free)
        analysis = analyze(trace, book, all_carry=piece, static=static, computed=computed)
        made = make_plan(trace, analysis, book, on_unknown)
        if not piece:  # a row may have its site in another piece
            require_matched([made])
        return Decision(trace, analysis, made, known, free)


def _traced(
    model: torch.nn.Module, args: Any, kwargs: Any, book: RuleBook, module_calls: bool, free: Free
) -> tuple[Trace, Free]:
    """The model as a graph that accepts at least the given call; and the sizes that are free in it."""
    subject = model
    # export puts fake tensors into the modules that it traces, where other threads see them
    with contextlib.suppress(Exception):  # a model that cannot be copied is traced itself
        subject = copied(model)
    if not token_lengths(args, kwargs):
        free = dataclasses.replace(free, lengths=False)
    while True:
        try:
            found = capture(subject, args, kwargs, book=book, module_calls=module_calls, free=free)
        except ExportError:
            if not free.lengths:
                raise
            free = dataclasses.replace(free, lengths=False)
            continue
        trace = normalize(model, found)
        _require_free(trace, free.named)
        if not free.batch or fits(trace.module, args, kwargs):  # type: ignore[arg-type]
            return trace, free
        free = FIXED  # the batch of one was doubled for export, and the model branched on that


def _require_free(trace: Trace, wanted: Mapping[str, Any]) -> None:
    """Raise ``InputError`` if the model fixes a size that ``dynamic`` names."""
    sizes = {spec.path: spec.shape for spec in trace.inputs}
    for name, axes in wanted.items():
        for axis, label in axes.items() if name in sizes and isinstance(axes, Mapping) else ():
            if isinstance(size := sizes[name][axis], int):
                label = getattr(label, "__name__", label)
                raise InputError(
                    f"dynamic: {name}.shape[{axis}] ({label}) cannot be free: the model takes {size} alone"
                    " there (or the example has one, which says nothing of others)"
                )


@contextlib.contextmanager
def _collected_later() -> Iterator[None]:
    """No garbage collection inside: graphs have so many objects that it would take a tenth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def remember(made: Decision) -> History:
    """The history that a balanced module keeps."""
    return History(
        plan=made.plan,
        original=spell(made.trace.graph),
        plain_sites=sites(made.trace.graph, made.trace.inputs, made.analysis),
        facts=dict(made.analysis.facts),
        roles=dict(made.analysis.roles),
        zeros=made.analysis.zeros,
        gate_outputs=frozenset(made.analysis.gate_outputs),
    )


def rewritten(made: Decision) -> CapturedModule:
    """The balanced module of a decision, not compared with the trace yet."""
    return rewrite(made.trace, made.plan, made.analysis, remember(made))


def plain(made: Decision) -> CapturedModule:
    """The captured model with autograd's own backward."""
    return rewrite(made.trace, None, made.analysis)


def balance(made: Decision) -> CapturedModule:
    """The balanced module of a decision; its forward graph, edits erased, is the trace's."""
    with _collected_later():
        module = rewritten(made)
        require_same_graph(module, made.trace)
    return module
