"""A small model of pictures and prompts: two digits a picture, prompts that name one.

The picture tower is the demo's vision transformer on pictures of twice its width; the text tower is one
transformer layer. ``tools/image_text.py`` trains and measures it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from libragrad_fx.demo import data as demo_data
from libragrad_fx.demo import sources
from libragrad_fx.demo.data import SIZE, Split

HEIGHT, WIDTH = SIZE, 2 * SIZE
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "{}", "a {}", "the {}", "the digit {}", "the number {}", "a photo of a {}", "a picture of the digit {}",
    "there is a {}",
)  # fmt: skip
_SAID = sorted({word for t in TEMPLATES for word in t.replace("{}", "").split()} | {"an", "eight"})
WORDS = ("<pad>", *dict.fromkeys((*DIGITS, *_SAID)))


def prompt(digit: int, template: str) -> str:
    """The template filled: "a photo of an eight"."""
    text = template.format(DIGITS[digit])
    return text.replace("a eight", "an eight")


LENGTH = max(len(prompt(d, t).split()) for d in range(10) for t in TEMPLATES)


def encoded(prompts: Sequence[str]) -> torch.Tensor:
    """int64 ``(B, LENGTH)``: each prompt's words, then padding (0). An unknown word is a ``ValueError``."""
    rows = [[WORDS.index(word) for word in p.split()] for p in prompts]
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])


# --- pictures


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """``n`` pictures, each of two scenes of the demo side by side, of different digits.

    images: float32 ``(n, 3, HEIGHT, WIDTH)``, RGB in [0, 1], not normalised
    labels: int64 ``(n, 2)``, of the left and the right digit
    boxes:  int64 ``(n, 2, 4)``, of each ``left, top, right, bottom`` in pixels, right and bottom exclusive
    """

    images: torch.Tensor
    labels: torch.Tensor
    boxes: torch.Tensor


def pairs(n: int, split: Split, seed: int) -> Pairs:
    """``n`` random pictures. The same arguments give the same pictures."""
    data = demo_data.scenes(2 * n, split, seed)
    left = np.arange(n)
    right = n + partners(data.labels[:n].numpy(), data.labels[n:].numpy(), np.random.default_rng(seed))
    shifted = data.boxes[right] + torch.tensor([SIZE, 0, SIZE, 0])
    return Pairs(
        torch.cat([data.images[left], data.images[right]], 3),
        torch.stack([data.labels[left], data.labels[right]], 1),
        torch.stack([data.boxes[left], shifted], 1),
    )


def partners(left: np.ndarray, right: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random places in ``right``, such that no digit meets its like."""
    chosen = rng.integers(len(right), size=len(left))
    while (same := left == right[chosen]).any():
        chosen[same] = rng.integers(len(right), size=same.sum())
    return chosen


# --- the model


class Embeddings(NamedTuple):
    """Vectors (B, D)."""

    image_embeds: torch.Tensor
    text_embeds: torch.Tensor


class TextTower(nn.Module):
    """Words and positions, one layer, and the mean over the words that are no padding."""

    def __init__(self, width: int, heads: int, out: int) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), width)
        self.positions = nn.Parameter(torch.randn(LENGTH, width) * 0.02)
        self.layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, out, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        kept = (ids != 0)[..., None]
        x = self.layer(self.words(ids) + self.positions, src_key_padding_mask=~kept[..., 0])
        x = torch.where(kept, self.norm(x), 0.0).sum(1) / kept.sum(1)
        return self.projection(x)


class ImageText(nn.Module):
    """Pictures (B, 3, H, W), normalised, and as many prompts (B, LENGTH) -> ``Embeddings``.

    unit: whether these have length one, as in CLIP
    """

    def __init__(self, tower: nn.Module, width: int, text: TextTower, out: int) -> None:
        super().__init__()
        self.image, self.text, self.unit = tower, text, True
        self.projection = nn.Linear(width, out, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.3))  # of the loss: e^2.3 = 10
        self.bias = nn.Parameter(torch.tensor(-5.0))

    def of_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self._finished(self.projection(self.image(pixel_values)))

    def of_texts(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self._finished(self.text(input_ids))

    def _finished(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=-1) if self.unit else x

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> Embeddings:
        return Embeddings(self.of_images(pixel_values), self.of_texts(input_ids))


def build(kwargs: dict[str, Any], out: int = 64) -> ImageText:
    """A freshly initialised model; the arguments are those of the picture tower, timm's ViT."""
    whole = {**kwargs, "img_size": (HEIGHT, WIDTH), "num_classes": 0}
    tower = demo_data.build_model("VisionTransformer", whole)
    width, heads = kwargs["embed_dim"], kwargs["num_heads"]
    return ImageText(tower, width, TextTower(width, heads, out), out)


def path() -> Path:
    """Where the trained weights lie, or would."""
    return sources.folder() / "image-text" / "model.safetensors"


def load() -> ImageText:
    """The trained model, in eval mode.

    Raises:
        FileNotFoundError: it was not trained on this machine.
    """
    model = build(dict(demo_data.demo_model_info("vit").kwargs))
    model.load_state_dict(load_file(path()))
    return model.eval()


def about() -> dict[str, str]:
    """How the weights were made."""
    with safe_open(path(), "pt") as file:
        return file.metadata()


def from_demo() -> ImageText:
    """The demo's vision transformer with its table of positions once for each half; the rest untrained."""
    model = build(dict(demo_data.demo_model_info("vit").kwargs))
    weights = demo_data.load_demo_model("vit").state_dict()
    model.image.load_state_dict(widened(weights))
    return model


def widened(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The demo's weights without its head, the positions of its patches repeated to the right."""
    table = weights["pos_embed"]
    side = round((table.shape[1] - 1) ** 0.5)
    patches = table[:, 1:].unflatten(1, (side, side))
    wide = torch.cat([table[:, :1], torch.cat([patches, patches], 2).flatten(1, 2)], 1)
    return {k: v for k, v in weights.items() if not k.startswith("head.")} | {"pos_embed": wide}
