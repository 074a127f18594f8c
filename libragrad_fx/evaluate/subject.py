"""A model of an evaluation, with what its answers depend on."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from libragrad_fx.errors import InputError, LibraGradError
from libragrad_fx.evaluate.config import ModelSpec
from libragrad_fx.evaluate.data.items import sha256
from libragrad_fx.evaluate.data.prepare import Steps
from libragrad_fx.evaluate.inputs import Input, Pictures, Texts, printed, sources_of, texts
from libragrad_fx.explain.kept import AUTOGRAD, captured
from libragrad_fx.models import Loaded, imported, preprocessing, reads_texts, resolve
from libragrad_fx.module.variants import fitting
from libragrad_fx.perturb import Tokens
from libragrad_fx.perturb import tokens as tokens_of


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a model's answers depend on, beside the file that names it.

    weights: SHA-256 of every parameter and buffer
    code:    SHA-256 of how the model is built: its modules as they print themselves, and their source files
    steps:   what prepares samples: of pictures, as it prints itself, its source file, and what it makes of
             one; of texts, the tokens, and what is made of one
    """

    weights: str
    code: str
    steps: str


@dataclasses.dataclass(frozen=True)
class Subject:
    """module: in eval mode, on ``device``. inputs: what it takes. A language model answers with the logits
    of the next token (B, V): to all that follows it is a classifier."""

    module: torch.nn.Module
    inputs: Pictures | Texts
    device: torch.device
    dtype: torch.dtype
    identity: Identity
    _found: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def batch(self, samples: Sequence[Input]) -> Any:
        """Prepared pictures of one size (B, C, H, W), or texts of one length (B, T) by name, as the module
        takes them."""
        return pytree.tree_map(self._stacked, *samples)

    def _stacked(self, *each: torch.Tensor) -> torch.Tensor:
        found = torch.stack(each).to(self.device)
        return found.to(self.dtype) if found.is_floating_point() else found

    def captured(self, size: Sequence[int], policy: str) -> Any:
        """The module captured for pictures (C, H, W) or texts (T,). These are the same noise in every
        process, so that a capture does not depend on which samples come first."""
        key = (policy, *size)
        if key not in self._found:
            noise = self._noise(size)
            self._found[key] = fitting(captured(self.module, noise, policy), noise)
        return self._found[key]

    def tokens(self, size: Sequence[int]) -> Tokens:
        """The tokens of the module, looked for once for each size of sample, in the same noise.

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

    @property
    def steps(self) -> Steps:
        """How pictures are prepared. Raises ``InputError``: the model takes texts."""
        if not isinstance(self.inputs, Pictures):
            raise InputError("this model takes texts, and this is about pictures")
        return self.inputs.steps

    def _noise(self, size: Sequence[int]) -> Any:
        return self.batch(self.inputs.noise(size))


def loaded(spec: ModelSpec, device: torch.device, dtype: str) -> Subject:
    """Build the model that a config names; the same one in every process.

    Raises:
        InputError: as ``models.resolve``, or samples cannot be prepared.
    """
    found = resolve(spec.load, spec.pretrained, spec.checkpoint, args=spec.args)
    kind = getattr(torch, dtype)
    module = found.module.eval().to(dtype=kind)
    sources = [type(m).__module__ for m in module.modules()]
    if found.source == "factory":
        sources.append(spec.load.partition(":")[0])
    code, weights = sha256([printed(module), *sources_of(sources)]), hashed(module)
    inputs = _inputs(spec, found)
    answering = inputs.answering() if isinstance(inputs, Texts) else module
    identity = Identity(weights, code, sha256(inputs.said()))
    return Subject(answering.eval().to(device), inputs, device, kind, identity)


def _inputs(spec: ModelSpec, found: Loaded) -> Pictures | Texts:
    if spec.steps is None and (spec.tokenizer is not None or reads_texts(found.module)):
        return texts(found.module, spec.tokenizer)
    return Pictures(imported(spec.steps) if spec.steps else preprocessing(found))


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
