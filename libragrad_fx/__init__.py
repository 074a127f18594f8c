"""Same forward to the bit, LibraGrad-balanced backward: a compiler pass for any PyTorch model."""

from __future__ import annotations

from libragrad_fx import errors
from libragrad_fx.api import audit, gradient_graph, plan, trace, transform, verify, visualize
from libragrad_fx.attribution import Attribution, blocks
from libragrad_fx.attribution.similarity import similarity, unit
from libragrad_fx.explain import (
    Likeness,
    Span,
    attribute,
    attribute_each,
    attribute_generation,
    draw,
    methods,
)
from libragrad_fx.interop import quantus_explain, reshape_transform
from libragrad_fx.programs import Program, program
from libragrad_fx.segments import checkpointed
from libragrad_fx.types import Certificate, Ledger, Plan
from libragrad_fx.version import __version__

__all__ = [
    "Attribution", "Certificate", "Ledger", "Likeness", "Plan", "Program", "Span", "__version__",
    "attribute", "attribute_each", "attribute_generation", "audit", "blocks", "checkpointed", "draw",
    "errors", "gradient_graph", "methods", "plan", "program", "quantus_explain", "reshape_transform",
    "similarity", "trace", "transform", "unit", "verify", "visualize",
]  # fmt: skip
