"""A small evaluation: models of two blocks, pictures of 24 x 24, masks; made in a moment."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer

from tests.evaluate.pictures import mask, picture, put

CLASSES = ("cat", "dog", "owl")


@functools.cache
def vit(act: str = "gelu") -> torch.nn.Module:
    """The same module at each call: it is captured once for all tests."""
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=24, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3, act_layer=act
    )  # fmt: skip


@functools.cache
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 8, 8, 8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(8, 3))


@functools.cache
def mixer() -> torch.nn.Module:
    torch.manual_seed(0)
    return MlpMixer(img_size=24, patch_size=8, embed_dim=32, num_blocks=2, num_classes=3)


def steps(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1) / 128 - 1


def fitted(image: Image.Image) -> torch.Tensor:
    return steps(image.resize((24, 24)))


def pictures(root: Path, count: int = 12, masks: bool = True) -> Path:
    """``count`` pictures of three classes, with a mask of the class of each."""
    for i in range(count):
        name = f"{CLASSES[i % 3]}/{i}"
        put(root / "images" / f"{name}.png", picture(i, (24, 24)))
        if masks:
            drawn = np.zeros((24, 24))
            drawn[4 : 12 + i % 5, 6:20] = 1
            put(root / "masks" / f"{name}.png", mask(drawn))
    return root


def config(root: Path, **changed: Any) -> dict[str, Any]:
    """A model, a policy, two methods, two metrics; chunks of three samples, batches of two."""
    found = {
        "models": {"net": NET},
        "data": {"animals": {"load": f"folder:{root}", "seed": 1}},
        "policies": ["autograd"],
        "methods": ["random", "input_x_gradient"],
        "metrics": {"pixels": {"ratios": [0.3, 0.6]}, "places": {}},
        "batch": 2, "chunk": 3, "threads": 1,
    }  # fmt: skip
    return {**found, **changed}


NET, VIT, MIXER = (
    {"load": f"tests.evaluate.small:{name}", "steps": "tests.evaluate.small:fitted"}
    for name in ("net", "vit", "mixer")
)
