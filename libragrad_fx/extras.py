"""Optional dependencies, files to write, names and logs: with errors that say what to do."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.metadata
import logging
import os
import platform
import re
import shlex
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from libragrad_fx.errors import InputError, LibraGradError

_LOCK = threading.Lock()
_quiet, _before = 0, 0


def need(module: str, extra: str) -> Any:
    """The module, or an error that says how to get the extra which brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        top = module.partition(".")[0]
        raise LibraGradError(f"this needs {top}, which is not installed ({e}): {how_to_get(extra)}") from e


def how_to_get(extra: str) -> str:
    """The command that installs what an extra of this package brings."""
    packages = _of_extra(extra)
    return (
        f"pip install {shlex.join(packages)}" if packages else f"pip install '.[{extra}]' in the checkout"
    )


def _of_extra(extra: str) -> list[str]:
    """The requirements of an extra, and of the extras that it names."""
    found: set[str] = set()
    for line in _requirements():
        package, _, marker = line.partition(";")
        if re.search(rf"extra == ['\"]{extra}['\"]", marker):
            named = re.match(r"libragrad[-_]fx\[(.*)\]", package)
            found |= {p for e in named[1].split(",") for p in _of_extra(e)} if named else {package.strip()}
    return sorted(found)


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires("libragrad-fx") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return []


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """``; did you mean …?`` of the names that are like one, for the end of a message; else nothing."""
    found = difflib.get_close_matches(str(name), names, 4)
    return f"; did you mean {', '.join(found)}?" if found else ""


def show_versions() -> None:
    """Print what a report of a fault should say: versions of this package and of what it stands on, the
    digest of its rules, and the devices."""
    import torch

    from libragrad_fx.decide import rulebook

    named = [re.split(r"[ <>=;\[(]", line, maxsplit=1)[0] for line in _requirements()]
    for name in ("libragrad-fx", *sorted({*named, "triton"} - {"libragrad-fx"})):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            print(f"{name:28} {importlib.metadata.version(name)}")
    print(f"{'python':28} {platform.python_version()} on {platform.platform(terse=True)}")
    print(f"{'rules':28} {rulebook.load().digest[:12]}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"{'devices':28} {', '.join(['cpu', *devices])}; {torch.get_num_threads()} threads")


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


def writable(path: Path, endings: Sequence[str] = (), folder: bool = False) -> Path:
    """``path``, if it can be written: to be asked before the work. Nothing is made.

    Args:
        endings: a file has one of these; any if there are none.
        folder: whether files are to be written into it.

    Raises:
        InputError: another ending, or a path that cannot be written.
    """
    if endings and not any(path.name.endswith(e) and path.name != e for e in endings):
        raise InputError(f"cannot write {str(path)!r}: its ending must be one of {', '.join(endings)}")
    try:
        there = next(p for p in (path, *path.parents) if p.exists())
        wanted = folder or there != path
        if there.is_dir() != wanted:
            raise NotADirectoryError(None, f"{str(there)!r} is {'no' if wanted else 'a'} folder")
        if not os.access(there, os.W_OK):
            raise PermissionError(None, f"{str(there)!r} is read-only")
    except OSError as e:
        raise InputError(f"cannot write {str(path)!r}: {e.strerror or e}") from e
    return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make the folder that a file is written to; a path that cannot be written is an ``InputError``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as e:
        raise InputError(f"cannot write {str(path)!r}: {e.strerror or e}") from e
