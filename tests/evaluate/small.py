"""A small evaluation: models of two blocks, pictures of 24 x 24, masks; made in a moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer

from tests.evaluate.pictures import mask, picture, put

CLASSES = ("cat", "dog", "owl")


def vit(act: str = "gelu") -> torch.nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=24, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3, act_layer=act
    )


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
    """Two models, two policies, two methods, two metrics; chunks of four, batches of three."""
    model = {"load": "tests.evaluate.small:vit", "steps": "tests.evaluate.small:fitted"}
    found = {
        "models": {"vit": model, "mixer": {**model, "load": "tests.evaluate.small:mixer"}},
        "data": {"animals": {"load": f"folder:{root}", "seed": 1}},
        "policies": ["autograd", "libra"],
        "methods": ["random", "input_x_gradient"],
        "metrics": {"tokens": {"ratios": [0.3, 0.6]}, "places": {}},
        "batch": 3, "chunk": 4, "threads": 1,
    }  # fmt: skip
    return {**found, **changed}
