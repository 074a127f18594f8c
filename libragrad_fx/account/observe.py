"""Runs a graph and shows each node's value, arguments and constant to a callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from libragrad_fx.errors import InputError
from libragrad_fx.graph.schema import aten_op
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.ops import bias as biases
from libragrad_fx.ops import insert
from libragrad_fx.optimise.execute import attribute
from libragrad_fx.target import inexact
from libragrad_fx.types import Site

Tap = Callable[[Node, Any], None]


class Observer(torch.fx.Interpreter):
    """Runs a module's graph node by node; call ``run(*flat_arguments(module, args, kwargs))``.

    Where the signal enters (inputs, and embeddings that inputs index), the value becomes a new leaf of
    autograd. ``sources`` holds these leaves, by the path of the input or the name of the embedding's node.

    Args:
        tap: called with each node and its value once that is computed; the node's arguments are
            ``fetch_args_kwargs_from_env(node)``.
        graph: the graph to run, ``module.graph`` by default; may be the lean one.
        given: values that leaves start from instead of what is computed, by the names in ``sources``. A
            node that is named here starts a leaf as well.
        attributes: tensors to take in place of the module's own, by path.
    """

    def __init__(
        self, module: CapturedModule, tap: Tap | None = None, graph: Graph | None = None,
        given: Mapping[str, torch.Tensor] | None = None,
        attributes: Mapping[str, torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(module, garbage_collect_values=True, graph=graph)
        self.extra_traceback = False  # an op's own error is enough
        self.tap, self.embeddings, self.given = tap, module.record.starts, given or {}
        self.attributes = attributes or {}
        self.sources: dict[str, torch.Tensor] = {}

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """As fx, but ``*args`` takes one argument: the tuple (see ``flat_arguments``)."""
        return next(self.args_iter)

    def fetch_attr(self, target: str) -> Any:
        """As fx, but by ``entry``."""
        return self.attributes[target] if target in self.attributes else attribute(self.module, target)

    def run_node(self, n: Node) -> Any:
        y = self.computed(n)
        if n.target is insert.guard or n.name in self.embeddings or n.name in self.given:
            y = pytree.tree_map(lambda x: self.started(n, x), y)  # an embedding bag gives several
        if self.tap is not None:
            self.tap(n, y)
        return y

    def computed(self, n: Node) -> Any:
        """The value of a node."""
        return super().run_node(n)

    def started(self, n: Node, x: Any) -> Any:
        """``x`` as a new leaf of autograd, noted in ``sources``."""
        if inexact(x):
            name = source_name(n)
            start: Any = self.given.get(name, x)
            self.sources[name] = x = start.detach().requires_grad_()
        return x


def source_name(node: Node) -> str:
    """The path of an input (``x['mask']``); any other node's own name."""
    return str(node.args[1]) if node.target is insert.guard else node.name


def site_bias(site: Site, n: Node, args: Any, kwargs: Any) -> Any:
    """The constant of a site that has one, shaped like its output; None if it turns out to be zero."""
    assert site.bias is not None
    return biases.bias(site.bias, aten_op(n), site.live, args, kwargs)


def flat_arguments(module: CapturedModule, args: Any, kwargs: Any) -> list[Any]:
    """A call's arguments in the order of the graph's placeholders, with defaults filled in."""
    names = [n for n in module.graph.nodes if n.op == "placeholder"]
    star = next((n for n in names if str(n.target).startswith("*")), None)
    plain = [n for n in names if n is not star]
    count = len(plain) if star is None else names.index(star)
    given = dict(zip((n.name for n in plain[:count]), args, strict=False)) | dict(kwargs)
    if unknown := set(given) - {n.name for n in plain}:
        raise InputError(f"forward takes no {', '.join(sorted(unknown))}")
    missing = [n.name for n in plain if n.name not in given and not n.args]
    if missing or (star is None and len(args) > count):
        raise InputError(f"the inputs do not fit forward({', '.join(n.name for n in names)})")
    if star is not None:
        given[star.name] = tuple(args[count:])
    return [given[n.name] if n.name in given else n.args[0] for n in names]
