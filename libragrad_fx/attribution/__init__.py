"""Attribution: what of an output comes from where in the input."""

from __future__ import annotations

from libragrad_fx.attribution.formulas import METHODS
from libragrad_fx.attribution.methods import explain
from libragrad_fx.attribution.result import Attribution
from libragrad_fx.module.walk import blocks, called_modules

__all__ = ["METHODS", "Attribution", "blocks", "called_modules", "explain"]
