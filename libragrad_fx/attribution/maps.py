"""From terms ``a * df/da`` of any shape to maps over positions: image patches, pixels or tokens.

A term is summed over its channels, whichever axis they are on; what has no position (a pooled
vector, the hidden units of a token-mixing MLP) is kept apart as one number a sample.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

_MOST_PREFIX = 16  # class, distillation and register tokens in front of the patches


@dataclasses.dataclass(frozen=True)
class Layout:
    """How positions are laid out: ``grid`` (H, W) of an image, or a sequence of ``tokens``."""

    tokens: int
    grid: tuple[int, int] | None
    prefix: int


@dataclasses.dataclass(frozen=True)
class Placed:
    """A term summed over channels. ``map``: (B, H, W), or (B, N) for a sequence; None if nowhere."""

    map: torch.Tensor | None
    prefix: torch.Tensor | None
    rest: torch.Tensor


def layout(
    shape: Sequence[int], upstream: Sequence[Sequence[int]], image: tuple[int, int] | None
) -> Layout:
    """Layout of a layer whose input has ``shape``, from the image-like values before it.

    Args:
        shape: (B, N, C) for tokens, (B, C, H, W) or (B, H, W, C) for feature maps.
        upstream: shapes of all values before it, in graph order.
        image: (H, W) of the model's input, if that is an image.
    """
    if len(shape) == 4:
        grid = _image_axes(shape, image)
        h, w = (shape[grid[0]], shape[grid[1]]) if grid else (shape[2], shape[3])
        return Layout(h * w, (h, w), 0)
    tokens = shape[1] if len(shape) == 3 else 1
    if image is None:
        return Layout(tokens, None, 0)
    pictures = [(s[a[0]], s[a[1]]) for s in upstream if len(s) == 4 and (a := _image_axes(s, image))]
    fitting = [(h, w) for h, w in pictures if 0 <= tokens - h * w <= _MOST_PREFIX]
    if fitting:  # heads by features may have the image's aspect as well: the largest is the grid
        h, w = max(fitting, key=lambda grid: grid[0] * grid[1])
        return Layout(tokens, (h, w), tokens - h * w)
    for prefix in range(min(_MOST_PREFIX, tokens - 1) + 1):  # no feature map: the image's aspect
        w = math.isqrt((tokens - prefix) * image[1] // image[0])
        h = (tokens - prefix) // max(w, 1)
        if h * w == tokens - prefix and h * image[1] == w * image[0]:
            return Layout(tokens, (h, w), prefix)
    return Layout(tokens, None, 0)


def positions(shape: Sequence[int], image: tuple[int, int] | None) -> tuple[int, ...]:
    """The axes of a value that are positions; the others, but the batch, are channels."""
    if len(shape) == 4:
        return _image_axes(shape, image) or (2, 3)
    return (1,) if len(shape) == 3 else tuple(range(2, len(shape)))


def _image_axes(shape: Sequence[int], image: tuple[int, int] | None) -> tuple[int, int] | None:
    """Which two axes of a 4-d value are the image's: they have its aspect and are not larger."""
    if image is None:
        return (2, 3)
    for a, b in ((2, 3), (1, 2)):
        if shape[a] * image[1] == shape[b] * image[0] and shape[a] <= image[0]:
            return a, b
    return None


def place(term: torch.Tensor, where: Layout, image: tuple[int, int] | None) -> Placed:
    """Sum a term (B, ...) over channels onto positions.

    A 4-d term of another resolution than the layout's is placed on its own grid.
    """
    term = term.double()
    nowhere = term.new_zeros(term.shape[0])
    if term.ndim == 4 and term.shape[-1] == term.shape[-2] == where.tokens:  # queries and keys: no picture
        term = term.sum(1)
    if term.ndim == 4 and (axes := _image_axes(term.shape, image)) and image is not None:
        channel = 1 if axes == (2, 3) else 3
        return Placed(term.sum(channel), None, nowhere)
    axis = next((i for i in (1, 2) if term.ndim == 3 and term.shape[i] == where.tokens), None)
    if axis is None:
        return Placed(None, None, summed(term))
    tokens = term.sum(3 - axis)
    if where.grid is None:
        return Placed(tokens, None, nowhere)
    patches = tokens[:, where.prefix :].unflatten(1, where.grid)
    return Placed(patches, tokens[:, : where.prefix] if where.prefix else None, nowhere)


def summed(term: torch.Tensor) -> torch.Tensor:
    """(B,): a term (B, ...) as one number a sample, in float64."""
    return term.double().flatten(1).sum(1) if term.ndim > 1 else term.double()


class Rows(NamedTuple):
    """Where samples are in a tensor: row r of ``axis`` is of sample (r // inner) % B. Windows of one sample
    lie next to each other (``inner`` of them); of tokens in front of samples, ``inner`` is 1."""

    axis: int
    inner: int


def by_sample(term: torch.Tensor, rows: Rows | None, batch: int) -> torch.Tensor:
    """A term with its batch axis in front: (B, ...).

    A term without a batch axis belongs to all samples alike; it is shared out equally.
    """
    if rows is None:
        return (term / batch).expand(batch, *term.shape)
    term = term.movedim(rows.axis, 0)
    if term.shape[0] == batch:
        return term
    return term.unflatten(0, (-1, batch, rows.inner)).movedim(1, 0).flatten(1, 2)


def rows_of(samples: torch.Tensor, batch: int, axes: Sequence[int]) -> Rows | None:
    """Where samples are, from a tensor that says for each element whose it is, -1 where nobody knows.

    The first of ``axes`` for which it is one pattern, and of that the largest ``inner``; None if none is.
    """
    for axis in axes:
        found = samples.movedim(axis, 0).flatten(1)
        n = found.shape[0]
        whose, known = found.amax(1), found >= 0
        if n % batch or bool(((found != whose[:, None]) & known).any()):
            continue
        row, said = torch.arange(n, device=found.device), whose >= 0
        for inner in (i for i in range(n // batch, 0, -1) if n // batch % i == 0):
            if bool((row.div(inner, rounding_mode="floor") % batch == whose)[said].all()):
                return Rows(axis, inner)
    return None


def add(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of maps on the finest grid among them; each keeps its total when it is spread."""
    if maps[0].ndim == 2:
        return torch.stack(list(maps)).sum(0)
    h, w = max(m.shape[1] for m in maps), max(m.shape[2] for m in maps)
    total = torch.zeros(maps[0].shape[0], h, w, dtype=maps[0].dtype, device=maps[0].device)
    for m in maps:
        spread = torch.nn.functional.interpolate(m[:, None], size=(h, w), mode="nearest-exact")[:, 0]
        kept = spread.sum((1, 2), keepdim=True)
        uniform = m.shape[1] * m.shape[2] / (h * w)
        exact = h % m.shape[1] == 0 and w % m.shape[2] == 0
        total += spread * uniform if exact else spread * (m.sum((1, 2), keepdim=True) / kept)
    return total
