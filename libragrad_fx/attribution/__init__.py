"""Attribution: what of an output comes from where in the input."""

from __future__ import annotations

from libragrad_fx.attribution.formulas import METHODS
from libragrad_fx.attribution.methods import explain
from libragrad_fx.attribution.result import Attribution
from libragrad_fx.attribution.towers import called_modules
from libragrad_fx.module.walk import blocks

__all__ = ["METHODS", "Attribution", "blocks", "called_modules", "explain"]
