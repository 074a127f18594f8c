"""Models by name (timm's, ``torchvision:NAME``, ``hf:NAME``, ``package.module:factory``), and their images.

Every failure is an ``InputError`` whose first line says what to do, because the names, files and
factories come straight from a command line.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from libragrad_fx.capture.examples import infer_inputs
from libragrad_fx.errors import InputError
from libragrad_fx.extras import did_you_mean, need, quiet

_IMAGENET_SIZES = (1000, 21841, 21843, 11821, 12000)
T = TypeVar("T")
_PATIENCE = 5  # seconds in which the hub must answer
_NESTED = ("state_dict", "model")  # where training scripts put the weights inside a checkpoint


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model in eval mode. source: timm, torchvision, hf or factory. weights: where they come from."""

    name: str
    source: str
    module: torch.nn.Module
    weights: str

    @property
    def title(self) -> str:
        """Its name, and where its weights come from if that is no factory's matter."""
        if self.source == "factory":
            return self.name
        random = self.weights == "random"
        return f"{self.name} (weights {self.weights}{': its classes mean nothing' if random else ''})"


# --- models


def resolve(
    name: str,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    args: Mapping[str, Any] | None = None,
) -> Loaded:
    """Build a model in eval mode.

    Args:
        name: a timm name, ``torchvision:NAME``, ``hf:NAME`` or ``hf:FOLDER`` (of Hugging Face, always with
            its published weights), or ``package.module:factory``.
        pretrained: download the published weights (timm and torchvision).
        checkpoint: a safetensors file or a torch state dict; it must fit exactly.
        seed: of random weights.
        args: of a factory, by name.

    Raises:
        InputError: no such model or file, weights that do not fit, a factory that fails, or arguments for
            a model that is no factory.
    """
    if pretrained and checkpoint is not None:
        raise InputError("give --pretrained or --checkpoint, not both")
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise InputError(f"there is no checkpoint file {str(checkpoint)!r}")
    torch.manual_seed(seed)
    source, build = _builder(name, args or {})
    if args and source != "factory":
        raise InputError(f"args are of a factory package.module:function, and {name!r} is none")
    if source == "factory" and pretrained:
        raise InputError(f"{name} is your own factory: load its weights there, or pass --checkpoint")
    module = build(pretrained).eval()
    if checkpoint is not None:
        _load(module, name, Path(checkpoint))
        return Loaded(name, source, module, f"from {Path(checkpoint).name}")
    if source == "factory":
        return Loaded(name, source, module, "as the factory made them")
    published = pretrained or source == "hf"
    if not published:
        _randomise_zeros(module)
    return Loaded(name, source, module, "pretrained" if published else "random")


def _builder(name: str, args: Mapping[str, Any]) -> tuple[str, Callable[[bool], torch.nn.Module]]:
    head, colon, tail = name.partition(":")
    if not colon:
        return "timm", _timm(name)
    known = {"torchvision": _torchvision, "hf": _hugging_face}
    return (head, known[head](tail)) if head in known else ("factory", _factory(name, args))


def _timm(name: str) -> Callable[[bool], torch.nn.Module]:
    timm = need("timm", "models")
    if not timm.is_model(name):
        ways = "; other models are torchvision:NAME, hf:NAME or package.module:factory"
        raise InputError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}{ways}")

    def make(pretrained: bool) -> torch.nn.Module:
        published = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None)
        if pretrained and published:
            _require_hub(published)
        return timm.create_model(name, pretrained=pretrained)

    return lambda pretrained: _fetch(name, lambda: make(pretrained))


def _torchvision(name: str) -> Callable[[bool], torch.nn.Module]:
    models = need("torchvision.models", "models")
    if name not in models.list_models():
        raise InputError(f"torchvision has no model {name!r}{did_you_mean(name, models.list_models())}")
    # the backbone of a detection model is downloaded unless it is refused by name
    options = inspect.signature(models.get_model_builder(name)).parameters
    refuse = {"weights_backbone": None} if "weights_backbone" in options else {}

    def make(pretrained: bool) -> torch.nn.Module:
        kwargs = {"weights": "DEFAULT"} if pretrained else {"weights": None, **refuse}
        return models.get_model(name, **kwargs)

    return lambda pretrained: _fetch(f"torchvision:{name}", lambda: make(pretrained))


_TASKS = {
    "ForImageClassification": "AutoModelForImageClassification", "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM", "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
}  # fmt: skip
"""How the class that a config names ends, and what builds it. Any other is built without its head."""


def _hugging_face(name: str) -> Callable[[bool], torch.nn.Module]:
    library = need("transformers", "models")

    def make() -> torch.nn.Module:
        if not Path(name).is_dir():
            _require_hub(name)
        config = library.AutoConfig.from_pretrained(name)
        if hasattr(config, "use_cache"):
            config.use_cache = False
        trained = (getattr(config, "architectures", None) or [""])[0]
        builder = next((made for end, made in _TASKS.items() if trained.endswith(end)), "AutoModel")
        return getattr(library, builder).from_pretrained(name, config=config)

    return lambda _: _fetch(f"hf:{name}", make)


def _require_hub(name: str) -> None:
    """Ask Hugging Face's hub once whether it answers, if nothing of a model is in its cache: its loaders
    would ask for a minute before they give up.

    Raises:
        ConnectionError: it does not.
    """
    hub, constants = (need(f"huggingface_hub.{part}", "models") for part in ("utils", "constants"))
    try:
        need("huggingface_hub", "models").snapshot_download(name, local_files_only=True)
    except hub.LocalEntryNotFoundError:
        try:
            hub.get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
        except Exception as e:  # of its HTTP library, which is another in each version
            raise ConnectionError(f"its weights could not be downloaded ({first_line(e)})") from e


def _fetch(name: str, make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    try:
        with quiet():
            return make()
    except Exception as e:  # network, hub, tag and registry errors of two libraries
        raise InputError(
            f"could not build {name}: {first_line(e)} (published weights need a network; a file you"
            " have goes to --checkpoint, a folder of Hugging Face's to hf:FOLDER)"
        ) from e


def _factory(name: str, args: Mapping[str, Any]) -> Callable[[bool], torch.nn.Module]:
    imported(name)
    return lambda _: made_by(name, torch.nn.Module, args)


def imported(name: str) -> Any:
    """What ``package.module:name`` says, the working directory being searched as well.

    Raises:
        InputError: it cannot be imported.
    """
    path, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(path), attribute)
    except Exception as e:  # a user's module may fail in any way while it is imported
        raise InputError(f"cannot import {name}: {first_line(e)}") from e


def made_by(name: str, kind: type[T], args: Mapping[str, Any] | None = None) -> T:
    """What the factory ``package.module:name`` returns.

    Raises:
        InputError: it cannot be imported, fails, or returns something else than a ``kind``.
    """
    factory = imported(name)
    try:
        made = factory(**(args or {}))
    except (Exception, SystemExit) as e:
        raise InputError(f"{name}() raised {first_line(e)}") from e
    if not isinstance(made, kind):
        what = f"{'an nn.' if kind is torch.nn.Module else 'a '}{kind.__name__}"
        raise InputError(f"{name}() returned {type(made).__name__}, not {what}")
    return made


def first_line(error: BaseException) -> str:
    """``Type: message``, on one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].strip()}" if text else type(error).__name__


def _randomise_zeros(model: torch.nn.Module) -> None:
    """Draw weights that are all zero, as of some heads: every output and attribution would be zero."""
    for p in model.parameters():
        if p.ndim > 1 and not p.detach().any():
            torch.nn.init.trunc_normal_(p, std=0.02)


def _load(model: torch.nn.Module, name: str, file: Path) -> None:
    found, wanted = _read(file), model.state_dict()
    shapes = [
        f"{k} is {tuple(found[k].shape)} in the file and {tuple(v.shape)} in the model"
        for k, v in wanted.items()
        if k in found and found[k].shape != v.shape
    ]
    dtypes = [
        f"{k} is {found[k].dtype} in the file and {v.dtype} in the model"
        for k, v in wanted.items()
        if k in found and found[k].is_complex() != v.is_complex()
    ]
    groups = {"missing": [k for k in wanted if k not in found],
              "unexpected": [k for k in found if k not in wanted],
              "of another shape": shapes, "of another kind": dtypes}  # fmt: skip
    wrong = [f"{len(v)} {what} ({', '.join(v[:2])}{', …' if len(v) > 2 else ''})"
             for what, v in groups.items() if v]  # fmt: skip
    if wrong:
        raise InputError(f"{file.name} does not fit {name}: {'; '.join(wrong)}")
    model.load_state_dict(found)


def _sentence(error: Exception) -> str:
    """The first sentence of an error; PyTorch adds advice for whoever wrote the file."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", first_line(error))
    return re.split(r"(?<=[.!?])\s|: This|\. In", text, maxsplit=1)[0][:160]


def _read(file: Path) -> dict[str, torch.Tensor]:
    """Tensors by name. No code in the file is run: a pickle that needs some is refused."""
    try:
        if file.suffix == ".safetensors":
            return need("safetensors.torch", "models").load_file(file)
        body = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # both readers raise types of their own on bytes they cannot read
        raise InputError(
            f"{file.name} is neither a safetensors file (named *.safetensors) nor a torch state dict of"
            f" plain tensors: {_sentence(e)}"
        ) from e
    for key in _NESTED:
        if isinstance(body, Mapping) and isinstance(body.get(key), Mapping):
            body = body[key]
    if not isinstance(body, Mapping):
        raise InputError(f"{file.name} holds {type(body).__name__}, not tensors by name (a state dict)")
    for key, value in body.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise InputError(
                f"{file.name} holds {key!r}: {type(value).__name__}, not tensors by name (a state dict)"
            )
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise InputError(f"{file.name}: {key!r} is no plain tensor (sparse, quantised or on meta)")
    return dict(body)


# --- images

IMAGE_FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "TGA",
    "TIFF", "WEBP",
)  # fmt: skip
"""The only formats that are read. For some others Pillow runs programs (Ghostscript for PostScript), which
a stranger's file could exploit."""
IMAGE_ENDINGS = frozenset(f".{name.lower()}" for name in (*IMAGE_FORMATS, "jpg", "tif", "jp2"))


def read_image(file: str | Path) -> Image.Image:
    """A picture of one of ``IMAGE_FORMATS``, upright, as RGB: 16-bit scaled down, transparency over white.

    Raises:
        InputError: no such file, or not such a picture.
    """
    try:
        known = Path(file).is_file()
    except (OSError, ValueError):  # a name that no file can have
        known = False
    if not known:
        raise InputError(f"there is no image file {str(file)!r:.200}")
    return decoded(file, str(file))


def decoded(file: str | Path | BinaryIO, name: str) -> Image.Image:
    """``read_image`` of a file that is open, or known to be there; ``name`` is what errors call it.

    Raises:
        InputError: not such a picture.
    """
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as opened:
            opened.load()
            return _rgb(ImageOps.exif_transpose(opened))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        said = first_line(e)
        if isinstance(e, UnidentifiedImageError):
            said = f"it is none of {', '.join(IMAGE_FORMATS)}"
        raise InputError(f"cannot read {name!r} as an image: {said}") from e


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion would clip them at 255
        values = np.asarray(image, dtype=np.float64)
        deep = image.mode != "F" and (";16" in image.mode or values.max() > 255)
        values = values / 257 if deep else values * 255 if 0 < values.max() <= 1 else values
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def preprocessing(model: Loaded) -> Callable[[Image.Image], torch.Tensor]:
    """From a picture to the tensor (C, H, W) that the model wants.

    Raises:
        InputError: it takes no images.
    """
    if model.source == "torchvision":
        return _torchvision_steps(model.name.partition(":")[2])
    if hasattr(model.module, "pretrained_cfg"):
        return _timm_steps(model.module)
    args, kwargs = infer_inputs(model.module)
    shapes = [tuple(t.shape[1:]) for t in (*args, *kwargs.values())]
    if len(shapes) != 1 or len(shapes[0]) != 3 or shapes[0][0] not in (1, 3):
        raise InputError(f"{model.name} does not take one image (1 or 3 channels): it takes {shapes}")
    channels, height, width = shapes[0]

    def scale(image: Image.Image) -> torch.Tensor:
        fitted = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (width, height))
        values = torch.from_numpy(np.array(fitted, dtype=np.float32)) / 255
        return values.reshape(height, width, channels).permute(2, 0, 1)

    return scale


def processor(model: Loaded) -> Callable[[Image.Image], torch.Tensor] | None:
    """Its ``preprocessing``; None where what is published with the model says it (Hugging Face)."""
    return None if model.source == "hf" else preprocessing(model)


def reads_texts(model: torch.nn.Module) -> bool:
    """Whether a model says that it takes token ids, as those of Hugging Face do."""
    return getattr(model, "main_input_name", "") == "input_ids"


def transform_of(model: torch.nn.Module) -> Callable[[Image.Image], torch.Tensor]:
    """From a picture to the tensor (C, H, W) that ``model`` was published for, as it says itself.

    Raises:
        InputError: it does not say.
    """
    if hasattr(model, "pretrained_cfg"):
        return _timm_steps(model)
    unsaid = (
        "this model does not say how it wants its pictures: give processor=…, a callable from a PIL"
        " picture to a tensor (C, H, W), or tensors"
    )
    return pixels_by(published(model, "AutoImageProcessor", unsaid))


def published(model: torch.nn.Module, kind: str, unsaid: str) -> Any:
    """What was published with a model of Hugging Face, by a class of transformers (``AutoTokenizer``).

    Raises:
        InputError: the model does not say its name (``unsaid``), or nothing is found under it.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise InputError(unsaid)
    try:
        return getattr(need("transformers", "models"), kind).from_pretrained(name)
    except (OSError, ValueError) as e:
        raise InputError(f"no {kind} is found for {name}: give one as processor=…") from e


def pixels_by(processor: Any) -> Callable[[Image.Image], torch.Tensor]:
    """A processor of Hugging Face as a callable from a picture to a tensor (C, H, W)."""

    def to_tensor(picture: Image.Image) -> torch.Tensor:
        found: Any = processor(images=picture, return_tensors="pt")
        return found["pixel_values"][0]

    return to_tensor


def _timm_steps(module: torch.nn.Module) -> Callable[[Image.Image], torch.Tensor]:
    data = need("timm.data", "models")
    config = data.resolve_model_data_config(module)
    steps = data.create_transform(**config, is_training=False)
    return (lambda image: steps(image.convert("L"))) if config["input_size"][0] == 1 else steps


def _torchvision_steps(name: str) -> Callable[[Image.Image], torch.Tensor]:
    published = need("torchvision.models", "models").get_model_weights(name)
    steps = next(iter(published)).transforms() if len(published) else None
    if steps is not None and hasattr(steps, "mean") and hasattr(steps, "crop_size"):
        return steps
    return need("torchvision.transforms._presets", "models").ImageClassification(crop_size=224)


def categories(model: Loaded) -> Sequence[str]:
    """The classes of a model of torchvision, which does not name them itself; of any other, nothing."""
    if model.source != "torchvision":
        return ()
    published = need("torchvision.models", "models").get_model_weights(model.name.partition(":")[2])
    return next((w.meta.get("categories", ()) for w in published), ())


def label_of(model: torch.nn.Module, index: int) -> str:
    """What a model calls its class ``index``, which may count from the end; empty where it does not say."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    if isinstance(names, Mapping):
        index += len(names) * (index < 0)
        found = str(names.get(index, ""))
        return "" if found == f"LABEL_{index}" else found
    count: Any = getattr(model, "num_classes", 0)
    if hasattr(model, "pretrained_cfg") and count in _IMAGENET_SIZES:
        subset = need("timm.data", "models").infer_imagenet_subset(model)
        return str(_imagenet(subset).index_to_description(index % count)) if subset else ""
    return ""


@functools.cache
def _imagenet(subset: str) -> Any:
    """timm's names of classes, which it reads from files each time."""
    return need("timm.data", "models").ImageNetInfo(subset)


def index_of(model: torch.nn.Module, name: str) -> int:
    """The class that a model calls ``name``, or whose list of names holds it.

    Raises:
        InputError: there is none, or the model names none.
    """
    names = getattr(getattr(model, "config", None), "id2label", None)
    count = len(names) if isinstance(names, Mapping) else getattr(model, "num_classes", 0)
    known = {i: label_of(model, i) for i in range(count)} if isinstance(count, int) else {}
    found = [i for i, text in known.items() if name == text or name in text.split(", ")]
    if len(found) == 1:
        return found[0]
    named = [text for text in known.values() if text]
    if not named:
        raise InputError(f"this model does not name its classes: give an index instead of {name!r}")
    raise InputError(f"{len(found) or 'no'} classes are called {name!r}{did_you_mean(name, named)}")
