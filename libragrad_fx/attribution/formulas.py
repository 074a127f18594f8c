"""The methods: pure functions of what one backward shows. Shares of positions come out, before channels are
summed; where those lie is none of their business (``maps``).

Layers are numbered from 0 to L-1, and a layer is the *input* of a block. Formulas are as in the code of
LibraGrad's authors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch

from libragrad_fx.attribution.attention import Attention
from libragrad_fx.errors import InputError
from libragrad_fx.extras import did_you_mean
from libragrad_fx.target import product

Term = tuple[str, torch.Tensor]
"""A node or module path, and its (B, ...) share."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A value and its gradient. places: the axes that are positions; of the others but 0, channels."""

    name: str
    value: torch.Tensor
    gradient: torch.Tensor
    places: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Taps:
    """What a method sees.

    layers:    block inputs in order; the model's inputs where no layer was asked for
    attention: of each layer's block, for methods that need it
    streams:   of each layer's block, the residual stream behind attention, (B, T, C)
    ends:      of each layer's block, its output, (B, T, C)
    rows:      of each sample the token that the output is read from, of methods that follow attention to it
    noise:     a number from [0, 1) for each position of the first layer, 1 for batch and channels
    """

    layers: Sequence[Layer]
    attention: Sequence[Attention] = ()
    streams: Sequence[torch.Tensor] = ()
    ends: Sequence[torch.Tensor] = ()
    rows: Sequence[int] | torch.Tensor = ()
    noise: torch.Tensor | None = None


# --- gradients


def gradient(taps: Taps) -> list[Term]:
    """Σ_c ∂f/∂h."""
    return [(layer.name, layer.gradient.double()) for layer in taps.layers]


def input_x_gradient(taps: Taps) -> list[Term]:
    """Σ_c h ∂f/∂h, at each layer."""
    return [(layer.name, product(layer.value, layer.gradient)) for layer in taps.layers]


def random(taps: Taps) -> list[Term]:
    """Noise as shares, their sum 1, the same for each sample: what any method has to beat."""
    assert taps.noise is not None
    first, batch = taps.layers[0], taps.layers[0].value.shape[0]
    return [(first.name, (taps.noise / taps.noise.sum()).expand(batch, *taps.noise.shape[1:]))]


# --- class activation maps, with their signs (no ReLU)


def gradcam(taps: Taps) -> list[Term]:
    """w_c = mean over positions of the gradient; Σ_c w_c h_c. Selvaraju et al. 2017."""
    found = []
    for x in taps.layers:
        at = reached(x)
        found.append(_weighted(x, _summed(x, x.gradient.double()) / _summed(x, at), at))
    return found


def xgradcam(taps: Taps) -> list[Term]:
    """w_c = Σ_t g |h| / (Σ_t |h| + 1e-7); Σ_c w_c h_c. Fu et al. 2020, in the authors' signed form."""
    found = []
    for x in taps.layers:
        at = reached(x)
        size = x.value.double().abs() * at
        shares = _summed(x, x.gradient.double() * size)
        found.append(_weighted(x, shares / (_summed(x, size) + 1e-7), at))
    return found


def reached(layer: Layer) -> torch.Tensor:
    """1 at the tokens that the output comes from, 0 at the others, which have no gradient: a shorter text's
    padding, and what follows the token that is read. A mean over positions leaves them out, so that a text
    in a batch is explained as it is alone. Of images all positions count; so do all if none has a gradient.
    """
    if layer.value.ndim != 3:
        kept = [n if i in (0, *layer.places) else 1 for i, n in enumerate(layer.value.shape)]
        return layer.value.new_ones(kept).double()
    at = (layer.gradient != 0).any(2, keepdim=True)
    return (at | ~at.any(1, keepdim=True)).double()


def _summed(layer: Layer, values: torch.Tensor) -> torch.Tensor:
    return values.sum(layer.places, keepdim=True) if layer.places else values


def _weighted(layer: Layer, weights: torch.Tensor, at: torch.Tensor) -> Term:
    return layer.name, layer.value.double() * weights * at


# --- attention


def raw_attention(taps: Taps) -> list[Term]:
    """The last block's probabilities, their mean over heads, at the token that is read."""
    return _read(taps, taps.attention[-1].weights.mean(1))


def rollout(taps: Taps) -> list[Term]:
    """R ← (A/2 + I/2) R with the mean over heads, rows not renormalised. Abnar and Zuidema 2020."""
    return _read(taps, _rolled([a.weights.mean(1) for a in taps.attention]))


def genatt(taps: Taps) -> list[Term]:
    """Rollout of the mean over heads of relu(A · dA). Chefer et al. 2021, times 2^-L."""
    return _read(taps, _rolled([(a.weights * a.gradient).relu().mean(1) for a in taps.attention]))


def attcat(taps: Taps) -> list[Term]:
    """Σ_l a_l Σ_c h_{l+1} g_{l+1}, a_l the mean attention that a token gets. Qiang et al. 2022."""
    if len(taps.layers) < 2:
        raise InputError("attcat needs the inputs of two blocks, and there is one: use legrad or gradcam")
    found = []
    for layer, a, after in zip(taps.layers, taps.attention, taps.layers[1:], strict=False):
        at = reached(layer)
        got = (a.weights.mean(1) * at).sum(1) / at.sum(1)
        found.append((after.name, got[..., None] * product(after.value, after.gradient)))
    return found


def tokentm(taps: Taps) -> list[Term]:
    """Token transformation: how much a token grows and turns in each half of a block. Wu et al. 2024."""
    first = taps.layers[0].value.double()
    seen = torch.diag_embed(first.norm(dim=-1))
    one = torch.eye(first.shape[1], dtype=seen.dtype, device=seen.device)
    for layer, a, stream, end in zip(taps.layers, taps.attention, taps.streams, taps.ends, strict=True):
        before, between, behind = (t.double() for t in (layer.value, stream, end))
        at = reached(layer)[..., 0] > 0
        mixed = a.weights.mean(1) * _turned(before, between, at)[:, None] * a.gradient.relu().mean(1)
        seen = (one + torch.diag_embed(_turned(between, behind, at))) @ (one + mixed) @ seen
    return _read(taps, seen)


def legrad(taps: Taps) -> list[Term]:
    """The mean over blocks, heads and queries of relu(dA). Each block's dA is that of the target on its own
    output, as if the network ended there. Bousselham et al. 2024, without their final scaling to [0, 1]."""
    found = []
    for layer, a in zip(taps.layers, taps.attention, strict=True):
        at = reached(layer)
        got = (a.gradient.relu().mean(1) * at).sum(1) / at.sum(1)
        found.append(got[..., None] * at)
    return [(taps.layers[0].name, torch.stack(found).mean(0))]


def _turned(a: torch.Tensor, b: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """(B, T): the growth of each token, weighted by a softmax over tokens of how little it turned."""
    likeness = torch.nn.functional.cosine_similarity(a, b, dim=-1).masked_fill(~at, -torch.inf)
    return b.norm(dim=-1) / (a.norm(dim=-1) + 1e-8) * likeness.softmax(-1)


def _rolled(steps: Sequence[torch.Tensor]) -> torch.Tensor:
    one = torch.eye(steps[0].shape[-1], dtype=steps[0].dtype, device=steps[0].device)
    rolled = one
    for step in steps:
        rolled = (0.5 * step + 0.5 * one) @ rolled
    return rolled


def _read(taps: Taps, shares: torch.Tensor) -> list[Term]:
    """One row of each (T, T) of (B, T, T), as a share of each token."""
    samples = torch.arange(shares.shape[0], device=shares.device)
    rows = torch.as_tensor(taps.rows, device=shares.device)
    return [(taps.layers[0].name, shares[samples, rows][..., None])]


# --- the table


class Method(NamedTuple):
    """What a method needs, and where it comes from.

    layers:    which block inputs: the model's own input, the first, the last, all, or the later half
    biases:    whether every additive constant behind the first layer counts, once
    attention: whether it reads attention probabilities
    row:       whether it follows attention to the one token that the output is read from
    streams:   whether it compares a block's input with its end, and with the stream behind attention
    sums:      whether its map adds up to the output where the backward is balanced
    path:      whether the gradient is an average over inputs: of noise, or on the way from a baseline; or
               whether the whole map is one; or whether each block has a gradient of its own
    """

    terms: Callable[[Taps], list[Term]]
    layers: Literal["input", "first", "last", "all", "half"]
    source: str
    biases: bool = False
    attention: bool = False
    row: bool = False
    streams: bool = False
    sums: bool = False
    path: Literal["", "noise", "line", "whole", "blocks"] = ""


_LIBRA = "Mehri et al. 2025 (LibraGrad)"
METHODS: Mapping[str, Method] = {
    "random": Method(random, "first", "the baseline"),
    "gradient": Method(gradient, "input", "Simonyan et al. 2014"),
    "input_x_gradient": Method(input_x_gradient, "input", "Shrikumar et al. 2016", sums=True),
    "smoothgrad": Method(gradient, "input", "Smilkov et al. 2017", path="noise"),
    "integrated_gradients": Method(input_x_gradient, "input", "Sundararajan et al. 2017", path="line"),
    "fullgrad": Method(input_x_gradient, "first", "Srinivas and Fleuret 2019", biases=True, sums=True),
    "fullgrad_plus": Method(input_x_gradient, "all", _LIBRA, biases=True, sums=True),
    "input_x_gradient_plus": Method(input_x_gradient, "all", f"{_LIBRA}, FullGrad+ without biases"),
    "skip_plus": Method(input_x_gradient, "half", _LIBRA, biases=True, sums=True),
    "hirescam": Method(input_x_gradient, "last", "Draelos and Carin 2020"),
    "gradcam": Method(gradcam, "last", "Selvaraju et al. 2017"),
    "gradcam_plus": Method(gradcam, "all", _LIBRA),
    "xgradcam": Method(xgradcam, "last", "Fu et al. 2020"),
    "xgradcam_plus": Method(xgradcam, "all", _LIBRA),
    "raw_attention": Method(raw_attention, "all", "Bahdanau et al. 2015", attention=True, row=True),
    "rollout": Method(rollout, "all", "Abnar and Zuidema 2020", attention=True, row=True),
    "genatt": Method(genatt, "all", "Chefer et al. 2021", attention=True, row=True),
    "attcat": Method(attcat, "all", "Qiang et al. 2022", attention=True),
    "tokentm": Method(tokentm, "all", "Wu et al. 2024", attention=True, row=True, streams=True),
    "legrad": Method(legrad, "all", "Bousselham et al. 2024", attention=True, path="blocks"),
}  # fmt: skip


def method_of(name: str) -> Method:
    """The method called ``name``: one of ``METHODS``, or ``path_averaged(…)`` of one.

    ``path_averaged(m)`` is the mean of m's maps on the way from the baseline to the first block's input, as
    LibraGrad's authors compute "Integrated Gradients" and its compositions. It promises no sum.

    Raises:
        InputError: there is none.
    """
    if isinstance(name, str):
        inner = name.removeprefix("path_averaged(").removesuffix(")")
        found = METHODS.get(inner)
        if found is not None and name == inner:
            return found
        if found is not None and name == f"path_averaged({inner})" and not found.path:
            return found._replace(path="whole", sums=False, source=f"{_LIBRA}, of {found.source}")
    near = did_you_mean(name, METHODS) or "."
    raise InputError(
        f"no method {name!r}{near} There are {', '.join(METHODS)}, and path_averaged(…) of those"
    )
