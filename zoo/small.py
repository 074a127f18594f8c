"""One small model of each family that attributions are tested on and ``docs/attribution.md`` lists: random
weights (no bias or gate is zero), float64, some seconds to capture all of them."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

F64 = torch.float64


@dataclasses.dataclass(frozen=True)
class Small:
    """A model, its inputs (two samples or more, samples first), and what to explain.

    needs: the library that makes it; "" for PyTorch alone
    """

    model: nn.Module
    inputs: Any
    target: Any = 1
    needs: str = ""


def small(name: str) -> Small:
    """The model called ``name``, one of ``SMALL``; the same at each call.

    Raises:
        ImportError: its library is not installed.
    """
    torch.manual_seed(0)
    made = SMALL[name]()
    model = made.model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                _draw(p)
    return dataclasses.replace(made, model=model)


def _draw(p: torch.Tensor) -> None:
    """Weights that keep the size of what they read, and scales and biases that are none."""
    p.normal_(0, 0.2) if p.ndim < 2 else p.normal_(0, p[0].numel() ** -0.5)
    if p.ndim < 2:
        p.add_(0.5)


def samples(inputs: Any, index: slice) -> Any:
    """Those samples of ``inputs``."""
    if isinstance(inputs, torch.Tensor):
        return inputs[index]
    if isinstance(inputs, Mapping):
        return {k: samples(v, index) for k, v in inputs.items()}
    return tuple(samples(v, index) for v in inputs)


def _timm(name: str, size: int, **options: Any) -> Callable[[], Small]:
    def make() -> Small:
        timm = importlib.import_module("timm")
        model = timm.create_model(name, num_classes=5, **options)
        return Small(model, torch.randn(2, 3, size, size, dtype=F64), needs="timm")

    return make


def _mixer() -> Small:
    mixer = importlib.import_module("timm.models.mlp_mixer").MlpMixer
    model = mixer(num_classes=5, img_size=32, patch_size=8, num_blocks=2, embed_dim=16)
    return Small(model, torch.randn(2, 3, 32, 32, dtype=F64), needs="timm")


def _hugging(model: str, config: str, inputs: Callable[[], Any], **options: Any) -> Callable[[], Small]:
    target = options.pop("target", 1)

    def make() -> Small:
        transformers = importlib.import_module("transformers")
        made = getattr(transformers, config)(**options)
        return Small(getattr(transformers, model)(made), inputs(), target, "transformers")

    return make


_TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def _ids() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": torch.randint(3, 30, (2, 6)), "attention_mask": mask}


def _pair() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, dtype=F64)} | _ids()


# --- written here: what no library has small enough


class Tabular(nn.Module):
    """A feature-tokenising transformer (Gorishniy et al. 2021): numeric and categorical columns."""

    def __init__(self, numeric: int = 5, classes: int = 7, columns: int = 3) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.empty(numeric, 8)) for _ in range(2))
        self.embed, self.cls = nn.Embedding(classes * columns, 8), nn.Parameter(torch.empty(1, 1, 8))
        self.offsets = nn.Buffer(torch.arange(columns) * classes)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 12, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        tokens = [self.cls.expand(len(x), -1, -1), x[..., None] * self.weight + self.bias]
        h = torch.cat([*tokens, self.embed(columns + self.offsets)], 1)
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h)[:, 0])


class Columns(nn.Module):
    """An MLP with a batch norm in front, on a table."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.BatchNorm1d(6), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Recurrent(nn.Module):
    """An LSTM or GRU over (B, T, F)."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.net, self.head = kind(4, 6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.net(x)[0][:, -1])


class Series(nn.Module):
    """Convolutions over the time of (B, channels, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 8, 3, padding=1)
        self.net = nn.Sequential(
            nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 8, 3, padding=1), nn.ReLU()
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.net(self.stem(x)).mean(2))


class Voxels(nn.Module):
    """Convolutions in three dimensions, with residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 6, 3, 2, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv3d(6, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU()) for _ in range(2)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3, 4)))


class Shared(nn.Module):
    """One tower over two inputs (a Siamese network): its blocks are called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.tower = nn.Sequential(*(
            nn.TransformerEncoderLayer(8, 2, 12, 0.0, "gelu", batch_first=True) for _ in range(2)
        ))  # fmt: skip
        self.head = nn.Linear(8, 3)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        x, y = (self.tower(self.embed(t)).mean(1) for t in (a, b))
        return self.head(x) + self.head(y * 2)


SMALL: Mapping[str, Callable[[], Small]] = {
    "vit": _timm(
        "vit_tiny_patch16_224", 32, img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2
    ),
    "eva02": _timm(
        "eva02_tiny_patch14_224", 32, img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2
    ),
    "mixer": _mixer,
    "swin": _timm("swin_tiny_patch4_window7_224", 32, img_size=32, patch_size=2, window_size=4,
                  depths=(2, 2), num_heads=(2, 2), embed_dim=8),
    "pvt": _timm("pvt_v2_b0", 64, depths=(1, 1, 2, 1), embed_dims=(8, 8, 16, 16), num_heads=(1, 1, 2, 2)),
    "convnext": _timm("convnext_atto", 64, depths=(1, 1, 2, 1), dims=(8, 8, 16, 16)),
    "maxvit": _timm("maxvit_rmlp_pico_rw_256", 64, img_size=64, embed_dim=(32, 32, 32, 32),
                    depths=(1, 1, 1, 1), stem_width=(8, 8)),
    "mobilevitv2": _timm("mobilevitv2_050", 64),
    "efficientvit": _timm("efficientvit_b0", 64),
    "efficientvit_m": _timm("efficientvit_m0", 128),
    "hiera": _timm("hiera_tiny_224", 64, img_size=64, embed_dim=8, num_heads=1, stages=(1, 1, 2, 1)),
    "resnet": _timm("resnet10t", 64),
    "bert": _hugging("BertForSequenceClassification", "BertConfig", _ids, vocab_size=30, num_labels=3,
                     **_TEXT),
    "llama": _hugging("LlamaForCausalLM", "LlamaConfig", _ids, vocab_size=30, target=(3, 1), **_TEXT),
    "t5": _hugging("T5ForConditionalGeneration", "T5Config",
                   lambda: _ids() | {"decoder_input_ids": torch.randint(3, 30, (2, 4))}, vocab_size=30,
                   d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, target=(1, 1)),
    "clip": _hugging("CLIPModel", "CLIPConfig", _pair,
                     text_config=_TEXT | {"vocab_size": 30, "eos_token_id": 2},
                     vision_config=_TEXT | {"image_size": 16, "patch_size": 4}, projection_dim=8,
                     target=lambda y: y.logits_per_image.diagonal()),
    "vilt": _hugging("ViltForQuestionAnswering", "ViltConfig", _pair, vocab_size=30, image_size=16,
                     patch_size=4, num_labels=3, **_TEXT),
    "videomae": _hugging("VideoMAEForVideoClassification", "VideoMAEConfig",
                         lambda: {"pixel_values": torch.randn(2, 4, 3, 16, 16, dtype=F64)}, image_size=16,
                         patch_size=4, num_frames=4, tubelet_size=2, num_labels=3, **_TEXT),
    "timesformer": _hugging("TimesformerForVideoClassification", "TimesformerConfig",
                            lambda: {"pixel_values": torch.randn(2, 4, 3, 16, 16, dtype=F64)},
                            image_size=16, patch_size=4, num_frames=4, num_labels=3, **_TEXT),
    "table": lambda: Small(Columns(), torch.randn(3, 6, dtype=F64)),
    "tabular": lambda: Small(Tabular(), (torch.randn(3, 5, dtype=F64), torch.randint(7, (3, 3)))),
    "lstm": lambda: Small(Recurrent(nn.LSTM), torch.randn(3, 7, 4, dtype=F64)),
    "gru": lambda: Small(Recurrent(nn.GRU), torch.randn(3, 7, 4, dtype=F64)),
    "series": lambda: Small(Series(), torch.randn(3, 3, 8, dtype=F64)),
    "voxels": lambda: Small(Voxels(), torch.randn(2, 1, 8, 12, 16, dtype=F64)),
    "shared": lambda: Small(Shared(), (torch.randn(2, 5, 3, dtype=F64), torch.randn(2, 4, 3, dtype=F64))),
}  # fmt: skip
"""By family, how to make the model."""
