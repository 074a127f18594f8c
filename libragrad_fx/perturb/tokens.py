"""Takes tokens from a model: by a shorter sequence behind the embedding, or by zeros in their place.

As in the authors' protocol, tokens are computed once from the whole input, with their positions, and taken
away where the first block begins. Class and register tokens stay.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from libragrad_fx.account.observe import Observer, flat_arguments, source_name
from libragrad_fx.attribution.internals import Run, facts_of, layer_input, run
from libragrad_fx.attribution.maps import Layout, Part, guessed, positions
from libragrad_fx.attribution.towers import towers
from libragrad_fx.decide.flow import reach
from libragrad_fx.errors import InputError
from libragrad_fx.graph import origin as origins
from libragrad_fx.module.captured import CapturedModule, InGraphs, one_graph
from libragrad_fx.module.walk import bypassed, calls, origin, senders
from libragrad_fx.ops import insert
from libragrad_fx.perturb import planner, shorter
from libragrad_fx.perturb.kept import Ends, Kept, shapes_of
from libragrad_fx.perturb.shorter import Refused, Whole
from libragrad_fx.rewrite.erase import erase
from libragrad_fx.target import as_call, first_tensor, undisturbed

_ROUNDING, _COARSE = 1000, 1 / 16
"""Two orders of the same tokens may differ by so many units in the last place of the largest logit, in half
precision by that share of it."""
_PIXELS = "mask pixels instead"


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of a model: the input of its first block. ``tokens`` finds them.

    path:   of that block
    layout: how its tokens lie
    grid:   (H, W) of a picture, (N,) of a text: its cells are counted row by row
    stays:  cells whose token always stays, since the model reads it by its place (a text's first)
    plan:   how the ops behind run on fewer tokens; None where they cannot
    why:    why they cannot; "" where they can
    """

    module: CapturedModule
    path: str
    layout: Layout
    graph: Graph
    start: Node
    stays: frozenset[int] = frozenset()
    plan: shorter.Plan | None = None
    why: str = ""

    @property
    def grid(self) -> tuple[int, ...]:
        return self.layout.parts[0].grid

    @property
    def cells(self) -> list[int]:
        """The cells whose tokens may go."""
        return [c for c in range(len(self.layout.parts[0].order)) if c not in self.stays]

    def seen(self, inputs: Any) -> Seen:
        """One run on all tokens, of any number of samples."""
        values: dict[Node, Any] = {}
        shapes: dict[Node, tuple[tuple[int, ...], ...]] = {}
        mine = shorter.behind(self.start)
        read = {self.start, *(n for node in mine for n in node.all_input_nodes)} - {*mine}

        def tap(node: Node, y: Any) -> None:
            shapes[node] = shapes_of(y)
            if node in read:
                values[node] = y

        with torch.no_grad(), undisturbed(self.module):
            runs = Observer(self.module, tap, self.graph)
            output = runs.run(*flat_arguments(self.module, *as_call(inputs)))
        seen = Seen(self, Whole(values, shapes), first_tensor(output).detach())
        shape, axes = seen.whole.shape(self.start), self.layout.axes
        if tuple(shape[i] for i in axes) != ((self.layout.tokens,) if len(axes) == 1 else self.grid):
            raise InputError(f"the tokens of {self.path} are {shape} now: look for them anew, by tokens")
        return seen


@dataclasses.dataclass(frozen=True)
class Seen:
    """One run on all tokens. logits: the first tensor of the output, (B, classes) of a classifier."""

    tokens: Tokens
    whole: Whole
    logits: torch.Tensor

    def kept(self, cells: torch.Tensor) -> torch.Tensor:
        """The model on some of its tokens, in their order: the first tensor that it returns.

        Args:
            cells: (B, K) int64, of each sample the cells whose tokens are kept.

        Raises:
            InputError: no such cells, or the model cannot run on fewer tokens, or not on none.
        """
        of = self.tokens
        if of.plan is None:
            raise InputError(f"{of.path} has all tokens or none: {of.why}. Use zeroed")
        order, cells = self._order(cells)
        places = order[cells] - min(order[c] for c in of.cells)
        kept = Kept(places.sort(1).values, len(of.cells))
        with torch.no_grad(), undisturbed(of.module):
            runs = Observer(of.module, graph=of.graph)
            found = first_tensor(shorter.run(runs, of.plan, self.whole, kept))
        if not cells.shape[1] and not bool(found.isfinite().all()):
            raise InputError("this model has no answer without tokens: keep at least one cell")
        return found

    def zeroed(self, cells: torch.Tensor) -> torch.Tensor:
        """As ``kept``, but the embeddings of the other tokens are zeros."""
        of, x = self.tokens, self.whole.values[self.tokens.start]
        order, cells = self._order(cells)
        mask = x.new_zeros(len(cells), of.layout.tokens)
        mask[:, [*of.layout.apart, *(of.layout.parts[0].order[c] for c in of.stays)]] = 1
        mask = mask.scatter_(1, order[cells], 1).unflatten(1, [x.shape[i] for i in of.layout.axes])
        for axis in range(1, x.ndim):
            mask = mask if axis in of.layout.axes else mask.unsqueeze(axis)
        with torch.no_grad(), undisturbed(of.module):
            runs, env = Observer(of.module, graph=of.graph), {**self.whole.values, of.start: x * mask}
            for node in shorter.behind(of.start):
                args, kwargs = pytree.tree_map_only(Node, env.__getitem__, (node.args, node.kwargs))
                env[node] = getattr(runs, node.op)(node.target, args, kwargs)
        return first_tensor(env[node])

    def _order(self, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The place of each cell's token, and the cells asked for, once they are found to be there."""
        of, x = self.tokens, self.whole.values[self.tokens.start]
        if cells.ndim != 2 or len(cells) != len(x) or cells.dtype is not torch.int64:
            raise InputError(
                f"cells is (B, K) int64 with B = {len(x)}, got {tuple(cells.shape)} {cells.dtype}"
            )
        free, cells = torch.tensor(of.cells, device=x.device), cells.to(x.device)
        twice = bool((cells.sort(1).values.diff(dim=1) == 0).any())
        if twice or not bool(torch.isin(cells, free).all()):
            but = f" but {sorted(of.stays)}" if of.stays else ""
            raise InputError(f"cells are of grid {of.grid}{but}, each once; got {cells.tolist()}")
        return torch.tensor(of.layout.parts[0].order, device=x.device), cells


# --- finding them


def tokens(module: InGraphs, inputs: Any) -> Tokens:
    """Find the tokens of a model, and whether it can run on some of them.

    A model can if every op behind its first block's input takes a shorter sequence, and its answer stays
    the same when the tokens come in another order, each with its row of the tables of positions, and when
    they all come twice (see ``planner``, also for what no graph can show).

    Args:
        module: a result of ``transform`` or ``trace``, in eval mode; which of them makes no difference.
        inputs: at least two samples, as the module takes them.

    Raises:
        InputError: a model in train mode, without blocks, whose tokens lie nowhere, or with a path past
            them.
    """
    module = one_graph(module)
    if module.record.training:
        raise InputError("the model was captured in train mode, where it draws: capture it in eval mode")
    path = next(iter(max(towers(module), key=len, default=[])), "")
    if not path:
        raise InputError(f"this model has no repeated blocks, so no tokens: {_PIXELS}")
    node = layer_input(calls(module), path)
    if bypassed(module, node, senders(module)):
        raise InputError(f"a path leads past {path}, which shows the model its whole input: {_PIXELS}")
    with torch.no_grad():
        layout = _layout(run(module, inputs, [path], biases=False), node)
    graph = erase(module.graph)
    start = next(n for n in graph.nodes if n.name == origin(node).name)
    found = Tokens(module, path, layout, graph, start)
    seen = found.seen(inputs)
    rows, answers = seen.whole.shape(start)[0], (*seen.logits.shape, 1)[0]
    if answers < 2 or rows != answers:
        raise InputError(
            f"{answers} outputs of {rows} rows at {path}: give at least two samples; if you did, the rows"
            f" are parts of samples: {_PIXELS}"
        )
    if _leaks(found, seen):
        raise InputError(f"what is computed past {path} depends on pixels: {_PIXELS}")
    return _planned(found, seen)


def _leaks(of: Tokens, seen: Seen) -> bool:
    """Whether what lies behind the tokens reads a picture past them, if only by a path without gradients.
    Ids of texts may be read: masks and positions are computed from them."""
    shapes, source = seen.whole.shapes, of.layout.parts[0].source
    beside = [n for n in seen.whole.values if n is not of.start and shapes[n]]
    read = reach(beside, lambda n: [m for m in n.all_input_nodes if shapes.get(m)])
    return any(n.target is insert.guard and source_name(n) == source for n in read)


def _layout(seen: Run, node: Node) -> Layout:
    """How the tokens of a block's input lie, where they come from one input, one in each cell."""
    shape = tuple(seen.values[node].shape)
    found = seen.located.layouts.get(node.name)
    if found is None:
        found = _of_picture(seen, shape)
    alone = found is not None and len(found.parts) == 1 and not seen.samples.get(node, 0)
    if found is None or not alone or len(found.parts[0].order) != torch.Size(found.parts[0].grid).numel():
        raise InputError(f"nothing says where the tokens of {node.name} {shape} lie: {_PIXELS}")
    return found


def _of_picture(seen: Run, shape: tuple[int, ...]) -> Layout | None:
    """The layout of a value on the grid of the one picture that there is."""
    pictures = {n: axes for n, axes in seen.located.axes.items() if len(axes) > 1 and n in seen.sources}
    if len(pictures) != 1:
        return None
    ((source, axes),) = pictures.items()
    image = tuple(seen.sources[source].shape[i] for i in axes)
    if len(shape) == 3:
        return guessed(source, shape, seen.layout["shapes"], image)
    places = positions(shape, image)
    grid = tuple(shape[i] for i in places)
    order = tuple(range(torch.Size(grid).numel()))
    return Layout(len(order), (Part(source, grid, order),), (), places) if len(grid) == len(image) else None


def _planned(found: Tokens, seen: Seen) -> Tokens:
    """With a plan; or with the reason why there is none."""
    while True:
        try:
            return dataclasses.replace(found, plan=_plan(found, seen))
        except Refused as e:
            order = {p: c for c, p in enumerate(found.layout.parts[0].order)}
            first = min(p for p, c in order.items() if c not in found.stays)
            cell = None if e.place is None else order[first + e.place]
            if cell is None or len(found.cells) <= 2:
                return dataclasses.replace(found, stays=frozenset(), why=str(e))
            found = dataclasses.replace(found, stays=found.stays | {cell})


def _plan(of: Tokens, seen: Seen) -> shorter.Plan:
    """How the model runs on fewer tokens.

    Raises:
        Refused: it cannot, and why.
    """
    order, axes = of.layout.parts[0].order, of.layout.axes
    places = sorted(order[c] for c in of.cells)
    front, n = places[0], len(places)
    if len(axes) != 1 or places != [*range(front, front + n)]:
        raise Refused("its tokens lie in rows, or not side by side")
    if n < 2:
        raise Refused("it has one token")
    ends, named = Ends(front, of.layout.tokens - front - n), {m.name: m for m in of.module.graph.nodes}
    runs, form = Observer(of.module, graph=of.graph), lambda m: (origins.form(named[m.name]) or ((), ()))[1]
    draw = torch.Generator().manual_seed(0)
    mixed = torch.stack([torch.randperm(n, generator=draw) for _ in seen.logits]).to(seen.logits.device)
    kept = Kept(mixed, n)
    with torch.no_grad(), undisturbed(of.module):
        made = planner.plan(runs, of.start, {axes[0]: ends}, n, seen.whole, facts_of(of.module), form)
        other = first_tensor(shorter.run(runs, made, seen.whole, kept))
    near = min(_ROUNDING * torch.finfo(other.dtype).eps, _COARSE) * float(seen.logits.abs().max())
    if not torch.allclose(other, kept.of(seen.logits, made.returned), rtol=0, atol=near):
        raise Refused("its answer depends on the order of its tokens beyond their positions")
    return made
