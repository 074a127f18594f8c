"""One sample and its map, as small as a report needs them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from libragrad_fx.attribution import Attribution
from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.data import Item
from libragrad_fx.evaluate.data.prepare import geometry
from libragrad_fx.evaluate.inputs import Texts
from libragrad_fx.evaluate.measures import Case

_SIDE = 64  # the most rows and columns of a map that are kept
_PICTURE = 160  # the most pixels of a picture's side


def example(
    case: Case, found: Attribution, classes: torch.Tensor, i: int, names: Sequence[str]
) -> dict[str, Any]:
    """A row of examples (``store.MAPS``) of sample ``i``; {} without a class to explain, or if its map is
    over neither a picture nor a text.

    A map of a picture that is finer than ``_SIDE`` is the mean over areas.

    Args:
        names: of the classes of a set of pictures, by index; () if they are not known.
    """
    item, of = case.items[i], int(classes[i])
    inputs = case.subject.inputs
    pieces = inputs.pieces(item) if isinstance(inputs, Texts) else None
    if of < 0 or found.values.ndim != (3 if pieces is None else 2):
        return {}
    small = torch.atleast_2d(found.values[i].detach().double())
    size = (min(small.shape[0], _SIDE), min(small.shape[1], _SIDE)) if pieces is None else small.shape
    small = torch.nn.functional.adaptive_avg_pool2d(small[None], size)[0].cpu().numpy()
    scale = float(np.abs(small[np.isfinite(small)]).max(initial=0.0)) or 1.0
    chances = case.logits[i].double().softmax(-1)
    mask, label, called = case.masks[i].get(of), case.labels[i], _names(case, i, names, len(chances))
    against = f" against {called(1 - of)}" if case.contrast is not None else ""
    return {
        "image": item.id, "label": None if label is None else called(label),
        "predicted": called(int(chances.argmax())), "explained": called(of) + against,
        "probability": float(chances[of]), "scale": scale, "height": size[0], "width": size[1],
        "values": (small / scale).astype("<f2").tobytes(), "picture": _picture(case, item),
        "pieces": None if pieces is None else json.dumps(pieces),
        "mask": None if mask is None else _file(Image.fromarray(np.atleast_2d(mask.cpu().numpy())), "PNG"),
    }  # fmt: skip


def _names(case: Case, i: int, names: Sequence[str], classes: int) -> Callable[[int], str]:
    """What classes are called; of a contrast, the two that sample ``i`` is a choice between."""
    inputs = case.subject.inputs

    def own(index: int) -> str:
        if isinstance(inputs, Texts):
            return inputs.named(index) or str(index)
        return names[index] if len(names) == classes else str(index)

    if case.contrast is None:
        return own
    other, this = case.contrast.pairs[i].flip(0).tolist()  # class 1 is the first of them
    return lambda index: own(this if index else other)


def _picture(case: Case, item: Item) -> bytes | None:
    """What the model saw: the picture, resized and cut; None where that cannot be known."""
    if isinstance(item.content, str):
        return None
    try:
        way = geometry(case.subject.steps)
        seen = way.cut(way.resized(item.content))
    except InputError:
        return None
    seen.thumbnail((_PICTURE, _PICTURE))
    return _file(seen, "WEBP", quality=85)


def _file(picture: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()
