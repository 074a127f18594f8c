"""Sets by name: as a command line or a configuration says them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.data.coco import coco
from libragrad_fx.evaluate.data.folders import folder, imagenet, imagenet_s, mura, pet
from libragrad_fx.evaluate.data.hub import hugging_face, imagenet_hard
from libragrad_fx.evaluate.data.items import Data
from libragrad_fx.evaluate.data.tables import table
from libragrad_fx.models import made_by

LOADERS: Mapping[str, Callable[..., Data]] = {
    "folder": folder, "imagenet": imagenet, "imagenet-s": imagenet_s, "imagenet-hard": imagenet_hard,
    "mura": mura, "pet": pet, "coco": coco, "hf": hugging_face,
    "csv": table, "tsv": table, "jsonl": table,
}  # fmt: skip


def open_data(spec: str | Mapping[str, Any]) -> Data:
    """A set by name.

    Args:
        spec: ``LOADER:PATH``, ``LOADER:PATH@SPLIT`` or ``package.module:factory``; or a mapping of ``load``
            (a loader or a factory) and ``args`` (by name).

    Raises:
        InputError: there is no such loader, argument or set, or a factory fails or returns no ``Data``.
    """
    if isinstance(spec, str):
        head, colon, rest = spec.partition(":")
        if colon and head in LOADERS:
            return _called(head, _split(rest), {})
        return _called(spec, [], {})
    unknown = sorted(set(spec) - {"load", "args"})
    if unknown or not isinstance(spec.get("load"), str) or not isinstance(spec.get("args") or {}, Mapping):
        raise InputError(f"data is LOADER:PATH, or a mapping of load and args, not {dict(spec)!r:.200}")
    head, colon, rest = spec["load"].partition(":")
    if colon and head in LOADERS:
        return _called(head, _split(rest), spec.get("args") or {})
    return _called(spec["load"], [], spec.get("args") or {})


def _called(name: str, given: list[str], args: Mapping[str, Any]) -> Data:
    if name not in LOADERS:
        if ":" not in name:
            raise InputError(f"no data {name!r}: say {', '.join(LOADERS)}:PATH, or package.module:factory")
        return made_by(name, Data, args)
    loader = LOADERS[name]
    wanted = inspect.signature(loader)
    words = dict(zip(_places(wanted), given, strict=False))
    if len(words) < len(given) or words.keys() & args.keys():
        raise InputError(f"{name}:{'@'.join(given)} says more than {name} takes, or twice: {_said(wanted)}")
    try:
        wanted.bind(**words, **args)
    except TypeError as e:
        raise InputError(f"{name}: {e}; it takes {_said(wanted)}") from e
    return loader(**words, **args)


def _places(wanted: inspect.Signature) -> list[str]:
    """The arguments that a text says: the first, and the split."""
    return [next(iter(wanted.parameters)), *(["split"] if "split" in wanted.parameters else [])]


def _said(wanted: inspect.Signature) -> str:
    return ", ".join(wanted.parameters)


def _split(text: str) -> list[str]:
    """Path and split. A file or folder that has an @ in its name is one."""
    path, at, split = text.rpartition("@")
    if not text:
        return []
    return [text] if not at or not path or Path(text).expanduser().exists() else [path, split]
