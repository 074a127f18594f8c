"""BiLRP: which pairs of positions make two inputs alike. Eberle et al. 2022."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from libragrad_fx.attribution.internals import run
from libragrad_fx.errors import InputError
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.module.variants import fitting
from libragrad_fx.target import differentiable, first_tensor, product

Embed = Callable[[Any], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Similarity:
    """⟨u(a), u(b)⟩ shared out over pairs of positions.

    values:  (B, N, M), in float64: what position i of a and position j of b have to do with each other
    left:    (B, N) what positions of a have to do with the biases of b's side; ``right`` (B, M) likewise
    biases:  (B,) what biases have to do with each other
    output:  (B,) the product; where the backward is balanced, the sum of all of the above
    """

    values: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    biases: torch.Tensor
    output: torch.Tensor

    @property
    def completeness_error(self) -> torch.Tensor:
        """(B,): |sum of all shares - output|."""
        shared = self.values.sum((1, 2)) + self.left.sum(1) + self.right.sum(1) + self.biases
        return (shared - self.output).abs()


def similarity(
    module: CapturedModule,
    left: Any,
    right: Any,
    *,
    embed: Embed = first_tensor,
    other: CapturedModule | None = None,
    other_embed: Embed | None = None,
    layer: str | None = None,
    chunk: int = 32,
) -> Similarity:
    """Explain the dot product of what a module makes of two inputs, pair by pair of positions (BiLRP).

    Every entry of a vector u is explained by Input x Gradient; the products of these maps are added up:
    R_ij = Σ_k R_i(u_k(a)) R_j(u_k(b)). It takes a backward for each entry and side, ``chunk`` at once.

    Args:
        module: the result of ``transform``; plain or balanced.
        left, right: inputs as the module takes them, batch first, as many samples of each.
        embed: from an output to the vectors u (B, D): pooled, and of length one if a cosine is meant.
        other: the module of the second input, if it is another tower.
        other_embed: of that module; ``embed`` by default.
        layer: path of the module whose input has the positions; by default the model's own input, or its
            embedded tokens.

    Raises:
        InputError: vectors of other shapes than (B, D), or no positions.
    """
    a = _shares(module, left, embed, layer, chunk)
    b = _shares(other or module, right, other_embed or embed, layer, chunk)
    if a.vectors.shape != b.vectors.shape:
        raise InputError(f"the two vectors differ: {tuple(a.vectors.shape)} and {tuple(b.vectors.shape)}")
    # what no position has is the biases' part of each entry
    rest, other_rest = (s.vectors - s.maps.sum(2) for s in (a, b))
    return Similarity(
        torch.einsum("bki,bkj->bij", a.maps, b.maps),
        torch.einsum("bki,bk->bi", a.maps, other_rest),
        torch.einsum("bk,bkj->bj", rest, b.maps),
        (rest * other_rest).sum(1),
        (a.vectors * b.vectors).sum(1),
    )


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors (B, D) at length one, their norm held as in every balanced norm: for ``embed``."""
    return vectors / vectors.norm(dim=-1, keepdim=True).detach()


@dataclasses.dataclass(frozen=True)
class _Shares:
    """vectors: (B, D); maps: (B, D, N) of each entry."""

    vectors: torch.Tensor
    maps: torch.Tensor


def _shares(module: CapturedModule, inputs: Any, embed: Embed, layer: str | None, chunk: int) -> _Shares:
    module = fitting(module, inputs)
    seen = run(module, inputs, [] if layer is None else [layer], biases=False)
    found = [seen.values[n] for n in seen.layers.values()] or [*seen.sources.values()]
    values = [h for h in found if h.shape == found[0].shape]  # words, segments: one sequence
    samples = next((seen.samples[of] for of in (*seen.layers.values(), *seen.sources)), 0)
    if not values or values[0].ndim < 3:
        raise InputError(
            "the inputs have no positions: name a layer whose input is (B, N, C) or (B, C, H, W)"
        )
    with differentiable():
        vectors = embed(seen.output)
        if not isinstance(vectors, torch.Tensor) or vectors.ndim != 2:
            what = tuple(vectors.shape) if isinstance(vectors, torch.Tensor) else type(vectors).__name__
            raise InputError(f"embed must give vectors (B, D), and gave {what}")
        maps = [_maps(vectors, values, k, samples) for k in torch.arange(vectors.shape[1]).split(chunk)]
    return _Shares(vectors.detach().double(), torch.cat(maps, 1))


def _maps(
    vectors: torch.Tensor, values: list[torch.Tensor], entries: torch.Tensor, samples: int
) -> torch.Tensor:
    """(B, k, N): Input x Gradient of some entries. samples: which axis of the values counts samples."""
    seeds = torch.nn.functional.one_hot(entries, vectors.shape[1]).to(vectors)
    seeds = seeds[:, None].expand(-1, *vectors.shape)
    grads = torch.autograd.grad(
        vectors, values, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True
    )
    channels = values[0].ndim - 1 if values[0].ndim == 3 else 1
    pairs = ((h, g) for h, g in zip(values, grads, strict=True) if g is not None)
    total = sum(product(h, g).movedim(samples + 1, 1).sum(channels + 1) for h, g in pairs)
    return torch.as_tensor(total).flatten(2).movedim(0, 1)
