"""The algebra of zeros: each rule says the same of a part as its op of the whole tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from libragrad_fx.kernels.pointwise import gelu_gate, norm_gradient
from libragrad_fx.ops.attention import attention_value
from libragrad_fx.programs.zeros import _RULES, Part, Zeros

aten = torch.ops.aten
F64 = torch.float64


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64)


def part(*shape: int, axis: int, start: int = 1, length: int = 2, inner: int = 1, count: int = 0) -> Part:
    """A random tensor that is zero but for a part."""
    count = count or shape[axis] // inner
    kept = rand(*shape[:axis], shape[axis] // count * length, *shape[axis + 1 :])
    return Part(kept, shape, F64, kept.device, axis, inner, count, start, length)


def nothing(*shape: int) -> Part:
    return Part(None, shape, F64, torch.device("cpu"))


def parts(*shape: int) -> list[Part]:
    """Parts of each axis, and of an axis that views have joined: two times over, three groups of two."""
    found = [part(*shape, axis=axis) for axis in range(len(shape)) if shape[axis] > 2]
    return [*found, *(part(*shape, axis=a, inner=2, count=3) for a in range(len(shape)) if shape[a] == 12)]


def each(make: Callable[[Part], tuple[Any, ...]], *shape: int) -> list[tuple[Any, ...]]:
    return [make(p) for p in [*parts(*shape), nothing(*shape)]]


def around(make: Callable[[torch.Tensor], tuple[Any, ...]], *shape: int) -> list[tuple[Any, ...]]:
    return [*each(make, *shape), make(rand(*shape))]


POINTWISE = {
    aten.gelu_backward.default: (), aten.silu_backward.default: (), aten.tanh_backward.default: (),
    aten.sigmoid_backward.default: (), aten.hardswish_backward.default: (),
    aten.hardsigmoid_backward.default: (), aten.threshold_backward.default: (0.0,),
    aten.leaky_relu_backward.default: (0.1, False), aten.softplus_backward.default: (1.0, 20.0),
    aten.hardtanh_backward.default: (-1.0, 1.0),
}  # fmt: skip
"""Ops of a gradient and a tensor, and what follows."""
QKV = (rand(2, 2, 5, 4), rand(2, 2, 6, 4))
SAMPLES: dict[Any, list[tuple[Any, ...]]] = {
    aten.zeros.default: [([2, 3],)],
    aten.new_zeros.default: [(rand(2), [2, 3]), (part(4, 3, axis=0), [2])],
    aten.zeros_like.default: [(rand(2, 3),), (part(4, 3, axis=0),)],
    aten.add.Tensor: [
        *((p, q) for p in parts(4, 12) for q in [*parts(4, 12), rand(4, 12), rand(12)]),
        (nothing(4, 12), rand(12)), (rand(4, 12), nothing(4, 12)), (nothing(4, 1), rand(4, 12)),
        (nothing(4, 12), part(4, 12, axis=0)), (nothing(1, 12), part(4, 12, axis=0)),
    ],
    aten.sub.Tensor: [(nothing(4, 3), rand(4, 3)), (rand(4, 3), nothing(4, 3)),
                      *((part(4, 3, axis=0), q) for q in (
                          part(4, 3, axis=0), part(4, 1, axis=0), part(4, 1, axis=0, start=0),
                          part(2, 4, 3, axis=1), part(3, 1, 3, axis=0)))],
    aten.mul.Tensor: [
        *((p, q) for p in parts(4, 12) for q in [*parts(4, 12), rand(4, 12), rand(12), rand(4, 1), 0.5]),
        (rand(12), part(4, 12, axis=1, inner=2, count=3)), (rand(2, 4, 12), part(4, 12, axis=0)),
    ],
    aten.div.Tensor: [*((p, rand(4, 12)) for p in parts(4, 12)), (rand(4, 12), part(4, 12, axis=0) ),
                      (part(4, 12, axis=0), 2.0)],
    aten.mul.Scalar: each(lambda p: (p, 3.0), 4, 12),
    aten.div.Scalar: each(lambda p: (p, 3.0), 4, 12),
    **{op: each(lambda p: (p,), 4, 12) for op in (
        aten.neg.default, aten.alias.default, aten.detach.default, aten.clone.default,
        aten.nan_to_num.default, aten._to_copy.default, aten.sum.default)},
    **{op: [*each(lambda p, more=more: (p, rand(4, 12), *more), 4, 12),
            (rand(4, 12), part(4, 12, axis=0), *more)] for op, more in POINTWISE.items()},
    aten.elu_backward.default: each(lambda p: (p, 1.0, 1.0, 1.0, False, rand(4, 12)), 4, 12),
    aten.mm.default: [
        *around(lambda x: (x, rand(12, 3)), 4, 12), *around(lambda x: (rand(3, 4), x), 4, 12),
        *((p, q) for p in parts(4, 12) for q in parts(12, 5)),
    ],
    aten.bmm.default: [
        *around(lambda x: (x, rand(4, 5, 3)), 4, 12, 5), *around(lambda x: (rand(4, 3, 12), x), 4, 12, 5),
        *((p, q) for p in parts(4, 3, 12) for q in parts(4, 12, 5)),
    ],
    aten.addmm.default: [(rand(3), nothing(4, 5), rand(5, 3)), (rand(3), rand(4, 5), nothing(5, 3)),
                         (rand(3), part(4, 5, axis=0), rand(5, 3))],
    aten.convolution.default: [
        (nothing(2, 3, 6, 6), rand(4, 3, 2, 2), b, [2, 2], [0, 0], [1, 1], False, [0, 0], 1)
        for b in (rand(4), None)
    ],
    aten.convolution_backward.default: [
        (p, rand(2, 3, 5, 5), rand(8, 3, 2, 2), b, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, mask)
        for p in parts(2, 8, 4, 4) for b in ([8], None)
        for mask in ([True, False, False], [True, True, False])
    ],
    aten.native_layer_norm.default: [(nothing(2, 4), [4], rand(4), rand(4), 1e-5),
                                     (nothing(2, 4), [4], None, None, 1e-5)],
    aten.view.default: [
        (p, shape) for p in [*parts(4, 3, 12), nothing(4, 3, 12)]
        for shape in (
            [12, 12], [4, 36], [144], [4, 3, 2, 6], [2, 2, 3, 12], [4, 3, 12, 1], [-1, 12], [8, 18],
        )
    ],
    aten._unsafe_view.default: [(p, [12, 12]) for p in parts(4, 3, 12)],
    aten.as_strided.default: [
        (x, *how) for x in (rand(4, 6), nothing(4, 6), rand(6, 4).t(), part(4, 6, axis=1))
        for how in (([4, 6, 1, 1], [6, 1, 6, 6]), ([24], [1], 0), ([4, 3], [6, 1]), ([4, 5], [6, 1], 1))
    ],
    aten.as_strided_scatter.default: [
        (x, rand(*shape), [*shape], [*strides], 0)
        for x in (nothing(4, 6), rand(4, 6))
        for shape, strides in (((4, 6, 1), (6, 1, 1)), ((4, 3), (6, 1)), ((6, 4), (1, 6)))
    ],
    aten.copy.default: [
        *((nothing(4, 6), x) for x in (rand(4, 6), rand(6), part(4, 6, axis=0), rand(4, 6).float())),
        (part(4, 6, axis=0), rand(4, 6)),
    ],
    aten.permute.default: each(lambda p: (p, [2, 0, 1]), 4, 3, 12),
    aten.transpose.int: [*each(lambda p: (p, 0, -1), 4, 3, 12), *each(lambda p: (p, 0, 1), 4, 3, 12)],
    aten.t.default: each(lambda p: (p,), 4, 12),
    aten.unsqueeze.default: [*each(lambda p: (p, 0), 4, 12), *each(lambda p: (p, -1), 4, 12)],
    aten.squeeze.dim: [*each(lambda p: (p, 1), 4, 1, 12), *each(lambda p: (p, 0), 4, 12)],
    aten.expand.default: [
        *each(lambda p: (p, [5, 4, 12]), 4, 12), *each(lambda p: (p, [4, 6, -1]), 4, 1, 12),
    ],
    aten.sum.dim_IntList: [
        *each(lambda p: (p, [0]), 4, 12), *each(lambda p: (p, [-1], True), 4, 3, 12),
        *each(lambda p: (p, [0, 2]), 4, 3, 12), *each(lambda p: (p, None), 4, 12),
    ],
    aten.select.int: [
        (p, a, i) for p in [*parts(4, 12), nothing(4, 12)] for a in (0, -1) for i in (0, 1, -1)
    ],
    aten.slice.Tensor: [
        (p, *how) for p in [*parts(4, 12), nothing(4, 12)]
        for how in ((0,), (0, 0, 2), (1, 2, 2**63 - 1), (0, -3, -1), (1, 0, 12, 2), (1, 2, 2), (1, 4, 6))
    ],
    aten.unbind.int: [*each(lambda p: (p, 0), 4, 12), *each(lambda p: (p, 1), 4, 3)],
    aten.split.Tensor: [*each(lambda p: (p, 5, 1), 4, 12), *each(lambda p: (p, 3), 4, 12)],
    aten.split_with_sizes.default: each(lambda p: (p, [2, 3, 7], 1), 4, 12),
    aten.cat.default: [
        *(([nothing(2, 3), x, nothing(4, 3)], 0) for x in (rand(3, 3), part(3, 3, axis=0))),
        ([part(4, 3, axis=1), nothing(4, 2), rand(4, 3), nothing(4, 1)], 1), ([nothing(2), nothing(3)],),
    ],
    aten.stack.default: [
        ([nothing(4, 3), x], -1) for x in (rand(4, 3), part(4, 3, axis=1))
    ] + [([nothing(4, 3), nothing(4, 3)],)],
    aten.select_backward.default: [
        (g, [4, 5, 12], 1, -2) for g in (rand(4, 12), nothing(4, 12), *parts(4, 12))
    ],
    aten.slice_backward.default: [
        (g, [4, 9, 12], 1, first, last, step)
        for g in (rand(4, 3, 12), nothing(4, 3, 12), *parts(4, 3, 12))
        for first, last, step in ((2, 5, 1), (-3, 2**63 - 1, 1), (0, 9, 3))
    ] + [(rand(4, 12), [4, 12], 0, 0, 2**63 - 1, 1)],
    gelu_gate: each(lambda p: (p, rand(4, 12), "none"), 4, 12),
    norm_gradient: [
        (p, w, rand(4, 3, 1), centred) for p in [*parts(4, 3, 12), nothing(4, 3, 12)]
        for w, centred in ((None, False), (rand(12), True))
    ],
    attention_value: [
        (g, *QKV, mask, (QKV[0] @ QKV[1].mT).logsumexp(-1), causal, 1.0)
        for g in parts(2, 2, 5, 3)
        for causal, mask in ((False, None), (True, None), (False, rand(5, 6)), (False, rand(2, 1, 1, 6)))
    ],
}  # fmt: skip


@pytest.mark.parametrize("op", _RULES, ids=str)
def test_rule(op: Any) -> None:
    """What the walk makes of parts is what the op makes of whole tensors, and some sample uses the rule."""
    used = False
    for args in SAMPLES[op]:
        walk = Zeros(torch.fx.GraphModule({}, torch.fx.Graph()))
        found = walk.call_function(op, args, {})
        wholes = pytree.tree_map(lambda a: a.whole if isinstance(a, Part) else a, (args, found))
        want = op(*wholes[0])
        for got, right in zip(pytree.tree_leaves(wholes[1]), pytree.tree_leaves(want), strict=True):
            if right is None:  # a gradient that is not asked for
                continue
            assert (got.shape, got.dtype) == (right.shape, right.dtype)
            torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)
        used |= walk.ruled[op] > 0
    assert used


def test_a_part_is_where_it_says() -> None:
    p = part(2, 12, axis=1, inner=2, count=3, start=1, length=1)
    whole = torch.zeros(2, 2, 3, 2, dtype=F64)
    whole[:, :, 1] = p.kept.view(2, 2, 2)  # type: ignore[union-attr]
    assert torch.equal(p.whole, whole.view(2, 12))
