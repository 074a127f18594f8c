"""The one call: from a model and what a person has (pictures, texts, tensors) to an attribution."""

from __future__ import annotations

from libragrad_fx.explain.call import attribute, attribute_each

__all__ = ["attribute", "attribute_each"]
