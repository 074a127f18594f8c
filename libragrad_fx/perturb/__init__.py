"""Changes what a model sees: fewer tokens, zeros in their place, or other pixels.

``tokens(module, inputs)`` finds a model's tokens, and whether it runs on some of them. ``Tokens.seen`` is
one run on all. ``Seen.kept(cells)`` is the model on a shorter sequence, ``Seen.zeroed(cells)`` the model on
zeros in place of the other tokens. ``masked(pictures, cells, grid, fill)`` needs no tokens: it gives
pictures of which only some cells are seen. Cells are those of a grid, counted row by row.
"""

from __future__ import annotations

from libragrad_fx.perturb.pixels import masked
from libragrad_fx.perturb.tokens import Seen, Tokens, tokens

__all__ = ["Seen", "Tokens", "masked", "tokens"]
