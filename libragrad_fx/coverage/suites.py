"""The models to check: names by suite, and a builder for each."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from libragrad_fx import models
from libragrad_fx.capture.examples import infer_inputs
from libragrad_fx.coverage.unfilled import unfilled
from libragrad_fx.errors import LibraGradError
from libragrad_fx.extras import need
from libragrad_fx.target import middle

_SMALL = 160  # pixels a side


@dataclasses.dataclass(frozen=True)
class Subject:
    """One model in eval mode; inputs of batch 2, as ``transform`` takes them; the target to explain."""

    name: str
    model: nn.Module
    inputs: Any
    target: Any


@dataclasses.dataclass(frozen=True)
class Suite:
    """names: every name, with its family; build: from a name to its subject, with random weights;
    package: the models' distribution, or "" if the family is that."""

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
    """The model of an architecture module with the fewest weights times input pixels."""
    timm = need("timm", "coverage")

    def work(name: str) -> int:
        with unfilled():
            model = timm.create_model(name)
        size = (model.pretrained_cfg or {}).get("input_size", (3, 224, 224))
        return sum(p.numel() for p in model.parameters()) * size[-1] * size[-2]

    return _reduced(_timm(min(timm.list_models(module=module), key=work)))


def _reduced(subject: Subject) -> Subject:
    """On an image of a third of the side, if that is large and the model takes any size: in float64, the
    attention maps of some thousand tokens fill 20 GB."""
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
    detector: Any = model
    sides = detector.transform.fixed_size or (224, 224)  # SSD scales every image to one size
    return Subject(name, detector.backbone, (torch.randn(2, 3, *sides),), middle)


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


# --- models listed in the folder zoo/


def _zoo(file: str) -> Any:
    """``zoo/FILE.py``: the folder stands beside the package in a checkout, and is not in the wheel."""
    try:
        return importlib.import_module(f"zoo.{file}")
    except ModuleNotFoundError as e:
        raise LibraGradError(
            f"the models of this suite are listed in zoo/{file}.py of the repository, which is not"
            f" installed with the package ({e}): run `python -m libragrad_fx coverage` in a checkout"
        ) from e


def _listed(file: str, package: str, about: str) -> Suite:
    """A suite of ``zoo/FILE.py``, which is imported only when its names or models are needed."""
    return Suite(lambda: _zoo(file).names(), lambda name: _zoo(file).build(name), package, about)


SUITES: Mapping[str, Suite] = {
    "timm": Suite(_timm_modules, _smallest, "timm", "the smallest model of every timm module"),
    "timm-all": Suite(_timm_names, _timm, "timm", "every name registered in timm"),
    "torchvision": Suite(
        _torchvision_names, _torchvision, "torchvision",
        "every torchvision classifier, segmenter, video model and detection backbone",
    ),
    "hf": _listed("huggingface", "transformers", "Hugging Face architectures, from tiny configs"),
    "openclip": Suite(
        _open_clip_names, _open_clip, "open_clip_torch",
        "both towers of every OpenCLIP model, with unit-vector output",
    ),
    "community": _listed("community", "", "small models of twenty libraries that strangers build on"),
}  # fmt: skip


def build(suite: str, name: str, fill: bool = True) -> Subject:
    """A subject of a suite; ``fill=False`` leaves large weights undrawn."""
    torch.manual_seed(0)
    if fill:
        return SUITES[suite].build(name)
    with unfilled():
        return SUITES[suite].build(name)
