"""From samples to what a model takes: tensors of pictures, or token ids of texts."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.data import Item, prepared
from libragrad_fx.evaluate.data.prepare import Steps
from libragrad_fx.explain.inputs import Batch, batches
from libragrad_fx.explain.targets import class_of, is_nexts
from libragrad_fx.extras import need
from libragrad_fx.models import first_line, label_of, made_by, published
from libragrad_fx.target import first_tensor
from libragrad_fx.viz.pieces import readable

Input = torch.Tensor | Mapping[str, torch.Tensor]
_SHORT = "the old keys"
_LONG = "When Mary and John went to the store, the old keys cost 12.50 at 7 o'clock; wasn't it naïve?"


class Sample(NamedTuple):
    """A sample as a model takes it.

    x:       of a picture (C, H, W); of a text (T,) by name: ids, and what the tokenizer gives with them
    label:   its class, or next token; None if it is not known
    against: the class or next token that the label is compared with, if any
    masks:   by class, bool (H, W), or (T,) over tokens
    item:    what it was made of
    """

    id: str
    x: Input
    label: int | None
    against: int | None
    masks: Mapping[int, torch.Tensor]
    item: Item

    @property
    def size(self) -> tuple[int, ...]:
        return size_of(self.x)


def size_of(x: Input) -> tuple[int, ...]:
    """The shape of a picture, or of a text's token ids."""
    return tuple((x if isinstance(x, torch.Tensor) else x["input_ids"]).shape)


# --- pictures


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What a model of pictures takes. steps: from a picture to a tensor (C, H, W)."""

    steps: Steps

    def sample(self, item: Item) -> Sample:
        """Raises ``InputError``: as ``data.prepared``, or a label in words."""
        x, masks = prepared(item, self.steps)
        return Sample(item.id, x, _index(item.label, item), _index(item.against, item), masks, item)

    def noise(self, size: Sequence[int]) -> list[Input]:
        """Two pictures: the same in every process."""
        draw = torch.Generator().manual_seed(0)
        return [*torch.randn(2, *size, generator=draw).unbind()]

    def said(self) -> list[bytes]:
        """How the steps print themselves, their source, and the size, mean and deviation of a picture that
        they prepare.

        Raises:
            InputError: they fail, or give another tensor each time.
        """
        draw = torch.Generator().manual_seed(0)
        levels = torch.randint(0, 256, (96, 160, 3), dtype=torch.uint8, generator=draw).numpy()
        try:
            one, other = (torch.as_tensor(self.steps(Image.fromarray(levels))).double() for _ in range(2))
        except Exception as e:  # steps of a user fail in any way
            raise InputError(
                f"the preparation of pictures fails on one of 160 x 96: {first_line(e)}"
            ) from e
        if not torch.equal(one, other):
            raise InputError("the preparation of pictures is random: it makes two tensors of one picture")
        said = f"{tuple(one.shape)} {float(one.mean()):.3f} {float(one.std()):.3f}"
        source = sources_of([str(getattr(self.steps, "__module__", ""))])
        return [printed(self.steps), said.encode(), *source]


def _index(label: int | str | None, item: Item) -> int | None:
    if isinstance(label, str):
        raise InputError(f"{item.id}: {label!r} is the class of a picture, which is a number")
    return label


# --- texts


@dataclasses.dataclass(frozen=True)
class Texts:
    """What a model of texts takes, by its tokenizer.

    nexts: whether the model answers with next tokens (B, T, V). Then its answer is that behind the last
           token, and classes are tokens.
    """

    model: torch.nn.Module
    tokenizer: Any
    nexts: bool

    def sample(self, item: Item) -> Sample:
        """Raises ``InputError``: it is no text, or a label is no class and no single token."""
        if not isinstance(item.content, str):
            raise InputError(f"{item.id} is a picture, and this model takes texts")
        batch = _read(self.model, self.tokenizer, item.content)
        name = functools.partial(self._class, batch)
        masks = {name(c): _over_tokens(mask, batch, item.id) for c, mask in item.masks.items()}
        x = {k: v[0] for k, v in batch.call.items()}
        label, against = (None if c is None else name(c) for c in (item.label, item.against))
        return Sample(item.id, x, label, against, masks, item)

    def pieces(self, item: Item) -> list[str]:
        """The tokens of a text as people read them."""
        (tokens,) = _read(self.model, self.tokenizer, str(item.content)).tokens or ((),)
        return readable(tokens)

    def named(self, index: int) -> str:
        """A class: the token, or as the model's config calls it; "" if it does not."""
        if self.nexts:
            return repr(readable(self.tokenizer.convert_ids_to_tokens([index]))[0])
        return label_of(self.model, index)

    def _class(self, batch: Batch, name: int | str) -> int:
        return class_of(self.model, batch, name, self.nexts) if isinstance(name, str) else name

    def noise(self, size: Sequence[int]) -> list[Input]:
        """Two texts of ``size`` tokens, none of them special: the same in every process. What goes with
        the ids is what goes with the first token of any text."""
        special = {*self.tokenizer.all_special_ids}
        usual = torch.tensor([i for i in range(len(self.tokenizer)) if i not in special])
        draw = torch.Generator().manual_seed(0)
        ids = usual[torch.randint(len(usual), (2, *size), generator=draw)]
        call = _read(self.model, self.tokenizer, _SHORT).call
        beside = {k: v[0, :1].expand(*size) for k, v in call.items()}
        return [{**beside, "input_ids": row.to(call["input_ids"].device)} for row in ids]

    def said(self) -> list[bytes]:
        """All tokens by id, those that are special, and what is made of a text."""
        tokens = self.tokenizer.convert_ids_to_tokens([*range(len(self.tokenizer))])
        call = _read(self.model, self.tokenizer, _LONG).call
        made = {k: v.tolist() for k, v in sorted(call.items())}
        return [repr(found).encode() for found in (tokens, self.tokenizer.all_special_ids, made)]

    def answering(self) -> torch.nn.Module:
        """The model as one of classes."""
        return NextToken(self.model) if self.nexts else self.model


class NextToken(torch.nn.Module):
    """A language model as a classifier: of its next tokens (B, T, V), those behind the last token (B, V).
    Texts have no padding."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **call: torch.Tensor) -> torch.Tensor:
        return first_tensor(self.model(**call))[:, -1]


def texts(model: torch.nn.Module, tokenizer: str | None) -> Texts:
    """How a model reads texts. It runs once, on a text, to see what it answers with.

    Args:
        tokenizer: ``package.module:factory`` of a tokenizer of transformers; None for that which was
            published with the model.

    Raises:
        InputError: there is no tokenizer, or the model fails on what it makes of a text.
    """
    if tokenizer is None:
        unsaid = "this model takes texts and does not say how: give tokenizer: package.module:factory"
        made = published(model, "AutoTokenizer", unsaid)
    else:
        made = made_by(tokenizer, need("transformers", "models").PreTrainedTokenizerBase)
    batch = _read(model, made, _SHORT)
    try:
        with torch.no_grad():
            y = first_tensor(model(**batch.call))
    except Exception as e:  # a model fails in any way on what it does not take
        names = ", ".join(batch.call)
        raise InputError(
            f"the model fails on a text, which its tokenizer makes {names} of: {first_line(e)}"
        ) from e
    return Texts(model, made, is_nexts(y, batch.vocabulary))


def _read(model: torch.nn.Module, tokenizer: Any, text: str) -> Batch:
    (make,) = batches(model, {"text": [text]}, tokenizer, None)
    return make()


def _over_tokens(mask: np.ndarray, batch: Batch, name: str) -> torch.Tensor:
    """bool (T,): the tokens of a text with a character in the mask (N,) over its characters."""
    if batch.spans is None:
        raise InputError(
            f"{name} has masks, and its tokenizer does not say where tokens lie: take a fast one"
        )
    return torch.tensor([bool(mask[first:last].any()) for first, last in batch.spans[0]])


# --- identity


def printed(found: Any) -> bytes:
    """As it prints itself, but for addresses in memory."""
    return re.sub(r"0x[0-9a-fA-F]+", "", repr(found)).encode()


def sources_of(modules: Sequence[str]) -> list[bytes]:
    """The source of Python modules by name; of one without a file, its name."""
    found = []
    for name in sorted({*modules}):
        file = getattr(sys.modules.get(name), "__file__", None)
        found.append(Path(file).read_bytes() if file and Path(file).is_file() else name.encode())
    return found
