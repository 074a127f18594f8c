"""Attributions as files: .npz and .safetensors keep tensors as they are, .json is for everything else."""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from libragrad_fx.errors import InputError
from libragrad_fx.extras import writing

MAPPINGS = ("others", "stages", "parts")
"""Fields of an ``Attribution`` that hold tensors by name: saved as others.NAME."""


def save(found: Any, path: Path) -> Path:
    """Write every field of an ``Attribution``."""
    write, _ = _format(path)
    fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    others = {f"{name}.{k}": v for name in MAPPINGS for k, v in fields.pop(name).items()}
    tensors = {k: v.detach().cpu() for k, v in {**fields, **others}.items() if isinstance(v, torch.Tensor)}
    said = {k: v for k, v in fields.items() if not isinstance(v, torch.Tensor)}
    with writing(path):
        write(path, tensors, said)
    return path


def load(path: Path) -> Any:
    """The ``Attribution`` that ``save`` wrote."""
    from libragrad_fx.attribution.result import Attribution

    _, read = _format(path)
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r}")
    try:
        tensors, said = read(path)
        named: dict[str, Any] = {
            name: {
                k.removeprefix(f"{name}."): tensors.pop(k) for k in [*tensors] if k.startswith(f"{name}.")
            }
            for name in MAPPINGS
        }
        texts = {k: _tuples(v) for k, v in said.items()}
        return Attribution(**tensors, **texts, **named)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as e:
        raise InputError(f"{str(path)!r} holds no attribution that save wrote: {e}") from e
    except Exception as e:  # safetensors raises a type of its own
        raise InputError(f"cannot read {str(path)!r}: {e}") from e


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


Tensors = Mapping[str, torch.Tensor]
_Write = Callable[[Path, Tensors, Mapping[str, Any]], None]
_Read = Callable[[Path], tuple[dict[str, torch.Tensor], dict[str, Any]]]


def _format(path: Path) -> tuple[_Write, _Read]:
    if path.suffix not in _FORMATS:
        raise InputError(f"an attribution is saved as {', '.join(_FORMATS)}; got {path.name!r}")
    return _FORMATS[path.suffix]


def _write_npz(path: Path, tensors: Tensors, said: Mapping[str, Any]) -> None:
    arrays: dict[str, Any] = {k: t.numpy() for k, t in tensors.items()}
    with path.open("wb") as file:  # a name without the file's ending would get it twice
        np.savez_compressed(file, said=np.array(json.dumps(said)), **arrays)


def _read_npz(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with np.load(path, allow_pickle=False) as held:
        tensors = {k: torch.from_numpy(held[k]) for k in held.files if k != "said"}
        return tensors, json.loads(str(held["said"]))


def _write_safetensors(path: Path, tensors: Tensors, said: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file({k: t.contiguous() for k, t in tensors.items()}, path, {"said": json.dumps(said)})


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as held:
        return {k: held.get_tensor(k) for k in held.keys()}, json.loads(held.metadata()["said"])  # noqa: SIM118


def _write_json(path: Path, tensors: Tensors, said: Mapping[str, Any]) -> None:
    plain = {k: {"dtype": str(t.dtype).removeprefix("torch."), "values": _finite(t.tolist())}
             for k, t in tensors.items()}  # fmt: skip
    path.write_text(json.dumps({**said, "tensors": plain}, allow_nan=False, indent=1), "utf-8")


def _read_json(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    said = json.loads(path.read_text("utf-8"))
    found = said.pop("tensors").items()
    return {
        k: torch.tensor(_numbers(t["values"]), dtype=getattr(torch, t["dtype"])) for k, t in found
    }, said


def _finite(value: Any) -> Any:
    """Numbers as JSON has them: it knows no nan and no inf, which become text."""
    if isinstance(value, list):
        return [*map(_finite, value)]
    return value if math.isfinite(value) else str(value)


def _numbers(value: Any) -> Any:
    return [*map(_numbers, value)] if isinstance(value, list) else float(value)


_FORMATS = {
    ".npz": (_write_npz, _read_npz),
    ".safetensors": (_write_safetensors, _read_safetensors),
    ".json": (_write_json, _read_json),
}
