"""Other libraries' explanations, as methods of an evaluation: ``{method: "zoo.rivals:autolrp"}``.

Each takes a module, inputs (B, C, H, W) and a function from the module's output to (B,) scalars, and gives
maps (B, H, W). HiLRP and LXT patch classes for a whole process, and LXT does not import beside transformers
5. So they run in a process of their own, with packages of their own in the folder that the environment
variable ``LIBRAGRAD_RIVALS`` names::

    pip install --target FOLDER --no-deps lxt==2.1 hilrp==0.2.0 zennit==1.0.0 \\
      transformers==4.57.6 "huggingface_hub<1" "tokenizers<0.23"

HiLRP's metadata ask for Python 3.11.11. With an earlier 3.11, add ``--ignore-requires-python``. LXT itself
has rules for torchvision's ViT and for language models, and none for timm's classes: HiLRP brings those.
DynamicLRP is not here: it is on no registry.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from libragrad_fx.errors import InputError, LibraGradError
from libragrad_fx.extras import need
from libragrad_fx.target import first_tensor

Scalar = Callable[[Any], torch.Tensor]
FOLDER = "LIBRAGRAD_RIVALS"


def autolrp(module: torch.nn.Module, inputs: torch.Tensor, scalar: Scalar) -> torch.Tensor:
    """autoLRP 0.2 with its defaults: relevance of pixels, channels summed."""
    x = need("autolrp", "rivals").tensor(inputs)
    total: Any = scalar(module(x)).sum()
    total.lrp()
    return torch.Tensor(x.relevance).sum(1)


def hilrp(module: torch.nn.Module, inputs: torch.Tensor, scalar: Scalar) -> torch.Tensor:
    """HiLRP 0.2 with its defaults (CP-LRP inside attention, gamma 0.25): relevance of pixels for the logit.

    Raises:
        LibraGradError: it is not installed.
        InputError: it fails in its process, as on a model that it has no rules for.
    """
    return _apart(module, inputs, scalar, "cp")


def attnlrp(module: torch.nn.Module, inputs: torch.Tensor, scalar: Scalar) -> torch.Tensor:
    """LXT 2.1's AttnLRP on timm's ViT and Swin, as HiLRP 0.2 runs it; else as ``hilrp``."""
    return _apart(module, inputs, scalar, "attnlrp")


def _apart(module: torch.nn.Module, inputs: torch.Tensor, scalar: Scalar, mode: str) -> torch.Tensor:
    folder = os.environ.get(FOLDER, "")
    if not (Path(folder) / "hilrp").is_dir() or not folder:
        missing = ImportError(f"no folder 'hilrp' in {FOLDER}={folder!r}")
        raise LibraGradError(f"HiLRP runs in a process of its own, from the folder {FOLDER}: see"
                             " zoo/rivals.py for what to install there") from missing  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        given, made = Path(place) / "given.pt", Path(place) / "made.pt"
        classes = _classes(module, inputs, scalar)
        torch.save((module.cpu(), inputs.cpu(), classes.cpu(), mode), given)
        module.to(inputs.device)
        path = os.pathsep.join([folder, *filter(None, sys.path)])
        done = subprocess.run(
            [sys.executable, "-m", "zoo.rivals", given, made], env={**os.environ, "PYTHONPATH": path},
            cwd=Path(__file__).parent.parent, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise InputError(f"HiLRP fails: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
        return torch.load(made).to(inputs.device)


def _classes(module: torch.nn.Module, inputs: torch.Tensor, scalar: Scalar) -> torch.Tensor:
    """(B,): the classes that a scalar is about: the logits that it grows with most."""
    with torch.no_grad():
        logits = first_tensor(module(inputs))
    logits = logits.detach().requires_grad_()
    (slope,) = torch.autograd.grad(scalar(logits).sum(), logits)
    return slope.argmax(1)


def _there(given: str, made: str) -> None:
    """In the process apart."""
    import importlib

    module, inputs, classes, mode = torch.load(given, weights_only=False)
    attribute = importlib.import_module("hilrp").attribute
    options = {} if mode == "cp" else {"attn_mode": mode}
    pairs = zip(inputs.split(1), classes.tolist(), strict=True)
    torch.save(
        torch.stack([attribute(module, x, target=c, **options)["pixel_map"] for x, c in pairs]), made
    )


if __name__ == "__main__":
    _there(*sys.argv[1:])
