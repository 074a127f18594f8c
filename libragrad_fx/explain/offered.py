"""Which methods a model supports, found by trying."""

from __future__ import annotations

from typing import Any

import torch

from libragrad_fx.attribution import METHODS, explain
from libragrad_fx.capture.examples import infer_inputs
from libragrad_fx.errors import LibraGradError
from libragrad_fx.explain.inputs import Batch, batches
from libragrad_fx.explain.kept import Policy, captured
from libragrad_fx.explain.targets import of_samples, resolved
from libragrad_fx.target import Target, largest


def methods(
    model: torch.nn.Module,
    inputs: Any = None,
    target: Target = None,
    *,
    policy: Policy = None,
    processor: Any = None,
) -> dict[str, str]:
    """For each of ``METHODS`` "" if the model supports it, else why not, and what to use instead.

    Each is run once, so the answer is of these inputs and this target.

    Args:
        inputs: as for ``attribute``; None infers them from the model, as ``transform`` does.
        target: as for ``attribute``; None is the largest number of the output.

    Raises:
        LibraGradError: the model cannot be captured, or its inputs cannot be inferred.
    """
    if inputs is None:
        args, kwargs = infer_inputs(model)
        inputs = kwargs or args
    batch = batches(model, inputs, processor, None)[0]()
    module = captured(model, batch.call, policy)

    def tried(name: str) -> str:
        try:
            explain(module, batch.call, lambda y: _chosen(model, batch, y, target), method=name, steps=1)
        except LibraGradError as e:
            return str(e)
        except Exception as e:  # one that breaks says nothing of the others
            return f"it fails: {type(e).__name__}: {e}"
        return ""

    return {name: tried(name) for name in METHODS}


def _chosen(model: Any, batch: Batch, output: Any, target: Target) -> list[Target]:
    if target is None and batch.last is None:
        return [largest(output)]
    return resolved(model, batch, output, [of_samples(target, batch)])
