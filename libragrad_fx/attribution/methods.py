"""Attribution methods. They take any captured module and never ask whether it was balanced."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from libragrad_fx.attribution import maps
from libragrad_fx.attribution.internals import Internals, observe
from libragrad_fx.errors import InputError
from libragrad_fx.module import CapturedModule, blocks
from libragrad_fx.target import Target, product
from libragrad_fx.variants import fitting

METHODS = ("input_x_gradient", "fullgrad_plus")


@dataclasses.dataclass(frozen=True)
class Attribution:
    """A signed, un-normalised attribution.

    values:       (B, H, W) over pixels or patches, or (B, N) over tokens; float64
    prefix:       (B, P) class and register tokens, or None
    unplaced:     (B,) bias terms that belong to no position
    output:       (B,) what was explained
    completeness_error: (B,) |sum of the terms that make up the output - output|: for Input x
                  Gradient ⟨h, g⟩ alone, for FullGrad+ ⟨h_0, g_0⟩ and all bias terms (method §4)
    layers:       module paths whose inputs were used (empty: the model's own input)
    """

    values: torch.Tensor
    prefix: torch.Tensor | None
    unplaced: torch.Tensor
    output: torch.Tensor
    completeness_error: torch.Tensor
    method: str
    layers: tuple[str, ...]


def attribute(
    module: CapturedModule,
    inputs: Any,
    target: Target = None,
    *,
    method: str = "fullgrad_plus",
    layers: Sequence[str] | None = None,
) -> Attribution:
    """Explain ``target`` of a captured module on ``inputs``, one sample at a time in a batch.

    Args:
        module: the result of ``transform`` (balanced) or ``trace`` (autograd's own backward).
        inputs: a tensor, a tuple, or a dict of keyword arguments, batch first.
        target: as in Captum (int, tuple, tensor, list), or a callable from output to scalars.
        method: ``"input_x_gradient"``: Σ_c h g at one layer's input (the model's own by default);
            ``"fullgrad_plus"`` (FullGrad+, LibraGrad's flagship): the sum of it over the inputs of
            all blocks, plus every additive bias of the graph times its gradient, once.
        layers: module paths whose inputs to use; by default the repeated blocks of the network.

    Raises:
        InputError: unknown method or layer, or a target that does not fit.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise InputError(f"no method {method!r}; there are {', '.join(METHODS)}")
    if not isinstance(module, CapturedModule):
        raise InputError(
            f"attribute needs a captured graph, and {type(module).__name__} is none: give it the result"
            " of transform(model). A model that had to be cut into several graphs has no such maps;"
            " its balanced input gradient, torch.autograd.grad(gm(x)[...], x), does what it says"
        )
    if isinstance(layers, str) or not isinstance(layers, (Sequence, type(None))):
        raise InputError(f"layers is a list of module paths, got {layers!r}")
    module = fitting(module, inputs)
    plus = method == "fullgrad_plus"
    paths = list(layers) if layers is not None else (blocks(module) if plus else [])
    seen = observe(module, inputs, target, paths, biases=plus)
    terms = {**seen.layers} if paths else dict(seen.inputs)
    if not plus and len(terms) > 1:
        raise InputError(f"input_x_gradient takes one layer; got {', '.join(terms)}")
    products = {k: product(h, g) for k, (h, g) in terms.items()}
    batch = seen.output.shape[0]
    if any(h.shape[0] != batch for h, _ in terms.values()):
        raise InputError(
            f"the target callable gave {batch} numbers; attribute wants one for each sample"
        )
    biases = [maps.by_sample(product(b, g), s.batch, batch) for s, b, g in seen.biases]
    first = next(iter(products.values()))
    whole = first.flatten(1).sum(1) + sum(b.flatten(1).sum(1) for b in biases)
    return _assemble(seen, products, biases, (whole - seen.output).abs(), method, tuple(paths))


def _assemble(
    seen: Internals, products: dict[str, torch.Tensor], biases: list[torch.Tensor],
    error: torch.Tensor, method: str, layers: tuple[str, ...],
) -> Attribution:  # fmt: skip
    images = ((x.shape[-2], x.shape[-1]) for x, _ in seen.inputs.values() if x.ndim == 4)
    image = next(images, None)
    first = next(iter(products.values()))
    where = maps.layout(first.shape, seen.shapes, image)
    placed = [maps.place(t, where, image) for t in (*products.values(), *biases)]
    found = [p.map for p in placed if p.map is not None]
    if not found:
        raise InputError(
            f"inputs of shape {tuple(first.shape)} have no positions to attribute to; ask for"
            " layers=[…] whose inputs are (B, N, C) or (B, C, H, W)"
        )
    prefix = [p.prefix for p in placed if p.prefix is not None]
    return Attribution(
        values=maps.add(found),
        prefix=torch.stack(prefix).sum(0) if prefix else None,
        unplaced=torch.stack([p.rest for p in placed]).sum(0),
        output=seen.output,
        completeness_error=error,
        method=method,
        layers=layers,
    )
