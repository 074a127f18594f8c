"""The public face: the stages called in order."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch

from libragrad_fx import rulebook
from libragrad_fx.analyze import analyze
from libragrad_fx.capture import capture
from libragrad_fx.errors import GateOutputWarning, InputError
from libragrad_fx.ledger import ledger, sites
from libragrad_fx.module import CapturedModule
from libragrad_fx.normalize import normalize
from libragrad_fx.plan import plan as make_plan
from libragrad_fx.rewrite import require_same_graph, rewrite, spell
from libragrad_fx.types import Analysis, Certificate, Ledger, Plan, Trace
from libragrad_fx.verify import certify


@dataclasses.dataclass(frozen=True)
class Decision:
    """A captured model with everything decided about it and nothing done yet."""

    trace: Trace
    analysis: Analysis
    plan: Plan


def decide(
    model: torch.nn.Module,
    inputs: Any,
    policy: str | Path = "libra",
    on_unknown: str = "raise",
    rules: Any = None,
    *,
    module_calls: bool = True,
) -> Decision:
    """Every stage before the rewrite."""
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"expected an nn.Module, got {type(model).__name__}")
    if on_unknown not in ("raise", "keep"):
        raise InputError(f"on_unknown must be 'raise' or 'keep', got {on_unknown!r}")
    book = rulebook.load(policy, rules)
    trace = normalize(model, capture(model, inputs, module_calls=module_calls))
    analysis = analyze(trace, book)
    return Decision(trace, analysis, make_plan(trace, analysis, book, on_unknown))


def remember(made: Decision) -> dict[str, Any]:
    """What a balanced module keeps of how it was made: enough to account for it and to prove it."""
    listed = sites(made.trace, made.analysis, balanced=True)
    return {
        "plan": made.plan,
        "sites": listed,
        "original": spell(made.trace.graph),
        "facts": dict(made.analysis.facts),
        "starts": frozenset(s.node for s in listed if not s.live),
        "zeros": made.analysis.zeros,
        "gate_outputs": frozenset(made.analysis.gate_outputs),
    }


def transform(
    model: torch.nn.Module,
    example_inputs: Any = None,
    *,
    policy: str | Path = "libra",
    on_unknown: str = "raise",
    rules: Any = None,
) -> CapturedModule:
    """Same forward to the bit, balanced backward, same parameters, as a ``torch.fx.GraphModule``.

    The model is not changed: not its parameters, mode, hooks or ``requires_grad``, whatever happens.

    Args:
        model: any ``nn.Module`` that ``torch.export`` can capture, in the mode (train or eval) to
            be captured.
        example_inputs: a tensor, a tuple, or a dict of keyword arguments; inferred from the model
            if None. Dimension 0 of each tensor becomes free, the others are fixed.
        policy: ``"libra"`` (LibraGrad, CVPR 2025), ``"cp_lrp"`` (Ali et al. 2022), or a YAML file.
        on_unknown: ``"raise"`` lists every op on a live gradient path that no rule covers;
            ``"keep"`` leaves autograd's gradient there and says so in the plan.
        rules: facts to add: a YAML file, or a list of mappings (see ``rules/README.md``).

    Raises:
        CaptureError, InputError, RuleError, UnknownOpError: see ``libragrad_fx.errors``.
    """
    if isinstance(model, CapturedModule):
        return _again(model, policy)
    made = decide(model, example_inputs, policy, on_unknown, rules)
    for name in made.analysis.gate_heads:
        text = next(n for n in made.plan.notes if name in n)
        warnings.warn(text, GateOutputWarning, stacklevel=2)
    module = rewrite(made.trace, made.plan, remember(made))
    require_same_graph(module, made.trace)
    return module


def _again(module: CapturedModule, policy: str | Path) -> CapturedModule:
    """A balanced module balanced by the same policy is itself; by another, its model is needed."""
    made: Plan | None = module.plan
    if made is not None and made.policy == policy:
        return module
    raise InputError(
        f"this module was captured already (policy {made.policy if made else None});"
        f" transform the original model to apply {str(policy)!r}"
    )


def trace(
    model: torch.nn.Module, example_inputs: Any = None, *, rules: Any = None
) -> CapturedModule:
    """The captured model with autograd's own backward: the plain side of every comparison."""
    made = decide(model, example_inputs, "libra", "keep", rules)
    listed = sites(made.trace, made.analysis, balanced=False)
    return rewrite(made.trace, None, {"sites": listed})


def plan(
    model: torch.nn.Module,
    example_inputs: Any = None,
    *,
    policy: str | Path = "libra",
    on_unknown: str = "keep",
    rules: Any = None,
) -> Plan:
    """What ``transform`` would do, and why. Print it, or ask ``plan.explain(node)``."""
    return decide(model, example_inputs, policy, on_unknown, rules).plan


def verify(
    model: torch.nn.Module,
    module: CapturedModule,
    inputs: Any,
    target: Any = None,
    *,
    tolerance: float | None = None,
) -> Certificate:
    """Check every promise on one input: bits, the erased graph, each node's law, completeness.

    Args:
        model: the original.
        module: its transform.
        inputs: what to run both on, as for ``transform``.
        target: what to explain, as in Captum (int, tuple, tensor, list) or a callable.
        tolerance: largest residual and completeness error that still counts as balanced, in units
            of the output; by default a thousand ulp of the largest flow through a node.
    """
    return certify(model, module, inputs, target, tolerance)


def audit(model: torch.nn.Module, inputs: Any, target: Any = None, *, rules: Any = None) -> Ledger:
    """Which nodes create or destroy gradient mass, for any model, balanced or not."""
    module = model if isinstance(model, CapturedModule) else trace(model, inputs, rules=rules)
    return ledger(module, inputs, target)
