"""Ops that write over dead operands: results to the bit, and nothing written that is read again."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx

from libragrad_fx.programs.reuse import reuse

aten = torch.ops.aten
ROWS, COLUMNS = 3, 4
UNARY = (torch.neg, torch.abs, torch.relu, torch.tanh)
BINARY = (torch.add, torch.mul, torch.sub)
VIEWS = (lambda t: t.reshape(-1).view(t.shape), lambda t: t.transpose(0, 1).transpose(0, 1), lambda t: t[:],
         lambda t: t[:1].expand_as(t))  # fmt: skip
SEVERAL = (lambda t: torch.native_layer_norm(t, (COLUMNS,), None, None, 1e-5)[0],
           lambda t: torch.max(t, 1)[0][:, None] + t, lambda t: t @ t.t() @ t)  # fmt: skip


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Steps, each an op and the places of its operands among the values so far."""
    count = draw(st.integers(1, 14))
    ops = len(UNARY) + len(BINARY) + len(VIEWS) + len(SEVERAL)
    return [
        (draw(st.integers(0, ops - 1)), draw(st.integers(0, 30)), draw(st.integers(0, 30)))
        for _ in range(count)
    ]


def run(steps: list[tuple[int, int, int]], values: list[torch.Tensor]) -> list[torch.Tensor]:
    for op, i, j in steps:
        x, y = values[-1 - i % len(values)], values[-1 - j % len(values)]
        if op < len(UNARY):
            values.append(UNARY[op](x))
        elif (op := op - len(UNARY)) < len(BINARY):
            values.append(BINARY[op](x, y))
        elif (op := op - len(BINARY)) < len(VIEWS):
            values.append(VIEWS[op](x))
        else:
            values.append(SEVERAL[op - len(VIEWS)](x))
    return values


def held(made: GraphModule, inputs: list[torch.Tensor]) -> None:
    """The graph that reuses memory gives the same bits, twice, and leaves its inputs alone."""
    want, before = made(*inputs), [t.clone() for t in inputs]
    over = GraphModule(made, reuse(made.graph))
    for _ in range(2):
        torch.testing.assert_close([*over(*inputs)], [*want], rtol=0, atol=0, equal_nan=True)
        assert all(map(torch.equal, inputs, before))


@settings(deadline=None, max_examples=60)
@given(programs(), st.data())
def test_bits_are_the_same(steps, data):
    inputs = [torch.randn(ROWS, COLUMNS), torch.randn(ROWS, COLUMNS)]
    shown = data.draw(st.sets(st.integers(0, len(steps) + 1), min_size=1))
    held(make_fx(lambda *t: [run(steps, [*t])[i] for i in shown])(*inputs), inputs)


def written_over(graph: Graph) -> list[str]:
    names = [n.name for n in graph.nodes]
    return [next(k for k in names if k == n.kwargs[name].name) for n in graph.nodes
            for name in ("out", "grad_input") if name in n.kwargs]  # fmt: skip


def reused(f, *inputs):
    made = make_fx(f)(*inputs)
    held(made, [*inputs])
    return len(written_over(reuse(made.graph)))


X, ROW = torch.randn(ROWS, COLUMNS), torch.randn(COLUMNS)


def test_a_chain_is_one_memory():
    assert reused(lambda x: [x.neg().abs().tanh()], X) == 2  # not the input


def test_what_is_read_later_stays():
    def f(x):
        y = x.neg()
        return [y.abs() + y]

    assert reused(f, X) == 1  # the sum, not abs


def test_an_output_stays():
    def f(x):
        y = x.neg()
        return [y, y.abs()]

    assert reused(f, X) == 0


def test_the_second_operand_too():
    assert reused(lambda x: [x - x.neg()], X) == 1


def test_another_shape_or_dtype_is_new():
    assert reused(lambda x, row: [row.neg() + x], X, ROW) == 0
    assert reused(lambda x: [x.neg() > 0], X) == 0


def test_its_own_transpose_is_another_place():
    x = torch.randn(ROWS, ROWS)

    def f(x):
        y = x.neg()
        return [y + y.t()]

    assert reused(f, x) == 0


def test_an_expanded_operand_is_read_many_times():
    assert reused(lambda row: [row.neg().expand(ROWS, COLUMNS).abs()], ROW) == 0


def test_several_new_results_are_apart():
    def f(x):
        normed, mean, scale = torch.native_layer_norm(x, (COLUMNS,), None, None, 1e-5)
        return [normed.neg(), mean, scale]

    assert reused(f, X) == 1


def test_a_constant_stays():
    constant = torch.randn(ROWS, COLUMNS)
    made = GraphModule(torch.nn.Module(), Graph())
    made.register_buffer("c", constant.clone())
    read = made.graph.get_attr("c")
    read.meta["val"] = constant
    neg = made.graph.call_function(aten.neg.default, (read,))
    neg.meta["val"] = constant
    made.graph.output([neg])
    over = GraphModule(made, reuse(made.graph))
    over()
    assert torch.equal(over.c, constant)


def test_the_gelu_of_a_backward():
    def f(g, x):
        return [aten.gelu_backward(g.neg(), x)]

    assert reused(f, X, X) == 1


def test_a_view_of_what_lies_otherwise_than_traced() -> None:
    """The fake backward of softplus says that it lies dense; the real one lies as the gradient."""
    f = lambda g, x: [aten.softplus_backward(g.t(), x, 1, 20).reshape(-1).neg()]  # noqa: E731
    g, x = torch.randn(COLUMNS, ROWS), torch.randn(ROWS, COLUMNS)
    with FakeTensorMode() as mode:
        made = make_fx(f)(mode.from_tensor(g), mode.from_tensor(x))
    assert not aten.softplus_backward(g.t(), x, 1, 20).is_contiguous()
    assert [n for n in made.graph.nodes if n.target is aten.view.default]
    over = GraphModule(made, reuse(made.graph))
    assert torch.equal(over(g, x)[0], f(g, x)[0])


def test_an_interpreter_runs_it_too():
    made = make_fx(lambda x: [x.neg().abs()])(X)
    over = GraphModule(made, reuse(made.graph))
    assert torch.equal(Interpreter(over).run(X)[0], made(X)[0])
