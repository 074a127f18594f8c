"""Removes zeros by algebra: from a flat graph, whatever computes with parts of tensors that are zero.

A balanced backward leaves many. The gradient of the token that a head reads is one row of many; that of v
is a third of its projection's; that of a class is one number of a thousand. Here such a tensor is its part
that is not zero, and ops compute with the part alone: products of fewer rows, or over fewer terms. An op
without a rule gets the whole tensor, with the zeros around the part.

The graph is run once more, with parts in place of tensors, and traced. So a rule is written with tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._prims_common import suggest_memory_format
from torch.fx import GraphModule, Node, Proxy
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx, track_tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true as known
from torch.utils import _pytree as pytree

from libragrad_fx.kernels.pointwise import gelu_gate, norm_gradient
from libragrad_fx.ops.attention import attention_value

Tensor = torch.Tensor
aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A tensor of ``shape`` that is zero but for a part of one axis.

    kept:  the part: as the tensor, but shorter along ``axis``; None if all of it is zero
    count: the axis has so many groups, ``inner`` elements each, one after another; and that once or many
           times over, where a view has joined axes (the rows of one token of each sample)
    start: the first of these groups that is not zero; there are ``length``
    """

    kept: Tensor | None
    shape: Sequence[Any]
    dtype: torch.dtype
    device: torch.device
    axis: int = 0
    inner: Any = 1
    count: int = 1
    start: int = 0
    length: int = 0

    @functools.cached_property
    def whole(self) -> Tensor:
        if self.kept is None:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        x, axis = self.kept, self.axis
        if not self.plain:
            x, axis = self.parted(x, axis, self.length), axis + 1
        sides = (self.start, self.count - self.start - self.length)
        before, after = (
            x.new_zeros((*x.shape[:axis], n, *x.shape[axis + 1 :])) if n else None for n in sides
        )
        joined = torch.cat([t for t in (before, x, after) if t is not None], axis)
        return joined if self.plain else joined.flatten(axis - 1, axis + 1)

    def parted(self, x: Tensor, axis: int, count: int) -> Tensor:
        """``x`` with its axis as three: times over, groups, elements."""
        return x.unflatten(axis, (x.shape[axis] // count // self.inner, count, self.inner))

    def of(self, x: Any, back: int) -> Any:
        """The same part of another tensor, along its axis ``back`` from the end, which may be of size 1."""
        if not isinstance(x, Tensor) or x.ndim < back or known(x.shape[-back] == 1):
            return x
        axis = x.ndim - back
        if self.plain:
            return x.narrow(axis, self.start, self.length)
        return (
            self.parted(x, axis, self.count)
            .narrow(axis + 1, self.start, self.length)
            .flatten(axis, axis + 2)
        )

    @property
    def back(self) -> int:
        """The axis, counted from the end, 1 for the last."""
        return len(self.shape) - self.axis

    @property
    def plain(self) -> bool:
        """Whether the axis is the groups alone."""
        return known(self.shape[self.axis] == self.count)

    def with_(self, kept: Tensor, shape: Sequence[Any], axis: int, inner: Any = None) -> Part:
        """Another tensor, zero but for the same groups of ``axis``."""
        inner = self.inner if inner is None else inner
        return dataclasses.replace(self, kept=kept, shape=shape, dtype=kept.dtype, axis=axis, inner=inner)

    def alike(self, other: Part) -> bool:
        """Whether two tensors are zero at the same places, where one is broadcast to the other."""
        mine, others = ((p.back, p.count, p.start, p.length) for p in (self, other))
        same = mine == others and _equal(self.inner, other.inner)
        return same and _equal(self.shape[self.axis], other.shape[other.axis])


def _equal(a: Any, b: Any) -> bool:
    return known(a == b)


def _is_nothing(x: Any) -> bool:
    """Whether all of it is zero."""
    return isinstance(x, Part) and x.kept is None


def _nothing(like: Any) -> Part:
    """A tensor of zeros."""
    return Part(None, tuple(like.shape), like.dtype, like.device)


def _part(kept: Tensor, shape: Sequence[Any], axis: int, start: int, length: int) -> Any:
    """What is ``kept`` along ``axis``, from ``start`` on, and zero elsewhere."""
    if length == shape[axis]:
        return kept
    return Part(kept, tuple(shape), kept.dtype, kept.device, axis, 1, int(shape[axis]), start, length)


# --- rules: an op on arguments, some of them parts. They return a tensor, a part, or None for no rule

_RULES: dict[Any, Callable[..., Any]] = {}


def _rule(*ops: Any) -> Callable[..., Any]:
    def add(rule: Callable[..., Any]) -> Callable[..., Any]:
        _RULES.update((op, functools.partial(rule, op)) for op in ops)
        return rule

    return add


@_rule(aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
def _zeros(op: Any, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = _whole((args, kwargs))
    return _nothing(op(*args, **kwargs))


@_rule(
    aten.neg.default, aten.alias.default, aten.detach.default, aten.clone.default, aten._to_copy.default,
    aten.nan_to_num.default, aten.mul.Scalar, aten.div.Scalar,
)  # fmt: skip
def _alone(op: Any, x: Part, *args: Any, **kwargs: Any) -> Any:
    return x.with_(op(x.kept, *args, **kwargs), x.shape, x.axis)


@_rule(
    aten.mul.Tensor, aten.div.Tensor, aten.gelu_backward.default, aten.silu_backward.default,
    aten.threshold_backward.default, aten.tanh_backward.default, aten.sigmoid_backward.default,
    aten.leaky_relu_backward.default, aten.hardswish_backward.default, aten.hardsigmoid_backward.default,
    aten.softplus_backward.default, aten.elu_backward.default, aten.hardtanh_backward.default, gelu_gate,
)  # fmt: skip
def _times(op: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A product, or g times a function of other tensors: zero where its first argument is."""
    given = [x, *args]
    at = next(i for i, a in enumerate(given) if isinstance(a, Part))
    if at and op is not aten.mul.Tensor:
        return None
    part = given[at]
    kept = [_fitting(part, a) for a in given]
    y = op(*kept, **kwargs)
    shape = torch.broadcast_shapes(*(a.shape for a in given if isinstance(a, (Tensor, Part))))
    return part.with_(y, shape, len(shape) - part.back)


def _fitting(part: Part, x: Any) -> Any:
    """An operand, where ``part`` is not zero."""
    if isinstance(x, Part):
        return x.kept if x is part or x.alike(part) else part.of(x.whole, part.back)
    return part.of(x, part.back)


@_rule(aten.add.Tensor, aten.sub.Tensor)
def _plus(op: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    both = [x for x in (a, b) if isinstance(x, Part) and x.kept is not None]
    if len(both) == 2 and a.alike(b):
        shape = torch.broadcast_shapes(a.shape, b.shape)
        return a.with_(op(a.kept, b.kept, **kwargs), shape, len(shape) - a.back)
    zero, other = (a, b) if _is_nothing(a) else (b, a)
    plain = _is_nothing(zero) and isinstance(other, (Tensor, Part))
    if not plain or zero.dtype != other.dtype or (zero is a and (kwargs or op is aten.sub.Tensor)):
        return None
    if len(zero.shape) == len(other.shape) and all(map(_equal, zero.shape, other.shape)):
        return other
    shape = torch.broadcast_shapes(zero.shape, other.shape)
    return other.expand(shape) if isinstance(other, Tensor) else None


@_rule(aten.addmm.default)
def _affine(op: Any, bias: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    """A linear layer of zeros is its bias. It lies in memory as the layer's result: kernels that read it
    round by how it lies."""
    if kwargs or isinstance(bias, Part) or not any(map(_is_nothing, (a, b))):
        return None
    return bias.expand(a.shape[0], b.shape[1]).clone(memory_format=torch.contiguous_format)


@_rule(aten.convolution.default)
def _convolution(op: Any, x: Any, weight: Any, bias: Any, *how: Any) -> Any:
    if not _is_nothing(x) or isinstance(weight, Part):
        return None
    y = op(x.whole, weight, bias, *how)  # for its shape
    if bias is None:
        return _nothing(y)
    whole = bias.view(-1, *[1] * (y.ndim - 2)).expand(y.shape)
    return whole.clone(memory_format=suggest_memory_format(y))


@_rule(aten.native_layer_norm.default)
def _layer_norm(op: Any, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    if not _is_nothing(x) or bias is None:
        return None
    _, mean, rstd = op(x.whole, shape, weight, bias, eps)
    return bias.expand(x.shape), mean, rstd


@_rule(aten.mm.default, aten.bmm.default)
def _product(op: Any, a: Any, b: Any) -> Any:
    shape = (*a.shape[:-1], b.shape[-1])
    if isinstance(a, Part):
        b = b.whole if isinstance(b, Part) and not (a.back == 1 and b.back == 2) else b
        if a.back == 1:  # terms of a sum
            if isinstance(b, Part):
                return op(a.kept, b.kept) if _same_terms(a, b) else None
            return op(a.kept, a.of(b, 2))
        return a.with_(op(a.kept, b if a.back == 2 else a.of(b, 3)), shape, a.axis)
    if b.back == 2:
        return op(b.of(a, 1), b.kept)
    return b.with_(op(a if b.back == 1 else b.of(a, 3), b.kept), shape, b.axis)


def _same_terms(a: Part, b: Part) -> bool:
    groups = [(p.count, p.start, p.length) for p in (a, b)]
    return groups[0] == groups[1] and _equal(a.inner, b.inner)


_VIEWS = (aten.view.default, aten._unsafe_view.default)


@_rule(*_VIEWS)
def _view(op: Any, x: Part, shape: Sequence[Any]) -> Any:
    if -1 in shape:
        rest = math.prod(n for n in shape if n != -1)
        shape = [math.prod(x.shape) // rest if n == -1 else n for n in shape]
    shape = tuple(shape)
    below = x.inner * math.prod(x.shape[x.axis + 1 :])
    for axis, size in enumerate(shape):
        behind = math.prod(shape[axis + 1 :])
        inner = below // behind
        if known(below == inner * behind) and known(size % (x.count * inner) == 0):
            kept = (*shape[:axis], size // x.count * x.length, *shape[axis + 1 :])
            return x.with_(x.kept.reshape(kept), shape, axis, inner)  # type: ignore[union-attr]
    return None


def _in_order(shape: Sequence[Any], strides: Sequence[Any]) -> bool:
    """Whether elements lie one after another; where an axis has one element, its stride says nothing."""
    places = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    each = zip(shape, strides, places, strict=True)
    return all(_equal(n, 1) or _equal(stride, place) for n, stride, place in each)


@_rule(aten.as_strided.default)
def _as_strided(op: Any, x: Any, shape: Sequence[Any], strides: Sequence[Any], first: Any = 0) -> Any:
    """A view, if it keeps the order of elements: pooling gives an axis of one element other strides."""
    if (
        not _in_order(shape, strides)
        or first not in (0, None)
        or not _equal(math.prod(x.shape), math.prod(shape))
    ):
        return None
    if _is_nothing(x):
        return Part(None, tuple(shape), x.dtype, x.device)
    x = _whole(x)
    return x.view(shape) if _in_order(x.shape, x.stride()) else None


@_rule(aten.as_strided_scatter.default)
def _as_strided_scatter(
    op: Any, x: Any, new: Any, shape: Sequence[Any], strides: Sequence[Any], first: Any = 0
) -> Any:
    """The gradient of such a view, written over zeros: all of them."""
    if not _is_nothing(x) or not _in_order(shape, strides) or first not in (0, None):
        return None
    return _whole(new).reshape(x.shape) if _equal(math.prod(x.shape), math.prod(shape)) else None


@_rule(aten.copy.default)
def _copy(op: Any, x: Any, new: Any, *_: Any) -> Any:
    """``x``, written over."""
    return _whole(new).expand(x.shape) if _is_nothing(x) and x.dtype == new.dtype else None


@_rule(aten.permute.default, aten.transpose.int, aten.t.default)
def _permute(op: Any, x: Part, *how: Any) -> Any:
    places = list(range(n := len(x.shape)))
    if op is aten.permute.default:
        places = [i % n for i in how[0]]
    elif n > 1:
        a, b = how or (0, 1)
        places[a], places[b] = places[b], places[a]
    return x.with_(op(x.kept, *how), [x.shape[i] for i in places], places.index(x.axis))


@_rule(aten.unsqueeze.default)
def _unsqueeze(op: Any, x: Part, axis: int) -> Any:
    axis %= len(x.shape) + 1
    shape = (*x.shape[:axis], 1, *x.shape[axis:])
    return x.with_(op(x.kept, axis), shape, x.axis + (axis <= x.axis))


@_rule(aten.squeeze.dim)
def _squeeze(op: Any, x: Part, axis: int) -> Any:
    axis %= len(x.shape)
    if axis == x.axis or not known(x.shape[axis] == 1):
        return None
    return x.with_(op(x.kept, axis), (*x.shape[:axis], *x.shape[axis + 1 :]), x.axis - (axis < x.axis))


@_rule(aten.expand.default)
def _expand(op: Any, x: Part, sizes: Sequence[Any], **_: Any) -> Any:
    more = len(sizes) - len(x.shape)
    old = (*[1] * more, *x.shape)
    shape = [o if known(n == -1) else n for n, o in zip(sizes, old, strict=True)]
    kept = list(shape)
    kept[x.axis + more] = x.kept.shape[x.axis]  # type: ignore[union-attr]
    return x.with_(op(x.kept, kept), shape, x.axis + more)


@_rule(aten.sum.dim_IntList)
def _sum(op: Any, x: Part, axes: Sequence[int] | None, keepdim: bool = False, **kwargs: Any) -> Any:
    n = len(x.shape)
    gone = {a % n for a in axes or range(n)}
    y = op(x.kept, axes, keepdim, **kwargs)
    if x.axis in gone:
        return y
    shape = [1 if i in gone else s for i, s in enumerate(x.shape) if keepdim or i not in gone]
    return x.with_(y, shape, x.axis if keepdim else x.axis - sum(a < x.axis for a in gone))


@_rule(aten.sum.default)
def _sum_all(op: Any, x: Part, **kwargs: Any) -> Any:
    return op(x.kept, **kwargs)


@_rule(aten.select.int)
def _select(op: Any, x: Part, axis: int, place: int) -> Any:
    axis %= len(x.shape)
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    if axis != x.axis:
        return x.with_(op(x.kept, axis, place), shape, x.axis - (axis < x.axis))
    if not x.plain:
        return None
    at = place % x.count - x.start
    if 0 <= at < x.length:
        return op(x.kept, axis, at)
    return Part(None, shape, x.dtype, x.device)


@_rule(aten.slice.Tensor)
def _slice(op: Any, x: Part, axis: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    axis %= len(x.shape)
    size = x.shape[axis]
    if axis != x.axis:
        kept = op(x.kept, axis, start, end, step)
        return x.with_(kept, (*x.shape[:axis], kept.shape[axis], *x.shape[axis + 1 :]), x.axis)
    if step != 1 or not x.plain or not all(isinstance(i, (int, type(None))) for i in (start, end)):
        return None
    first, last, _ = slice(start, end).indices(size)
    return _between(x, first, max(last, first))


def _between(x: Part, first: int, last: int) -> Any:
    """The elements ``first`` to ``last`` of a plain part's axis."""
    shape = (*x.shape[: x.axis], last - first, *x.shape[x.axis + 1 :])
    low, high = max(first, x.start), min(last, x.start + x.length)
    if low >= high:
        return Part(None, shape, x.dtype, x.device)
    kept = x.kept.narrow(x.axis, low - x.start, high - low)  # type: ignore[union-attr]
    return _part(kept, shape, x.axis, low - first, high - low)


@_rule(aten.unbind.int)
def _unbind(op: Any, x: Part, axis: int = 0) -> Any:
    count = x.shape[axis]
    if not isinstance(count, int):
        return None
    found = [_select(aten.select.int, x, axis, i) for i in range(count)]
    return None if any(f is None for f in found) else found


@_rule(aten.split.Tensor, aten.split_with_sizes.default)
def _split(op: Any, x: Part, sizes: Any, axis: int = 0) -> Any:
    count = x.shape[axis]
    if not isinstance(count, int) or not all(isinstance(n, int) for n in pytree.tree_leaves(sizes)):
        return None
    if isinstance(sizes, int):
        sizes = [min(sizes, count - i) for i in range(0, count, sizes)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    found = [_slice(aten.slice.Tensor, x, axis, s, s + n) for s, n in zip(starts, sizes, strict=True)]
    return None if any(f is None for f in found) else found


@_rule(aten.cat.default)
def _cat(op: Any, parts: Sequence[Any], axis: int = 0) -> Any:
    axis %= len(parts[0].shape)
    sizes = [p.shape[axis] for p in parts]
    full = [i for i, p in enumerate(parts) if not _is_nothing(p)]
    if not full or not all(isinstance(n, int) for n in sizes):
        return None
    first, last = full[0], full[-1] + 1
    read = [p.whole if isinstance(p, Part) else p for p in parts[first:last]]
    shape = list(read[0].shape)
    shape[axis] = sum(sizes)
    kept = read[0] if len(read) == 1 else op(read, axis)
    return _part(kept, shape, axis, sum(sizes[:first]), sum(sizes[first:last]))


@_rule(aten.stack.default)
def _stack(op: Any, parts: Sequence[Any], axis: int = 0) -> Any:
    axis %= len(parts[0].shape) + 1
    full = [i for i, p in enumerate(parts) if not _is_nothing(p)]
    if not full:
        return None
    read = [p.whole if isinstance(p, Part) else p for p in parts[full[0] : full[-1] + 1]]
    shape = [*read[0].shape]
    shape.insert(axis, len(parts))
    return _part(op(read, axis), shape, axis, full[0], len(read))


@_rule(aten.select_backward.default)
def _select_backward(op: Any, g: Any, sizes: Sequence[Any], axis: int, place: Any) -> Any:
    axis %= len(sizes)
    count = sizes[axis]
    if _is_nothing(g):
        return Part(None, tuple(sizes), g.dtype, g.device)
    if not isinstance(count, int) or not isinstance(place, int):
        return None
    whole = g.whole if isinstance(g, Part) else g
    return _part(whole.unsqueeze(axis), sizes, axis, place % count, 1)


@_rule(aten.slice_backward.default)
def _slice_backward(
    op: Any, g: Any, sizes: Sequence[Any], axis: int, start: Any, end: Any, step: Any
) -> Any:
    axis %= len(sizes)
    if known(g.shape[axis] == sizes[axis]):
        return g
    if _is_nothing(g):
        return Part(None, tuple(sizes), g.dtype, g.device)
    if isinstance(g, Part) and g.axis != axis:
        kept = list(sizes)
        kept[g.axis] = g.kept.shape[g.axis]  # type: ignore[union-attr]
        return g.with_(op(g.kept, kept, axis, start, end, step), tuple(sizes), g.axis)
    if step != 1 or not all(isinstance(i, int) for i in (sizes[axis], start, end)):
        return None
    first, last, _ = slice(start, end).indices(sizes[axis])
    return _part(g.whole if isinstance(g, Part) else g, sizes, axis, first, last - first)


@_rule(aten.convolution_backward.default)
def _convolution_backward(op: Any, g: Part, x: Any, weight: Any, bias: Any, *how: Any) -> Any:
    """Of the input alone: through the filters whose features have a gradient."""
    *_, transposed, _, groups, wanted = how
    if g.axis != 1 or transposed or groups != 1 or [*wanted] != [True, False, False]:
        return None
    return op(g.kept, x, g.of(weight, weight.ndim), None if bias is None else [g.kept.shape[1]], *how)  # type: ignore[union-attr]


@_rule(norm_gradient)
def _norm_gradient(op: Any, g: Part, weight: Any, rstd: Any, centred: bool) -> Any:
    """Of some rows alone."""
    return (
        None if g.back == 1 else g.with_(op(g.kept, weight, g.of(rstd, g.back), centred), g.shape, g.axis)
    )


@_rule(attention_value)
def _attention(
    op: Any, g: Part, query: Any, key: Any, mask: Any, lse: Any, causal: bool, scale: Any
) -> Any:
    """dV from the rows of some queries alone."""
    if g.axis != 2 or causal:
        return None
    return op(g.kept, g.of(query, 2), key, g.of(mask, 2), g.of(lse, 1), causal, scale)


# --- the walk


class Zeros(torch.fx.Interpreter):
    """Runs a traced graph of functional ATen ops with parts in place of tensors that are mostly zero.

    Most ops read no such tensor. While a tracer watches, their nodes are copied: it takes a fraction of the
    time that noting the op again would.

    ruled:  counts the ops that a rule has answered
    copied: nodes of the graph that is being traced, by those they are copies of
    """

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.ruled = Counter[Any]()
        self.copied: dict[Node, Node] = {}

    def run_node(self, n: Node) -> Any:
        mode = get_proxy_mode()
        if mode is None or n.op != "call_function" or n.target in _MAKERS:
            return super().run_node(n)
        value, tracer = n.meta["val"], mode.tracer
        read = {m: self._copy_of(m, tracer) for m in n.all_input_nodes}
        if isinstance(value, torch.SymInt) or not all(isinstance(m, Node) for m in read.values()):
            return super().run_node(n)
        self.copied[n] = tracer.graph.node_copy(n, read.__getitem__)
        if isinstance(value, Tensor):
            track_tensor(value, Proxy(self.copied[n], tracer), constant=None, tracer=tracer)
        return value

    def _copy_of(self, n: Node, tracer: Any) -> Any:
        """The node of a value that lies as it did in the first trace."""
        x, like = self.env[n], n.meta.get("val")
        if n in self.copied:
            return self.copied[n]
        if isinstance(x, torch.SymInt):
            return getattr(tracer.unwrap_proxy(x), "node", None)
        if not isinstance(x, Tensor) or not isinstance(like, Tensor) or x.ndim != like.ndim:
            return None
        same = zip((*x.shape, *x.stride()), (*like.shape, *like.stride()), strict=True)
        proxy = tracer.unwrap_proxy(x)
        return proxy.node if isinstance(proxy, Proxy) and all(_equal(a, b) for a, b in same) else None

    def call_function(self, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        rule = _RULES.get(target)
        if rule is not None and _asks(target, args, kwargs):
            found = self._nothing(target, args, kwargs) or rule(*args, **kwargs)
            if found is not None:
                self.ruled[target] += 1
                return found
        args, kwargs = _whole((args, kwargs))
        if target in _VIEWS:  # what stands for zeros may lie otherwise in memory
            return args[0].reshape(args[1])
        return super().call_function(target, args, kwargs)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().output(target, *_whole((args, kwargs)))

    def _nothing(self, target: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """What an op makes of zeros alone: zeros, if it is linear in them."""
        if target not in _LINEAR or not any(map(_is_nothing, pytree.tree_leaves((args, dict(kwargs))))):
            return None
        args, kwargs = _whole((args, dict(kwargs)))
        return pytree.tree_map(_nothing, target(*args, **kwargs))  # for its shape: nobody reads it


def _asks(target: Any, args: Any, kwargs: Any) -> bool:
    """Whether an op has parts among its arguments, or makes one."""
    if target in _MAKERS:
        return True
    return any(isinstance(a, Part) for a in pytree.tree_leaves((args, dict(kwargs))))


def _whole(values: Any) -> Any:
    return pytree.tree_map(lambda a: a.whole if isinstance(a, Part) else a, values)


_MAKERS = {
    aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default, aten.select_backward.default,
    aten.slice_backward.default, aten.as_strided.default,
}  # fmt: skip
_ADDING = {
    aten.add.Tensor, aten.sub.Tensor, aten.cat.default, aten.stack.default, aten.addmm.default,
    aten.convolution.default, aten.native_layer_norm.default, aten.as_strided_scatter.default,
    aten.copy.default, *_MAKERS,
}  # fmt: skip
_LINEAR = {op for op in _RULES if op not in _ADDING}


def without_zeros(traced: GraphModule, inputs: Sequence[Tensor]) -> GraphModule:
    """The same computation, without zeros that nobody needs. ``inputs``: fake ones, to trace it with."""
    if any(_writes(n.target) for n in traced.graph.nodes):
        with torch._C._AutoDispatchBelowAutograd(), enable_python_dispatcher():
            traced = make_fx(torch.func.functionalize(traced, remove="mutations"))(*inputs)
    traced.graph.eliminate_dead_code()
    made = make_fx(lambda *given: Zeros(traced).run(*given))(*inputs)
    made.graph.eliminate_dead_code()
    return made


def _writes(op: Any) -> bool:
    return isinstance(op, torch._ops.OpOverload) and op._schema.is_mutable
