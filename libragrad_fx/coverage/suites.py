"""What there is to check: names by suite, and a builder that makes one ready to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from libragrad_fx import models
from libragrad_fx.capture.examples import infer_inputs
from libragrad_fx.coverage.unfilled import unfilled
from libragrad_fx.extras import need
from libragrad_fx.target import middle

_SMALL = 160  # pixels a side


@dataclasses.dataclass(frozen=True)
class Subject:
    """One model in eval mode, batch-2 inputs that it takes (as ``transform`` takes them), and what
    of its output to explain."""

    name: str
    model: nn.Module
    inputs: Any
    target: Any


@dataclasses.dataclass(frozen=True)
class Suite:
    """names: every name with its family; build: a name's subject, with random weights;
    package: the distribution that the models come from; if none, it is the family."""

    names: Callable[[], Mapping[str, str]]
    build: Callable[[str], Subject]
    package: str
    about: str


def _subject(name: str, model: nn.Module) -> Subject:
    model.eval()
    args, kwargs = infer_inputs(model)
    return Subject(name, model, kwargs or args, middle)


# --- timm


def _timm_modules() -> dict[str, str]:
    timm = need("timm", "coverage")
    return {m: m for m in timm.list_modules()}


def _timm_names() -> dict[str, str]:
    timm = need("timm", "coverage")
    return {n: m for m in timm.list_modules() for n in timm.list_models(module=m)}


def _timm(name: str) -> Subject:
    return _subject(name, need("timm", "coverage").create_model(name))


def _smallest(module: str) -> Subject:
    """The model of an architecture module with the least work: weights times input positions."""
    timm = need("timm", "coverage")

    def work(name: str) -> int:
        with unfilled():
            model = timm.create_model(name)
        size = (model.pretrained_cfg or {}).get("input_size", (3, 224, 224))
        return sum(p.numel() for p in model.parameters()) * size[-1] * size[-2]

    return _reduced(_timm(min(timm.list_models(module=module), key=work)))


def _reduced(subject: Subject) -> Subject:
    """On a third of the side, where the model says that it takes any size and its own is large:
    in float64 the attention maps of some thousand tokens fill 20 GB."""
    config: Any = subject.model.pretrained_cfg
    (image,) = subject.inputs
    sides = [side // 3 for side in image.shape[2:]]
    if config.get("fixed_input_size", True) or min(sides) <= _SMALL:
        return subject
    image = image[..., : sides[0], : sides[1]].contiguous()
    try:
        with torch.no_grad():
            subject.model(image)
    except Exception:
        return subject
    return dataclasses.replace(subject, inputs=(image,))


# --- torchvision


def _torchvision_names() -> dict[str, str]:
    zoo = need("torchvision.models", "coverage")
    kinds = {"classification": zoo, "segmentation": zoo.segmentation, "video": zoo.video}
    kinds["detection backbone"] = zoo.detection
    return {n: kind for kind, module in kinds.items() for n in zoo.list_models(module=module)}


def _torchvision(name: str) -> Subject:
    model = models.resolve(f"torchvision:{name}").module
    if _torchvision_names()[name] != "detection backbone":
        return _subject(name, model)
    side = 320 if "320" in name or name.startswith("ssd") else 224
    return Subject(name, model.backbone, (torch.randn(2, 3, side, side),), middle)  # type: ignore[arg-type]


# --- Hugging Face


def _hugging_face_names() -> dict[str, str]:
    need("transformers", "coverage")
    from libragrad_fx.coverage.huggingface import ARCHITECTURES

    return {n: a.family for n, a in ARCHITECTURES.items()}


def _hugging_face(name: str) -> Subject:
    from libragrad_fx.coverage.huggingface import ARCHITECTURES

    found = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = found.build().eval()
    return Subject(name, model, found.inputs(model), found.target)


# --- OpenCLIP


class _Tower(nn.Module):
    """One tower of a CLIP, with unit-vector output."""

    def __init__(self, clip: nn.Module, side: str) -> None:
        super().__init__()
        self.clip, self.side = clip, side

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        encode: Any = self.clip.encode_image if self.side == "image" else self.clip.encode_text
        return encode(x, normalize=True)


def _open_clip_names() -> dict[str, str]:
    clip = need("open_clip", "coverage")
    return {f"{n}/{side}": side for n in clip.list_models() for side in ("image", "text")}


def _open_clip(name: str) -> Subject:
    clip = need("open_clip", "coverage")
    config, _, side = name.rpartition("/")
    model = clip.create_model(config, pretrained_hf=False, pretrained_image=False).eval()
    if side == "image":
        size = model.visual.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        inputs = torch.randn(2, 3, height, width)
    else:
        text = clip.CLIPTextCfg(**clip.get_model_config(config)["text_cfg"])
        inputs = torch.randint(1, text.vocab_size, (2, text.context_length))
    return Subject(name, _Tower(model, side).eval(), (inputs,), middle)


# --- libraries of others


def _community_names() -> dict[str, str]:
    from libragrad_fx.coverage import community

    return community.names()


def _community(name: str) -> Subject:
    from libragrad_fx.coverage import community

    model, args = community.build(name)
    return Subject(name, model, args, middle)


SUITES: Mapping[str, Suite] = {
    "timm": Suite(_timm_modules, _smallest, "timm", "the smallest model of every timm module"),
    "timm-all": Suite(_timm_names, _timm, "timm", "every name registered in timm"),
    "torchvision": Suite(
        _torchvision_names, _torchvision, "torchvision",
        "every torchvision classifier, segmenter, video model and detection backbone",
    ),
    "hf": Suite(
        _hugging_face_names, _hugging_face, "transformers",
        "Hugging Face architectures, from tiny configs",
    ),
    "openclip": Suite(
        _open_clip_names, _open_clip, "open_clip_torch",
        "both towers of every OpenCLIP model, with unit-vector output",
    ),
    "community": Suite(
        _community_names, _community, "",
        "small models of twenty libraries that strangers build on",
    ),
}  # fmt: skip


SAMPLE = {
    ("hf", "bert"): "post-norm encoder, from embeddings",
    ("hf", "deberta-v2"): "disentangled attention",
    ("hf", "llama"): "SwiGLU, rotary positions, RMSNorm in float32",
    ("hf", "gpt-oss"): "attention sinks, clamped gates, experts",
    ("hf", "t5"): "encoder and decoder, cross-attention, relative bias",
    ("hf", "mamba"): "selective scan",
    ("hf", "rwkv"): "recurrence with exponential gates",
    ("hf", "swin"): "shifted windows",
    ("hf", "wav2vec2"): "convolutions over sound, group norm",
    ("timm-all", "test_efficientnet"): "squeeze-excite, batch norm",
    ("timm-all", "test_nfnet"): "standardised weights, no norm",
    ("torchvision", "shufflenet_v2_x0_5"): "channel shuffle",
}
"""One small model for each of a dozen mechanisms, by suite and name."""


def build(suite: str, name: str, fill: bool = True) -> Subject:
    """A subject of a suite; ``fill=False`` leaves large weights undrawn."""
    torch.manual_seed(0)
    if fill:
        return SUITES[suite].build(name)
    with unfilled():
        return SUITES[suite].build(name)
