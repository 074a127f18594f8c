"""Rewrites an op of an exported graph as the op that the normal form uses for it. For example:

``view`` becomes ``reshape``: another kernel may choose other strides than the traced one. Batch norm
becomes the public op, which picks the model's kernel and updates its statistics. ``copy``, which autograd
refuses, becomes a cast and an expansion. A write into complex numbers becomes one into pairs of reals.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.fx import Node

from libragrad_fx.graph.schema import bind

aten = torch.ops.aten
COPY_INTO = aten.copy_.default
_BATCH_NORMS = {
    "_native_batch_norm_legit_no_training", "_native_batch_norm_legit_functional",
    "_native_batch_norm_legit",
}  # fmt: skip
_VIEWS = {"view", "_unsafe_view"}
_MOMENTS = {"var_mean", "std_mean"}
_WRITES = {"slice_scatter", "select_scatter", "diagonal_scatter"}


@dataclasses.dataclass(frozen=True)
class Writer:
    """Writes nodes of the normal form.

    emit: ``(op, args, kwargs)`` -> the node that replaces the exported one
    made: ``(op, *args)`` -> an additional node, which the exported graph does not have
    """

    emit: Callable[..., Node]
    made: Callable[..., Node]


def written(node: Node, args: Any, kwargs: Any, to: Writer) -> Any:
    """The normal form's node for ``node`` of an exported graph; None if nothing reads it.

    args, kwargs: of ``node``, as nodes of the new graph.
    """
    name, op, value = _name(node), node.target, cast(Any, node.meta.get("val"))
    if name in _BATCH_NORMS:
        made = to.emit(aten.batch_norm.default, _batch_norm(name, args), {})
        made.meta["val"] = value[0]  # the other outputs are statistics
        return made
    if op is operator.getitem and _name(node.args[0]) in _BATCH_NORMS:
        return args[0] if args[1] == 0 else None
    if name in _VIEWS and op is not aten.view.dtype:
        return to.emit(aten.reshape.default, args, kwargs)
    if name == "div" and kwargs.get("rounding_mode", "") is None:
        return to.emit(aten.div.Tensor, args, {})
    if name == "sgn" and not value.is_complex():  # the same on real numbers
        return to.emit(aten.sign.default, args, {})
    if name in _MOMENTS:
        overload, args, kwargs = _corrected(op, args, kwargs)
        return to.emit(overload, args, kwargs)
    if name in _WRITES and value.is_complex():
        return _complex_write(node, args, kwargs, to)
    if name == "copy":
        into, source, *_ = args
        return _copied(node, into, source, to)
    return to.emit(op, args, kwargs)


def says_nothing(node: Node) -> bool:
    """Whether a node only asserts an assumption of export: it returns nothing."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or op.namespace != "aten":
        return False
    return not op._schema.returns and not op._schema.is_mutable


def is_empty(node: Node) -> bool:
    """Whether a node makes an uninitialised tensor."""
    return _name(node).startswith(("empty", "new_empty"))


def _name(node: Any) -> str:
    return getattr(getattr(node, "target", None), "_opname", "")


def _batch_norm(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of the public op; the last, whether cuDNN may be used, is PyTorch's flag now."""
    x, weight, bias, *rest = args
    mean, var = (None, None) if len(rest) == 3 else rest[:2]
    training = False if name.endswith("no_training") else rest[-3]
    return (x, weight, bias, mean, var, training, *rest[-2:], torch.backends.cudnn.enabled)


def _corrected(op: Any, args: Any, kwargs: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The ``correction`` overload of ``var_mean`` or ``std_mean``, and the call's arguments for it."""
    x, *rest = bind(op, args, kwargs).items()
    given = dict(rest)
    if "unbiased" in given:
        given["correction"] = int(given.pop("unbiased"))
    axes = (x[1], given.pop("dim", None))
    return op._overloadpacket.correction, axes, given


def _complex_write(node: Node, args: Any, kwargs: Any, to: Writer) -> Node:
    """A write into complex numbers, as a write into pairs of reals: PyTorch has a derivative for the
    in-place write, but none for its functional form."""
    x, part, *where = args
    pairs = [to.made(aten.view_as_real.default, to.made(aten.resolve_conj.default, v)) for v in (x, part)]
    if node.target is aten.diagonal_scatter.default:  # the diagonal is the last axis
        pairs[1] = to.made(aten.transpose.int, pairs[1], -1, -2)
    rank, given = node.meta["val"].ndim, bind(node.target, (x, part, *where), kwargs)  # type: ignore[arg-type]
    places = [v % rank if k.startswith("dim") else v for k, v in given.items()]
    return to.emit(aten.view_as_complex.default, (to.made(node.target, *pairs, *places[2:]),), {})


def _copied(node: Node, into: Node, source: Node, to: Writer) -> Node:
    """``copy(into, source)``: the source in the dtype, device and shape of ``into``."""
    want, have = node.meta["val"], source.meta["val"]
    if want.dtype != have.dtype or want.device != have.device:
        options = {"dtype": want.dtype, "device": want.device}
        source = to.emit(aten._to_copy.default, (source,), options)
    if tuple(want.shape) != tuple(have.shape):
        source = to.emit(aten.expand_as.default, (source, into), {})
    return source
