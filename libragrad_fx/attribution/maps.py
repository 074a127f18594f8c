"""From terms ``a * df/da`` of any shape to maps over positions: tokens, patches, pixels, frames, voxels.

A term is summed over its channels, whichever axis they are on; what has no position (a pooled
vector, the hidden units of a token-mixing MLP) is kept apart as one number a sample.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

_MOST_PREFIX = 16  # class, distillation and register tokens in front of the patches
Extents = tuple[int, ...]
"""Of an input, the sizes of its axes that are positions: (H, W), (frames, H, W), (T,)."""


class Part(NamedTuple):
    """The tokens that come from one input: ``order`` names them, cell by cell of their ``grid``, as many
    for one as for another."""

    source: str
    grid: Extents
    order: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the tokens of a value lie.

    tokens: how many there are
    parts:  by input, those that lie somewhere in it
    apart:  those that lie nowhere: class and register tokens
    axes:   of the value, its axes that count tokens; several are read in their order
    """

    tokens: int
    parts: tuple[Part, ...]
    apart: tuple[int, ...]
    axes: tuple[int, ...] = (1,)


@dataclasses.dataclass(frozen=True)
class Placed:
    """A term summed over channels. ``maps``: by input, (B, *grid); ``prefix``: tokens that lie nowhere."""

    maps: Mapping[str, torch.Tensor]
    prefix: torch.Tensor | None
    rest: torch.Tensor


def guessed(
    source: str, shape: Sequence[int], upstream: Sequence[Sequence[int]], image: Extents | None
) -> Layout:
    """Layout of a value (B, N, C), from sizes alone: row by row, behind the tokens that lie nowhere.

    Args:
        source: the input that it lies in.
        upstream: shapes of all values before it, in graph order.
        image: (H, W) of that input, if it is an image.
    """
    tokens = shape[1] if len(shape) == 3 else 1
    grid, prefix = _fitting(tokens, upstream, image) if image is not None and len(image) == 2 else (None, 0)
    order = tuple(range(prefix, tokens))
    return Layout(tokens, (Part(source, grid or (tokens,), order),), tuple(range(prefix)))


def _fitting(tokens: int, upstream: Sequence[Sequence[int]], image: Extents) -> tuple[Extents | None, int]:
    """The grid of that many tokens over an image, and how many are in front of it."""
    pictures = [tuple(s[i] for i in a) for s in upstream if len(s) == 4 and (a := _axes(s, image))]
    fitting = [(h, w) for h, w in pictures if 0 <= tokens - h * w <= _MOST_PREFIX]
    if fitting:  # heads by features may have the image's aspect as well: the largest is the grid
        grid = max(fitting, key=math.prod)
        return grid, tokens - math.prod(grid)
    for prefix in range(min(_MOST_PREFIX, tokens - 1) + 1):  # no feature map: the image's aspect
        w = math.isqrt((tokens - prefix) * image[1] // image[0])
        h = (tokens - prefix) // max(w, 1)
        if h * w == tokens - prefix and h * image[1] == w * image[0]:
            return (h, w), prefix
    return None, 0


def positions(shape: Sequence[int], image: Extents | None) -> tuple[int, ...]:
    """The axes of a value that are positions; the others, but the batch, are channels."""
    found = None if image is None else _axes(shape, image)
    return found or ((1,) if len(shape) == 3 else tuple(range(2, len(shape))))


def _axes(shape: Sequence[int], image: Extents) -> tuple[int, ...] | None:
    """Which axes of a value are the image's: they are not larger, and the last two have its aspect. Frames
    may lie before the channels."""
    n = len(image)
    if len(shape) != n + 2 or n < 2:
        return None
    behind, before = tuple(range(2, n + 2)), tuple(range(1, n + 1))
    for axes in (behind, before) if n == 2 else (behind, (1, *behind[1:]), before):
        sizes = [shape[a] for a in axes]
        aspect = sizes[-2] * image[-1] == sizes[-1] * image[-2]
        if aspect and all(s <= size for s, size in zip(sizes, image, strict=True)):
            return axes
    return None


def place(term: torch.Tensor, layouts: Sequence[Layout], source: str, image: Extents | None) -> Placed:
    """Sum a term (B, ...) over channels onto positions.

    Args:
        layouts: how tokens lie, the likeliest first; a term has the first whose number of tokens it has.
        source: the input in which a term lies that is a picture itself, at a resolution of its own.
        image: the extents of that input.
    """
    term = term.double()
    nowhere = term.new_zeros(term.shape[0])
    square = term.shape[-1] if term.ndim == 4 and term.shape[-1] == term.shape[-2] else 0
    if any(layout.tokens == square for layout in layouts):  # queries and keys: no picture
        term = term.sum(1)
    if image is not None and (axes := _axes(term.shape, image)):
        return Placed({source: kept(term, axes)}, None, nowhere)
    if term.ndim == 3:  # hidden units may be as many as the tokens of another stage: their axis comes last
        tried = [(x, x.axes[0]) for x in layouts] + [(x, 3 - x.axes[0]) for x in layouts]
        found = next(((x, axis) for x, axis in tried if term.shape[axis] == x.tokens), None)
        if found is not None:
            return on_tokens(kept(term, (found[1],)), found[0])
    return Placed({}, None, summed(term))


def kept(term: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """A term summed over all but the batch and ``axes``, in float64."""
    others = [i for i in range(1, term.ndim) if i not in axes]
    return term.double().sum(others) if others else term.double()


def on_tokens(tokens: torch.Tensor, layout: Layout) -> Placed:
    """Numbers of tokens (B, N), each where it lies."""
    found = {p.source: tokens[:, list(p.order)].unflatten(1, (*p.grid, -1)).sum(-1) for p in layout.parts}
    return Placed(
        found, tokens[:, list(layout.apart)] if layout.apart else None, tokens.new_zeros(tokens.shape[0])
    )


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

    The first of ``axes`` for which it is one pattern; None if it is none, or one of several ``inner``.
    """
    for axis in axes:
        found = samples.movedim(axis, 0).flatten(1)
        n = found.shape[0]
        whose, known = found.amax(1), found >= 0
        if n % batch or bool(((found != whose[:, None]) & known).any()):
            continue
        row, said = torch.arange(n, device=found.device), whose >= 0
        fits = [
            Rows(axis, inner)
            for inner in range(1, n // batch + 1)
            if n // batch % inner == 0
            and bool((row.div(inner, rounding_mode="floor") % batch == whose)[said].all())
        ]
        if fits:
            return fits[0] if len(fits) == 1 or not bool(said.any()) else None
    return None


def add(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of maps on the finest grid among them; each keeps its total when it is spread."""
    size = tuple(max(m.shape[i] for m in maps) for i in range(1, maps[0].ndim))
    return torch.stack([spread(m, size) for m in maps]).sum(0)


def spread(m: torch.Tensor, size: Extents) -> torch.Tensor:
    """A map (B, ...) on a finer grid: each cell is shared out equally among those nearest to it."""
    for axis, (old, new) in enumerate(zip(m.shape[1:], size, strict=True), 1):
        if old != new:
            nearest = [int((i + 0.5) * old / new) for i in range(new)]
            count = m.new_tensor([max(nearest.count(i), 1) for i in range(old)])
            m = (m / count.view(-1, *[1] * (m.ndim - 1 - axis)))[(slice(None),) * axis + (nearest,)]
    return m
