"""From what a person has (pictures, texts, tensors) to calls of a model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils import _pytree as pytree

from libragrad_fx.errors import InputError
from libragrad_fx.extras import need
from libragrad_fx.models import IMAGE_FORMATS, pixels_by, read_image, transform_of
from libragrad_fx.target import Arguments, Target, as_call


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples that are explained at once.

    call:       inputs as the model takes them
    first, size: which samples of all these are
    tokens:     the pieces of each text, padding as ""; None for anything else
    last:       where each text ends
    vocabulary: of the tokenizer, 0 if there is none
    piece:      the text of a token
    """

    call: Any
    first: int
    size: int
    whole: int
    tokens: tuple[tuple[str, ...], ...] | None = None
    last: tuple[int, ...] | None = None
    vocabulary: int = 0
    piece: Callable[[int], str] | None = None

    def targets_of(self, targets: Sequence[Target]) -> list[Target]:
        """Those of these samples: a list or tensor has an entry for each sample of all."""
        return [self._own(t) for t in targets]

    def _own(self, target: Any) -> Any:
        arrays = isinstance(target, (torch.Tensor, np.ndarray)) and target.ndim
        listed = isinstance(target, list) or arrays
        if self.size == self.whole or not listed:
            return target
        if len(target) != self.whole:
            raise InputError(f"{len(target)} targets for {self.whole} samples")
        return target[self.first : self.first + self.size]


def batches(model: Any, inputs: Any, processor: Any, size: int | None) -> list[Callable[[], Batch]]:
    """The batches of ``inputs``, each made when it is called for.

    Raises:
        InputError: nothing to explain, no such file, or no processor for pictures or texts.
    """
    items = _items(inputs)
    if items is None:
        return _of_tensors(inputs, size)
    if all(isinstance(item, str) for item in items):
        return _of_texts(model, items, processor, size)
    return _of_pictures(model, items, processor, size)


def _items(inputs: Any) -> list[Any] | None:
    """The pictures or texts of ``inputs``; None if it holds neither. A path of a file is a picture."""
    found: list[Any] = list(inputs) if isinstance(inputs, list) else [inputs]
    if not found:
        raise InputError("the batch is empty: there is nothing to explain")
    found = [Path(i) if isinstance(i, str) and _is_picture_path(i) else i for i in found]
    if all(isinstance(i, (Image.Image, Path)) for i in found) or all(isinstance(i, str) for i in found):
        return found
    if any(isinstance(i, (Image.Image, Path, str)) for i in found):
        raise InputError(
            f"pictures and texts in one list: {', '.join(sorted({type(i).__name__ for i in found}))}"
        )
    return None


def _is_picture_path(text: str) -> bool:
    """Whether a text is the name of a picture: it ends like one, and has no line break."""
    endings = {f".{name.lower()}" for name in (*IMAGE_FORMATS, "jpg", "tif", "jp2")}
    return "\n" not in text and Path(text).suffix.lower() in endings


def _places(count: int, size: int | None) -> list[tuple[int, int]]:
    size = size or count
    return [(a, min(a + size, count)) for a in range(0, count, size)]


def _floating(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.is_floating_point()]


# --- tensors


def _of_tensors(inputs: Any, size: int | None) -> list[Callable[[], Batch]]:
    args, kwargs = as_call(inputs)
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim]
    count = tensors[0].shape[0] if tensors else 1
    if size is None or size >= count:
        return [lambda: Batch(inputs, 0, count, count)]

    def part(a: int, b: int) -> Batch:
        cut = lambda t: t[a:b] if t.ndim and t.shape[0] == count else t  # noqa: E731
        mine = pytree.tree_map_only(torch.Tensor, cut, (args, kwargs))
        return Batch(Arguments(*mine), a, b - a, count)

    return [lambda a=a, b=b: part(a, b) for a, b in _places(count, size)]


# --- pictures


def _of_pictures(
    model: Any, items: Sequence[Any], processor: Any, size: int | None
) -> list[Callable[[], Batch]]:
    steps = _picture_steps(model, processor)
    at = next((t.device, t.dtype) for t in [*_floating(model), torch.zeros(())])
    places, whole = _places(len(items), size), len(items)
    return [lambda a=a, b=b: Batch(_pictures(items[a:b], steps, at), a, b - a, whole) for a, b in places]


def _picture_steps(model: Any, processor: Any) -> Callable[[Image.Image], torch.Tensor]:
    """From a picture to a tensor (C, H, W)."""
    if processor is None:
        return transform_of(model)
    if not callable(processor):
        raise InputError(
            f"processor is a callable from a picture to a tensor, got {type(processor).__name__}"
        )
    return pixels_by(processor) if hasattr(processor, "model_input_names") else processor


def _pictures(items: Sequence[Any], steps: Any, at: tuple[torch.device, torch.dtype]) -> torch.Tensor:
    made = [
        steps(item.convert("RGB") if isinstance(item, Image.Image) else read_image(item)) for item in items
    ]
    if not all(isinstance(t, torch.Tensor) and t.shape == made[0].shape for t in made):
        raise InputError("the processor must give tensors (C, H, W) of one shape")
    return torch.stack(made).to(*at)


# --- texts


def _of_texts(
    model: Any, texts: Sequence[str], processor: Any, size: int | None
) -> list[Callable[[], Batch]]:
    tokenizer = processor if processor is not None else _tokenizer_of(model)
    if len(texts) > 1 and getattr(tokenizer, "pad_token", "") is None:
        tokenizer = copy.deepcopy(tokenizer)  # the user's is not changed
        tokenizer.pad_token = tokenizer.eos_token
    made = tokenizer(list(texts), return_tensors="pt", padding=len(texts) > 1)
    device = next((t.device for t in _floating(model)), torch.device("cpu"))
    call = {k: v.to(device) for k, v in made.items()}
    ids = call["input_ids"]
    mask = call.get("attention_mask", torch.ones_like(ids))
    pieces = [
        tuple(p if kept else "" for p, kept in zip(tokenizer.convert_ids_to_tokens(row), m, strict=True))
        for row, m in zip(ids.tolist(), mask.tolist(), strict=True)
    ]
    last = (mask.shape[1] - 1 - mask.flip(1).argmax(1)).tolist()

    def part(a: int, b: int) -> Batch:
        mine, piece = {k: v[a:b] for k, v in call.items()}, lambda i: tokenizer.decode([i])
        ends = tuple(last[a:b])
        return Batch(mine, a, b - a, len(texts), tuple(pieces[a:b]), ends, len(tokenizer), piece)

    return [lambda a=a, b=b: part(a, b) for a, b in _places(len(texts), size)]


def _tokenizer_of(model: Any) -> Any:
    """The tokenizer that was published with a model of Hugging Face."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise InputError("texts need a tokenizer: give processor=AutoTokenizer.from_pretrained(…)")
    try:
        return need("transformers", "models").AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as e:
        raise InputError(f"no tokenizer is found for {name}: give one as processor=…") from e
