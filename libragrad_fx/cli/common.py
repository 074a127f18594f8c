"""Shared by the commands: load a model, and make inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer
from torch.utils import _pytree as pytree

from libragrad_fx import models
from libragrad_fx.capture.examples import infer_inputs
from libragrad_fx.cli.progress import working
from libragrad_fx.target import as_call, largest


def load_model(name: str, pretrained: bool, checkpoint: Path | None, seed: int) -> models.Loaded:
    with working(f"building {name}"):
        loaded = models.resolve(name, pretrained, checkpoint, seed)
    if loaded.weights == "random":
        said = f"the weights of {name} are random: its answers and the names of its classes mean nothing"
        typer.echo(f"note: {said} (--pretrained or --checkpoint)", err=True)
    return loaded


def guessed_inputs(module: torch.nn.Module, seed: int, single: bool = False) -> Any:
    """Two samples that a model may take; ``single``: the first of them."""
    torch.manual_seed(seed)
    args, kwargs = infer_inputs(module)
    found = kwargs or args
    return pytree.tree_map_only(torch.Tensor, lambda t: t[:1], found) if single else found


def run_once(module: torch.nn.Module, inputs: Any) -> Any:
    args, kwargs = as_call(inputs)
    with torch.no_grad():
        return module(*args, **kwargs)


def target_of(module: torch.nn.Module, inputs: Any, index: int | None) -> Any:
    return index if index is not None else largest(run_once(module, inputs))
