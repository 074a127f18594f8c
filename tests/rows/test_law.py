"""Every row of ``rules/ops.yaml``, on every sample: bits equal, law holds, gates get no gradient.

Generated from the table, so a new row is tested the moment it is written, or fails for want of a
sample. Ops go through analyze, plan, rewrite and the ledger on a graph of one op; a sample of each
kind also goes through capture (``test_whole_pipeline``).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import libragrad_fx as lg
from libragrad_fx.decide import rulebook
from libragrad_fx.decide.roles import analyze
from libragrad_fx.errors import UnknownOpError
from libragrad_fx.ops.bias import bias
from libragrad_fx.target import inexact
from libragrad_fx.types import Kind, Ledger, OpFacts, Role
from tests.rows.one_op import ALL_TWINS, Balanced, balance, cast, tensors, trace_call
from tests.samples import ELEMENTWISE, Call, calls

BOOK = rulebook.load()
ROWS = [row for row in BOOK.facts.values() if row.kind is not Kind.CUT]
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.op.removeprefix("aten."))
TOLERANCE = 1e-10  # float64, of the size of the sums involved

aten = torch.ops.aten


def carriers(row: OpFacts, call: Call) -> tuple[str, ...]:
    return tuple(tensors(call, (*row.stream, *row.factors)))


def modulators(row: OpFacts, call: Call) -> tuple[str, ...]:
    return tuple(tensors(call, (*row.gate, *row.denominator)))


def live_sets(row: OpFacts, call: Call) -> list[tuple[str, ...]]:
    """Every carrier alone, all of them, and all with every operand that modulates."""
    names, gates = carriers(row, call), modulators(row, call)
    sets = [(n,) for n in names] + [names, names + gates]
    return [s for s in dict.fromkeys(sets) if s]


def weights(outputs: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(y.shape, dtype=torch.float64, generator=generator) for y in map(real, outputs)
    ]


def real(x: torch.Tensor) -> torch.Tensor:
    """A complex number as its two parts."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def weighted_sum(outputs: Any) -> torch.Tensor:
    """A scalar whose gradient with respect to every output is generic."""
    moving = [real(y) for y in outputs if inexact(y) and y.requires_grad]
    return sum((y * w).sum() for y, w in zip(moving, weights(moving), strict=True))


def run(module: Any, inputs: Any) -> list[Any]:
    torch.manual_seed(7)
    moving = [x.detach().clone().requires_grad_() for x in inputs]
    return list(module(*moving))


def same_bits(a: Any, b: Any) -> bool:
    """Stricter than ``torch.equal``: tells -0.0 from 0.0 and takes nan for equal to itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = real(a).resolve_neg(), real(b).resolve_neg()
    if not a.is_floating_point():
        return torch.equal(a, b)
    as_int = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(a.detach().contiguous().view(as_int), b.detach().contiguous().view(as_int))


def assert_same_bits(made: Balanced, row: OpFacts, inputs: Any = None) -> None:
    inputs = made.inputs if inputs is None else inputs
    torch.manual_seed(7)
    moving = [x.detach().clone().requires_grad_() for x in inputs]
    plain = [y for i, y in enumerate(made.plain(moving)) if i not in row.gate_outputs]
    for a, b in zip(plain, run(made.module, inputs), strict=True):
        assert same_bits(a, b), f"{made.call}: {a} is not {b}"


def size_of(made: Balanced) -> float:
    """The size of the sums that the law compares: Σ|y w| + Σ|x|, which no cancellation hides."""
    outputs = [
        real(y.detach()) for y in run(made.module, made.inputs) if inexact(y) and y.requires_grad
    ]
    flow = sum(float((y * w).abs().sum()) for y, w in zip(outputs, weights(outputs), strict=True))
    return 1.0 + flow + sum(float(x.abs().sum()) for x in made.inputs)


def assert_law(account: Ledger, size: float, what: str) -> None:
    assert account.rows, f"{what}: no node carries gradient"
    assert math.isfinite(size)
    for r in account.rows:
        assert abs(r.residual) <= TOLERANCE * size, f"{what}\n{account}"
    assert account.completeness_error <= TOLERANCE * size, f"{what}\n{account}"


def test_every_row_has_samples() -> None:
    assert [row.op for row in ROWS if not calls(row)] == []


# what no test on a CPU can call, with the reason
LEFT_OUT = {
    "TorchScript alone makes it": (
        "split.default", "mT.a", "numpy_T.a", "to.prim_Device", "to.prim_dtype", "to.prim_other",
        "index.Tensor_hacked_twin", "index_put.hacked_twin", "einsum.sublist",
    ),
    "it has a kernel on CUDA alone": ("mm.dtype", "bmm.dtype", "addmm.dtype", "baddbmm.dtype"),
    "no operand is a tensor that carries": (
        "repeat_interleave.Tensor", "where.Scalar", "where.default", "remainder.Scalar_Tensor",
        "xlogy.Scalar_Self", "special_xlog1py.self_scalar",
    ),
}  # fmt: skip


def overloads(row: OpFacts) -> set[str]:
    """The overloads that a packet row speaks for and a functional graph may hold."""
    packet = getattr(aten, row.op.removeprefix("aten.").split(".")[0])
    # older PyTorch has some for named dimensions, which torch.export does not know
    unnamed = (name for name in packet.overloads() if "name" not in name.lower())
    found = (getattr(packet, name) for name in unnamed)
    return {str(op) for op in found if BOOK.fact(op) is row and _of_tensors(op._schema)}


def _of_tensors(schema: torch.FunctionSchema) -> bool:
    sides = (schema.arguments, schema.returns)
    return not schema.is_mutable and all(any("Tensor" in str(a.type) for a in s) for s in sides)


def test_every_overload_of_a_packet_has_samples() -> None:
    """A row of a packet is a claim about each of its overloads: an untested one may be false."""
    rows = [row for row in ROWS if row.registered_by is None]
    claimed = set[str]().union(*map(overloads, rows))
    sampled = {str(call.op) for row in rows for call in calls(row)}
    left_out = {f"aten.{name}" for names in LEFT_OUT.values() for name in names}
    assert sorted(claimed - sampled - left_out) == []
    assert sorted(left_out - (claimed - sampled)) == [], "left out, yet sampled or not claimed"


@each_row
def test_samples_reach_every_operand(row: OpFacts) -> None:
    """An argument that a row names and no sample gives a float tensor to is an untested claim."""
    reached = {n.split("[")[0] for c in calls(row) for n in tensors(c, row.operands)}
    arguments = {a.name: str(a.type) for c in calls(row) for a in c.op._schema.arguments}
    named = {n for n in row.operands if "Tensor" in arguments.get(n, "")}
    assert reached >= named


@each_row
def test_forward_bits(row: OpFacts) -> None:
    for call in calls(row):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            typed, live = cast(call, dtype), carriers(row, call)
            if not live:  # fill with a number: nothing depends on the input
                continue
            try:
                typed.op(*typed.args, **typed.kwargs)
            except (RuntimeError, NotImplementedError):
                assert dtype is torch.bfloat16, f"{call} has no {dtype} kernel"
                continue
            assert_same_bits(balance(BOOK, row, typed, live), row)


@each_row
def test_law(row: OpFacts) -> None:
    """The balanced backward keeps the law; and an edit is there because autograd's does not."""
    edited, needed = 0, 0
    for call in calls(row):
        for live in live_sets(row, call):
            made = balance(BOOK, row, call, live)
            torch.manual_seed(7)
            assert_law(made.ledger(weighted_sum), size_of(made), f"{call}, live: {', '.join(live)}")
            edited += bool(made.plan.edits)
            needed += bool(made.plan.edits) and changes_gradient(made, row)
    assert edited or row.kind not in ALWAYS_EDITED
    assert needed or not edited or row.op in UNCHANGED, "its edits change no gradient"


ALWAYS_EDITED = (Kind.GATED, Kind.RECURRENT, Kind.ATTENTION)
# the secant of relu is its derivative, and an Elman cell has no gates; boxes get no gradient at all
UNCHANGED = (
    "aten.rnn_relu.input", "torchvision.roi_align", "torchvision.roi_pool", "torchvision.ps_roi_align",
    "torchvision.ps_roi_pool",
)  # fmt: skip


def changes_gradient(made: Balanced, row: OpFacts) -> bool:
    """Whether the balanced gradient of any input differs from autograd's."""

    def gradients(outputs: list[Any], moving: list[torch.Tensor]) -> Any:
        total = weighted_sum(outputs)
        return torch.autograd.grad(total, moving, allow_unused=True, materialize_grads=True)

    plain, mine = ([x.detach().clone().requires_grad_() for x in made.inputs] for _ in range(2))
    torch.manual_seed(7)
    outputs = [y for i, y in enumerate(made.plain(plain)) if i not in row.gate_outputs]
    theirs = gradients(outputs, plain)
    torch.manual_seed(7)
    ours = gradients(list(made.module(*mine)), mine)
    return any(not torch.allclose(a, b) for a, b in zip(theirs, ours, strict=True))


MODULATED = [row for row in ROWS if row.gate or row.denominator]


@pytest.mark.parametrize("row", MODULATED, ids=lambda r: r.op)
def test_what_modulates_gets_no_gradient(row: OpFacts) -> None:
    checked = 0
    for call in calls(row):
        names, gates = carriers(row, call), modulators(row, call)
        if not gates or not names:
            continue
        made = balance(BOOK, row, call, names + gates)
        checked += assert_no_gradient(made, gates)
    assert checked > 0


PRODUCTS = [
    row
    for row in ROWS
    if (row.kind is Kind.PRODUCT and len(row.factors) > 1) or row.op == "aten.einsum"
]


@pytest.mark.parametrize("row", PRODUCTS, ids=lambda r: r.op)
def test_a_factor_that_is_a_gate_gets_no_gradient(row: OpFacts) -> None:
    checked = 0
    for call in calls(row):
        factors = tuple(tensors(call, row.factors))
        for gate in factors if len(factors) > 1 else ():
            live = carriers(row, call)
            made = balance(BOOK, row, call, live, gated=(gate,))
            checked += assert_no_gradient(made, (gate,))
            assert_law(made.ledger(weighted_sum), size_of(made), f"{call}, gate: {gate}")
    assert checked > 0


def assert_no_gradient(made: Balanced, gates: tuple[str, ...]) -> bool:
    """None reaches ``gates``; whether any reaches the others."""
    torch.manual_seed(7)
    moving = [x.detach().clone().requires_grad_() for x in made.inputs]
    grads = torch.autograd.grad(weighted_sum(made.module(*moving)), moving, allow_unused=True)
    named = dict(zip(made.live, grads, strict=True))
    for name in gates:
        assert named[name] is None or not named[name].any(), (
            f"{made.call}: {name} gets {named[name]}"
        )
    carried = [g for n, g in named.items() if n not in gates]
    return any(g is not None and bool(g.any()) for g in carried)


@pytest.mark.parametrize("row", MODULATED, ids=lambda r: r.op)
def test_what_modulates_alone_is_balanced_or_reported(row: OpFacts) -> None:
    """A gate operand may be all that moves; what the rules cannot balance they name."""
    for call in calls(row):
        for gate in modulators(row, call):
            try:
                made = balance(BOOK, row, call, (gate,))
            except UnknownOpError as e:
                assert gate in row.gate
                assert str(call.op) in str(e)  # noqa: PT017
                continue
            assert_law(made.ledger(weighted_sum), size_of(made), f"{call}, live: {gate}")


SOURCES = [row for row in ROWS if row.kind is Kind.GATE_SOURCE]


@pytest.mark.parametrize("row", SOURCES, ids=lambda r: r.op)
def test_a_gate_source_beside_a_value_is_a_gate(row: OpFacts) -> None:
    for call in calls(row):
        trace, _ = trace_call(row, call, carriers(row, call), beside=True)
        analysis = analyze(trace, BOOK)
        (node,) = (n.name for n in trace.graph.nodes if n.target is call.op)
        assert analysis.roles[node] is Role.GATE
        assert node not in analysis.live
        assert analysis.relabelled == frozenset()


@pytest.mark.parametrize("op", [aten.var_mean.correction, aten.std_mean.correction], ids=str)
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("taken", [(0,), (0, 1)])
def test_a_gate_output_that_is_demanded_is_balanced(op: Any, kept: bool, taken: Any) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            y = op(x, [1], correction=1, keepdim=kept)
            return sum(y[i] * (i + 1) for i in taken)

    x = torch.randn(4, 5, dtype=torch.float64)
    model = Model()
    gm = lg.transform(model, x)
    certificate = lg.verify(model, gm, x, lambda y: y.sum())
    assert certificate.ok, certificate
    (row,) = (r for r in certificate.rows if "mean" in r.op)
    assert abs(row.residual) < TOLERANCE
    assert len(gm.plan.edits) == 1


# --- edge points


EDGES = [0.0, -0.0, 5e-324, 1e-300, 1e-12, 1e-8, 2e-8, 1e-4, 0.5, 1.0, 1.5, 2.0, 3.0, 6.0, 30.0, 1e4, 1e150]
INFINITE = [math.inf, -math.inf, math.nan, 1e308, -1e308]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_edge_points(name: str) -> None:
    """Bits everywhere, also at ±inf and nan; the law element by element where the op is finite."""
    row = BOOK.facts[f"aten.{name}"]
    x = torch.tensor([s * e for e in EDGES for s in (1, -1)], dtype=torch.float64)
    everywhere = torch.cat([x, torch.tensor(INFINITE, dtype=torch.float64)])
    packet, _, overload = name.partition(".")
    op = getattr(getattr(aten, packet), overload or "default")
    for points in (everywhere, everywhere.float(), everywhere.bfloat16(), everywhere[:0]):
        made = balance(BOOK, row, Call(op, (points, *ELEMENTWISE[name]), {}), ("self",))
        assert_same_bits(made, row)
    fn = op if row.twin is None else ALL_TWINS[row.twin]
    moving = x.clone().requires_grad_()
    y = fn(moving, *ELEMENTWISE[name])
    (r,) = torch.autograd.grad(y.sum(), moving)
    (slope,) = torch.autograd.grad(op(moving, *ELEMENTWISE[name]).sum(), moving)
    constant = bias(row.bias, op, ["self"], (x, *ELEMENTWISE[name]), {})
    finite = y.isfinite() & slope.isfinite()
    assert finite.sum() >= 8
    assert r[finite].isfinite().all()
    made_of = x * r + (0.0 if constant is None else constant)
    torch.testing.assert_close(made_of[finite], y.detach()[finite], rtol=TOLERANCE, atol=1e-15)


def test_edge_points_cover_every_elementwise_row() -> None:
    """Rows of these kinds with one tensor and no dimension argument are elementwise."""
    smooth = (Kind.GATED, Kind.GATE_SOURCE, Kind.SATURATING)
    one_tensor = {
        row.op.removeprefix("aten.")
        for row in ROWS
        if row.kind in smooth and row.operands == ("self",) and not _of_matrices(row)
    }
    assert one_tensor <= set(ELEMENTWISE)


def _of_matrices(row: OpFacts) -> bool:
    arguments = {a.name for c in calls(row) for a in c.op._schema.arguments}
    of_several = any("dim" in a or a == "target" for a in arguments)
    return row.op.startswith(("aten.linalg_", "aten.prod.")) or of_several


EMPTY = {
    "add": (2, 0), "mul": (2, 0), "where": (2, 0), "cat": (2, 0), "div": (2, 0), "maximum": (2, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", EMPTY)
def test_empty_tensors(name: str) -> None:
    row, x = BOOK.facts[f"aten.{name}"], torch.empty(EMPTY[name], dtype=torch.float64)
    args: dict[str, Any] = {"where": (x > 0, x, x), "cat": ([x, x],)}
    packet = getattr(aten, name)
    overload = packet.self if name == "where" else getattr(packet, "Tensor", None) or packet.default
    call = Call(overload, args.get(name, (x, x)), {})
    made = balance(BOOK, row, call, carriers(row, call))
    assert_same_bits(made, row)
    assert_law(made.ledger(weighted_sum), 1.0, str(call))


NOT_ELEMENTWISE = {"aten.inner", "aten.vdot", "aten.cross", "aten.linalg_cross"}
BROADCAST = [
    r for r in ROWS if set(r.operands) == {"self", "other"} and r.op not in NOT_ELEMENTWISE
]
SHAPES = [((3, 1), (4,)), ((), (2, 3)), ((2, 3), ()), ((1, 3), (2, 1))]


@pytest.mark.parametrize("row", BROADCAST, ids=lambda r: r.op)
def test_broadcasting(row: OpFacts) -> None:
    packet = getattr(aten, row.op.split(".")[1])
    for left, right in (
        SHAPES if row.op != "aten.matmul" else [((2, 1, 3, 4), (5, 4, 2)), ((4,), (3, 4, 2))]
    ):
        a, b = (torch.rand(s, dtype=torch.float64) + 0.5 for s in (left, right))
        args = (a.mean() > 0, a, b) if row.op == "aten.where" else (a, b)
        overload = torch._C._jit_resolve_packet(str(packet).replace(".", "::"), *args)
        call = Call(getattr(packet, overload), args, {})
        for live in live_sets(row, call):
            made = balance(BOOK, row, call, live)
            assert_same_bits(made, row)
            assert_law(made.ledger(weighted_sum), size_of(made), f"{call}, live: {live}")


# --- the whole pipeline, one sample of every kind


def _one_of_each_kind() -> list[OpFacts]:
    return [
        next(iter(g))
        for _, g in itertools.groupby(sorted(ROWS, key=lambda r: r.kind), lambda r: r.kind)
    ]


WHOLE = [
    *_one_of_each_kind(),
    *(
        BOOK.facts[f"aten.{n}"]
        for n in ("gelu", "mul", "div", "linear", "softmax", "batch_norm", "var")
    ),
]


class OneOp(torch.nn.Module):
    """A user's model of one op; operands that do not move are constants."""

    def __init__(self, call: Call, live: tuple[str, ...]) -> None:
        super().__init__()
        self.sample, self.live = call, live

    def forward(self, a: Any, b: Any = None, c: Any = None) -> Any:
        made = Balanced(self.sample, self.live, (), None, None, None)  # type: ignore[arg-type]
        inputs = (a, b, c)[: len(self.live)]
        return tuple(y for y in made.plain(inputs) if inexact(y))


@pytest.mark.filterwarnings("ignore::libragrad_fx.errors.GateOutputWarning")
@pytest.mark.parametrize("row", WHOLE, ids=lambda r: r.op)
def test_whole_pipeline(row: OpFacts) -> None:
    call = calls(row)[0]
    live = () if row.kind is Kind.EMBEDDING else carriers(row, call)
    model = OneOp(call, live) if live else torch.nn.Embedding(7, 3, dtype=torch.float64)
    named = tensors(call, row.operands)
    inputs = tuple(named[n] for n in live) or (call.args[1],)
    module = lg.transform(model, inputs)
    certificate = lg.verify(model, module, inputs, target=_total)
    assert certificate.ok, str(certificate)
    if live:  # an embedding is where the signal starts: it has no operand to account for
        assert_law(lg.audit(module, inputs, _total), 1.0 + abs(certificate.output), row.op)


def _total(outputs: Any) -> torch.Tensor:
    return weighted_sum(outputs if isinstance(outputs, tuple) else (outputs,))
