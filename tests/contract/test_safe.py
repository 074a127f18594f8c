"""Files that users pass on to each other run no code: rules, policies, configs, checkpoints, maps."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import libragrad_fx as lg
from libragrad_fx.decide import rulebook
from libragrad_fx.errors import LibraGradError
from libragrad_fx.evaluate import Config
from libragrad_fx.models import resolve


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def as_yaml(file: Path, mark: Path) -> None:
    file.write_text(f"policy: !!python/object/apply:os.mkdir ['{mark}']\n")


def as_checkpoint(file: Path, mark: Path) -> None:
    torch.save({"weight": Payload(mark)}, file)


def as_pickle(file: Path, mark: Path) -> None:
    file.write_bytes(pickle.dumps(Payload(mark)))


def as_arrays(file: Path, mark: Path) -> None:
    np.savez(file, values=np.array([Payload(mark)], dtype=object))


KINDS: dict[str, tuple[Callable[[Path, Path], None], Callable[[Path], Any]]] = {
    "rules.yaml": (as_yaml, lambda file: lg.plan(torch.nn.Linear(2, 2), torch.ones(1, 2), rules=file)),
    "policy.yaml": (as_yaml, rulebook.load),
    "config.yaml": (as_yaml, Config.load),
    "weights.pt": (as_checkpoint, lambda file: resolve("vit_tiny_patch16_224", False, file)),
    "weights.bin": (as_pickle, lambda file: resolve("vit_tiny_patch16_224", False, file)),
    "map.npz": (as_arrays, lg.Attribution.load),
    "map.json": (as_pickle, lg.Attribution.load),
    "map.safetensors": (as_pickle, lg.Attribution.load),
    "certificate.json": (as_pickle, lambda file: lg.Certificate.from_json(file.read_text("latin-1"))),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_file_runs_no_code(name: str, tmp_path: Path) -> None:
    write, read = KINDS[name]
    file, mark = tmp_path / name, tmp_path / "was-run"
    write(file, mark)
    with pytest.raises((LibraGradError, ValueError, OSError)):
        read(file)
    assert not mark.exists()


def test_the_payload_is_one(tmp_path: Path) -> None:
    """Or the tests above could not fail."""
    as_checkpoint(tmp_path / "weights.pt", tmp_path / "was-run")
    torch.load(tmp_path / "weights.pt", weights_only=False)
    assert (tmp_path / "was-run").is_dir()
