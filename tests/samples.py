"""Calls that exercise a row of ``rules/ops.yaml``: made by hand, else PyTorch's own OpInfo samples.

A row needs an entry in ``BY_HAND`` only where no OpInfo calls its op directly, or where OpInfo's
first samples miss a case that matters. ``calls(row)`` is empty for a row without samples, and
``tests/rows/test_law.py`` fails on it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from libragrad_fx.types import OpFacts

aten = torch.ops.aten
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Builder = Callable[[], Arguments]
_OPINFO_LIMIT = 2


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an ATen overload with concrete arguments, in float64."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        return (
            f"{self.op}({', '.join([*map(_short, self.args), *map(_named, self.kwargs.items())])})"
        )


def calls(row: OpFacts) -> tuple[Call, ...]:
    """All samples of a row; the same ones every time."""
    if row.registered_by is not None:
        importlib.import_module(row.registered_by)
    return _calls(row.op)


@functools.cache
def _calls(op: str) -> tuple[Call, ...]:
    namespace, _, rest = op.partition(".")
    packet, _, overload = rest.partition(".")
    found = []
    for build in BY_HAND.get(op, ()):
        torch.manual_seed(0)
        found.append(call_of(packet, *build(), namespace))
    if namespace != "aten":
        return tuple(found)
    made = (call_of(packet, *a) for a in _opinfo_arguments(packet))
    fitting = (c for c in made if overload in ("", c.op._overloadname))
    return (
        *found,
        *itertools.islice(fitting, 1 if found else _OPINFO_LIMIT),
        *_by_overload(op),
    )


def _by_overload(op: str) -> Iterator[Call]:
    """Samples of overloads that PyTorch would not pick by itself, of the packet ``op``."""
    for name, builders in BY_OVERLOAD.items():
        packet, overload = name.removeprefix("aten.").rsplit(".", 1)
        for build in builders if name.startswith(f"{op}.") else ():
            torch.manual_seed(0)
            yield Call(getattr(getattr(aten, packet), overload), *build())


def call_of(
    packet: str, args: tuple[Any, ...], kwargs: dict[str, Any], namespace: str = "aten"
) -> Call:
    """The overload that PyTorch picks for these arguments."""
    overload = torch._C._jit_resolve_packet(f"{namespace}::{packet}", *args, **kwargs)
    found = getattr(getattr(torch.ops, namespace), packet)
    return Call(getattr(found, overload or "default"), args, kwargs)


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_short, value))}]"
    return repr(value)


def _named(item: tuple[str, Any]) -> str:
    return f"{item[0]}={_short(item[1])}"


# --- OpInfo


@functools.cache
def opinfos() -> dict[str, list[Any]]:
    """PyTorch's op database by the ATen name that an entry most likely calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal import common_utils
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.opinfo import core
    for module in (common_utils, core):
        # it looks for a unittest in every frame of the stack, which under pytest takes a tenth of a
        # second for each op; there is none, and None is what it gives
        module.extract_test_fn = lambda: None
    by_name: dict[str, list[Any]] = defaultdict(list)
    for info in op_db:
        for name in {info.name.rsplit(".", 1)[-1], info.aten_name}:
            by_name[name].append(info)
    return by_name


def _opinfo_arguments(packet: str) -> Iterator[Arguments]:
    """Arguments of OpInfo samples that the ATen op takes as they are and has a derivative for."""
    for info in opinfos().get(packet, ()):
        torch.manual_seed(0)
        samples = info.sample_inputs("cpu", torch.float64, requires_grad=False)
        for sample in itertools.islice(samples, 12):
            args, kwargs = (sample.input, *sample.args), dict(sample.kwargs)
            try:
                y = differentiable(call_of(packet, args, kwargs))
            except (RuntimeError, TypeError, IndexError, NotImplementedError):
                continue  # the Python function of this name spells its arguments another way
            if kwargs.get("eps", 1) <= 0:
                continue  # a norm that is nan at zero
            if y is not None and _usable(args, y):
                yield args, kwargs


def differentiable(call: Call) -> Any:
    """The call's output, if a gradient leads from it to its float operands; else None."""
    moving = [t.clone().requires_grad_() for t in _floats(call.args)]
    fresh = iter(moving)
    args = torch.utils._pytree.tree_map(lambda t: next(fresh) if is_float(t) else t, call.args)
    y = call.op(*args, **call.kwargs)
    outputs = [t for t in _floats(y) if t.requires_grad]
    if not moving or not outputs:
        return None
    torch.autograd.grad([t.sum() for t in outputs], moving, allow_unused=True)
    return y


def is_float(value: Any) -> bool:
    """Real, as PyTorch's own samples in float64 are; complex ones are made by hand."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _floats(tree: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(tree) if is_float(t)]


def _usable(args: tuple[Any, ...], y: Any) -> bool:
    """Finite, and not empty: edge points have tests of their own."""
    tensors = [t for t in torch.utils._pytree.tree_leaves((args, y)) if isinstance(t, torch.Tensor)]
    strided = all(t.layout is torch.strided for t in tensors)
    return strided and all(t.numel() > 0 and bool(t.isfinite().all()) for t in tensors)


# --- by hand


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def positive(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64) + 0.5


def _with_zeros(rows: int, columns: int) -> torch.Tensor:
    """No zero in the last row, one in the row before it, then two."""
    x = randn(rows, columns)
    x[:-1, 1] = x[: max(rows - 2, 0), 0] = 0.0
    return x


def one(*args: Any, **kwargs: Any) -> list[Builder]:
    """A single sample whose tensors are given as functions, drawn after seeding."""
    return [lambda: (_drawn(args), _drawn(kwargs))]


def _drawn(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _drawn(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_drawn, value))
    return value() if callable(value) else value


def r(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: randn(*shape)


def c(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.complex(randn(*shape), randn(*shape))


def ids(high: int, *shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randint(high, shape)


def chances(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.rand(shape, dtype=torch.float64) * 1.6 - 0.8


def _gru_like(gates: int, num_layers: int, bidirectional: bool, bias: bool, states: int) -> Builder:
    def build() -> Arguments:
        inputs, hidden, steps, batch = 3, 4, 3, 2
        directions = 1 + bidirectional
        params: list[torch.Tensor] = []
        for layer in range(num_layers):
            width = inputs if layer == 0 else hidden * directions
            for _ in range(directions):
                params += [randn(gates * hidden, width), randn(gates * hidden, hidden)]
                params += [randn(gates * hidden), randn(gates * hidden)] if bias else []
        hx = [randn(num_layers * directions, batch, hidden) for _ in range(states)]
        start = hx if states > 1 else hx[0]
        tail = (bias, num_layers, 0.0, False, bidirectional, False)
        return (randn(steps, batch, inputs), start, params, *tail), {}

    return build


def _recurrent(gates: int, states: int = 1) -> list[Builder]:
    return [_gru_like(gates, 1, False, True, states), _gru_like(gates, 2, True, False, states)]


def _resize(dims: int, *, corners: bool, exact_scale: bool = True) -> list[Builder]:
    """``upsample_*`` of a (2, 3, 4, …) tensor, by size, with both align_corners where it has them."""
    size = [7] * dims
    flags = [False] if corners else []
    more = one(r(2, 3, *[4] * dims), size, *([True] if corners else []))
    return one(r(2, 3, *[4] * dims), size, *flags) + (more if corners else [])


def _conv(dims: int, *, transposed: bool = False) -> list[Builder]:
    shape = (4, 2, *[3] * dims)  # (out, in / groups) or (in, out / groups): 4 in, 4 out, two groups
    x = r(2, 4, *[5] * dims)
    strides, pads, dilations = [2] * dims, [1] * dims, [1] * dims
    if transposed:
        extra = (strides, pads, [1] * dims, 2, dilations)
        return one(x, r(*shape), r(4), *extra) + one(x, r(4, 4, *[3] * dims), None)
    return one(x, r(*shape), r(4), strides, pads, dilations, 2) + one(x, r(4, 4, *[3] * dims), None)


def _norm_of(*shape: int) -> list[Builder]:
    """batch_norm in both modes, with and without an affine part."""
    c = shape[1]
    x, w, b = r(*shape), r(c), r(c)
    mean, var = r(c), lambda: positive(c)
    return [
        *one(x, w, b, mean, var, False, 0.1, 1e-5, False),
        *one(x, None, None, mean, var, False, 0.1, 1e-5, False),
        *one(x, w, b, None, None, True, 0.1, 1e-5, False),
        *one(x, None, None, None, None, True, 0.1, 1e-5, False),
    ]


def _attention() -> list[Builder]:
    q, k, v = r(2, 4, 5, 8), r(2, 4, 6, 8), r(2, 4, 6, 8)
    few = r(2, 2, 6, 8)
    return [
        *one(q, k, v),
        *one(q, k, v, r(5, 6), scale=0.3),
        *one(q, k, v, lambda: torch.rand(2, 1, 5, 6) > 0.3),
        *one(r(2, 4, 6, 8), k, v, None, 0.0, True),
        *one(q, few, few, enable_gqa=True),
        *one(r(1, 1, 70, 4), r(1, 1, 70, 4), r(1, 1, 70, 4), None, 0.0, True),  # two chunks of rows
    ]


_ADAPTIVE = {1: [3], 2: [3, 2], 3: [3, 2, 2]}

_BOXES = lambda: torch.tensor([[0, 0.3, 0.2, 4.1, 3.7], [1, 1.0, 0.6, 4.9, 4.4]]).double()  # noqa: E731
_ROWS = lambda: torch.tensor([[0, 1, 1], [2, 0, 1]])  # noqa: E731

BY_HAND: dict[str, list[Builder]] = {
    "aten.rot90": one(r(3, 4)) + one(r(2, 3, 4), 3, [1, 2]),
    **{
        f"aten.max_unpool{d}d": one(
            r(1, 2, *[2] * d),
            (torch.arange(2**d) * 2).reshape([1, 1] + [2] * d).repeat(1, 2, *[1] * d),
            [4] * d,
            *([[2] * d, [0] * d] if d == 3 else []),
        )
        for d in (2, 3)
    },
    "aten.take": one(r(3, 4), ids(12, 5)),
    "aten.put": one(r(3, 4), torch.tensor([1, 7]), r(2)) + one(r(3, 4), torch.tensor([1, 1]), r(2), True),
    "aten.remainder": one(r(4, 5), 0.6) + one(r(4, 5), lambda: positive(5)),
    "aten.fmod": one(r(4, 5), 0.6) + one(r(4, 5), lambda: positive(5)),
    "aten.frac": one(lambda: 3 * randn(4, 5)),
    "torchvision.roi_align": one(r(2, 3, 6, 6), _BOXES, 1.0, 2, 2, 2, True),
    "torchvision.ps_roi_align": one(r(2, 8, 6, 6), _BOXES, 1.0, 2, 2, 2),
    "torchvision.ps_roi_pool": one(r(2, 8, 6, 6), _BOXES, 1.0, 2, 2),
    "torchvision.roi_pool": one(r(2, 3, 6, 6), _BOXES, 1.0, 2, 2),
    "torchvision.deform_conv2d": one(
        r(2, 4, 5, 5), r(4, 2, 3, 3), r(2, 18, 5, 5), r(2, 9, 5, 5), r(4), 1, 1, 1, 1, 1, 1, 2, 1, True
    ),
    "aten.istft": one(c(2, 5, 7), 8, 4, 8, lambda: positive(8)) + one(c(5, 7), 8),
    "aten.stft": one(r(2, 24), 8, 4, 8, lambda: positive(8), return_complex=True)
    + one(r(24), 8, None, None, None, False, True, True)
    + one(r(2, 24), 8, 4, 8, lambda: positive(8), True, "reflect", return_complex=True),
    "aten.aminmax": one(r(4, 5), dim=1) + one(r(4, 5)),
    "aten.mode": one(lambda: torch.randint(3, (4, 7)).double()),
    "aten.scatter_reduce": [
        b
        for reduce in ("sum", "mean", "amax", "amin")
        for inside in (True, False)
        for b in one(r(3, 3), 1, _ROWS, r(2, 3), reduce, include_self=inside)
    ],
    "aten.index_reduce": [
        b
        for reduce in ("mean", "amax", "amin")
        for inside in (True, False)
        for b in one(r(3, 4), 0, torch.tensor([2, 0, 2]), r(3, 4), reduce, include_self=inside)
    ],
    "aten.cdist": one(r(4, 3), r(5, 3)) + one(r(2, 4, 3), r(2, 5, 3), 1.0) + one(r(4, 3), r(5, 3), 3.0),
    "aten.pdist": one(r(4, 3)) + one(r(4, 3), 3.0),
    "aten.hypot": one(r(4, 3), r(3)),
    "aten.acos": one(chances(4, 5)),
    "aten.erfinv": one(chances(4, 5)),
    "aten.logaddexp": one(r(4, 5), r(5)),
    "aten.logaddexp2": one(r(4, 5), r(5)),
    "aten.logcumsumexp": one(r(4, 5), 1) + one(r(4, 5), 0),
    "aten.logit": one(lambda: torch.rand(4, 5).double()) + one(lambda: torch.rand(4, 5).double(), 0.2),
    "aten.special_i1": one(r(4, 5)),
    "aten.nll_loss_nd": one(r(4, 5), ids(5, 4)) + one(r(2, 5, 3), ids(5, 2, 3), None, 2),
    "aten.i0": one(r(4, 5)),
    "aten.special_entr": one(lambda: positive(4, 5)),
    "aten.lgamma": one(lambda: positive(4, 5)),
    "aten.mse_loss": one(r(4, 5), r(4, 5)) + one(r(4, 5), r(4, 5), 0) + one(r(4, 5), r(4, 5), 2),
    "aten.cross_entropy_loss": [
        b
        for reduction in (0, 1, 2)
        for smoothing in (0.0, 0.3)
        for weight in (None, lambda: positive(5))
        for b in [
            *one(r(4, 5), lambda: torch.tensor([1, 4, -100, 0]), weight, reduction, -100, smoothing),
            *one(r(2, 5, 3), ids(5, 2, 3), weight, reduction, -100, smoothing),
            *one(r(4, 5), lambda: randn(4, 5).softmax(1), weight, reduction, -100, smoothing),
        ]
    ],
    "aten.binary_cross_entropy_with_logits": [
        b
        for reduction in (0, 1, 2)
        for b in [
            *one(r(4, 5), lambda: torch.rand(4, 5).double(), None, None, reduction),
            *one(r(4, 5), lambda: torch.rand(4, 5).double(), r(5), lambda: positive(5), reduction),
        ]
    ],
    "aten.nll_loss": one(r(4, 5), ids(5, 4), lambda: positive(5)) + one(r(4, 5), ids(5, 4), None, 0),
    "aten.nll_loss2d": one(r(2, 5, 3, 3), ids(5, 2, 3, 3), lambda: positive(5)),
    "aten.rrelu": one(r(4, 5)) + one(r(4, 5), training=True),
    "aten.affine_grid_generator": one(r(2, 2, 3), [2, 1, 3, 4], False),
    "aten.xlogy": one(r(4, 5), lambda: positive(5)) + one(r(4, 5), 2.0),
    "aten.special_xlog1py": one(r(4, 5), lambda: positive(5)) + one(r(4, 5), 2.0),
    "aten.sgn": one(c(4, 5)),
    **{f"aten.{n}_mean.correction": one(r(4, 5), [1], correction=1) for n in ("std", "var")},
    "aten.block_diag": one([r(2, 3), r(3, 4)]) + one([r(2, 3), r(4), r(1, 1)]),
    "aten.linalg_multi_dot": one([r(2, 3), r(3, 4), r(4, 2)]) + one([r(2, 3), r(3, 4)]),
    "transformers.grouped_mm_fallback": one(r(5, 3), r(2, 3, 4), torch.tensor([2, 5])),
    "aten._unsafe_view": one(r(2, 6), [3, 4]),
    "aten._to_copy": one(r(2, 3), dtype=torch.float64),
    "aten.type_as": one(r(2, 3), r(4)),
    "aten.alias": one(r(2, 3)),
    "aten.lift_fresh_copy": one(r(2, 3)),
    "aten.roll": one(r(2, 6), [2], [1]),
    "aten.col2im": one(r(2, 12, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]),
    "aten.index": one(r(4, 3), [ids(4, 5)]) + one(r(4, 3), [None, ids(3, 2)]),
    "aten.index_put": one(r(4, 3), [torch.tensor([2, 0])], r(2, 3))
    + one(r(4, 3), [torch.tensor([2, 2])], r(2, 3), True),
    "aten.im2col": one(r(2, 3, 4, 4), [2, 2], [1, 1], [0, 0], [1, 1]),
    "aten._adaptive_avg_pool2d": one(r(2, 3, 5, 5), _ADAPTIVE[2]),
    "aten._adaptive_avg_pool3d": one(r(2, 3, 5, 5, 4), _ADAPTIVE[3]),
    "aten._upsample_bicubic2d_aa": _resize(2, corners=True),
    "aten.upsample_linear1d": _resize(1, corners=True),
    "aten.upsample_bilinear2d": _resize(2, corners=True),
    "aten.upsample_bicubic2d": _resize(2, corners=True),
    "aten.upsample_trilinear3d": _resize(3, corners=True),
    **{f"aten.upsample_nearest{d}d": _resize(d, corners=False) for d in (1, 2, 3)},
    **{f"aten._upsample_nearest_exact{d}d": _resize(d, corners=False) for d in (1, 2, 3)},
    **{f"aten.reflection_pad{d}d": one(r(2, 3, *[4] * d), [1, 2] * d) for d in (1, 2, 3)},
    **{f"aten.replication_pad{d}d": one(r(2, 3, *[4] * d), [1, 2] * d) for d in (1, 2, 3)},
    "aten.constant_pad_nd": one(r(2, 3), [1, 2], 0.7) + one(r(2, 3), [0, 1]),
    "aten.pad": one(r(2, 3), [1, 2], "constant", 0.7) + one(r(2, 3, 4), [1, 2], "reflect"),
    "aten.add": one(r(2, 3), r(3)) + one(r(2, 3), 1.5) + one(r(2, 1), r(3), alpha=2.0),
    "aten.sub": one(r(2, 3), r(3)) + one(r(2, 3), 1.5) + one(r(2, 1), r(3), alpha=2.0),
    "aten.rsub": one(r(2, 3), r(3)) + one(r(2, 3), 1.5) + one(r(2, 1), r(3), alpha=2.0),
    "aten.where": one(lambda: torch.rand(2, 3) > 0.5, r(2, 3), r(3))
    + one(lambda: torch.rand(2, 3) > 0.5, r(2, 3), 0.7),
    "aten.masked_fill": one(r(2, 3), lambda: torch.rand(3) > 0.5, 0.7)
    + one(r(2, 3), lambda: torch.rand(2, 3) > 0.5, r()),
    "aten.view_as_real": one(c(2, 3)),
    "aten.view_as_complex": one(r(2, 3, 2)),
    **{f"aten.{n}": one(c(2, 3)) for n in ("real", "imag", "_conj", "_conj_physical", "_neg_view")},
    **{f"aten.{n}": one(c(2, 3)) for n in ("conj_physical", "resolve_conj", "resolve_neg")},
    "aten.complex": one(r(2, 3), r(2, 3)),
    "aten._fft_r2c": one(r(2, 6), [1], 0, True) + one(r(2, 5), [0, 1], 1, False),
    "aten._fft_c2c": one(c(2, 6), [1], 0, True) + one(c(2, 5), [0, 1], 1, False),
    "aten._fft_c2r": one(c(2, 4), [1], 0, 6) + one(c(3, 3), [0, 1], 2, 5),
    "aten.polar": one(lambda: positive(2, 3), r(3)),
    "aten.linalg_solve_triangular": one(lambda: randn(3, 3).tril() + 3 * torch.eye(3), r(3, 2), upper=False)
    + one(lambda: randn(2, 3, 3).triu() + 3 * torch.eye(3), r(2, 4, 3), upper=True, left=False),
    "aten.linalg_solve": one(lambda: randn(3, 3) + 3 * torch.eye(3), r(3, 2)),
    "aten.linalg_inv": one(lambda: randn(2, 3, 3) + 3 * torch.eye(3)),
    "aten.linalg_cholesky": one(lambda: 0.1 * torch.ones(3, 3).double() + 2 * torch.eye(3)),
    "aten.abs": one(r(2, 3)) + one(c(2, 3)),
    "aten.moveaxis": one(r(2, 3, 4), [0, 1], [2, 0]),
    **{f"aten.{n}": one(r(2, 3, 4), 0, 2) for n in ("swapaxes", "swapdims")},
    "aten.numpy_T": one(r(2, 3)),
    "aten.fill": one(r(2, 3), r()),
    "aten.dropout": one(r(4, 5), 0.5, True) + one(r(4, 5), 0.5, False),
    "aten.native_dropout": one(r(4, 5), 0.5, True),
    "aten.feature_dropout": one(r(4, 5, 3), 0.5, True) + one(r(4, 5, 3), 0.5, False),
    "aten.embedding": one(r(7, 3), ids(7, 2, 4)),
    "aten.embedding_bag": one(r(7, 3), ids(7, 8), lambda: torch.tensor([0, 3, 5]))
    + one(r(7, 3), ids(7, 8), torch.tensor([0, 3, 5]), False, 0, False, r(8)),
    "aten.prelu": one(r(2, 3, 4), r(3)),
    "aten._prelu_kernel": one(r(2, 3, 4), r(1, 3, 1)),
    **{f"aten.max_pool{d}d": one(r(2, 3, *[6] * d), [2] * d, [2] * d) for d in (1, 2, 3)},
    **{f"aten.max_pool{d}d_with_indices": one(r(2, 3, *[6] * d), [2] * d) for d in (1, 2, 3)},
    **{f"aten.adaptive_max_pool{d}d": one(r(2, 3, *[6] * d), s) for d, s in _ADAPTIVE.items()},
    "aten.max": one(r(4, 5)) + one(r(4, 5), 1, True) + one(r(4, 5), r(5)),
    "aten.min": one(r(4, 5)) + one(r(4, 5), 1, True) + one(r(4, 5), r(5)),
    "aten.maximum": one(r(4, 5), r(5)),
    "aten.minimum": one(r(4, 5), r(5)),
    "aten.linalg_vector_norm": one(r(4, 5)) + one(r(4, 5), 1, [1]) + one(r(4, 5), 3.0, [0], True),
    "aten.norm": one(r(4, 5)) + one(r(4, 5), 1.0, [1], True),
    "aten.clamp": one(r(4, 5), -0.5, 0.7) + one(r(4, 5), None, 0.2),
    "aten.clamp_min": one(r(4, 5), -0.5),
    "aten.clamp_max": one(r(4, 5), 0.5),
    "aten.clamp.Tensor": one(r(4, 5), r(5), r(4, 5)) + one(r(4, 5), r(5)),
    "aten.clamp_min.Tensor": one(r(4, 5), r(5)),
    "aten.clamp_max.Tensor": one(r(4, 5), r(5)),
    "aten.lerp": one(r(4, 5), r(4, 5), r(5)) + one(r(4, 5), r(4, 5), 0.3),
    "aten.hardtanh": one(r(4, 5)) + one(r(4, 5), -0.3, 0.2),
    "aten.threshold": one(r(4, 5), 0.2, 0.9) + one(r(4, 5), -0.2, -3.0),
    "aten.gelu": one(r(4, 5)) + one(r(4, 5), approximate="tanh"),
    "aten.elu": one(r(4, 5)) + one(r(4, 5), 0.7, 1.3, 0.9),
    "aten.softplus": one(r(4, 5)) + one(r(4, 5), 2.0, 1.0) + one(r(4, 5), 3.0, -1.0),
    "aten.glu": one(r(4, 6)) + one(r(4, 6), 0),
    "aten.pow.Tensor_Scalar": [
        b for p in (2, 3, 0.5, -1.0, 0, 1) for b in one(lambda: positive(4, 5), p)
    ]
    + one(r(4, 5), 2),
    "aten.pow.Tensor_Tensor": one(lambda: positive(4, 5), r(5))
    + one(lambda: positive(5), lambda: torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)),
    "aten.pow.Scalar": one(2, r(4, 5)) + one(0.3, r(4, 5)) + one(2.0, lambda: torch.zeros(2).double()),
    "aten.prod.default": one(r(2, 3)) + one(r(1)) + one(r()) + one(lambda: _with_zeros(2, 3)),
    "aten.prod.dim_int": one(r(4, 3), 1) + one(r(4, 3), 0, True) + one(lambda: _with_zeros(4, 3), -1),
    "aten.cumprod": one(r(4, 3), 1) + one(r(4, 3), 0) + one(lambda: _with_zeros(4, 3), -1),
    "aten.softmax": one(r(4, 5), -1) + one(r(4, 5), 0) + one(r(2, 3, 4), 1),
    "aten.log_softmax": one(r(4, 5), -1) + one(r(2, 3, 4), 1),
    "aten.logsumexp": one(r(4, 5), [1]) + one(r(4, 5), [0], True) + one(r(2, 3, 4), [0, 2]),
    "aten.layer_norm": one(r(4, 6), [6], r(6), r(6)) + one(r(2, 3, 4), [3, 4]),
    "aten.rms_norm": one(r(4, 6), [6], r(6), 1e-5) + one(r(2, 3, 4), [3, 4]),
    "aten.group_norm": one(r(2, 6, 4), 3, r(6), r(6)) + one(r(2, 6, 2, 2), 2),
    "aten.instance_norm": [
        b
        for use_stats in (True, False)
        for affine in (True, False)
        for b in one(
            r(2, 3, 5), r(3) if affine else None, r(3) if affine else None,
            None if use_stats else r(3), None if use_stats else lambda: positive(3),
            use_stats, 0.1, 1e-5, False,
        )
    ],
    "aten.batch_norm": _norm_of(4, 3, 5) + _norm_of(6, 3),
    "aten.mul": one(r(2, 3), r(3)) + one(r(2, 3), 1.5) + one(c(2, 3), c(3)) + one(c(2, 3), r(3)),
    "aten.unsafe_split": one(r(4, 3), 3),
    "aten.unsafe_split_with_sizes": one(r(4, 3), [1, 3]),
    "aten.unsafe_chunk": one(r(4, 3), 2),
    "aten.div": one(r(2, 3), lambda: positive(3)) + one(r(2, 3), 1.5) + one(c(2, 3), c(3)),
    "aten.einsum": one("ij,jk->ik", [r(2, 3), r(3, 4)])
    + one("bi,bj,bk->bijk", [r(2, 3), r(2, 2), r(2, 4)]),
    "aten.addcmul": one(r(2, 3), r(2, 3), r(3), value=0.5),
    "aten.addcdiv": one(r(2, 3), r(2, 3), lambda: positive(3), value=0.5),
    "aten.linear": one(r(2, 5, 3), r(4, 3), r(4)) + one(r(2, 3), r(4, 3)),
    "aten.bilinear": one(r(2, 3), r(2, 4), r(5, 3, 4), r(5))
    + one(r(2, 3), r(2, 4), r(5, 3, 4), None),
    **{f"aten.conv{d}d": _conv(d) for d in (1, 2, 3)},
    **{f"aten.conv_transpose{d}d": _conv(d, transposed=True) for d in (1, 2, 3)},
    "aten.convolution": one(
        r(2, 4, 5), r(4, 2, 3), r(4), [1], [1], [1], False, [0], 2
    ) + one(r(2, 4, 5), r(4, 3, 3), r(3), [2], [1], [1], True, [1], 1),
    "aten.grid_sampler": one(r(2, 3, 4, 4), chances(2, 5, 5, 2), 0, 0, False),
    "aten.grid_sampler_2d": one(r(2, 3, 4, 4), chances(2, 5, 5, 2), 0, 1, True),
    "aten.grid_sampler_3d": one(r(2, 3, 4, 4, 4), chances(2, 5, 5, 5, 3), 0, 0, False),
    "aten.scaled_dot_product_attention": _attention(),
    "aten.lstm.input": _recurrent(4, states=2),
    "aten.lstm_cell": one(r(2, 3), [r(2, 4), r(2, 4)], r(16, 3), r(16, 4), r(16), r(16))
    + one(r(2, 3), [r(2, 4), r(2, 4)], r(16, 3), r(16, 4)),
    "aten.gru_cell": one(r(2, 3), r(2, 4), r(12, 3), r(12, 4), r(12), r(12))
    + one(r(2, 3), r(2, 4), r(12, 3), r(12, 4)),
    "aten.gru.input": _recurrent(3),
    "aten.rnn_tanh.input": _recurrent(1),
    "aten.rnn_relu.input": _recurrent(1),
}  # fmt: skip


# --- overloads that the samples above do not call; each is true of its packet's row

BY_OVERLOAD: dict[str, list[Builder]] = {
    "aten.squeeze.dim": one(r(2, 1, 3), 1),
    "aten.squeeze.dims": one(r(2, 1, 3, 1), [1, 3]),
    "aten.split.sizes": one(r(4, 3), [1, 3]),
    "aten.tensor_split.tensor_indices_or_sections": one(r(4, 3), torch.tensor([1, 2])),
    "aten.narrow.Tensor": one(r(4, 3), 0, torch.tensor(1), 2),
    "aten.movedim.int": one(r(2, 3, 4), 0, 2),
    "aten.moveaxis.int": one(r(2, 3, 4), 0, 2),
    "aten.to.dtype": one(r(2, 3), torch.float64),
    "aten.to.dtype_layout": one(r(2, 3), dtype=torch.float64),
    "aten.to.other": one(r(2, 3), r(4)),
    "aten.repeat_interleave.self_Tensor": one(r(3, 2), torch.tensor([1, 0, 2]), 0),
    **{f"aten.{n}.Scalar": one(r(2, 3), 1.5) for n in ("add", "sub", "mul", "div", "true_divide")},
    **{
        f"aten.{n}{d}d.vec": one(r(2, 3, *[4] * d), [7] * d, None)
        for n in ("upsample_nearest", "_upsample_nearest_exact")
        for d in (1, 2, 3)
    },
    **{
        f"aten.{n}.vec": one(r(2, 3, *[4] * d), [7] * d, False, None)
        for n, d in (
            ("upsample_linear1d", 1), ("upsample_bilinear2d", 2), ("upsample_bicubic2d", 2),
            ("upsample_trilinear3d", 3), ("_upsample_bilinear2d_aa", 2), ("_upsample_bicubic2d_aa", 2),
        )
    },
    "aten._upsample_bilinear2d_aa.default": one(r(2, 3, 4, 4), [7, 7], False),
    "aten.where.ScalarSelf": one(lambda: torch.rand(2, 3) > 0.5, 0.7, r(2, 3)),
    "aten.scatter.value": one(r(3, 4), 1, lambda: torch.tensor([[0, 1], [1, 3]]), 0.7),
    "aten.embedding_bag.padding_idx": [
        b
        for mode in (0, 1, 2)
        for b in one(r(7, 3), ids(7, 8), torch.tensor([0, 3, 5]), False, mode, False, None, False, 1)
    ],
    "aten.sort.stable": one(r(4, 5), stable=True, dim=0),
    "aten.norm.ScalarOpt_dtype": one(r(4, 5), 2, dtype=torch.float64),
    "aten.norm.ScalarOpt_dim_dtype": one(r(4, 5), 3, [1], True, dtype=torch.float64),
    **{f"aten.{n}.correction": one(r(4, 5), [1], correction=0) for n in ("std", "var")},
    "aten.conv2d.padding": one(r(2, 4, 5, 5), r(4, 2, 3, 3), r(4), [1, 1], "same", [1, 1], 2),
}  # fmt: skip


# --- elementwise ops of one tensor, for edge points: every row here is called as op(x, *extra)

_UNARY = """
relu leaky_relu abs hardshrink softshrink nan_to_num hardtanh relu6 neg clone
gelu silu mish hardswish elu celu selu softplus log_sigmoid square
sin tan sinh asinh atan asin atanh sinc expm1 log1p cos cosh
tanh erf sigmoid hardsigmoid erfc special_ndtr acos erfinv i0 special_i1 special_entr
exp exp2 log log2 log10 sqrt rsqrt reciprocal
"""

ELEMENTWISE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_UNARY.split(), ()),
    "clamp": (-0.5, 0.7),
    "clamp_min": (-0.5,),
    "clamp_max": (0.5,),
    "threshold": (0.0, -1.0),
    "logit": (0.01,),
    "lgamma": (),
    "pow.Tensor_Scalar": (2,),
}
