"""A network and pictures for evaluations of seconds; configs name them as factories."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import nn

from libragrad_fx.evaluate.data import Data, Item
from tests.evaluate.pictures import picture


class Block(nn.Module):
    """A pre-norm block with attention and a SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.Linear(8, 24)
        self.gate, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attention(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Net(nn.Module):
    """Pictures (B, 3, 8, 8) -> (B, 3), by four tokens and four blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embed(x).flatten(2).mT).mean(1))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def steps(image: Image.Image) -> torch.Tensor:
    small = image.resize((8, 8), Image.Resampling.BICUBIC)
    return torch.tensor(np.array(small) / 255).permute(2, 0, 1).float()


def noise(seed: int = 0, count: int = 8) -> Data:
    """Pictures of noise (8, 8), with a label and its mask."""

    def get(i: int) -> Item:
        mask = np.zeros((8, 8), bool)
        mask[:4, i % 4 :] = True
        return Item(f"{seed}/{i}", picture(1000 * seed + i, (8, 8)), i % 3, {i % 3: mask})

    return Data(f"noise-{seed}", count, get, ("a", "b", "c"))
