"""Attribution methods. They take any captured module and never ask whether it was balanced."""

from __future__ import annotations

import dataclasses
import itertools
import math
import platform
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from libragrad_fx.attribution import formulas, maps
from libragrad_fx.attribution.assemble import assemble, expected, images, layouts_of, shares_of
from libragrad_fx.attribution.formulas import Layer, Method, Taps, Term
from libragrad_fx.attribution.internals import Internals, Known, Run, run
from libragrad_fx.attribution.outside import asks_outside, run_outside
from libragrad_fx.attribution.result import Attribution
from libragrad_fx.attribution.shares import BY, By, parts, stages
from libragrad_fx.attribution.storage import MAPPINGS
from libragrad_fx.attribution.towers import avoidable, entered, take_whole, towers
from libragrad_fx.errors import BranchWarning, InputError
from libragrad_fx.module.captured import CapturedModule, InGraphs, one_graph
from libragrad_fx.module.variants import fitting
from libragrad_fx.module.walk import calls, path_of
from libragrad_fx.target import Target, select_each
from libragrad_fx.version import __version__

Resolution = Literal["tokens", "pixels"]
Layers = Sequence[str] | Literal["stages"] | None
Starts = Mapping[str, torch.Tensor]
Meant = Callable[[Any], Sequence[Target]]
"""Says targets when it gets the output."""
Stacked = Callable[["Question", Run, Sequence[Starts], Sequence[Target]], "At"]
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
    bare: whether the layers' values and gradients alone are asked for: no constants, no attention
    known: of a traced run, what an earlier one showed
    drawn: likewise, the noise that was drawn
    stacked: likewise, the question at several places at once, see ``_runs``
    """

    module: InGraphs
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
    bare: bool = False
    known: Known | None = None
    drawn: Sequence[Starts] = ()
    stacked: Stacked | None = None

    def run(self, given: Starts | None = None, like: Run | None = None) -> Run:
        """A forward; on the values of ``given``, where things lie as in the run ``like``."""
        how, located = self.how, None if like is None else like.located
        if not isinstance(self.module, CapturedModule):
            return run_outside(self.module, self.inputs, given)
        if self.bare:
            known = self.known and dataclasses.replace(self.known, rows=())
            return run(
                self.module, self.inputs, self.paths, None, given=given, starts=self.rest, located=located,
                known=known,
            )  # fmt: skip
        return run(
            self.module, self.inputs, self.paths, how.biases, how.attention or self.by == "head", given,
            self.rest, located, self.by == "block", self.known,
        )  # fmt: skip

    def of_layers(self, paths: Sequence[str], rest: bool) -> Question:
        """The values and gradients of these layers, and no more."""
        return dataclasses.replace(self, paths=tuple(paths), rest=rest, bare=True)


@dataclasses.dataclass(frozen=True)
class At:
    """What backwards show at ``count`` places: by target, the samples of each place behind those before.

    asked: the question that was run
    """

    asked: Question
    count: int
    run: Run
    seen: Sequence[Internals]


def explain(
    module: InGraphs,
    inputs: Any,
    targets: Meant,
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
    asked = questions(
        module, inputs, targets, method=method, layers=layers, resolution=resolution, by=by,
        baseline=baseline, steps=steps, seed=seed,
    )  # fmt: skip
    by_target: dict[int, Attribution] = {}
    for question, meant, at in asked:
        seen = question.run()
        found = answers(question, seen, meant(seen.output))
        by_target |= zip(range(len(found)) if at is None else at, found, strict=True)
    return [by_target[i] for i in range(len(by_target))]


def questions(
    module: InGraphs, inputs: Any, targets: Meant, *, method: str, layers: Layers = None,
    resolution: Resolution = "tokens", by: By | None = None, baseline: float = 0.0, steps: int = 50,
    seed: int = 0,
) -> list[tuple[Question, Meant, Sequence[int] | None]]:  # fmt: skip
    """What ``explain`` asks: a question, its targets, and which of all they are; None for all of them.
    There are several where targets depend on several towers with blocks."""
    how = formulas.method_of(method)
    each = isinstance(layers, str) and layers == "stages"
    if not each and (isinstance(layers, str) or not isinstance(layers, (Sequence, type(None)))):
        raise InputError(f"layers is a list of module paths, or 'stages'; got {layers!r}")
    if by not in (None, *BY):
        raise InputError(f"by is one of {', '.join(BY)}, got {by!r}")
    if resolution not in ("tokens", "pixels"):
        raise InputError(f"resolution is 'tokens' or 'pixels', got {resolution!r}")
    module = fitting(module, inputs)

    def at(paths: Sequence[str]) -> Question:
        rest = layers is None and how.layers in ("input", "first")
        asked = Question(module, inputs, method, how, tuple(paths), rest, baseline, steps, seed, each, by)
        _require(asked)
        return asked

    if not isinstance(module, CapturedModule):
        _require_outside(module, method, how, layers, by)
        return [(at([]), targets, None)]
    if layers is not None:
        return [(at(stages(module) if each else layers), targets, None)]
    found = towers(module)
    if resolution == "tokens":
        found = _whole(module, found, how, by)
    if len(found) < 2 and not avoidable(module, found[0]):
        return [(at(_layers(found, how, resolution)), targets, None)]
    meant, read = _read(module, inputs, found, targets)
    asked = []
    for mine in dict.fromkeys(read):
        mean = [i for i, which in enumerate(read) if which == mine]
        question = at(_layers(mine, how, resolution))
        asked.append((question, lambda _, mean=mean: [meant[i] for i in mean], mean))
    return asked


def _whole(
    module: CapturedModule, found: Sequence[Sequence[str]], how: Method, by: By | None
) -> list[list[str]]:
    """The blocks; in place of branches, modules that the whole stream enters. Branches are repeated modules
    that a path leads past, as where a model loops over lists of norms, attentions and MLPs: their maps do
    not count what flows there. A method that looks for attention inside keeps them, with a warning.

    Raises:
        InputError: ``by="block"``, and a path leads past each of the modules that were taken for blocks.
    """
    kept = [[*names] for names in found]
    for i, names in enumerate(kept):
        if not names or next(take_whole(module, reversed(names)), None) is not None:
            continue
        if by == "block":
            raise InputError(
                f"by='block' needs blocks, and a path leads past each of {names[0]}, …, {names[-1]}: name"
                " modules that return all that flows with layers=[…], or use by='module'"
            )
        others = entered(module) if len(kept) == 1 and not how.attention else []
        if others:
            kept[i] = others
            continue
        warnings.warn(
            f"a path leads past each of the modules that were taken for the model's blocks ({names[0]}, …,"
            f" {names[-1]}), and no map of theirs counts what flows there. Compare fullgrad_plus, or name"
            " modules that are given all with layers=[…]",
            BranchWarning,
            stacklevel=6,  # who called ``attribute``
        )
    return kept


def _read(
    module: CapturedModule, inputs: Any, found: Sequence[Sequence[str]],
    targets: Meant,
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


def _require_outside(module: InGraphs, method: str, how: Method, layers: Layers, by: By | None) -> None:
    """Raise ``InputError`` if what is asked for is inside a model that is not one graph."""
    if asks_outside(how) and layers is None and by is None:
        return
    wanted = "layers" if layers is not None else "by" if by is not None else method
    able = ", ".join(name for name, m in formulas.METHODS.items() if asks_outside(m))
    raise InputError(
        f"{wanted} needs one captured graph, and {type(module).__name__} is none: this model had to be cut"
        f" into several, or to be recorded at each call. What looks at its inputs alone: {able}"
    )


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


def answers(asked: Question, seen: Run, targets: Sequence[Target]) -> list[Attribution]:
    """The method's answer for each target, from a run of ``asked``."""
    return _BY_PATH[asked.how.path](asked, seen, targets)


def _at_once(asked: Question, seen: Run, targets: Sequence[Target]) -> list[Attribution]:
    return [answer(asked, one) for one in seen.backs(targets)]


def _runs(asked: Question, first: Run, places: Sequence[Starts], targets: Sequence[Target]) -> Iterator[At]:
    """What the targets show at each place: one after another. A traced run has them all at once."""
    if asked.stacked is not None:
        yield asked.stacked(asked, first, places, targets)
        return
    for given in places:
        run = asked.run(given, first)
        yield At(asked, 1, run, [*run.backs(targets)])


def parted(x: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """The samples of each of so many places."""
    return x.unflatten(0, (count, x.shape[0] // count)).unbind(0)


def _among_noise(asked: Question, seen: Run, targets: Sequence[Target]) -> list[Attribution]:
    """SmoothGrad: gradients averaged over inputs with noise."""
    starts, axes = _starts(asked, seen), samples_of(seen)
    near = [
        {k: x + _noise(x, drawn[k], axes.get(k, 0)) for k, x in starts.items()}
        for drawn in asked.drawn or noise(asked, seen)
    ]
    means = _mean_gradients(asked, seen, targets, near, [1 / asked.steps] * asked.steps)
    return [
        answer(asked, _with_gradients(one, mean, lambda x: x))
        for one, mean in zip(seen.backs(targets), means, strict=True)
    ]


def _on_a_line(asked: Question, seen: Run, targets: Sequence[Target]) -> list[Attribution]:
    """Integrated gradients: averaged on the line from the baseline (Gauss-Legendre), times its length."""
    base = asked.baseline
    starts = _starts(asked, seen)
    nodes, weights = np.polynomial.legendre.leggauss(asked.steps)
    line = [{k: base + (1 + a) / 2 * (x - base) for k, x in starts.items()} for a in nodes.tolist()]
    means = _mean_gradients(asked, seen, targets, line, [w / 2 for w in weights.tolist()])
    origin = asked.run({k: torch.full_like(x, base) for k, x in starts.items()}, seen)
    answers = []
    for one, mean, t in zip(seen.backs(targets), means, targets, strict=True):
        difference = one.output.double() - select_each(origin.output, t).detach().double()
        answers.append(answer(asked, _with_gradients(one, mean, lambda x: x - base), difference))
    return answers


def _whole_on_a_line(asked: Question, seen: Run, targets: Sequence[Target]) -> list[Attribution]:
    """``path_averaged``: the whole method at k/n of the way to the first block's input, k = 1..n."""
    module = one_graph(asked.module)
    apart = towers(module)
    place = next((t for t in apart if set(t) & set(asked.paths)), max(apart, key=len))[:1]
    entered, base = asked.of_layers(place, True), asked.baseline
    starts = _starts(entered, entered.run(like=seen))
    line = [
        {name: base + k / asked.steps * (x - base) for name, x in starts.items()}
        for k in range(1, asked.steps + 1)
    ]
    found: list[list[Attribution]] = [[] for _ in targets]
    for at in _runs(asked, seen, line, targets):
        for mine, one in zip(found, at.seen, strict=True):
            mine.append(answer(at.asked, one))
    return [_mean(answers, asked.steps) for answers in found]


def _block_by_block(asked: Question, seen: Run, targets: Sequence[Target]) -> list[Attribution]:
    """LeGrad: each block's attention by the target of its own output, as if it were the last block's."""
    ends = {path: seen.values[n] for path, n in zip(asked.paths, seen.ends, strict=True)}
    axes = [(seen.samples[n], *seen.values[n].shape) for n in seen.ends]
    if any(other != axes[0] for other in axes):
        raise InputError(_several(asked.method, asked.paths))
    module, last, samples = one_graph(asked.module), seen.ends[-1].name, seen.samples[seen.ends[-1]]
    tails: list[list[torch.Tensor]] = [[] for _ in targets]
    places = [{last: t.detach()} for t in ends.values()]
    for at in _runs(asked.of_layers([], True), seen, places, targets):
        for mine, tail in zip(tails, at.seen, strict=True):
            mine += parted(tail.inputs[last][1], at.count)
    found = []
    for target, gradients in zip(targets, tails, strict=True):
        one = seen.back(target, last=False)
        attention = dict(enumerate(one.attention))
        for (path, end), g in zip(ends.items(), gradients, strict=True):
            inside = _inside(module, one, path)
            if inside is not None:
                attention[inside] = seen.attended(inside, end, g.movedim(0, samples))
        found.append(answer(asked, dataclasses.replace(one, attention=tuple(attention.values()))))
    return found


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


def samples_of(seen: Run) -> dict[str, int]:
    """Which axis counts samples, by the names of what a run can start from; of others the first."""
    return {n if isinstance(n, str) else n.name: axis for n, axis in seen.samples.items()}


def noise(asked: Question, seen: Run) -> list[Starts]:
    """Numbers from a normal distribution, for each step and each value; the same for each sample."""
    draw, axes = torch.Generator().manual_seed(asked.seed), samples_of(seen)

    def drawn(name: str, x: torch.Tensor) -> torch.Tensor:
        shape = x.movedim(axes.get(name, 0), 0).shape[1:]
        return torch.randn(shape, generator=draw, dtype=x.dtype, device=draw.device).to(x.device)

    starts = _starts(asked, seen)
    return [{name: drawn(name, x) for name, x in starts.items()} for _ in range(asked.steps)]


def _noise(x: torch.Tensor, drawn: torch.Tensor, samples: int) -> torch.Tensor:
    """Noise of standard deviation 0.15 of the range of a sample's values, as in the paper."""
    x = x.movedim(samples, 0)
    inner = tuple(range(1, x.ndim))
    size = 0.15 * (x.amax(inner, keepdim=True) - x.amin(inner, keepdim=True))
    return (drawn * size).movedim(0, samples)


def _mean_gradients(
    asked: Question, first: Run, targets: Sequence[Target], places: Sequence[Starts],
    weights: Sequence[float],
) -> list[dict[str, torch.Tensor]]:  # fmt: skip
    """For each target the gradients at ``places``, with their weights, by the names in ``Internals``."""
    means: list[dict[str, torch.Tensor]] = [{} for _ in targets]
    left = iter(weights)
    for at in _runs(asked.of_layers(asked.paths, asked.rest), first, places, targets):
        mine = [*itertools.islice(left, at.count)]
        for mean, one in zip(means, at.seen, strict=True):
            for name, (_, g) in _tapped(at.asked, one).items():
                for weight, part in zip(mine, parted(g, at.count), strict=True):
                    mean[name] = mean.get(name, 0) + weight * part
    return means


def _with_gradients(
    seen: Internals, gradients: Mapping[str, torch.Tensor], value: Callable[[torch.Tensor], torch.Tensor]
) -> Internals:
    """Other gradients, and other values, of the layer and inputs that have one."""

    def other(pairs: Mapping[str, Any]) -> dict[str, Any]:
        return {k: (value(x), gradients[k]) if k in gradients else (x, g) for k, (x, g) in pairs.items()}

    return dataclasses.replace(seen, layers=other(seen.layers), inputs=other(seen.inputs))


def _mean(answers: Sequence[Attribution], places: int) -> Attribution:
    """The mean of all that is a tensor, over so many places, of which each answer has as many; of a mean of
    maps no sum is promised."""
    first, count = answers[0], places // len(answers)

    def mean(values: Iterable[torch.Tensor]) -> Any:
        return sum(part for x in values for part in parted(x, count)) / places

    fields = {f.name: [getattr(a, f.name) for a in answers] for f in dataclasses.fields(first)}
    means = {k: mean(v) for k, v in fields.items() if isinstance(v[0], torch.Tensor)}
    for name in MAPPINGS:
        means[name] = {k: mean(getattr(a, name)[k] for a in answers) for k in getattr(first, name)}
    return dataclasses.replace(first, **means)


# --- from what was seen to an answer


def answer(asked: Question, seen: Internals, whole: torch.Tensor | None = None) -> Attribution:
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


def scale(asked: Question, seen: Internals) -> float:
    """The largest share of a channel: what rounding is to be compared with, where channels cancel."""
    terms = (t for _, t in asked.how.terms(_taps(asked, seen)))
    return max((float(t.abs().max()) for t in terms if t.numel()), default=0.0)


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
        noise = _uniform(layers[0], asked.seed) if how.terms is formulas.random else None
        return Taps(layers, noise=noise)
    at = [_inside(one_graph(asked.module), seen, layer.name) for layer in layers]
    missing = [x.name for x, i in zip(layers, at, strict=True) if i is None or not _over_tokens(seen, i, x)]
    if missing:
        raise InputError(
            f"{method} needs attention over the tokens of each block's input, and {missing[0]} has none (no"
            " attention, or one within windows): use fullgrad_plus or xgradcam_plus"
        )
    _require_one_sequence(method, seen, layers)
    if seen.apart:
        raise InputError(_several(method, [layer.name for layer in layers]))
    found = [i for i in at if i is not None]
    ends = [y for y, _ in seen.returned]
    streams = _streams(method, layers, [seen.streams[i] for i in found], ends) if how.streams else []
    taps = Taps(layers, [seen.attention[i] for i in found], streams, ends)
    if not how.row:
        return taps
    return dataclasses.replace(taps, rows=_rows(method, seen, asked.known))


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
    count = sum(path_of(c) == path for c in calls(module))
    place = (int(call or 1) - 1) * len(inside) // max(count, 1)
    return inside[place] if inside else None


def _uniform(layer: Layer, seed: int) -> torch.Tensor:
    kept = [n if i in layer.places else 1 for i, n in enumerate(layer.value.shape)]
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.rand(kept, generator=draw, dtype=torch.float64, device=draw.device)
    return drawn.to(layer.value.device)


def _over_tokens(seen: Internals, index: int, layer: Layer) -> bool:
    batch, _, *tokens = seen.attention[index].weights.shape
    return layer.value.ndim == 3 and tokens == [layer.value.shape[1]] * 2 and batch == layer.value.shape[0]


def _reached(seen: Internals) -> torch.Tensor | None:
    """Which tokens (B, T) of the last block's output get a gradient; what is not read gets exact zeros.
    None if its tokens are not those of the block's input."""
    ends = zip([*seen.layers.values()][-1:], seen.returned[-1:], strict=False)
    return next(((g != 0).flatten(2).any(2) for (h, _), (_, g) in ends if g.shape[:2] == h.shape[:2]), None)


def one_of_several(seen: Internals) -> int | None:
    """Where more than one token of the last block's output gets a gradient, the one that attention is
    followed to: the one that the model reads alone behind it, or an image's class token, if it gets one."""
    read = _reached(seen)
    if read is None or not bool((read.sum(1) > 1).any()):
        return None
    name, (first, _) = next(iter(seen.layers.items()))
    image, own = _image(seen, name), [seen.read]
    if image is not None:
        known = layouts_of(seen, seen.tokens[name])
        known.append(maps.guessed("", first.shape, seen.shapes, image))
        own += [x.apart[0] for x in known if x.apart][:1]
    return next((t for t in own if t is not None and bool(read[:, t].all())), None)


def _rows(method: str, seen: Internals, known: Known | None) -> torch.Tensor:
    """The token that attention is followed to, of each sample: the only one of the last block's output that
    gets a gradient, wherever an index was computed from. Where several do, see ``one_of_several``."""
    read, token = _reached(seen), known.token if known else one_of_several(seen)
    if token is not None:
        return torch.full(seen.output.shape, token, device=seen.output.device)
    if read is not None and (known or bool((read.sum(1) == 1).all())):
        return read.int().argmax(1)
    raise InputError(
        f"{method} follows attention to the token that the output is read from, and no token is read alone:"
        " use attcat, or give a target (token, class)"
    )
