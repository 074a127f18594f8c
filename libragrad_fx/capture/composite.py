"""Decomposes composite ops that have no fact into ops that have one.

PyTorch can decompose a whole program, by tracing it once more; that costs several times the export.
Here each op is traced alone, on the values of its node.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from libragrad_fx.decide.rulebook import RuleBook
from libragrad_fx.graph.alias import functional, is_composite, is_fresh
from libragrad_fx.graph.origin import origin
from libragrad_fx.ops.spelling import COPY_INTO, is_empty
from libragrad_fx.target import inexact

Parts = dict[Any, Callable[..., Any]]
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def every_op() -> tuple[torch._ops.OpOverload, ...]:
    """Every op of PyTorch, and of libraries that have registered ops so far."""
    return _ops_named(tuple(torch._C._dispatch_get_all_op_names()))


@functools.lru_cache(maxsize=1)
def _ops_named(names: tuple[str, ...]) -> tuple[torch._ops.OpOverload, ...]:
    found = []
    for name in names:
        space, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        with contextlib.suppress(AttributeError, RuntimeError):  # TorchScript's own have no packet
            found.append(getattr(getattr(getattr(torch.ops, space), packet), overload or "default"))
    return tuple(op for op in found if isinstance(op, torch._ops.OpOverload))


def write_out(graph: Graph, book: RuleBook) -> None:
    """Replace every composite op that has no fact by its parts, if all of those have one."""
    unknown = [n for n in graph.nodes if _is_unknown(n.target, book) and _is_pure(n)]
    parts = in_parts(book) if unknown else {}
    for node in unknown:
        found = _traced(node, parts)
        if found is not None and all(_is_known(op, book) for op in _ops(found)):
            _replace(node, found)


def _is_unknown(op: Any, book: RuleBook) -> bool:
    return is_composite(op) and book.fact(op) is None


def _is_known(op: Any, book: RuleBook) -> bool:
    """Whether an op has a fact, or is a copy, which the normal form replaces."""
    return op is COPY_INTO or book.fact(functional(op) or op) is not None


def in_parts(book: RuleBook) -> Parts:
    """By composite op without a fact, a function that decomposes it by running its own kernel."""
    unknown = (op for op in every_op() if _is_unknown(op, book))
    return {op: functools.partial(_called, book, op) for op in unknown}


def _called(book: RuleBook, op: Any, *args: Any, **kwargs: Any) -> Any:
    """Call ``op``'s kernel, so that its ops are traced. Some kernels fill a tensor by other means
    (quantile, the unpacking of sequences): ``NotImplemented`` leaves their op whole."""
    graph = get_proxy_mode().tracer.graph  # type: ignore[union-attr]
    before = len(graph.nodes)
    result = op._op_dk(COMPOSITE, *args, **kwargs)
    made = [*graph.nodes][before:]
    if not any(_is_unfilled(n, made, book) for n in made):
        return result
    for node in reversed(made):
        if _is_write(node):  # the other nodes are dead code, or (``to``) an alias of an operand
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph.erase_node(node)
    return NotImplemented


def _is_unfilled(node: Node, made: Sequence[Node], book: RuleBook) -> bool:
    """Whether a node makes an uninitialised tensor that no later node writes into."""
    if not is_empty(node):
        return False
    names = {node}  # the nodes that share its memory
    for other in made:
        if names.isdisjoint(other.all_input_nodes):
            continue
        if _is_write(other):
            return False
        if not is_fresh(other, book.fact(other.target)):
            names.add(other)
    return True


def _is_write(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_pure(node: Node) -> bool:
    op: Any = node.target
    made = pytree.tree_leaves(node.meta.get("val"))
    return not op._schema.is_mutable and any(isinstance(v, torch.Tensor) for v in made)


def _traced(node: Node, parts: Parts) -> Graph | None:
    """The ops that ``node``'s op calls, as a graph over its operands; None if it cannot be traced."""
    given = node.all_input_nodes
    values = [n.meta["val"] for n in given]

    def call(*found: Any) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), dict(zip(given, found, strict=True)).get)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    mode = detect_fake_mode(values)
    if mode is None:
        return None
    try:
        with torch.no_grad(), mode:
            trace = make_fx(call, parts, pre_dispatch=True, _error_on_data_dependent_ops=False)
            graph = trace(*values).graph
    except (RuntimeError, TypeError, ValueError):  # it reads values of its tensors
        return None
    graph.eliminate_dead_code(lambda n: n.op != "call_function" or _is_write(n))
    return None if any(n.op == "get_attr" for n in graph.nodes) else graph


def _ops(graph: Graph) -> set[Any]:
    """The ops of a graph that make floating-point or complex tensors from tensors."""
    return {
        n.target
        for n in graph.nodes
        if isinstance(n.target, torch._ops.OperatorBase)
        and any(isinstance(v.meta.get("val"), torch.Tensor) for v in n.all_input_nodes)
        and any(map(inexact, pytree.tree_leaves(n.meta.get("val"))))
    }


def _replace(node: Node, parts: Graph) -> None:
    graph = node.graph
    arguments = (n for n in parts.nodes if n.op == "placeholder")
    env = dict(zip(arguments, node.all_input_nodes, strict=True))
    with graph.inserting_before(node):
        result = graph.graph_copy(parts, env)
    for new in (env[n] for n in parts.nodes if n.op == "call_function"):
        new.meta = {**new.meta, **origin(node)}
    for user in list(node.users):
        if isinstance(result, (tuple, list)):  # its users are all ``getitem``
            user.replace_all_uses_with(result[user.args[1]])  # type: ignore[index,arg-type]
            graph.erase_node(user)
        else:
            user.replace_input_with(node, result)  # type: ignore[arg-type]
    graph.erase_node(node)
