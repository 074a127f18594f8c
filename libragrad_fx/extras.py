"""Imports optional dependencies, or says which extra to install."""

from __future__ import annotations

import importlib
from typing import Any

from libragrad_fx.errors import LibraGradError


def need(module: str, extra: str) -> Any:
    """The module, or an error that names the extra which brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        top = module.partition(".")[0]
        raise LibraGradError(
            f"this needs {top}, which is not installed ({e}): pip install 'libragrad-fx[{extra}]'"
        ) from e
