"""A model of an evaluation, with what its answers depend on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import torch
from PIL import Image

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.config import ModelSpec
from libragrad_fx.models import Loaded, imported, made_by, preprocessing, resolve


@dataclasses.dataclass(frozen=True)
class Subject:
    """module: in eval mode. steps: from a picture to a tensor (C, H, W). weights: SHA-256 of all tensors."""

    module: torch.nn.Module
    steps: Callable[[Image.Image], torch.Tensor]
    weights: str

    def batch(self, pictures: Sequence[torch.Tensor]) -> torch.Tensor:
        """Prepared pictures as the module takes them.

        Raises:
            InputError: they differ in size.
        """
        if len({x.shape for x in pictures}) > 1:
            raise InputError(
                f"pictures of several sizes in one batch: {sorted({tuple(x.shape) for x in pictures})}"
            )
        like = next(self.module.parameters())
        return torch.stack([*pictures]).to(like)


def loaded(spec: ModelSpec, device: str, dtype: str) -> Subject:
    """Build the model that a config names.

    Raises:
        InputError: as ``models.resolve``; or arguments for a model that is no factory.
    """
    if spec.args:
        if ":" not in spec.load or spec.load.startswith(("hf:", "torchvision:")):
            raise InputError(f"args are of a factory package.module:function, and {spec.load!r} is none")
        found = Loaded(spec.load, "factory", made_by(spec.load, torch.nn.Module, spec.args), "")
    else:
        found = resolve(spec.load, spec.pretrained, spec.checkpoint)
    module, steps = found.module, imported(spec.steps) if spec.steps else preprocessing(found)
    module = module.eval().to(torch.device(device), getattr(torch, dtype))
    return Subject(module, steps, hashed(module))


def hashed(module: torch.nn.Module) -> str:
    """SHA-256 of every parameter and buffer: its name, dtype, shape and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            plain = tensor.detach().cpu().contiguous()
            found.update(plain.view(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return found.hexdigest()
