"""A small vision transformer, and the same code on some of its tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

F64 = torch.float64
GRID, C = (3, 4), 8
N = GRID[0] * GRID[1]
Read = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """Attention with a bias for each pair of places, and a table of positions of its own."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.up = nn.LayerNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.bias = nn.Parameter(torch.randn(2, places, places))
        self.table = nn.Parameter(torch.randn(places, C))

    def forward(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        bias, table = self.bias, self.table
        if at is not None:
            bias, table = torch.stack([bias[:, p][:, :, p] for p in at]), table[at]
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, C // 2)).permute(2, 0, 3, 1, 4)
        x = x + ((q @ k.transpose(-2, -1) + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return x + F.gelu(self.up(x + table))


class Vit(nn.Module):
    """front: class tokens in front of the patches. read: from tokens (B, T, C) to a vector (B, C)."""

    def __init__(self, read: Read, front: int = 1) -> None:
        super().__init__()
        self.read, self.front = read, front
        self.patches, self.head = nn.Conv2d(3, C, 4, 4), nn.Linear(C, 3)
        self.places = nn.Parameter(torch.randn(1, N, C))
        self.apart = nn.Parameter(torch.randn(1, front, C))
        self.blocks = nn.ModuleList([Block(front + N), Block(front + N)])

    def embed(self, x: Tensor) -> Tensor:
        """(B, T, C): the input of the first block."""
        h = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return torch.cat([self.apart.expand(x.shape[0], -1, -1), h], 1) if self.front else h

    def behind(self, h: Tensor, at: Tensor | None = None) -> Tensor:
        """What the tokens (B, K, C) of the places ``at`` (B, K) give: by default of all places."""
        for block in self.blocks:
            h = block(h, at)
        return self.head(self.read(h))

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.embed(x))

    def on(self, x: Tensor, cells: Tensor) -> Tensor:
        """The model on the tokens of some cells (B, K), by hand."""
        h = self.embed(x)
        front = torch.arange(self.front).expand(len(x), -1)
        at = torch.cat([front, cells.sort(1).values + self.front], 1)
        return self.behind(h.take_along_dim(at[..., None], 1), at)


def pictures(batch: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 4 * GRID[0], 4 * GRID[1], generator=draw, dtype=F64)


def vit(read: Read, front: int = 1) -> Vit:
    torch.manual_seed(0)
    return Vit(read, front).to(F64).eval()
