"""Optional dependencies, files to write and logs: with errors that say what to do."""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from libragrad_fx.errors import InputError, LibraGradError

_LOCK = threading.Lock()
_quiet, _before = 0, 0


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
def quiet() -> Iterator[None]:
    """No logs: tracers log a failure with its whole graph, a hub each retry. The error says it once."""
    global _quiet, _before
    with _LOCK:  # several threads may be inside
        if _quiet == 0:
            _before = logging.root.manager.disable
            logging.disable(logging.CRITICAL)
        _quiet += 1
    try:
        yield
    finally:
        with _LOCK:
            _quiet -= 1
            if _quiet == 0:
                logging.disable(_before)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make the folder that a file is written to; a path that cannot be written is an ``InputError``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as e:
        raise InputError(f"cannot write {str(path)!r}: {e.strerror or e}") from e
