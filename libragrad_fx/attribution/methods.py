"""Attribution methods. They take any captured module and never ask whether it was balanced."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from libragrad_fx.attribution import maps
from libragrad_fx.attribution.formulas import METHODS, Layer, Method, Taps, Term
from libragrad_fx.attribution.internals import Internals, observe, run_from
from libragrad_fx.errors import InputError
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.module.variants import fitting
from libragrad_fx.module.walk import blocks
from libragrad_fx.target import Target, product


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
                  the output less what does not pass it (biases, other inputs), and all biases once; of
                  integrated gradients the difference to the output at the baseline; nan for methods that
                  promise no sum
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
    baseline: float = 0.0,
    steps: int = 50,
    seed: int = 0,
) -> Attribution:
    """Explain ``target`` of a captured module on ``inputs``, one sample at a time in a batch.

    Args:
        module: the result of ``transform`` (balanced) or ``trace`` (autograd's own backward).
        inputs: a tensor, a tuple, or a dict of keyword arguments, batch first.
        target: as in Captum (int, tuple, tensor, list), or a callable from output to scalars.
        method: a name in ``attribution.METHODS``, which says what it needs and its source.
            ``"fullgrad_plus"`` (FullGrad+, LibraGrad's flagship): Σ_c h g over the inputs of all blocks,
            plus every additive bias of the graph times its gradient, once.
        layers: module paths whose inputs to use in place of the method's own choice among the repeated
            blocks of the network (``blocks``).
        baseline: of ``integrated_gradients``: where the line to the input starts, a number for each entry
            of the inputs or embeddings.
        steps: how many inputs ``integrated_gradients`` (Gauss-Legendre nodes) and ``smoothgrad`` average
            over.
        seed: of ``smoothgrad``'s noise, of standard deviation 0.15 of the input's range, and of ``random``.

    Raises:
        InputError: unknown method or layer, a target that does not fit, or a model that has not what the
            method needs.
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
    module, how = fitting(module, inputs), METHODS[method]
    paths = _layers(module, how.layers) if layers is None else list(layers)
    _require(module, method, how, paths)
    seen, line = _observed(module, inputs, target, how, paths, baseline, steps, seed)
    batch = seen.output.shape[0]
    tapped = seen.layers or seen.inputs
    if any(h.shape[0] != batch for h, _ in tapped.values()):
        raise InputError(f"the target callable gave {batch} numbers; attribute wants one for each sample")
    terms = how.terms(_taps(method, how, seen, target, seed))
    biases = [(site.node, maps.by_sample(product(b, g), axis, batch)) for site, axis, b, g in seen.biases]
    if how.sums:
        expected = _expected(seen, [*tapped], biases, how.biases)
    elif line is not None:
        expected = line
    else:
        expected = torch.full_like(seen.output, math.nan, dtype=torch.float64)
    return _assemble(seen, terms, biases, expected, method, tuple(paths))


def _layers(module: CapturedModule, which: str) -> list[str]:
    """The block inputs that a method takes where nobody says; none of a network without blocks."""
    found = [] if which == "input" else blocks(module)
    chosen = {"first": found[:1], "last": found[-1:], "half": found[len(found) // 2 :]}
    return chosen.get(which, found)


def _require(module: CapturedModule, method: str, how: Method, paths: Sequence[str]) -> None:
    """Raise ``InputError`` if the graph has not what a method needs."""
    if how.path and paths:
        raise InputError(f"{method} goes over inputs, and takes no layers")
    if how.layers == "input" and len(paths) > 1:
        raise InputError(f"{method} takes one layer; got {', '.join(paths)}")
    if how.attention and not paths:
        raise InputError(
            f"{method} goes from block to block, and no repeated blocks were found: name their paths with"
            " layers=[…], or use input_x_gradient"
        )


def _observed(
    module: CapturedModule, inputs: Any, target: Target, how: Method, paths: Sequence[str], baseline: float,
    steps: int, seed: int,
) -> tuple[Internals, torch.Tensor | None]:  # fmt: skip
    """What a method is computed from. On a path, the gradients are averages over it, and the values the way
    that it goes; and, of a line, by how much the output differs between its ends."""
    seen = observe(module, inputs, target, paths, how.biases, how.attention)
    if not how.path:
        return seen, None
    starts = {name: x for name, (x, _) in seen.inputs.items()}
    if how.path == "line":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        places = [({k: baseline + (1 + a) / 2 * (x - baseline) for k, x in starts.items()}, w / 2)
                  for a, w in zip(nodes.tolist(), weights.tolist(), strict=True)]  # fmt: skip
    else:
        draw = torch.Generator().manual_seed(seed)
        places = [({k: x + _noise(x, draw) for k, x in starts.items()}, 1 / steps) for _ in range(steps)]
    run = functools.partial(run_from, module, inputs, target)
    mean = {name: torch.zeros_like(g) for name, (_, g) in seen.inputs.items()}
    for given, weight in places:
        for name, g in run(given)[1].items():
            mean[name] += weight * g
    if how.path == "noise":
        return dataclasses.replace(seen, inputs={k: (x, mean[k]) for k, x in starts.items()}), None
    origin = {k: torch.full_like(x, baseline) for k, x in starts.items()}
    way = {k: (x - baseline, mean[k]) for k, x in starts.items()}
    difference = seen.output.double() - run(origin)[0].double()
    return dataclasses.replace(seen, inputs=way), difference


def _noise(x: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """The same for each sample, of standard deviation 0.15 of the range of its values, as in the paper."""
    inner = tuple(range(1, x.ndim))
    size = 0.15 * (x.amax(inner, keepdim=True) - x.amin(inner, keepdim=True))
    return torch.randn(x.shape[1:], generator=draw, dtype=x.dtype, device=draw.device).to(x.device) * size


def _taps(method: str, how: Method, seen: Internals, target: Target, seed: int) -> Taps:
    """What one backward showed, block by block."""
    image = next(iter(_images(seen).values()), None)
    layers = [
        Layer(name, h, g, maps.positions(h.shape, image))
        for name, (h, g) in (seen.layers or seen.inputs).items()
    ]
    if not how.attention:
        return Taps(layers, seed=seed)
    at = [_inside(seen, layer.name) for layer in layers]
    missing = [x.name for x, i in zip(layers, at, strict=True) if i is None or not _over_tokens(seen, i, x)]
    if missing:
        raise InputError(
            f"{method} needs attention over the tokens of each block's input, and {missing[0]} has none (no"
            " attention, or one within windows): use fullgrad_plus or xgradcam_plus"
        )
    if len({layer.value.shape[1] for layer in layers}) > 1:
        raise InputError(
            f"{method} follows one sequence of tokens from block to block, and these blocks have several:"
            f" name those of one with layers=[…] ({layers[0].name}, …, {layers[-1].name})"
        )
    found = [i for i in at if i is not None]
    streams = [s for i in found if (s := seen.streams[i]) is not None]
    taps = Taps(layers, [seen.attention[i] for i in found], streams, seen.ends)
    return dataclasses.replace(taps, row=_row(method, taps, seen, image, target)) if how.row else taps


def _inside(seen: Internals, path: str) -> int | None:
    """Which attention is the first of a block."""
    return next((i for i, a in enumerate(seen.attention) if f"{a.module}.".startswith(f"{path}.")), None)


def _over_tokens(seen: Internals, index: int, layer: Layer) -> bool:
    batch, _, *tokens = seen.attention[index].weights.shape
    return layer.value.ndim == 3 and tokens == [layer.value.shape[1]] * 2 and batch == len(layer.value)


def _row(method: str, taps: Taps, seen: Internals, image: Any, target: Target) -> int:
    """The token that attention is followed to: the one that the model reads alone; else an image's class
    token; else the one that the target names."""
    if seen.read is not None:
        return seen.read
    if image is not None and maps.layout(taps.layers[0].value.shape, seen.shapes, image).prefix:
        return 0
    if isinstance(target, tuple) and len(target) > 1:
        return int(target[0])
    raise InputError(
        f"{method} follows attention to the token that the output is read from, and no token is read alone:"
        " use attcat, or give a target (token, class)"
    )


def _expected(seen: Internals, names: Sequence[str], biases: Sequence[Term], plus: bool) -> torch.Tensor:
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
    for path in names:
        before = seen.before[path]
        whole = whole + output - sum(s for name, s in [*sources, *sums] if name not in before)
    return whole


def _assemble(
    seen: Internals, shares: Sequence[Term], biases: Sequence[Term],
    expected: torch.Tensor, method: str, layers: tuple[str, ...],
) -> Attribution:  # fmt: skip
    images = _images(seen)
    terms = [*shares, *biases]
    main = _main(seen, [name for name, _ in shares], images)
    groups: dict[frozenset[str], list[torch.Tensor]] = {main: []}
    for name, term in terms:
        groups.setdefault(seen.tokens.get(name, frozenset()) or main, []).append(term)
    firsts = {seen.tokens[n]: p.shape for n, p in reversed(shares)}
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


def _main(seen: Internals, names: Sequence[str], images: Mapping[str, Any]) -> frozenset[str]:
    """The input whose positions the map is over: an image, or that of the first term."""
    tokens = [seen.tokens[n] for n in names]
    return next((t for t in tokens if t & set(images)), tokens[0])


def _images(seen: Internals) -> dict[str, tuple[int, int]]:
    """Height and width of the inputs that are images."""
    return {n: (x.shape[-2], x.shape[-1]) for n, (x, _) in seen.inputs.items() if x.ndim == 4}
