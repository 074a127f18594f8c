"""Random graphs in the normal form that the stages after capture take, made from the rule table.

A ``Recipe`` is plain data: Hypothesis draws it, prints it and shrinks it; ``build`` makes the same
graph of it every time. A step takes a row of ``rules/ops.yaml`` and one of its sample calls
(``tests.samples``), and puts values of the graph in the place of the sample's tensors. What the op
does not take as it is gets another shape, or is added in small measure to the sample itself, which
lies in the op's domain. So every row with a sample can stand anywhere in a graph.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
import warnings
from typing import Any

import torch
from hypothesis import strategies as st
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from libragrad_fx.decide import rulebook
from libragrad_fx.graph.schema import bind
from libragrad_fx.module.captured import CapturedModule, Record
from libragrad_fx.module.shells import shell_tree
from libragrad_fx.ops import insert
from libragrad_fx.target import inexact
from libragrad_fx.types import Kind, ModuleCall, OpFacts, Trace
from tests.samples import Call, calls

BOOK = rulebook.load()
aten = torch.ops.aten
Shape = tuple[int, ...]

_LARGEST = 100.0  # values beyond are scaled down, so that rounding stays far below the tolerance
_MOST = 256  # elements of a value that later steps may take
_REFUSALS = (RuntimeError, IndexError, TypeError, ValueError, AssertionError, ArithmeticError)
_WEIGHTS = {  # how often a kind is drawn: what the pass edits more often than what it leaves alone
    Kind.LINEAR: 9, Kind.PRODUCT: 14, Kind.GATE_SOURCE: 9, Kind.GATED: 6, Kind.NORMALISER: 4,
    Kind.HOMOGENEOUS: 4, Kind.ATTENTION: 3, Kind.SATURATING: 2, Kind.CUT: 2, Kind.EMBEDDING: 1,
    Kind.RECURRENT: 1,
}  # fmt: skip
_KINDS = [k for k, n in _WEIGHTS.items() for _ in range(n)]
_BACK = (0, 0, 0, 0, 1, 1, 2, 3, 5, 8, 13, 21)  # how far back a step reaches: long chains
_LEFT_OUT = {
    "aten.empty_like", "aten.new_empty",  # uninitialised memory has no bits to compare
    "aten.one_hot",  # takes integers only
    "aten.polar",  # its first operand is a length
    "aten.linalg_cholesky",  # its operand is symmetric
    "aten._fft_c2r",  # does not check its size against its operand's
}  # fmt: skip


def _is_safe(row: OpFacts) -> bool:
    """Whether an op checks what it is given: those of other libraries may read beside a tensor."""
    return row.registered_by is None


_ROWS = {
    k: [op for op, r in BOOK.facts.items() if r.kind is k and op not in _LEFT_OUT and _is_safe(r)]
    for k in Kind
}


@dataclasses.dataclass(frozen=True)
class Step:
    """One op. Numbers are taken modulo what there is to choose from, so every step is valid.

    picks:   for each tensor of the sample, 4 * (which value, 0 the latest) + (3: the sample's own)
    mode:    which way of fitting values to the op is tried first, see ``_Builder.operand``
    literal: another axis than the sample's
    shape:   that of a result which is too large for the steps after it
    wrap:    whether the step is seen as a call of a submodule, and what that returns
    """

    row: str
    call: int = 0
    picks: tuple[int, ...] = (0,)
    mode: int = 0
    literal: int = 0
    shape: Shape = (2, 3)
    wrap: int = 0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A graph and its inputs.

    outputs: which of the values that nothing reads are returned
    joined:  they are also returned all together, in one tensor
    coarse:  the inputs are multiples of one half, with zeros of both signs and ties
    """

    inputs: tuple[Shape, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...] = (0,)
    joined: bool = False
    seed: int = 0
    coarse: bool = False


_picks = st.builds(lambda back, how: 4 * back + how, st.sampled_from(_BACK), st.integers(0, 3))
_shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
_steps = st.builds(
    Step,
    row=st.sampled_from(_KINDS).flatmap(lambda kind: st.sampled_from(_ROWS[kind])),
    call=st.integers(0, 7),
    picks=st.lists(_picks, min_size=1, max_size=4).map(tuple),
    mode=st.integers(0, 3),
    literal=st.integers(0, 15),
    shape=_shapes,
    wrap=st.sampled_from([0, 0, 0, 0, 1, 2, 3]),
)


@st.composite
def recipes(draw: st.DrawFn, least: int = 1, most: int = 25) -> Recipe:
    least = draw(st.integers(least, (least + most) // 2))  # large graphs that shrink to small ones
    return Recipe(
        inputs=tuple(draw(st.lists(_shapes, min_size=1, max_size=3))),
        steps=tuple(draw(st.lists(_steps, min_size=least, max_size=most))),
        outputs=tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))),
        joined=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        coarse=draw(st.booleans()),
    )


def build(recipe: Recipe, static: int | None = None) -> tuple[Trace, list[torch.Tensor]]:
    """The recipe's graph and the inputs to run it on; the input ``static`` is a weight instead."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # before the graph: OpInfo's samples need grad mode
        found = [_samples(BOOK.facts[step.row]) for step in recipe.steps]
        with torch.no_grad():
            builder = _Builder(recipe, static)
            for step, given in zip(recipe.steps, found, strict=True):
                if given:
                    builder.step(step, given[step.call % len(given)])
            return builder.trace(), builder.inputs


def _samples(row: OpFacts) -> tuple[Call, ...]:
    """Samples of a row; a cut without any is called with the arguments that it requires."""
    if (found := calls(row)) or row.kind is not Kind.CUT:
        return found
    packet = getattr(aten, row.op.split(".")[1])
    op = getattr(packet, next(o for o in packet.overloads() if not o.endswith("out")))
    values: dict[str, Any] = {"Tensor": torch.ones(2, 3).double(), "number": 1.5, "List[int]": [2]}
    types = [str(a.type) for a in op._schema.arguments if not a.has_default_value()]
    return (Call(op, tuple(values[t] for t in types), {}),) if set(types) <= set(values) else ()


class _Builder:
    """Grows a graph op by op; every node has been run, so what an op refuses is found at once."""

    def __init__(self, recipe: Recipe, static: int | None) -> None:
        self.recipe, self.graph, self.root = recipe, Graph(), torch.nn.Module()
        self.inputs: list[torch.Tensor] = []
        self.nodes: list[Node] = []
        self.calls: list[ModuleCall] = []
        self.count = itertools.count()
        random = torch.Generator().manual_seed(recipe.seed)
        drawn = [torch.randn(s, dtype=torch.float64, generator=random) for s in recipe.inputs]
        drawn = [torch.round(2 * x) / 2 if recipe.coarse else x for x in drawn]
        given = [*drawn, torch.randint(0, 3, (4,), generator=random)]
        places = [
            None if i == static else self.graph.placeholder(f"x{i}") for i in range(len(given))
        ]
        made = [
            self.weight(x) if p is None else self.guard(p, x)
            for p, x in zip(places, given, strict=True)
        ]
        self.floats, self.integers = made[:-1], made[-1:]

    def guard(self, place: Node, x: torch.Tensor) -> Node:
        self.inputs.append(x)
        facts = (place, place.name, tuple(x.shape), insert.dtype_name(x), (False, False))
        return self.add(self.graph.call_function(insert.guard, facts), x)

    def weight(self, x: torch.Tensor, learned: bool = False) -> Node:
        """A tensor of the model; a learned one requires grad, which kernels may ask about."""
        at = f"static_{next(self.count)}"
        if learned:
            self.root.register_parameter(at, torch.nn.Parameter(x.clone()))
        else:
            self.root.register_buffer(at, x.clone())
        return self.add(self.graph.create_node("get_attr", at), x)

    def emit(self, op: Any, *args: Any, **kwargs: Any) -> Node:
        """A new node, if its op runs on the values at hand and gives finite ones."""
        value = op(*map_arg(args, _value), **map_arg(kwargs, _value))
        ys = value if isinstance(value, (tuple, list)) else (value,)
        if any(inexact(y) and not (y.numel() and bool(y.isfinite().all())) for y in ys):
            raise ValueError("not finite, or empty")
        if "std" in str(op) or "var" in str(op):  # of a constant: rounding over rounding
            assert float(ys[0].abs().min()) > 1e-6
        return self.add(self.graph.call_function(op, args, kwargs), value)

    def add(self, node: Node, value: Any) -> Node:
        node.meta["val"] = value
        self.nodes.append(node)
        return node

    # --- values in the place of a sample's tensors

    def fit(self, node: Node, shape: Shape) -> Node:
        """The elements of ``node`` in another shape, repeated or cut off as that needs."""
        have, want = _value(node), math.prod(shape)
        if tuple(have.shape) == shape:
            return node
        flat = self.emit(aten.reshape.default, node, [-1])
        if have.numel() < want:
            flat = self.emit(aten.repeat.default, flat, [-(-want // have.numel())])
        if _value(flat).numel() > want:
            flat = self.emit(aten.slice.Tensor, flat, 0, 0, want)
        return self.emit(aten.reshape.default, flat, list(shape))

    def operand(self, sample: torch.Tensor, pick: int, mode: int, first: Shape | None) -> Node:
        """What stands for one tensor of a sample call.

        mode:  0 a value as it is, 1 in a shape that goes with that of the first operand, 2 in the
               sample's shape, 3 a little of it added to the sample
        first: the shape of the first operand; None for the first one itself
        """
        back, how = divmod(pick, 4)
        shape, chosen = tuple(sample.shape), self.floats[-1 - back % len(self.floats)]
        if sample.is_complex():
            return self.emit(aten.view_as_complex.default, self.fit(chosen, (*shape, 2)))
        if not inexact(sample):
            if how != 2:
                return self.weight(sample)
            if sample.dtype == torch.bool:
                return self.emit(aten.gt.Scalar, self.fit(chosen, shape), 0.0)
            return self.fit(self.integers[-1 - back % len(self.integers)], shape)
        if mode == 1 and first is not None:
            shape = _partner(first, back)
        if how == 3:
            return self.fit(self.weight(sample, learned=back % 2 == 1), shape)
        if mode == 0 or (mode == 1 and first is None):
            return chosen
        fitted = self.fit(chosen, shape)
        if mode < 3:
            return fitted
        little = 0.05 / max(1.0, float(_value(fitted).abs().max()))
        scaled = self.emit(aten.mul.Tensor, fitted, little)
        return self.emit(aten.add.Tensor, self.weight(0.9 * sample), scaled)

    # --- steps

    def step(self, step: Step, call: Call) -> None:
        for turn in range(4):
            mark = len(self.nodes)
            try:
                return self.keep(step, *self.call(call, step, (step.mode + turn) % 4))
            except _REFUSALS:
                while len(self.nodes) > mark:
                    self.graph.erase_node(self.nodes.pop())

    def call(self, call: Call, step: Step, mode: int) -> tuple[Node, list[Node]]:
        """The op of a sample call with values for its tensors; the node, and those values."""
        row, used = BOOK.facts[step.row], list[Node]()
        picks = itertools.cycle(step.picks)
        if row.kind is Kind.ATTENTION or row.op == "aten.mse_loss":
            # PyTorch does not compare the lengths of k and v, and its derivative of the loss is wrong for
            # operands of two shapes, which ``F.mse_loss`` expands before
            mode = max(mode, 2)

        def place(name: str, value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [place(name, v) for v in value]
            if not isinstance(value, torch.Tensor):
                return value
            if not _free(row, name, value):
                return self.weight(value)
            pick = next(picks)
            pick = 0 if pick % 4 == 3 and not used else pick
            used.append(self.operand(value, pick, mode, _shape(used[0]) if used else None))
            return used[-1]

        op, placed = (
            call.op,
            {k: place(k, v) for k, v in bind(call.op, call.args, call.kwargs).items()},
        )
        rank = len(_shape(used[0])) if used else 0
        placed = {k: _literal(op, k, v, step.literal, rank) for k, v in placed.items()}
        if _random(op, placed):
            raise ValueError("left out")
        keyword = {a.name for a in op._schema.arguments if a.kwarg_only}
        args = [v for k, v in placed.items() if k not in keyword]
        kwargs = {k: v for k, v in placed.items() if k in keyword and v is not None}
        return self.emit(op, *args, **kwargs), used

    def keep(self, step: Step, node: Node, used: list[Node]) -> None:
        """Offer the results of a step to the steps after it, in a size that they can take."""
        value, results = _value(node), [node]
        if isinstance(value, (tuple, list)):
            get = self.graph.call_function
            items = [(i, v) for i, v in enumerate(value) if isinstance(v, torch.Tensor)]
            results = [self.add(get(operator.getitem, (node, i)), v) for i, v in items[:3]]
        floats = [self.real(n) for n in results if inexact(_value(n))]
        for i, result in enumerate(floats):
            if (largest := float(_value(result).abs().max())) > _LARGEST:
                floats[i] = result = self.emit(aten.mul.Tensor, result, 1 / largest)
            if _value(result).numel() > _MOST:
                floats[i] = self.fit(result, step.shape)
        self.floats += floats
        self.integers += [n for n in results if _value(n).dtype == torch.int64 and _shape(n)]
        if step.wrap and used:
            path, output = f"part_{len(self.calls)}", (results[0], (results[0], used[0]), used[0])
            last = self.nodes[-1].name
            self.calls.append(ModuleCall(path, last, tuple(used), {}, output[step.wrap - 1]))

    def real(self, node: Node) -> Node:
        """A complex value as its two parts."""
        if not _value(node).is_complex():
            return node
        return self.emit(aten.view_as_real.default, self.emit(aten.resolve_conj.default, node))

    def trace(self) -> Trace:
        ends = [n for n in reversed(self.floats) if not n.users] or self.floats[-1:]
        outputs = [ends[i % len(ends)] for i in self.recipe.outputs]
        if self.recipe.joined:
            flat = [self.emit(aten.reshape.default, n, [-1]) for n in ends]
            outputs.append(self.emit(aten.cat.default, flat))
        self.graph.output(tuple(outputs))
        parts = {call.path: torch.nn.Identity() for call in self.calls}
        shells = shell_tree(torch.nn.ModuleDict(parts))
        for path, part in parts.items():
            self.root.add_module(path, shells[id(part)])
        return Trace(CapturedModule(self.root, self.graph, Record(False)), (), tuple(self.calls))


def _value(node: Node) -> Any:
    return node.meta["val"]


def _shape(node: Node) -> Shape:
    return tuple(_value(node).shape)


def _partner(first: Shape, choice: int) -> Shape:
    """A shape that an op may take beside ``first``: broadcast, or transposed for a product."""
    swapped = (*first[:-2], *reversed(first[-2:]))
    ones = tuple(1 if i % 2 else n for i, n in enumerate(first))
    return (first, ones, first[-1:], swapped, swapped[-2:], first[-2:])[choice % 6]


def _literal(op: torch._ops.OpOverload, name: str, value: Any, choice: int, rank: int) -> Any:
    """Another axis, or the other way to keep it, where a sample says one."""
    if name == "keepdim" and choice:
        return bool(choice % 2)
    if name == "dim" and choice and rank and isinstance(value, (int, list)):
        axis = choice % (2 * rank) - rank
        if op.__name__.startswith("_fft"):  # reads beside the tensor for an axis below 0
            axis %= rank
        return [axis] if isinstance(value, list) else axis
    return value


def _free(row: OpFacts, name: str, sample: torch.Tensor) -> bool:
    """Whether something else may stand in the place of a sample's tensor."""
    if inexact(sample):
        return name in row.operands or row.kind is Kind.CUT
    if name == "offsets":  # of bags: PyTorch does not check them
        return False
    # what is written twice to one place has no gradient of its own: those indices are the sample's
    return sample.dtype == torch.bool or (len(row.operands) == 1 and not row.once)


def _random(op: torch._ops.OpOverload, args: dict[str, Any]) -> bool:
    """Whether a graph with this op would be another one on every run."""
    draws = args.get("train", args.get("dropout_p", True))  # an op without either always draws
    return torch.Tag.nondeterministic_seeded in op.tags and bool(draws)
