"""Batches of a program: the axes that count samples, and several places of a path as one batch.

``attribute`` runs the places of a path one after another. In a program the samples of each place lie behind
those of the place before, along the batch axis, so that a mean over inputs is one forward and backward.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from libragrad_fx.account.observe import source_name
from libragrad_fx.attribution.internals import Known, Run
from libragrad_fx.attribution.methods import At, Question, Starts, parted, samples_of
from libragrad_fx.capture.normal import paths_of
from libragrad_fx.errors import InputError
from libragrad_fx.module.captured import CapturedModule, InGraphs, one_graph
from libragrad_fx.module.variants import fits
from libragrad_fx.ops import insert
from libragrad_fx.programs.modes import rounding
from libragrad_fx.target import Arguments, Target, as_call, select_each

Tensor = torch.Tensor
Axes = Collection[int]


def batch_axes(module: InGraphs, inputs: Any) -> tuple[Axes, ...]:
    """Of each tensor of a call, its axes that count samples; () if the graph is for one number of these.

    Those are the axes that share the size of the first tensor's. An input may have a free size of its own
    in front, as a mask has that may be of one row; it counts samples where it is as long."""
    if not isinstance(module, CapturedModule):  # several graphs: there will be no program
        return ()
    guards = module.graph.find_nodes(op="call_function", target=insert.guard)
    shapes: dict[Any, Any] = {source_name(n): n.args[2] for n in guards}
    batch = next((s[0] for s in shapes.values() if s and isinstance(s[0], str)), None)
    if batch is None:
        return ()
    call = as_call(inputs)
    pairs = zip(paths_of(module, *call), pytree.tree_leaves(call), strict=True)
    mine = [(x, shapes.get(path, ())) for path, x in pairs if isinstance(x, Tensor)]
    inner = {size for _, shape in mine for size in shape[1:]}
    samples = next((x.shape[shape.index(batch)] for x, shape in mine if batch in shape), 0)

    def counts(x: Tensor, axis: int, size: Any) -> bool:
        own = axis == 0 and isinstance(size, str) and size not in inner and x.shape[0] == samples
        return bool(size == batch) or own

    return tuple(frozenset(a for a, size in enumerate(shape) if counts(x, a, size)) for x, shape in mine)


@dataclasses.dataclass(frozen=True)
class Stack:
    """Runs a question at several places at once, see ``Stacked``.

    axes:  of each tensor of a call, those that count samples
    known: what a run at so many places has shown; None of the first
    """

    axes: Sequence[Axes]
    known: Known | None = None

    def __call__(
        self, asked: Question, first: Run, places: Sequence[Starts], targets: Sequence[Target]
    ) -> At:
        """Raises ``InputError`` if the graph does not serve so many samples, or they meet each other."""
        counted = samples_of(first)
        given = {name: torch.cat([at[name] for at in places], counted.get(name, 0)) for name in places[0]}
        inputs = repeated(asked.inputs, self.axes, len(places))
        every = dataclasses.replace(asked, inputs=inputs, known=self.known, stacked=None)
        run = every.run(given) if self.known else self._first(every, given, asked, first, places)
        chosen = [lambda output, t=t: each_place(output, t, len(places)) for t in targets]
        return At(every, len(places), run, [*run.backs(chosen)])

    @staticmethod
    def _first(
        every: Question, given: Starts, asked: Question, first: Run, places: Sequence[Starts]
    ) -> Run:
        """A run of ``every``, after an ordinary one that tells where things lie."""
        if not fits(one_graph(every.module), *as_call(every.inputs)):
            raise InputError(f"{_refused(asked)}, and this model's graph does not serve so many samples")
        run = every.run(given, every.run())
        if not alike(_outputs(run.output, len(places))[0], asked.run(places[0], first).output):
            raise InputError(f"{_refused(asked)}, and an answer of this model depends on other samples")
        return run


def stacked(asked: Question) -> Stack:
    """For a question about several places.

    Raises:
        InputError: the model's graph is for one batch size.
    """
    axes = batch_axes(asked.module, asked.inputs)
    if not any(axes):
        raise InputError(f"{_refused(asked)}, and this model's graph is for one batch size")
    return Stack(axes)


def _refused(asked: Question) -> str:
    return f"a program of {asked.method} runs all its steps as one batch"


def each_place(output: Any, target: Target, count: int) -> Tensor:
    """The target's numbers, from the part of the output that belongs to each place."""
    return torch.cat([select_each(y, target) for y in _outputs(output, count)])


def _outputs(output: Any, count: int) -> list[Any]:
    leaves, spec = pytree.tree_flatten(output)
    rows = max((x.shape[0] for x in leaves if isinstance(x, Tensor) and x.ndim), default=0)

    def parts(x: Any) -> Sequence[Any]:
        samples = isinstance(x, Tensor) and x.ndim and x.shape[0] == rows
        return parted(x, count) if samples else [x] * count

    return [pytree.tree_unflatten([*part], spec) for part in zip(*map(parts, leaves), strict=True)]


def alike(output: Any, alone: Any) -> bool:
    """Whether a model answers this for samples by themselves, but for rounding."""

    def close(x: Any, y: Any) -> bool:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return True
        near = rounding(x.dtype)
        top = float(y.detach().nan_to_num(0, 0, 0).abs().max()) if y.numel() else 0.0
        return x.shape == y.shape and torch.allclose(x, y, rtol=near, atol=near * top, equal_nan=True)

    return all(map(close, *map(pytree.tree_leaves, (output, alone))))


def repeated(inputs: Any, axes: Sequence[Axes], count: int) -> Arguments:
    """A call with its samples ``count`` times, all of them behind each other."""
    more = lambda x, axis: x.unsqueeze(axis).expand(*x.shape[:axis], count, *x.shape[axis:])  # noqa: E731
    return _changed(inputs, axes, lambda x, axis: more(x, axis).flatten(axis, axis + 1))


def other_rows(inputs: Any, axes: Sequence[Axes]) -> list[int]:
    """Rows that make another batch of more than one sample of a call's; none if it has one sample."""
    tensors = [x for x in pytree.tree_leaves(as_call(inputs)) if isinstance(x, Tensor)]
    count = next(x.shape[axis] for x, mine in zip(tensors, axes, strict=True) for axis in mine)
    return [[], [], [0, 1, 0]][count] if count < 3 else [0, 1]


def chosen_rows(inputs: Any, axes: Sequence[Axes], rows: Sequence[int]) -> Arguments:
    """A call with those of its samples."""
    at = lambda x: torch.tensor(rows, device=x.device)  # noqa: E731
    return _changed(inputs, axes, lambda x, axis: x.index_select(axis, at(x)))


def _changed(inputs: Any, axes: Sequence[Axes], change: Callable[[Tensor, int], Tensor]) -> Arguments:
    """A call whose tensors are changed along the axes that count samples."""
    leaves, spec = pytree.tree_flatten(as_call(inputs))
    mine = iter(axes)
    every = [functools.reduce(change, next(mine), x) if isinstance(x, Tensor) else x for x in leaves]
    return Arguments(*pytree.tree_unflatten(every, spec))
