"""The one call: from a model and what a person has (pictures, texts, tensors) to an attribution."""

from __future__ import annotations

from libragrad_fx.explain.call import attribute, attribute_each
from libragrad_fx.explain.generation import attribute_generation
from libragrad_fx.explain.targets import Against, Likeness, Span

__all__ = ["Against", "Likeness", "Span", "attribute", "attribute_each", "attribute_generation"]
