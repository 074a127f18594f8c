"""Optional dependencies and files to write, with errors that say what to do."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from libragrad_fx.errors import InputError, LibraGradError


def need(module: str, extra: str) -> Any:
    """The module, or an error that names the extra which brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        top = module.partition(".")[0]
        raise LibraGradError(
            f"this needs {top}, which is not installed ({e}): pip install 'libragrad-fx[{extra}]'"
        ) from e


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make the folder that a file is written to; a path that cannot be written is an ``InputError``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as e:
        raise InputError(f"cannot write {str(path)!r}: {e.strerror or e}") from e
