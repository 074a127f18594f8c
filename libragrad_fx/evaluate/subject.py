"""A model of an evaluation, with what its answers depend on."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from libragrad_fx.errors import InputError, LibraGradError
from libragrad_fx.evaluate.config import ModelSpec
from libragrad_fx.evaluate.data.items import sha256
from libragrad_fx.explain.kept import AUTOGRAD, captured
from libragrad_fx.models import first_line, imported, preprocessing, resolve
from libragrad_fx.module.variants import fitting
from libragrad_fx.perturb import Tokens
from libragrad_fx.perturb import tokens as tokens_of

Steps = Callable[[Image.Image], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a model's answers depend on, beside the file that names it.

    weights: SHA-256 of every parameter and buffer
    code:    SHA-256 of how the model is built: its modules as they print themselves, and their source files
    steps:   what prepares pictures: as it prints itself, its source file, and what it makes of one picture
    """

    weights: str
    code: str
    steps: str


@dataclasses.dataclass(frozen=True)
class Subject:
    """module: in eval mode, on ``device``. steps: from a picture to a tensor (C, H, W)."""

    module: torch.nn.Module
    steps: Steps
    device: torch.device
    dtype: torch.dtype
    identity: Identity
    _found: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def batch(self, pictures: Sequence[torch.Tensor]) -> torch.Tensor:
        """Prepared pictures of one size as the module takes them."""
        return torch.stack([*pictures]).to(self.device, self.dtype)

    def captured(self, size: Sequence[int], policy: str) -> Any:
        """The module captured for pictures (C, H, W). The pictures are the same noise in every process, so
        that a capture does not depend on which samples come first."""
        key = (policy, *size)
        if key not in self._found:
            noise = self._noise(size)
            self._found[key] = fitting(captured(self.module, noise, policy), noise)
        return self._found[key]

    def tokens(self, size: Sequence[int]) -> Tokens:
        """The tokens of the module, looked for once for each size of picture, in the same noise.

        Raises:
            LibraGradError: it has none, or cannot be captured.
        """
        key = tuple(size)
        if key not in self._found:
            try:
                self._found[key] = tokens_of(self.captured(size, AUTOGRAD), self._noise(size))
            except LibraGradError as e:
                self._found[key] = e
        if isinstance(self._found[key], LibraGradError):
            raise self._found[key]
        return self._found[key]

    def with_weights(self, module: torch.nn.Module) -> Subject:
        """This subject with the parameters and buffers of ``module``, which has the same modules.

        It is one copy of the module, captured once, and written over at each call. What this subject has
        captured stays as it is, and so does its module.
        """
        if "copy" not in self._found:
            self._found["copy"] = dataclasses.replace(self, module=copy.deepcopy(self.module), _found={})
        found = self._found["copy"]
        with torch.no_grad():
            for ours, theirs in zip(_tensors(found.module), _tensors(module), strict=True):
                ours.copy_(theirs)
        return found

    def _noise(self, size: Sequence[int]) -> torch.Tensor:
        draw = torch.Generator().manual_seed(0)
        return self.batch(torch.randn(2, *size, generator=draw).unbind())


def loaded(spec: ModelSpec, device: torch.device, dtype: str) -> Subject:
    """Build the model that a config names; the same one in every process.

    Raises:
        InputError: as ``models.resolve``, or pictures cannot be prepared.
    """
    found = resolve(spec.load, spec.pretrained, spec.checkpoint, args=spec.args)
    kind = getattr(torch, dtype)
    steps = imported(spec.steps) if spec.steps else preprocessing(found)
    module = found.module.eval().to(dtype=kind)
    sources = [type(m).__module__ for m in module.modules()]
    if found.source == "factory":
        sources.append(spec.load.partition(":")[0])
    code = sha256([_printed(module), *sources_of(sources)])
    identity = Identity(hashed(module), code, sha256(_of_steps(steps)))
    return Subject(module.to(device), steps, device, kind, identity)


def place(name: str) -> torch.device:
    """The device that a config names. ``cuda`` is the GPU that ``torchrun`` gives to this process.

    Raises:
        InputError: this machine has none.
    """
    device = torch.device(name)
    if device.type == "cpu":
        return device
    here = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count()
    if here is None or here.type != device.type or (device.index or 0) >= count:
        raise InputError(f"this machine has no device {name!r}: say device: cpu, or run where there is one")
    if device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device(device.type, int(os.environ["LOCAL_RANK"]) % count)
    return device


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


# --- identity


def hashed(module: torch.nn.Module) -> str:
    """SHA-256 of every parameter and buffer, also of those that no state dict holds."""
    found = hashlib.sha256()
    tensors = [
        *module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)
    ]  # fmt: skip
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous().view(-1)
        if plain.numel():
            found.update(plain.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _of_steps(steps: Steps) -> list[bytes]:
    """As they print themselves, their source, and the size, mean and deviation of a picture they prepare.

    Raises:
        InputError: they fail, or give another tensor each time.
    """
    draw = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (96, 160, 3), dtype=torch.uint8, generator=draw).numpy()
    try:
        one, other = (torch.as_tensor(steps(Image.fromarray(levels))).double() for _ in range(2))
    except Exception as e:  # steps of a user fail in any way
        raise InputError(f"the preparation of pictures fails on one of 160 x 96: {first_line(e)}") from e
    if not torch.equal(one, other):
        raise InputError("the preparation of pictures is random: it makes two tensors of one picture")
    said = f"{tuple(one.shape)} {float(one.mean()):.3f} {float(one.std()):.3f}"
    return [_printed(steps), said.encode(), *sources_of([str(getattr(steps, "__module__", ""))])]


def _printed(found: Any) -> bytes:
    """As it prints itself, but for addresses in memory."""
    return re.sub(r"0x[0-9a-fA-F]+", "", repr(found)).encode()


def sources_of(modules: Sequence[str]) -> list[bytes]:
    """The source of Python modules by name; of one without a file, its name."""
    found = []
    for name in sorted({*modules}):
        file = getattr(sys.modules.get(name), "__file__", None)
        found.append(Path(file).read_bytes() if file and Path(file).is_file() else name.encode())
    return found
