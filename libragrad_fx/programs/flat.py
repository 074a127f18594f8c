"""One flat graph of an explanation: the forward, the balanced backward and the method, as ATen ops.

A first run of the method, in the usual way, shows what does not depend on values: where tokens lie, where
the samples of each constant are. Then the same code runs on fake tensors, and PyTorch's tracer notes ops.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from libragrad_fx.attribution import Attribution, formulas
from libragrad_fx.attribution.internals import Internals, Known, Run
from libragrad_fx.attribution.methods import (
    At,
    Question,
    Starts,
    answers,
    noise,
    one_of_several,
    questions,
    scale,
)
from libragrad_fx.errors import InputError
from libragrad_fx.extras import quiet
from libragrad_fx.module.captured import CapturedModule, one_graph
from libragrad_fx.optimise.execute import reader
from libragrad_fx.programs.free import Fakes, shapes
from libragrad_fx.programs.settle import settled
from libragrad_fx.programs.stack import Axes, Stack, stacked
from libragrad_fx.programs.zeros import without_zeros
from libragrad_fx.target import Arguments, as_call, first_tensor, rows_of

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The numbers to explain, one a sample: of a model's output (B, ...) the entry at a flat index (B,)
    behind the batch axis."""

    index: Tensor

    def __call__(self, output: Any) -> Tensor:
        return first_tensor(output).flatten(1).gather(1, self.index[:, None])[:, 0]


def chosen(index: Tensor, output: Any, count: int) -> Chosen:
    """Where an index is -1, the largest entry of the model's output; -2 is the second of ``count``."""
    entries = first_tensor(output).detach().flatten(1)
    if count == 1:
        return Chosen(torch.where(index < 0, entries.argmax(1), index))
    own = entries.topk(count, 1).indices
    return Chosen(torch.where(index < 0, own.gather(1, (~index).clamp(0)[:, None])[:, 0], index))


@dataclasses.dataclass(frozen=True)
class Flat:
    """A traced explanation.

    ``graph`` takes the module's tensors at ``paths``, ``constants``, the tensors of a call and, if
    ``indexed``, the flat index of each sample's target (int64); it returns what ``fields`` names.

    constants: the noise that a method adds
    targets: how many it explains; of several, the index is (B, targets)
    fields: of each result, the target's number (from 0), the field, and its key if that is a mapping
    sizes: of the model's output, behind the batch axis
    batch: how many samples it serves; 0 for as many as the first tensor of a call has
    like: an answer of the method, whose other fields are those of every answer
    scale: the largest share of a channel, in that answer
    """

    graph: GraphModule
    paths: tuple[str, ...]
    constants: tuple[Tensor, ...]
    indexed: bool
    targets: int
    fields: tuple[tuple[int, str, str], ...]
    sizes: tuple[int, ...]
    batch: int
    like: Attribution
    scale: float

    def index(self, targets: Sequence[Any], tensors: Sequence[Tensor]) -> Tensor:
        """The flat index of each sample's targets. Those that are None are its largest entries, in falling
        order: -1, -2, and so on. tensors: those of a call"""
        batch, device = self.batch or tensors[0].shape[0], tensors[0].device
        own = itertools.count(1)
        rows = [[-next(own)] * batch if t is None else self._index(t, batch) for t in targets]
        return torch.tensor(rows[0] if self.targets == 1 else [*zip(*rows, strict=True)], device=device)

    def _index(self, target: Any, batch: int) -> list[int]:
        steps = [math.prod(self.sizes[i + 1 :]) for i in range(len(self.sizes))]
        rows = rows_of(target, (batch, *self.sizes))
        return [sum(i % n * step for i, n, step in zip(r, self.sizes, steps, strict=True)) for r in rows]

    def places(self, index: Tensor) -> list[Any]:
        """A flat index as a target."""
        return [*zip(*(i.tolist() for i in np.unravel_index(index.cpu().numpy(), self.sizes)), strict=True)]

    def given(
        self, module: CapturedModule, tensors: Sequence[Tensor], index: Tensor | None
    ) -> list[Tensor]:
        """The arguments of the graph."""
        return [*self.state(module), *tensors, *([] if index is None else [index])]

    def state(self, module: CapturedModule) -> list[Tensor]:
        """What the graph takes before the tensors of a call: so many do not differ from call to call."""
        return [*self._read(module), *self.constants]

    @functools.cached_property
    def _read(self) -> Callable[[torch.nn.Module], list[Any]]:
        return reader(self.paths)

    def answers(self, found: Sequence[Tensor]) -> tuple[list[tuple[Attribution, Tensor | None]], Tensor]:
        """From what the graph returned: of each target the answer and the chosen index; the model's output
        tensor."""
        named: list[dict[str, Any]] = [{} for _ in range(self.targets)]
        for (which, field, key), t in zip(self.fields, found, strict=True):
            if key:
                named[which].setdefault(field, {})[key] = t
            else:
                named[which][field] = t
        output, chosen = named[0].pop("model"), [each.pop("chosen", None) for each in named]
        made = [dataclasses.replace(self.like, **each) for each in named]
        return [*zip(made, chosen, strict=True)], output


@dataclasses.dataclass(frozen=True)
class Shown:
    """What the method has shown of a call when it ran in the usual way.

    asked:   with what is known of a run, of a run at several places, and of noise
    apart:   whether each sample has a backward of its own, as rows of a constant are of several samples
    indexed: whether the target is an index, an argument of the graph
    like:    its answer; of an index, for the first entry of each sample's output
    scale:   the largest share of a channel
    output:  what the model returned, under grad mode
    """

    asked: Question
    apart: bool
    indexed: bool
    like: Attribution
    scale: float
    output: Tensor


def shown(module: CapturedModule, inputs: Any, target: Any, **options: Any) -> Shown:
    """Run the explanation of one target.

    Args:
        module: the graph that serves these inputs.
        target: None for an index that is an argument of the graph; or a callable, a part of it.
        options: of the method, see ``questions``.

    Raises:
        InputError: the method, or the model, cannot be one graph of one forward and backward.
    """
    ((asked, meant, _),) = questions(module, inputs, lambda output: [_first(output, target)], **options)
    if not isinstance(asked.module, CapturedModule):
        raise InputError("this model is captured in several graphs: it has no program. Use attribute()")
    if asked.how.terms is formulas.random:
        raise InputError("random answers without the model: use attribute()")
    run = asked.run()
    targets, output = meant(run.output), first_tensor(run.output).detach()
    seen = run.back(*targets, last=False)
    known = _known(asked, run, seen)
    if asked.how.path:
        drawn = noise(asked, run) if asked.how.path == "noise" else ()
        asked = dataclasses.replace(asked, drawn=drawn, stacked=_stack(asked, targets))
    plain = dataclasses.replace(asked, stacked=None)
    (like,) = answers(plain, run, targets)
    asked = dataclasses.replace(asked, known=known)
    indexed = isinstance(targets[0], Chosen)
    apart = [*known.rows, *(asked.stacked.known.rows if asked.stacked else ())]
    return Shown(asked, None in apart, indexed, like, scale(plain, seen), output)


def _known(asked: Question, run: Run, seen: Internals) -> Known:
    """What a run shows for a traced one."""
    token = one_of_several(seen) if asked.how.row else None
    return Known(run.located, seen.rows, tuple(run.kinds), seen.windows, seen.shapes, token)


def _stack(asked: Question, targets: Sequence[Any]) -> Stack:
    """The question at several places at once, with what is known of that.

    Raises:
        InputError: as ``stacked`` and ``Stack``.
    """
    stack = stacked(asked)
    found: list[Known] = []

    def noting(*given: Any) -> At:
        at = stack(*given)
        found.append(_known(at.asked, at.run, at.seen[0]))
        return at

    at_once = dataclasses.replace(asked, stacked=noting)
    answers(at_once, at_once.run(), targets)
    return dataclasses.replace(stack, known=found[-1])


def _first(output: Any, target: Any) -> Any:
    """The target of a first run: where it is to be an index, the first entry of each sample."""
    y = first_tensor(output)
    if target is not None or y.numel() == y.shape[0]:
        return target
    return Chosen(torch.zeros(y.shape[0], dtype=torch.long, device=y.device))


def traced(first: Shown, target: Any, targets: int, free: Sequence[Axes], python: bool) -> Flat:
    """Trace what ``first`` has run, for inputs of its sizes; their axes in ``free`` of any size.

    Args:
        target: as of ``shown``.
        targets: how many are explained, each by a backward.
        free: of each tensor of the call, see ``batch_axes``; () for none.
        python: whether shapes come from PyTorch's Python kernels. More of these leave a size free; some
            are made of other ops, which round otherwise.
    """
    module, leaves, spec = _call(first)
    attributes, sizes, asked = _attributes(module), ShapeEnv(), first.asked
    constants = [t for drawn in asked.drawn for t in drawn.values()]
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    own = target is not None  # a callable's own tensors are constants of the graph
    mode = Fakes(shape_env=sizes, allow_non_fake_inputs=own)
    fakes = [_fake(mode, t, ()) for t in (*attributes.values(), *constants)]
    fakes += [_fake(mode, t, axes) for t, axes in zip(tensors, free or [()] * len(tensors), strict=True)]
    if first.indexed:
        shape = (first.output.shape[0], *[targets] * (targets > 1))
        index = torch.zeros(shape, dtype=torch.long, device=first.output.device)
        fakes.append(_fake(mode, index, {0} if free else ()))
    fields: list[tuple[int, str, str]] = []

    def explained(*given: Tensor) -> list[Tensor]:
        rest = iter(given)
        state = {path: next(rest) for path in attributes}
        drawn = [{name: next(rest) for name in each} for each in asked.drawn]
        call = pytree.tree_unflatten([next(rest) if isinstance(x, Tensor) else x for x in leaves], spec)
        question = _with(asked, state, drawn, Arguments(*call))
        run = question.run()
        meant = _chosen(next(rest), run.output, targets) if first.indexed else [target]
        named: dict[tuple[int, str, str], Tensor] = {}
        for i, (mine, answer) in enumerate(zip(meant, answers(question, run, meant), strict=True)):
            found = _tensors(answer)
            if i == 0:
                found["model", ""] = first_tensor(run.output).detach()
            if first.indexed:
                found["chosen", ""] = mine.index
            named |= {(i, *field): t for field, t in found.items()}
        fields[:] = named
        return [*named.values()]

    with quiet(), mode, shapes(sizes, python):
        graph = make_fx(explained)(*fakes)
        with torch.no_grad():
            graph = without_zeros(graph, fakes)
    graph = settled(graph, [i for i, (_, field, _) in enumerate(fields) if field == "model"])
    fixed = not free or sizes.guards  # something was decided by the size of the batch
    batch, behind = (first.output.shape[0] if fixed else 0), tuple(first.output.shape[1:])
    return Flat(
        graph, tuple(attributes), tuple(constants), first.indexed, targets, tuple(fields), behind, batch,
        first.like, first.scale,
    )  # fmt: skip


def _with(asked: Question, state: Starts, drawn: Sequence[Starts], inputs: Arguments) -> Question:
    """A question on the tensors of a trace."""
    known = asked.known and dataclasses.replace(asked.known, attributes=state)
    stack: Any = asked.stacked
    if stack is not None:
        stack = dataclasses.replace(stack, known=dataclasses.replace(stack.known, attributes=state))
    return dataclasses.replace(asked, inputs=inputs, known=known, drawn=drawn, stacked=stack)


def _chosen(index: Tensor, output: Any, targets: int) -> list[Chosen]:
    return [chosen(i, output, targets) for i in (index.unbind(1) if targets > 1 else [index])]


def _call(first: Shown) -> tuple[CapturedModule, list[Any], pytree.TreeSpec]:
    """The module, and the leaves and structure of the call."""
    return one_graph(first.asked.module), *pytree.tree_flatten(as_call(first.asked.inputs))


def _attributes(module: CapturedModule) -> dict[str, Tensor]:
    """The module's tensors that its graph reads, by path."""
    paths = dict.fromkeys(str(n.target) for n in module.graph.nodes if n.op == "get_attr")
    found = zip(paths, reader([*paths])(module), strict=True)
    return {path: t for path, t in found if isinstance(t, Tensor)}


def _fake(mode: FakeTensorMode, x: Tensor, free: Collection[int]) -> Tensor:
    """A fake tensor, its axes in ``free`` of a size that all of them share. It requires grad if ``x`` does:
    some kernels are chosen by that."""
    sizes = [DimDynamic.DUCK if axis in free else DimDynamic.STATIC for axis in range(x.ndim)]
    return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


def _tensors(found: Attribution) -> dict[tuple[str, str], Tensor]:
    """By field, and by key where the field is a mapping."""
    named: dict[tuple[str, str], Tensor] = {}
    for field, value in vars(found).items():
        if isinstance(value, Tensor):
            named[field, ""] = value
        elif isinstance(value, Mapping):
            named |= {(field, key): t for key, t in value.items() if isinstance(t, Tensor)}
    return named
