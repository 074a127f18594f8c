"""From what a person has (pictures, texts, tensors) to calls of a model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils import _pytree as pytree

from libragrad_fx.errors import InputError
from libragrad_fx.models import IMAGE_ENDINGS, pixels_by, published, read_image, transform_of
from libragrad_fx.module.captured import anchor
from libragrad_fx.target import Arguments, as_call


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples that are explained at once.

    call:       inputs as the model takes them
    first, size: which samples of all these are
    tokens:     the pieces of each text, padding as ""; None for anything else
    spans:      of each piece, the first of its characters in the text and the one behind the last; (0, 0)
                of what the tokenizer adds. None where it does not say
    last:       where each text ends
    vocabulary: of the tokenizer, 0 if there is none
    piece:      the text of a token
    ids:        the tokens of a text
    pictures:   (B, H, W, 3) uint8, what the model sees of pictures; None for anything else
    """

    call: Any
    first: int
    size: int
    whole: int
    tokens: tuple[tuple[str, ...], ...] | None = None
    last: tuple[int, ...] | None = None
    vocabulary: int = 0
    piece: Callable[[int], str] | None = None
    ids: Callable[[str], list[int]] | None = None
    spans: tuple[tuple[tuple[int, int], ...], ...] | None = None
    pictures: torch.Tensor | None = None


def batches(model: Any, inputs: Any, processor: Any, size: int | None) -> list[Callable[[], Batch]]:
    """The batches of ``inputs``, each made when it is called for.

    Raises:
        InputError: nothing to explain, no such file, or no processor for pictures or texts.
    """
    if isinstance(inputs, Mapping) and any(_is_raw(v) for v in inputs.values()):
        return _by_processor(model, inputs, processor, size)
    items = items_of(inputs)
    if items is None:
        return _of_tensors(inputs, size)
    if all(isinstance(item, str) for item in items):
        return _by_processor(model, {"text": items}, processor, size)
    return _of_pictures(model, items, processor, size)


def items_of(inputs: Any) -> list[Any] | None:
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


def _is_raw(value: Any) -> bool:
    """Whether a value is a text or a picture, or a list of them."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, (str, Path, Image.Image))


def _is_picture_path(text: str) -> bool:
    """Whether a text is the name of a picture: it ends like one, and has no line break."""
    return "\n" not in text and Path(text).suffix.lower() in IMAGE_ENDINGS


def _places(count: int, size: int | None) -> list[tuple[int, int]]:
    size = size or count
    return [(a, min(a + size, count)) for a in range(0, count, size)]


# --- tensors


def _of_tensors(inputs: Any, size: int | None) -> list[Callable[[], Batch]]:
    args, kwargs = as_call(inputs)
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim]
    count = tensors[0].size(0) if tensors else 1
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
    steps = picture_steps(model, processor)
    places, whole = _places(len(items), size), len(items)

    def part(a: int, b: int) -> Batch:
        found = [opened(item) for item in items[a:b]]
        x = _pictures(found, steps).to(anchor(model))
        return Batch(x, a, b - a, whole, pictures=_seen(x, steps, found[0].size))

    return [lambda a=a, b=b: part(a, b) for a, b in places]


def picture_steps(model: Any, processor: Any) -> Callable[[Image.Image], torch.Tensor]:
    """From a picture to a tensor (C, H, W)."""
    if processor is None:
        return transform_of(model)
    if not callable(processor):
        raise InputError(
            f"processor is a callable from a picture to a tensor, got {type(processor).__name__}"
        )
    steps: Any = pixels_by(processor) if hasattr(processor, "model_input_names") else processor
    return steps


def opened(item: Any) -> Image.Image:
    return item.convert("RGB") if isinstance(item, Image.Image) else read_image(item)


def _pictures(items: Sequence[Image.Image], steps: Any) -> torch.Tensor:
    made = [steps(item) for item in items]
    if not all(isinstance(t, torch.Tensor) and t.shape == made[0].shape for t in made):
        raise InputError("the processor must give tensors (C, H, W) of one shape")
    return torch.stack(made)


def _seen(x: torch.Tensor, steps: Any, size: tuple[int, int]) -> torch.Tensor | None:
    """(B, H, W, 3) uint8: a model's input as pictures, by what the processor makes of black and of white.

    None if it is no picture, or if its brightness does not follow that of the picture.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        return None
    black, white = (
        steps(Image.new("RGB", size, colour)).double().flatten(1).median(1).values.cpu().view(-1, 1, 1)
        for colour in ("black", "white")
    )
    if not bool((white != black).all()):
        return None
    shown = (x.detach().double().cpu() - black) / (white - black)
    pixels = (shown.clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()


# --- texts, and texts with pictures


def _by_processor(
    model: Any, named: Mapping[str, Any], processor: Any, size: int | None
) -> list[Callable[[], Batch]]:
    """What a processor makes of ``text``, ``text_pair`` or ``images``, each a list."""
    if processor is None:
        unsaid = f"{' and '.join(named)} need a tokenizer or processor: give processor=…"
        processor = published(model, "AutoProcessor" if "images" in named else "AutoTokenizer", unsaid)
    tokenizer = getattr(processor, "tokenizer", processor)
    lists = {k: [_upright(i) for i in (v if isinstance(v, list) else [v])] for k, v in named.items()}
    counts = {len(v) for v in lists.values()}
    if len(counts) != 1 or counts == {0}:
        given = ", ".join(f"{len(v)} of {k}" for k, v in lists.items())
        raise InputError(f"each sample needs one of everything; got {given}")
    (count,) = counts
    if count > 1 and getattr(tokenizer, "pad_token", "") is None:
        processor = copy.deepcopy(processor)  # the user's is not changed
        tokenizer = getattr(processor, "tokenizer", processor)
        tokenizer.pad_token = tokenizer.eos_token
    made = processor(**lists, return_tensors="pt", **({"padding": True} if count > 1 else {}))
    call = {k: v.to(anchor(model).device) for k, v in made.items()}
    said: dict[str, Any] = _texts_of(call, tokenizer) if "input_ids" in call else {}
    if said and (rows := getattr(made, "encodings", None)):
        said["spans"] = tuple(tuple(row.offsets) for row in rows)

    def part(a: int, b: int) -> Batch:
        mine: Any = {k: v[a:b] if isinstance(v, tuple) else v for k, v in said.items()}
        return Batch({k: v[a:b] for k, v in call.items()}, a, b - a, count, **mine)

    return [lambda a=a, b=b: part(a, b) for a, b in _places(count, size)]


def _upright(item: Any) -> Any:
    return read_image(item) if isinstance(item, Path) else item


def _texts_of(call: Mapping[str, torch.Tensor], tokenizer: Any) -> dict[str, Any]:
    """The fields of ``Batch`` that are about texts."""
    ids = call["input_ids"]
    mask = call.get("attention_mask", torch.ones_like(ids))
    pieces = tuple(
        tuple(p if kept else "" for p, kept in zip(tokenizer.convert_ids_to_tokens(row), m, strict=True))
        for row, m in zip(ids.tolist(), mask.tolist(), strict=True)
    )
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return {
        "tokens": pieces,
        "last": tuple(last.tolist()),
        "vocabulary": len(tokenizer),
        "piece": lambda i: tokenizer.decode([i]),
        "ids": lambda text: tokenizer.encode(text, add_special_tokens=False),
    }
