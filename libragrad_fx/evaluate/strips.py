"""Examples as pictures or coloured texts: what the model saw, and each method's map, plain and balanced."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from libragrad_fx.evaluate.store import MAPS
from libragrad_fx.evaluate.tables import Results
from libragrad_fx.viz import heatmap, html, palette
from libragrad_fx.viz.template import markup

_MOST = 12  # strips on a page
_SIDE = 176  # pixels of a picture and of a map
_DARK, _LIGHT = (20, 20, 20), (255, 255, 255)


@dataclasses.dataclass(frozen=True)
class Strip:
    """One sample and one model. picture: a data URI. maps: by method and policy, data URIs; of a text,
    HTML. outlined: whether a mask is shown, as a line around it or under it."""

    model: str
    data: str
    image: str
    target: str
    said: Mapping[str, Any]
    picture: str | None
    text: bool
    outlined: bool
    methods: tuple[str, ...]
    maps: Mapping[tuple[str, str], str]


def strips(found: Results, policies: tuple[str, str]) -> tuple[list[Strip], int]:
    """The strips that are shown, spread over models and sets, and how many there are in all."""
    rows = [dict(zip(MAPS, row, strict=True)) for row in found.examples()]
    by: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["policy"] in policies:
            by.setdefault((row["model"], row["data"], row["image"]), []).append(row)
    turn: dict[tuple[str, str], int] = {}
    order = []
    for key in by:
        turn[key[:2]] = turn.get(key[:2], -1) + 1
        order.append((turn[key[:2]], key))
    chosen = [key for _, key in sorted(order, key=lambda pair: pair[0])[:_MOST]]
    return [_strip(by[key], found.methods) for key in sorted(chosen, key=[*by].index)], len(by)


def _strip(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> Strip:
    first = rows[0]
    seen = None if first["picture"] is None else Image.open(io.BytesIO(first["picture"])).convert("RGB")
    mask = None if first["mask"] is None else Image.open(io.BytesIO(first["mask"])).convert("L")
    pieces = None if first["pieces"] is None else json.loads(first["pieces"])
    maps: dict[tuple[str, str], str] = {}
    for method in methods:
        values = {r["policy"]: _values(r) for r in rows if r["method"] == method}
        if values:
            scale = heatmap.shared_scale(*values.values())
            signed = any(bool((v < 0).any()) for v in values.values())
            maps |= {
                (method, p): _map(v, seen, scale, signed) if pieces is None
                else _coloured(pieces, v[0], scale, signed, mask)
                for p, v in values.items()
            }  # fmt: skip
    said = {k: first[k] for k in ("label", "predicted", "explained", "probability")}
    picture = None if seen is None else _uri(_outlined(_sized(seen), mask))
    return Strip(
        first["model"], first["data"], first["image"], first["target"], said, picture, pieces is not None,
        (picture is not None or pieces is not None) and mask is not None,
        tuple(m for m in methods if any(m == k for k, _ in maps)), maps,
    )  # fmt: skip


def _values(row: Mapping[str, Any]) -> np.ndarray:
    levels = np.frombuffer(row["values"], "<f2").astype(np.float64)
    return levels.reshape(row["height"], row["width"]) * row["scale"]


def _map(values: np.ndarray, seen: Image.Image | None, scale: float, signed: bool) -> str:
    ground = np.ones((_SIDE, _SIDE, 3)) if seen is None else np.asarray(_sized(seen)) / 255
    return _uri(heatmap.to_image(heatmap.overlay(ground, values, scale, signed)))


def _coloured(
    pieces: Sequence[str], values: np.ndarray, scale: float, signed: bool, mask: Image.Image | None
) -> str:
    marked = [] if mask is None else (np.asarray(mask)[0] > 0).tolist()
    return markup(html.text(pieces, values, palette.colours(values, scale, signed), marked), "evaluate")


def _sized(picture: Image.Image) -> Image.Image:
    """As large as a map on the page."""
    scale = _SIDE / max(picture.size)
    width, height = (max(1, round(n * scale)) for n in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _outlined(picture: Image.Image, mask: Image.Image | None) -> Image.Image:
    """With a light line along the inner side of a mask's edge, and a dark one along the outer side."""
    if mask is None:
        return picture
    inside = mask.resize(picture.size, Image.Resampling.NEAREST)
    levels = np.array(picture)
    for filtered, colour in ((ImageFilter.MaxFilter(3), _DARK), (ImageFilter.MinFilter(3), _LIGHT)):
        levels[np.asarray(inside.filter(filtered)) != np.asarray(inside)] = colour
    return Image.fromarray(levels)


def _uri(picture: Image.Image) -> str:
    return heatmap.data_uri(picture, "WEBP", quality=80)


def keys() -> tuple[str, str]:
    """The colour scales: of signed values, and of values of one sign."""
    return heatmap.data_uri(heatmap.legend()), heatmap.data_uri(heatmap.legend(signed=False))
