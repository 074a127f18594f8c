"""Places of a sequence: the axes of a value that count tokens, and values of some of the tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

Tensor = torch.Tensor


class Ends(NamedTuple):
    """What an axis counts beside the tokens that may go.

    front, behind: places of the sequence in front of them, and behind them
    outer, inner:  of an axis that is several, joined (tokens and samples): the sizes of those outside the
                   sequence, and of those inside
    """

    front: int
    behind: int
    outer: int = 1
    inner: int = 1


Axes = Mapping[int, Ends]
"""The axes of a value that count tokens."""


class Part(NamedTuple):
    """Places that an op takes of a sequence: along ``axis``, from ``first`` to ``last``, which is the one
    behind them. They are counted on all tokens."""

    axis: int
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class Kept:
    """Tokens of a sequence, by their places.

    at:     (B, K) int64, of each sample its tokens; (1, K) where all samples have the same
    tokens: how many there are in all
    times:  how often each place of the sequence comes, one behind the other
    """

    at: Tensor
    tokens: int
    times: int = 1

    def places(self, ends: Ends) -> Tensor:
        """(B or 1, places): of the whole sequence, those that are left."""
        beside = torch.arange(ends.front + ends.behind, device=self.at.device).expand(len(self.at), -1)
        front, behind = beside[:, : ends.front], beside[:, ends.front :] + self.tokens
        return torch.cat([front, self.at + ends.front, behind], 1).repeat_interleave(self.times, 1)

    def shape(self, full: Sequence[int], axes: Axes) -> list[int]:
        """The sizes of a value that has ``full`` on all tokens."""
        return [self._size(n, axes[i]) if i in axes else n for i, n in enumerate(full)]

    def _size(self, full: int, ends: Ends) -> int:
        beside = ends.front + ends.behind
        return full // (beside + self.tokens) * (beside + self.at.shape[1]) * self.times

    def of(self, x: Tensor, axes: Axes, samples: int = 0) -> Tensor:
        """The places of ``x`` that are left. What all samples share becomes one for each, along the axis
        ``samples``, where they keep different tokens."""
        for axis, ends in axes.items():
            places = self.places(ends)
            if len(places) == 1:
                lines = x.unflatten(axis, (-1, ends.front + self.tokens + ends.behind, ends.inner))
                x = lines.index_select(axis + 1, places[0]).flatten(axis, axis + 2)
                continue
            shape = [1] * x.ndim
            shape[samples], shape[axis] = places.shape
            x = x.expand([len(places) if i == samples else n for i, n in enumerate(x.shape)])
            x = x.take_along_dim(places.view(shape), axis)
        return x

    def part(self, x: Tensor, ends: Ends, part: Part) -> Tensor:
        """Places of ``x``, which has lost some tokens. Those beside the tokens come once."""
        gone = self.tokens - self.at.shape[1]
        first, last = (p if p <= ends.front else p - gone for p in (part.first, part.last))
        x = x.narrow(part.axis, first * self.times, (last - first) * self.times)
        beside = part.last <= ends.front or part.first >= ends.front + self.tokens
        return x[(slice(None),) * part.axis + (slice(None, None, self.times),)] if beside else x


def shapes_of(value: Any) -> tuple[tuple[int, ...], ...]:
    """The shape of each tensor of a value."""
    return tuple(tuple(t.shape) for t in tensors(value))


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a value, in order."""
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
