"""Shared by the commands: load a model, make inputs, show progress."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

from libragrad_fx import models
from libragrad_fx.capture.examples import infer_inputs
from libragrad_fx.target import as_call, largest


def load_model(name: str, pretrained: bool, checkpoint: Path | None, seed: int) -> models.Loaded:
    with working(f"building {name}"):
        loaded = models.resolve(name, pretrained, checkpoint, seed)
    if loaded.weights == "random":
        typer.echo(f"note: the weights of {name} are random (--pretrained or --checkpoint)", err=True)
    return loaded


@contextlib.contextmanager
def working(what: str) -> Iterator[Any]:
    """A spinner on a terminal, silence elsewhere. Yields a function that changes its text."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status(what) as status:
        yield status.update


def guessed_inputs(module: torch.nn.Module, seed: int) -> Any:
    torch.manual_seed(seed)
    args, kwargs = infer_inputs(module)
    return kwargs or args


def run_once(module: torch.nn.Module, inputs: Any) -> Any:
    args, kwargs = as_call(inputs)
    with torch.no_grad():
        return module(*args, **kwargs)


def target_of(module: torch.nn.Module, inputs: Any, index: int | None) -> Any:
    return index if index is not None else largest(run_once(module, inputs))
