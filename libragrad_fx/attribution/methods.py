"""Attribution methods. They take any captured module and never ask whether it was balanced."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from libragrad_fx.attribution import maps
from libragrad_fx.attribution.internals import Internals, observe
from libragrad_fx.errors import InputError
from libragrad_fx.module.captured import CapturedModule, one_graph
from libragrad_fx.module.variants import fitting
from libragrad_fx.module.walk import blocks
from libragrad_fx.target import Target, product

METHODS = ("input_x_gradient", "fullgrad_plus")
Term = tuple[str, torch.Tensor]  # a node or a module path, and its (B, ...) share of the output


@dataclasses.dataclass(frozen=True)
class Attribution:
    """A signed, un-normalised attribution.

    values:       (B, H, W) over pixels or patches, or (B, N) over tokens; float64
    prefix:       (B, P) class and register tokens, or None
    unplaced:     (B,) what belongs to no position
    others:       where a model has several inputs with positions: the maps of the others, by input
    output:       (B,) what was explained
    total:        (B,) what ``values``, ``prefix``, ``unplaced`` and ``others`` add up to
    expected:     (B,) what they add up to where the backward is balanced: the output, for Input x
                  Gradient only if no bias carries; for FullGrad+ over blocks (method §4), for each of them
                  the output less what does not pass it (biases, other inputs), and all biases once
    completeness_error: (B,) |total - expected|
    layers:       module paths whose inputs were used (empty: the model's own input)
    """

    values: torch.Tensor
    prefix: torch.Tensor | None
    unplaced: torch.Tensor
    others: Mapping[str, torch.Tensor]
    output: torch.Tensor
    total: torch.Tensor
    expected: torch.Tensor
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
    module = one_graph(
        module,
        "attribute needs a captured graph, and {} is none: give it the result"
        " of transform(model). A model that had to be cut into several graphs has no such maps;"
        " its balanced input gradient, torch.autograd.grad(gm(x)[...], x), does what it says",
    )
    if isinstance(layers, str) or not isinstance(layers, (Sequence, type(None))):
        raise InputError(f"layers is a list of module paths, got {layers!r}")
    module = fitting(module, inputs)
    plus = method == "fullgrad_plus"
    paths = list(layers) if layers is not None else (blocks(module) if plus else [])
    seen = observe(module, inputs, target, paths, biases=plus)
    terms = {**seen.layers} if paths else dict(seen.inputs)
    if not plus and len(paths) > 1:
        raise InputError(f"input_x_gradient takes one layer; got {', '.join(paths)}")
    products = {k: product(h, g) for k, (h, g) in terms.items()}
    batch = seen.output.shape[0]
    if any(h.shape[0] != batch for h, _ in terms.values()):
        raise InputError(f"the target callable gave {batch} numbers; attribute wants one for each sample")
    biases = [(site.node, maps.by_sample(product(b, g), axis, batch)) for site, axis, b, g in seen.biases]
    expected = _expected(seen, products, biases, plus)
    return _assemble(seen, products, biases, expected, method, tuple(paths))


def _expected(
    seen: Internals, products: Mapping[str, torch.Tensor], biases: Sequence[Term], plus: bool
) -> torch.Tensor:  # fmt: skip
    """(B,): what all terms add up to if the backward is balanced.

    The term of a layer is the output less what does not come by it: biases and inputs that are not
    before it.
    """
    output = seen.output.double()
    if not plus or not seen.before:
        return output
    sums = [(name, maps.summed(b)) for name, b in biases]
    sources = [(name, maps.summed(product(x, g))) for name, (x, g) in seen.inputs.items()]
    whole = torch.zeros_like(output) + sum(s for _, s in sums)
    for path in products:
        before = seen.before[path]
        whole = whole + output - sum(s for name, s in [*sources, *sums] if name not in before)
    return whole


def _assemble(
    seen: Internals, products: dict[str, torch.Tensor], biases: Sequence[Term],
    expected: torch.Tensor, method: str, layers: tuple[str, ...],
) -> Attribution:  # fmt: skip
    images = {n: (x.shape[-2], x.shape[-1]) for n, (x, _) in seen.inputs.items() if x.ndim == 4}
    terms = [*products.items(), *biases]
    main = _main(seen, products, images)
    groups: dict[frozenset[str], list[torch.Tensor]] = {main: []}
    for name, term in terms:
        groups.setdefault(seen.tokens.get(name, frozenset()) or main, []).append(term)
    firsts = {seen.tokens[n]: p.shape for n, p in reversed(products.items())}
    found: dict[frozenset[str], list[maps.Placed]] = {}
    for source, group in groups.items():
        # of joined sequences (text before patches) no part is laid out as an image
        image = images.get(next(iter(source))) if len(source) == 1 else None
        shape = firsts.get(source)
        shape = max((t.shape for t in group), key=len) if shape is None else shape
        where = maps.layout(shape, seen.shapes if source == main else [], image)
        found[source] = [maps.place(t, where, image) for t in group]
    placed = {
        source: maps.add(shown)
        for source, ps in found.items()
        if (shown := [p.map for p in ps if p.map is not None])
    }
    if main not in placed:
        raise InputError(
            f"inputs of shape {tuple(firsts[main])} have no positions to attribute to; ask for"
            " layers=[…] whose inputs are (B, N, C) or (B, C, H, W)"
        )
    prefix = [p.prefix for p in found[main] if p.prefix is not None]
    rest = [p.rest for ps in found.values() for p in ps]
    rest += [
        p.prefix.sum(1)
        for source, ps in found.items()
        for p in ps
        if source != main and p.prefix is not None
    ]
    total = torch.stack([maps.summed(t) for _, t in terms]).sum(0)
    return Attribution(
        values=placed[main],
        prefix=torch.stack(prefix).sum(0) if prefix else None,
        unplaced=torch.stack(rest).sum(0),
        others={" and ".join(sorted(s)): m for s, m in placed.items() if s != main},
        output=seen.output,
        total=total,
        expected=expected,
        completeness_error=(total - expected).abs(),
        method=method,
        layers=layers,
    )


def _main(
    seen: Internals, products: Mapping[str, torch.Tensor], images: Mapping[str, Any]
) -> frozenset[str]:
    """The input whose positions the map is over: an image, or that of the first term."""
    tokens = [seen.tokens[n] for n in products]
    return next((t for t in tokens if t & set(images)), tokens[0])
