"""Changes what a model sees: fewer tokens, zeros in their place, or other pixels."""

from __future__ import annotations

from libragrad_fx.perturb.pixels import masked
from libragrad_fx.perturb.tokens import Seen, Tokens, tokens

__all__ = ["Seen", "Tokens", "masked", "tokens"]
