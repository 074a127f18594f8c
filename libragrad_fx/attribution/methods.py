"""Attribution methods. They take any captured module and never ask whether it was balanced."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from libragrad_fx.attribution import formulas, maps
from libragrad_fx.attribution.assemble import assemble, expected, images, layouts_of, shares_of
from libragrad_fx.attribution.formulas import Layer, Method, Taps, Term
from libragrad_fx.attribution.internals import Internals, Run, run
from libragrad_fx.attribution.result import Attribution
from libragrad_fx.attribution.shares import BY, By, parts, stages
from libragrad_fx.attribution.storage import MAPPINGS
from libragrad_fx.attribution.towers import towers
from libragrad_fx.errors import InputError
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.module.variants import fitting
from libragrad_fx.module.walk import avoidable, called_modules, path_of
from libragrad_fx.target import Target, select_each
from libragrad_fx.version import __version__

Resolution = Literal["tokens", "pixels"]
Layers = Sequence[str] | Literal["stages"] | None
Starts = Mapping[str, torch.Tensor]
VERSIONS = {
    "python": platform.python_version(),
    "torch": torch.__version__.partition("+")[0],
    "libragrad-fx": __version__,
}


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked of a captured module: see ``explain``.

    rest: whether inputs that do not pass the one layer (another tower's) count where they enter
    stages: whether each layer has a map of its own
    by:   whose parts are asked for
    """

    module: CapturedModule
    inputs: Any
    method: str
    how: Method
    paths: tuple[str, ...]
    rest: bool
    baseline: float
    steps: int
    seed: int
    stages: bool = False
    by: By | None = None

    def run(self, given: Starts | None = None, like: Run | None = None) -> Run:
        """A forward; on the values of ``given``, where things lie as in the run ``like``."""
        how, located = self.how, None if like is None else like.located
        return run(
            self.module, self.inputs, self.paths, how.biases, how.attention or self.by == "head", given,
            self.rest, located, self.by == "block",
        )  # fmt: skip


def explain(
    module: CapturedModule,
    inputs: Any,
    targets: Callable[[Any], Sequence[Target]],
    *,
    method: str = "fullgrad_plus",
    layers: Layers = None,
    resolution: Resolution = "tokens",
    by: By | None = None,
    baseline: float = 0.0,
    steps: int = 50,
    seed: int = 0,
) -> list[Attribution]:
    """Explain several targets on the same inputs, by one forward and a backward for each.

    Args and errors as of ``libragrad_fx.attribute``, but that ``targets`` gets the output and says them.
    """
    how = formulas.method_of(method)
    each = isinstance(layers, str) and layers == "stages"
    if not each and (isinstance(layers, str) or not isinstance(layers, (Sequence, type(None)))):
        raise InputError(f"layers is a list of module paths, or 'stages'; got {layers!r}")
    if by not in (None, *BY):
        raise InputError(f"by is one of {', '.join(BY)}, got {by!r}")
    if resolution not in ("tokens", "pixels"):
        raise InputError(f"resolution is 'tokens' or 'pixels', got {resolution!r}")
    module = fitting(module, inputs)

    def answers(paths: Sequence[str], meant: Callable[[Any], Sequence[Target]]) -> list[Attribution]:
        rest = layers is None and how.layers in ("input", "first")
        asked = Question(module, inputs, method, how, tuple(paths), rest, baseline, steps, seed, each, by)
        _require(asked)
        seen = asked.run()
        return _BY_PATH[how.path](asked, seen, meant(seen.output))

    if layers is not None:
        return answers(stages(module) if each else layers, targets)
    found = towers(module)
    if len(found) < 2 and not avoidable(module, found[0]):
        return answers(_layers(found, how, resolution), targets)
    meant, read = _read(module, inputs, found, targets)
    by_target: dict[int, Attribution] = {}
    for mine in dict.fromkeys(read):
        at = [i for i, which in enumerate(read) if which == mine]
        paths = _layers(mine, how, resolution)
        by_target |= zip(at, answers(paths, lambda _, at=at: [meant[i] for i in at]), strict=True)
    return [by_target[i] for i in range(len(meant))]


def _read(
    module: CapturedModule, inputs: Any, found: Sequence[Sequence[str]],
    targets: Callable[[Any], Sequence[Target]],
) -> tuple[Sequence[Target], list[tuple[tuple[str, ...], ...]]]:  # fmt: skip
    """The targets, and of each the blocks that it depends on, by tower: of CLIP's picture against a fixed
    text, the picture's alone; of what an encoder gives, none of a decoder's."""
    seen = run(module, inputs, [path for paths in found for path in paths], biases=False, returned=True)
    meant = targets(seen.output)
    kept = ([tuple(p for p in ps if p in one.reached) for ps in found] for one in seen.backs(meant))
    return meant, [tuple(paths for paths in towers_ if paths) for towers_ in kept]


def _layers(found: Sequence[Sequence[str]], how: Method, resolution: Resolution) -> list[str]:
    """The block inputs that a method takes where nobody says, of towers; none of a network without blocks.
    A method that looks at one place takes the tower with the most blocks."""
    if resolution == "pixels":
        if how.layers not in ("input", "first"):
            raise InputError(
                "resolution='pixels' is for methods that look at one place: not for sums over blocks"
            )
        return []
    if how.layers in ("input", "first"):
        return [*max(found, key=len, default=[])][:1]
    start = {"last": lambda n: n - 1, "half": lambda n: n // 2}.get(how.layers, lambda n: 0)
    return [path for paths in found if paths for path in paths[start(len(paths)) :]]


def _require(asked: Question) -> None:
    """Raise ``InputError`` if the graph has not what a method needs."""
    one = asked.how.layers == "input" and (asked.how.path or not asked.stages)
    if one and len(asked.paths) > 1:
        raise InputError(f"{asked.method} takes one layer; got {', '.join(asked.paths)}")
    if asked.how.attention and not asked.paths:
        raise InputError(
            f"{asked.method} goes from block to block, and no repeated blocks were found: name their paths"
            " with layers=[…], or use input_x_gradient"
        )


# --- where gradients are taken: at the inputs, or on a path to them


def _at_once(asked: Question, seen: Run, targets: Sequence[Target]) -> list[Attribution]:
    return [_answer(asked, one) for one in seen.backs(targets)]


def _among_noise(asked: Question, seen: Run, targets: Sequence[Target]) -> list[Attribution]:
    """SmoothGrad: gradients averaged over inputs with noise."""
    draw = torch.Generator().manual_seed(asked.seed)
    starts = _starts(asked, seen)
    axes = {n.name: seen.samples[n] for n in seen.layers.values()} | dict(seen.samples)
    near = [
        ({k: x + _noise(x, draw, axes.get(k, 0)) for k, x in starts.items()}, 1 / asked.steps)
        for _ in range(asked.steps)
    ]
    means = _mean_gradients(asked, seen, targets, near)
    return [
        _answer(asked, _with_gradients(one, mean, lambda x: x))
        for one, mean in zip(seen.backs(targets), means, strict=True)
    ]


def _on_a_line(asked: Question, seen: Run, targets: Sequence[Target]) -> list[Attribution]:
    """Integrated gradients: averaged on the line from the baseline (Gauss-Legendre), times its length."""
    base = asked.baseline
    starts = _starts(asked, seen)
    nodes, weights = np.polynomial.legendre.leggauss(asked.steps)
    line = [({k: base + (1 + a) / 2 * (x - base) for k, x in starts.items()}, w / 2)
            for a, w in zip(nodes.tolist(), weights.tolist(), strict=True)]  # fmt: skip
    means = _mean_gradients(asked, seen, targets, line)
    origin = asked.run({k: torch.full_like(x, base) for k, x in starts.items()}, seen)
    answers = []
    for one, mean, t in zip(seen.backs(targets), means, targets, strict=True):
        difference = one.output.double() - select_each(origin.output, t).detach().double()
        answers.append(_answer(asked, _with_gradients(one, mean, lambda x: x - base), difference))
    return answers


def _whole_on_a_line(asked: Question, seen: Run, targets: Sequence[Target]) -> list[Attribution]:
    """``path_averaged``: the whole method at k/n of the way to the first block's input, k = 1..n."""
    apart = towers(asked.module)
    place = next((t for t in apart if set(t) & set(asked.paths)), max(apart, key=len))[:1]
    first = run(asked.module, asked.inputs, place, False, located=seen.located)
    starts = _starts(dataclasses.replace(asked, rest=True), first)
    base, found = asked.baseline, list[list[Attribution]]()
    for k in range(1, asked.steps + 1):
        given = {name: base + k / asked.steps * (x - base) for name, x in starts.items()}
        found.append(_at_once(asked, asked.run(given, seen), targets))
    return [_mean(answers) for answers in zip(*found, strict=True)]


def _block_by_block(asked: Question, seen: Run, targets: Sequence[Target]) -> list[Attribution]:
    """LeGrad: each block's attention by the target of its own output, as if it were the last block's."""
    ends = {path: seen.values[n] for path, n in zip(asked.paths, seen.ends, strict=True)}
    if len({(seen.samples[n], seen.values[n].shape) for n in seen.ends}) > 1:
        raise InputError(_several(asked.method, asked.paths))
    last, samples = seen.ends[-1].name, seen.samples[seen.ends[-1]]
    tails = [
        run(asked.module, asked.inputs, biases=False, given={last: t.detach()}, located=seen.located)
        for t in ends.values()
    ]
    answers = []
    for target in targets:
        one = seen.back(target, last=False)
        attention = dict(enumerate(one.attention))
        for (path, end), tail in zip(ends.items(), tails, strict=True):
            inside, (_, g) = _inside(asked.module, one, path), tail.back(target, last=False).inputs[last]
            if inside is not None:
                attention[inside] = seen.attended(inside, end, g.movedim(0, samples))
        answers.append(_answer(asked, dataclasses.replace(one, attention=tuple(attention.values()))))
    return answers


_ByPath = Callable[[Question, Run, Sequence[Target]], list[Attribution]]
_BY_PATH: Mapping[str, _ByPath] = {
    "": _at_once, "noise": _among_noise, "line": _on_a_line, "whole": _whole_on_a_line,
    "blocks": _block_by_block,
}  # fmt: skip


def _starts(asked: Question, seen: Run) -> Starts:
    """What a path leads to, by the names that ``run`` takes: the layer's input, or the model's."""
    layers = {seen.layers[p].name: seen.values[seen.layers[p]].detach() for p in seen.layers}
    entered = _entered(asked, seen.sources, seen.layout["before"])
    return layers | {name: x.detach() for name, x in entered.items()}


def _entered(
    asked: Question, inputs: Mapping[str, Any], before: Mapping[str, frozenset[str]]
) -> dict[str, Any]:
    """The inputs that count where they enter: all without a layer, else those that do not pass it."""
    if not before:
        return dict(inputs)
    passed = frozenset().union(*before.values())
    return {name: x for name, x in inputs.items() if asked.rest and name not in passed}


def _tapped(asked: Question, seen: Internals) -> dict[str, Any]:
    """What the method looks at, with its gradient: layers, and inputs that count where they enter."""
    return {**seen.layers, **_entered(asked, seen.inputs, seen.before)}


def _noise(x: torch.Tensor, draw: torch.Generator, samples: int) -> torch.Tensor:
    """The same for each sample, of standard deviation 0.15 of the range of its values, as in the paper."""
    x = x.movedim(samples, 0)
    inner = tuple(range(1, x.ndim))
    size = 0.15 * (x.amax(inner, keepdim=True) - x.amin(inner, keepdim=True))
    drawn = torch.randn(x.shape[1:], generator=draw, dtype=x.dtype, device=draw.device).to(x.device)
    return (drawn * size).movedim(0, samples)


def _mean_gradients(
    asked: Question, first: Run, targets: Sequence[Target], places: Sequence[tuple[Starts, float]]
) -> list[dict[str, torch.Tensor]]:
    """For each target the gradients at ``places``, with their weights, by the names in ``Internals``."""
    means: list[dict[str, torch.Tensor]] = [{} for _ in targets]
    for given, weight in places:
        seen = asked.run(given, first)
        for mean, one in zip(means, seen.backs(targets), strict=True):
            for name, (_, g) in _tapped(asked, one).items():
                mean[name] = mean.get(name, 0) + weight * g
    return means


def _with_gradients(
    seen: Internals, gradients: Mapping[str, torch.Tensor], value: Callable[[torch.Tensor], torch.Tensor]
) -> Internals:
    """Other gradients, and other values, of the layer and inputs that have one."""

    def other(pairs: Mapping[str, Any]) -> dict[str, Any]:
        return {k: (value(x), gradients[k]) if k in gradients else (x, g) for k, (x, g) in pairs.items()}

    return dataclasses.replace(seen, layers=other(seen.layers), inputs=other(seen.inputs))


def _mean(answers: Sequence[Attribution]) -> Attribution:
    """The mean of all that is a tensor; of a mean of maps no sum is promised."""
    first, n = answers[0], len(answers)
    fields = {f.name: [getattr(a, f.name) for a in answers] for f in dataclasses.fields(first)}
    means: dict[str, Any] = {k: sum(v) / n for k, v in fields.items() if isinstance(v[0], torch.Tensor)}
    for name in MAPPINGS:
        means[name] = {k: sum(getattr(a, name)[k] for a in answers) / n for k in getattr(first, name)}
    return dataclasses.replace(first, **means)


# --- from what was seen to an answer


def _answer(asked: Question, seen: Internals, whole: torch.Tensor | None = None) -> Attribution:
    """The method on what one backward showed. ``whole``: what it adds up to, of a method on a line."""
    how, batch = asked.how, seen.output.shape[0]
    tapped = _tapped(asked, seen)
    other = next((name for name, (h, _) in tapped.items() if h.shape[0] != batch), None)
    if other is not None:
        raise InputError(
            f"the target gave {batch} numbers, and {other} has {tapped[other][0].shape[0]} samples:"
            " attribute wants one for each (of layers=[…], none within windows)"
        )
    terms = how.terms(_taps(asked, seen))
    biases = shares_of(seen.biases, batch)
    if how.sums:
        whole = expected(seen, [*tapped], biases, how.biases)
    elif whole is None:
        whole = torch.full_like(seen.output, math.nan, dtype=torch.float64)
    plan = asked.module.plan
    made = {"policy": str(plan.policy), "digest": plan.digest} if plan is not None else {}
    found = assemble(
        seen, terms, biases, whole, method=asked.method, layers=asked.paths, versions=VERSIONS,
        parts={} if asked.by is None else parts(asked.by, seen, terms, biases), **made,
    )  # fmt: skip
    return dataclasses.replace(found, stages=_stages(seen, terms, biases)) if asked.stages else found


def _stages(seen: Internals, terms: Sequence[Term], biases: Sequence[Term]) -> dict[str, torch.Tensor]:
    """The map of each layer by itself: its own share, and the biases that are not before it."""
    found = {}
    for path in seen.layers:
        own = [t for t in terms if t[0] == path]
        behind = [(n, t) for n, t in biases if n not in seen.before[path]]
        if own:  # attcat has none of its first
            found[path] = assemble(seen, own, behind, seen.output, method="", layers=(path,)).values
    return found


def _taps(asked: Question, seen: Internals) -> Taps:
    """What one backward showed, block by block."""
    method, how = asked.method, asked.how
    layers = [
        Layer(name, h, g, _places(seen, name, h.shape, _image(seen, name)))
        for name, (h, g) in _tapped(asked, seen).items()
    ]
    if not how.attention:
        return Taps(layers, noise=_uniform(layers[0], asked.seed))
    at = [_inside(asked.module, seen, layer.name) for layer in layers]
    missing = [x.name for x, i in zip(layers, at, strict=True) if i is None or not _over_tokens(seen, i, x)]
    if missing:
        raise InputError(
            f"{method} needs attention over the tokens of each block's input, and {missing[0]} has none (no"
            " attention, or one within windows): use fullgrad_plus or xgradcam_plus"
        )
    _require_one_sequence(method, seen, layers)
    found = [i for i in at if i is not None]
    ends = [y for y, _ in seen.returned]
    streams = _streams(method, layers, [seen.streams[i] for i in found], ends) if how.streams else []
    taps = Taps(layers, [seen.attention[i] for i in found], streams, ends)
    if not how.row:
        return taps
    return dataclasses.replace(taps, rows=_rows(method, taps, seen, _image(seen, layers[0].name)))


def _image(seen: Internals, name: str) -> maps.Extents | None:
    """The size of the picture that a value may be laid out as; None of the positions of a text."""
    found, where = images(seen), seen.tokens.get(name, frozenset())
    return next((size for n, size in found.items() if n in where or not where), None)


def _streams(
    method: str, layers: Sequence[Layer], found: Sequence[torch.Tensor | None], ends: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The residual streams behind attention, if they have the size of the block's input, as its end has."""
    for layer, stream, end in zip(layers, found, ends, strict=True):
        if stream is None or not layer.value.shape == stream.shape == end.shape:
            raise InputError(
                f"{method} follows tokens along the residual stream of a block, and {layer.name} has none"
                " of the size of its input: use attcat or rollout"
            )
    return [s for s in found if s is not None]


def _require_one_sequence(method: str, seen: Internals, layers: Sequence[Layer]) -> None:
    """Raise ``InputError`` if the layers' tokens are not one sequence: other in number, or of inputs that
    have none in common (an encoder's and a decoder's, were they as many)."""
    if len({x.value.shape[1] for x in layers}) > 1 or _strangers([seen.tokens[x.name] for x in layers]):
        raise InputError(_several(method, [x.name for x in layers]))


def _strangers(tokens: Sequence[frozenset[str]]) -> bool:
    return any(tokens) and not frozenset.intersection(*tokens)


def _several(method: str, names: Sequence[str]) -> str:
    return (
        f"{method} follows one sequence of tokens from block to block, and these blocks have several: name"
        f" those of one with layers=[…] ({names[0]}, …, {names[-1]})"
    )


def _places(seen: Internals, name: str, shape: Sequence[int], image: Any) -> tuple[int, ...]:
    """The axes of a layer that are positions."""
    if name in seen.inputs and name in seen.axes:
        return seen.axes[name]
    axes = [x.axes for x in layouts_of(seen, seen.tokens[name]) if shape[x.axes[0]] == x.tokens]
    return axes[0] if axes and len(shape) == 3 else maps.positions(shape, image)


def _inside(module: CapturedModule, seen: Internals, name: str) -> int | None:
    """Which attention is the first in a call of a block."""
    path, _, call = name.partition("#")
    inside = [i for i, a in enumerate(seen.attention) if f"{a.module}.".startswith(f"{path}.")]
    count = sum(path_of(c) == path for c in called_modules(module))
    place = (int(call or 1) - 1) * len(inside) // max(count, 1)
    return inside[place] if inside else None


def _uniform(layer: Layer, seed: int) -> torch.Tensor:
    kept = [n if i in layer.places else 1 for i, n in enumerate(layer.value.shape)]
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.rand(kept, generator=draw, dtype=torch.float64, device=draw.device)
    return drawn.to(layer.value.device)


def _over_tokens(seen: Internals, index: int, layer: Layer) -> bool:
    batch, _, *tokens = seen.attention[index].weights.shape
    return layer.value.ndim == 3 and tokens == [layer.value.shape[1]] * 2 and batch == len(layer.value)


def _rows(method: str, taps: Taps, seen: Internals, image: Any) -> list[int]:
    """The token that attention is followed to, of each sample: the only one of the last block's end that
    has a gradient, as the output is read from it alone; an image's class token, if it is read among others.
    """
    read = (seen.returned[-1][1] != 0).flatten(2).any(2)
    first = taps.layers[0]
    if image is not None and bool((read.sum(1) > 1).any()):
        known = layouts_of(seen, seen.tokens[first.name])
        known.append(maps.guessed("", first.value.shape, seen.shapes, image))
        own = next((x.apart[0] for x in known if x.apart), None)
        if own is not None and bool(read[:, own].all()):
            return [own] * len(read)
    if bool((read.sum(1) == 1).all()):
        return read.long().argmax(1).tolist()
    raise InputError(
        f"{method} follows attention to the token that the output is read from, and no token is read alone:"
        " use attcat, or give a target (token, class)"
    )
