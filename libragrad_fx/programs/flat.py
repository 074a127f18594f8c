"""One flat graph of an explanation: the forward, the balanced backward and the method, as ATen ops.

A first run of the method, in the usual way, shows what does not depend on values: where tokens lie, where
the samples of each constant are. Then the same code runs on fake tensors, and PyTorch's tracer notes ops.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from libragrad_fx.account.observe import flat_arguments
from libragrad_fx.attribution import Attribution, formulas
from libragrad_fx.attribution.internals import Known
from libragrad_fx.attribution.methods import Question, answer, answers, one_of_several, questions
from libragrad_fx.errors import InputError
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.module.variants import guards_of
from libragrad_fx.ops import binding, insert
from libragrad_fx.optimise.execute import attribute, bound
from libragrad_fx.programs.zeros import without_zeros
from libragrad_fx.target import Arguments, as_call, first_tensor, rows_of, undisturbed

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The numbers to explain, one a sample: of a model's output (B, ...) the entry at a flat index (B,)
    behind the batch axis; where that is negative, the largest."""

    index: Tensor

    def __call__(self, output: Any) -> Tensor:
        return first_tensor(output).flatten(1).gather(1, self.meant(output)[:, None])[:, 0]

    def meant(self, output: Any) -> Tensor:
        """The flat index, the model's own answer filled in."""
        own = first_tensor(output).detach().flatten(1).argmax(1)
        return torch.where(self.index < 0, own, self.index)


@dataclasses.dataclass(frozen=True)
class Flat:
    """A traced explanation. ``graph`` takes the module's tensors at ``paths``, the tensors of a call and,
    if ``indexed``, the flat index of each sample's target (int64); it returns what ``fields`` names.

    sizes: of the model's output, behind the batch axis
    batch: how many samples it serves; 0 for as many as the first tensor of a call has
    like: an answer of the method, whose other fields are those of every answer
    """

    graph: GraphModule
    paths: tuple[str, ...]
    indexed: bool
    fields: tuple[tuple[str, str], ...]
    sizes: tuple[int, ...]
    batch: int
    like: Attribution

    @functools.cached_property
    def run(self) -> Callable[..., Sequence[Tensor]]:
        binding.mark(self.graph.graph)
        return GraphModule(self.graph, bound(self.graph.graph)).forward

    def index(self, target: Any, call: Any) -> Tensor:
        """The flat index of each sample's target: -1 for None."""
        like = next(t for t in pytree.tree_leaves(as_call(call)) if isinstance(t, Tensor))
        batch = self.batch or like.shape[0]
        if target is None:
            return torch.full((batch,), -1, device=like.device)
        rows = torch.tensor(rows_of(target, (batch, *self.sizes)), device=like.device)
        rows = torch.where(rows < 0, rows + torch.tensor(self.sizes, device=like.device), rows)
        steps = [math.prod(self.sizes[i + 1 :]) for i in range(len(self.sizes))]
        return (rows * torch.tensor(steps, device=like.device)).sum(1)

    def places(self, index: Tensor) -> list[Any]:
        """A flat index as a target."""
        return [*map(tuple, torch.stack(torch.unravel_index(index, self.sizes), 1).tolist())]

    def __call__(self, module: CapturedModule, tensors: Sequence[Tensor], index: Tensor | None) -> Any:
        """The answer, the chosen index and the model's output tensor."""
        state = [attribute(module, path) for path in self.paths]
        with torch.no_grad():
            found = self.run(*state, *tensors, *([] if index is None else [index]))
        named: dict[str, Any] = {}
        for (field, key), t in zip(self.fields, found, strict=True):
            if key:
                named.setdefault(field, {})[key] = t
            else:
                named[field] = t
        output, chosen = named.pop("model"), named.pop("chosen", None)
        return dataclasses.replace(self.like, **named), chosen, output


def flat(
    module: CapturedModule, inputs: Any, target: Any, free: Mapping[int, set[int]],
    **options: Any,
) -> tuple[Flat, Tensor]:  # fmt: skip
    """Trace the explanation of one target on inputs of these sizes; and what the model returned for them.

    Args:
        module: the graph that serves these inputs.
        target: None for an index that is an argument of the graph; or a callable, a part of it.
        free: by id of an input, its axes that are to be free, see ``batch_axes``.
        options: of the method, see ``questions``.

    Raises:
        InputError: the method, or the model, cannot be one graph of one forward and backward.
    """
    leaves, spec = pytree.tree_flatten(as_call(inputs))
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    with undisturbed(module), torch.no_grad():
        output = first_tensor(module(*as_call(inputs)[0], **as_call(inputs)[1]))
    indexed = target is None and output.numel() != output.shape[0]
    index = torch.zeros(len(output), dtype=torch.long, device=output.device) if indexed else None
    meant: Any = Chosen(index) if index is not None else target
    found = questions(module, inputs, lambda _: [meant], **options)
    (asked, _, _), *_ = found
    if asked.how.path or asked.how.terms is formulas.random:
        raise InputError(
            f"{asked.method} is no arithmetic on one forward and backward, as a program is: use"
            " attribute(), or a program of another method"
        )
    like, known = _shown(asked, meant)
    attributes = _attributes(module)
    sizes = ShapeEnv()
    mode = FakeTensorMode(shape_env=sizes)
    tensors = [leaves[i] for i in places]
    fakes = [*(_fake(mode, t, {}) for t in attributes.values()),
             *(_fake(mode, t, free.get(id(t), {})) for t in tensors),
             *([] if index is None else [_fake(mode, index, {0} if free else {})])]  # fmt: skip
    fields: list[tuple[str, str]] = []

    def explained(*given: Tensor) -> list[Tensor]:
        state = dict(zip(attributes, given, strict=False))
        mine = [*leaves]
        for i, t in zip(places, given[len(state) :], strict=False):
            mine[i] = t
        call = Arguments(*pytree.tree_unflatten(mine, spec))
        chosen: Any = Chosen(given[-1]) if indexed else target
        seen: list[Any] = []

        def say(output: Any) -> list[Any]:
            seen.append(output)
            return [chosen]

        here = dataclasses.replace(asked, inputs=call, known=dataclasses.replace(known, attributes=state))
        (answer,) = answers(here, say)
        named = _tensors(answer)
        named["model", ""] = first_tensor(seen[0]).detach()
        if indexed:
            named["chosen", ""] = chosen.meant(seen[0])
        fields[:] = named
        return [*named.values()]

    with mode:
        traced = make_fx(explained)(*fakes)
    with mode, torch.no_grad():
        lean = without_zeros(traced, fakes)
    fixed = not free or sizes.guards  # something was decided by the size of the batch
    batch = output.shape[0] if fixed else 0
    made = Flat(lean, tuple(attributes), indexed, tuple(fields), tuple(output.shape[1:]), batch, like)
    return made, output


def _shown(asked: Question, target: Any) -> tuple[Attribution, Known]:
    """The answer in the usual way, and what it showed."""
    run = asked.run()
    seen = run.back(target)
    if any(rows is None for rows in seen.rows):
        raise InputError(
            "the rows of a constant of this model are of several samples at once, and need a backward for"
            " each sample: a program has one. Use attribute()"
        )
    found = answer(asked, seen)
    token = one_of_several(seen) if asked.how.row else None
    known = Known(run.located, seen.rows, tuple(run.kinds), seen.windows, seen.shapes, token)
    return found, known


def _attributes(module: CapturedModule) -> dict[str, Tensor]:
    """The module's tensors that its graph reads, by path."""
    paths = dict.fromkeys(str(n.target) for n in module.graph.nodes if n.op == "get_attr")
    found = {path: attribute(module, path) for path in paths}
    return {path: t for path, t in found.items() if isinstance(t, Tensor)}


def batch_axes(module: CapturedModule, inputs: Any) -> dict[int, set[int]]:
    """By id of a tensor, its axes that are as long as the batch, where the graph leaves that free."""
    shapes: dict[int, Sequence[Any]] = {}

    class Guards(torch.fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            y = super().run_node(n)
            if n.target is insert.guard:
                shapes[id(y)] = n.args[2]  # type: ignore[assignment]
            return y

        def placeholder(self, *_: Any) -> Any:
            return next(self.args_iter)

    Guards(GraphModule({"training": module.training}, guards_of(module.graph))).run(
        *flat_arguments(module, *as_call(inputs))
    )
    batch = next((s[0] for s in shapes.values() if s and isinstance(s[0], str)), None)
    if batch is None:
        return {}
    return {i: {a for a, n in enumerate(s) if n == batch} for i, s in shapes.items()}


def _fake(mode: FakeTensorMode, x: Tensor, free: Any) -> Tensor:
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
