from . import attribution, errors, metrics, perturb
from .api import audit, gradient_graph, plan, trace, transform, verify, visualize
from .attribution import Attribution, blocks
from .attribution.similarity import similarity, unit
from .explain import (
    Likeness,
    Span,
    attribute,
    attribute_each,
    attribute_generation,
    draw,
    methods,
)
from .extras import show_versions
from .interop import quantus_explain, reshape_transform
from .programs import Program, program
from .segments import checkpointed
from .types import Certificate, Ledger, Plan
from .version import __version__

__all__ = [
    "Attribution", "Certificate", "Ledger", "Likeness", "Plan", "Program", "Span", "__version__",
    "attribute", "attribute_each", "attribute_generation", "attribution", "audit", "blocks",
    "checkpointed", "draw", "errors", "gradient_graph", "methods", "metrics", "perturb", "plan",
    "program", "quantus_explain", "reshape_transform", "show_versions", "similarity", "trace",
    "transform", "unit", "verify", "visualize",
]  # fmt: skip
