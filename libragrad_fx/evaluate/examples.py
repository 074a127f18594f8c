"""One sample and its map, as small as a report needs them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from libragrad_fx.attribution import Attribution
from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.data import Item
from libragrad_fx.evaluate.data.prepare import geometry
from libragrad_fx.evaluate.measures import Case

_SIDE = 64  # the most rows and columns of a map that are kept
_PICTURE = 160  # the most pixels of a picture's side


def example(
    case: Case, found: Attribution, classes: torch.Tensor, i: int, names: Sequence[str]
) -> dict[str, Any]:
    """A row of examples (``store.MAPS``) of sample ``i``; {} without a class to explain or a flat map.

    A map that is finer than ``_SIDE`` is the mean over areas.

    Args:
        names: of the classes, by index; () if they are not known.
    """
    if int(classes[i]) < 0 or found.values.ndim != 3:
        return {}
    item, of = case.items[i], int(classes[i])
    small = found.values[i].detach().double()
    size = min(small.shape[0], _SIDE), min(small.shape[1], _SIDE)
    small = torch.nn.functional.adaptive_avg_pool2d(small[None], size)[0].cpu().numpy()
    scale = float(np.abs(small[np.isfinite(small)]).max(initial=0.0)) or 1.0
    chances = case.logits[i].double().softmax(-1)
    called = names if len(names) == len(chances) else ()
    mask, label = case.masks[i].get(of), case.labels[i]
    return {
        "image": item.id, "label": None if label is None else _name(label, called),
        "predicted": _name(int(chances.argmax()), called), "explained": _name(of, called),
        "probability": float(chances[of]), "scale": scale, "height": size[0], "width": size[1],
        "values": (small / scale).astype("<f2").tobytes(), "picture": _picture(case, item),
        "mask": None if mask is None else _file(Image.fromarray(mask.cpu().numpy()), "PNG"),
    }  # fmt: skip


def _name(index: int, names: Sequence[str]) -> str:
    return names[index] if index < len(names) else str(index)


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
