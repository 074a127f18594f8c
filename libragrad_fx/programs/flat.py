"""One flat graph of an explanation: the forward, the balanced backward and the method, as ATen ops.

A first run of the method, in the usual way, shows what does not depend on values: where tokens lie, where
the samples of each constant are. Then the same code runs on fake tensors, and PyTorch's tracer notes ops.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from libragrad_fx.account.observe import source_name
from libragrad_fx.attribution import Attribution, formulas
from libragrad_fx.attribution.internals import Known
from libragrad_fx.attribution.methods import Question, answer, one_of_several, questions
from libragrad_fx.capture.normal import paths_of
from libragrad_fx.errors import InputError
from libragrad_fx.extras import quiet
from libragrad_fx.module.captured import CapturedModule, one_graph
from libragrad_fx.ops import insert
from libragrad_fx.optimise.execute import attribute
from libragrad_fx.programs.settle import settled
from libragrad_fx.programs.zeros import without_zeros
from libragrad_fx.target import Arguments, as_call, first_tensor, rows_of

Tensor = torch.Tensor
Axes = Collection[int]


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The numbers to explain, one a sample: of a model's output (B, ...) the entry at a flat index (B,)
    behind the batch axis; where that is -1, the largest, and -2 the second of ``count``."""

    index: Tensor
    count: int = 1

    def __call__(self, output: Any) -> Tensor:
        return first_tensor(output).flatten(1).gather(1, self.meant(output)[:, None])[:, 0]

    def meant(self, output: Any) -> Tensor:
        """The flat index, the model's own answers filled in."""
        entries = first_tensor(output).detach().flatten(1)
        if self.count == 1:
            return torch.where(self.index < 0, entries.argmax(1), self.index)
        own = entries.topk(self.count, 1).indices
        return torch.where(self.index < 0, own.gather(1, (~self.index).clamp(0)[:, None])[:, 0], self.index)


@dataclasses.dataclass(frozen=True)
class Flat:
    """A traced explanation. ``graph`` takes the module's tensors at ``paths``, the tensors of a call and,
    if ``indexed``, the flat index of each sample's target (int64); it returns what ``fields`` names.

    targets: how many it explains; of several, the index is (B, targets)
    fields: of each result, the target's number (from 0), the field, and its key if that is a mapping
    sizes: of the model's output, behind the batch axis
    batch: how many samples it serves; 0 for as many as the first tensor of a call has
    like: an answer of the method, whose other fields are those of every answer
    """

    graph: GraphModule
    paths: tuple[str, ...]
    indexed: bool
    targets: int
    fields: tuple[tuple[int, str, str], ...]
    sizes: tuple[int, ...]
    batch: int
    like: Attribution

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
        """The module's tensors at ``paths``."""
        return [attribute(module, path) for path in self.paths]

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

    indexed: whether the target is an index, an argument of the graph
    like:    its answer; of an index, for the first entry of each sample's output
    output:  what the model returned, under grad mode
    """

    asked: Question
    known: Known
    indexed: bool
    like: Attribution
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
    if asked.how.path or asked.how.terms is formulas.random:
        raise InputError(
            f"{asked.method} is no arithmetic on one forward and backward, as a program is: use"
            " attribute(), or a program of another method"
        )
    run = asked.run()
    (chosen,) = meant(run.output)
    seen = run.back(chosen)
    if any(rows is None for rows in seen.rows):
        raise InputError(
            "the rows of a constant of this model are of several samples at once, and need a backward for"
            " each sample: a program has one. Use attribute()"
        )
    like, output = answer(asked, seen), first_tensor(run.output).detach()
    token = one_of_several(seen) if asked.how.row else None
    known = Known(run.located, seen.rows, tuple(run.kinds), seen.windows, seen.shapes, token)
    return Shown(asked, known, isinstance(chosen, Chosen), like, output)


def _first(output: Any, target: Any) -> Any:
    """The target of a first run: where it is to be an index, the first entry of each sample."""
    y = first_tensor(output)
    if target is not None or y.numel() == y.shape[0]:
        return target
    return Chosen(torch.zeros(y.shape[0], dtype=torch.long, device=y.device))


def traced(first: Shown, target: Any, targets: int, free: Sequence[Axes]) -> Flat:
    """Trace what ``first`` has run, for inputs of its sizes; their axes in ``free`` of any size.

    Args:
        target: as of ``shown``.
        targets: how many are explained, each by a backward.
        free: of each tensor of the call, see ``batch_axes``; () for none.
    """
    module, leaves, spec = _call(first)
    attributes, sizes = _attributes(module), ShapeEnv()
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    mode = FakeTensorMode(shape_env=sizes)
    fakes = [_fake(mode, t, ()) for t in attributes.values()]
    fakes += [_fake(mode, t, axes) for t, axes in zip(tensors, free or [()] * len(tensors), strict=True)]
    if first.indexed:
        shape = (first.output.shape[0], *[targets] * (targets > 1))
        index = torch.zeros(shape, dtype=torch.long, device=first.output.device)
        fakes.append(_fake(mode, index, {0} if free else ()))
    fields: list[tuple[int, str, str]] = []

    def explained(*given: Tensor) -> list[Tensor]:
        state, rest = dict(zip(attributes, given, strict=False)), iter(given[len(attributes) :])
        call = pytree.tree_unflatten([next(rest) if isinstance(x, Tensor) else x for x in leaves], spec)
        known = dataclasses.replace(first.known, attributes=state)
        asked = dataclasses.replace(first.asked, inputs=Arguments(*call), known=known)
        chosen = _chosen(next(rest), targets) if first.indexed else [target]
        run = asked.run()
        named: dict[tuple[int, str, str], Tensor] = {}
        for i, (mine, seen) in enumerate(zip(chosen, run.backs(chosen), strict=True)):
            found = _tensors(answer(asked, seen))
            if i == 0:
                found["model", ""] = first_tensor(run.output).detach()
            if first.indexed:
                found["chosen", ""] = mine.meant(run.output)
            named |= {(i, *field): t for field, t in found.items()}
        fields[:] = named
        return [*named.values()]

    with quiet(), mode:
        graph = make_fx(explained)(*fakes)
        with torch.no_grad():
            graph = without_zeros(graph, fakes)
    graph = settled(graph)
    fixed = not free or sizes.guards  # something was decided by the size of the batch
    batch, behind = (first.output.shape[0] if fixed else 0), tuple(first.output.shape[1:])
    return Flat(graph, tuple(attributes), first.indexed, targets, tuple(fields), behind, batch, first.like)


def _chosen(index: Tensor, targets: int) -> list[Any]:
    return [Chosen(i, targets) for i in (index.unbind(1) if targets > 1 else [index])]


def _call(first: Shown) -> tuple[CapturedModule, list[Any], pytree.TreeSpec]:
    """The module, and the leaves and structure of the call."""
    return one_graph(first.asked.module), *pytree.tree_flatten(as_call(first.asked.inputs))


def _attributes(module: CapturedModule) -> dict[str, Tensor]:
    """The module's tensors that its graph reads, by path."""
    paths = dict.fromkeys(str(n.target) for n in module.graph.nodes if n.op == "get_attr")
    found = {path: attribute(module, path) for path in paths}
    return {path: t for path, t in found.items() if isinstance(t, Tensor)}


def batch_axes(module: CapturedModule, inputs: Any) -> tuple[Axes, ...]:
    """Of each tensor of a call, its axes that are as long as the batch; () if the graph fixes that."""
    if not isinstance(module, CapturedModule):  # several graphs: there will be no program
        return ()
    guards = module.graph.find_nodes(op="call_function", target=insert.guard)
    shapes: dict[Any, Any] = {source_name(n): n.args[2] for n in guards}
    batch = next((s[0] for s in shapes.values() if s and isinstance(s[0], str)), None)
    if batch is None:
        return ()
    call = as_call(inputs)
    pairs = zip(paths_of(module, *call), pytree.tree_leaves(call), strict=True)
    mine = [shapes.get(path, ()) for path, x in pairs if isinstance(x, Tensor)]
    return tuple(frozenset(a for a, n in enumerate(shape) if n == batch) for shape in mine)


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
