"""One transformed module, one graph for each kind of call: other shapes, containers, dtypes, constants.

A graph serves the calls that its guards accept. For another call the original is captured again, as long as
it is in memory, and the new graph is kept. All graphs of a module share its parameters, its submodules and
their hooks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from libragrad_fx.errors import GuardError, LibraGradError
from libragrad_fx.module.captured import TREE, CapturedModule, InGraphs, one_graph
from libragrad_fx.ops import insert
from libragrad_fx.target import as_call

_MOST = 64  # the most graphs that are kept; the least recently used one is dropped
_CHECKS = (insert.guard, insert.constant, insert.structure, insert.sizes)
Recapture = Callable[[Sequence[Any], Mapping[str, Any]], CapturedModule]


class Origin:
    """Captures a module's original again, and keeps the graphs made so far."""

    def __init__(self, recapture: Recapture) -> None:
        self.recapture = recapture
        self.variants: list[CapturedModule] = []
        self._lock = threading.RLock()

    def other(
        self, module: CapturedModule, refusal: GuardError, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> CapturedModule:  # fmt: skip
        """A graph for a call that ``module``'s own guards refused: a kept one, or a new one.

        Raises:
            GuardError: ``refusal``, with the error of the new capture.
        """
        with self._lock:
            for variant in self.variants:
                _follow(variant, module)
                if fits(variant, args, kwargs):
                    self.variants.remove(variant)
                    self.variants.insert(0, variant)
                    return variant
            try:
                made = self.recapture(args, kwargs)
            except (LibraGradError, RuntimeError, TypeError, ValueError, IndexError, KeyError) as e:
                raise GuardError(f"{refusal}\n  Captured again for this call it failed: {e}") from e
            self.variants = [_adopted(made, module), *self.variants[: _MOST - 1]]
            return self.variants[0]

    def copied(self) -> Origin:
        """For a copy of the module: the same original, but no graphs, which share the module's tree."""
        return Origin(self.recapture)


def refusal_of(module: CapturedModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Exception | None:
    """The error that a graph's guards raise for a call; None if they accept it."""
    check = vars(module).get("_checks")
    if check is None:
        check = module.__dict__["_checks"] = type(_checks(module.graph)).forward
    try:
        check(module, *args, **kwargs)
    except (GuardError, TypeError) as e:  # TypeError: another signature
        return e
    return None


def fits(module: CapturedModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a graph's guards accept a call."""
    return refusal_of(module, args, kwargs) is None


def fitting(module: InGraphs, inputs: Any) -> Any:
    """The graph that ``module`` runs for ``inputs``; ``module`` itself if it has no original.

    Raises:
        ModeError: the module was changed after it was captured.
    """
    if isinstance(module, CapturedModule) and module.training is module.record.training:
        module._tree.require_unchanged()
    if module.origin is None:
        return module
    args, kwargs = as_call(inputs)
    refusal = refusal_of(one_graph(module), args, kwargs)
    if not isinstance(refusal, GuardError):
        return module
    return module.origin.other(module, refusal, args, kwargs)


def _checks(graph: Graph) -> GraphModule:
    """The guards of ``graph`` alone, as a module."""
    needed: set[Node] = set()
    stack = [n for n in graph.nodes if n.target in _CHECKS]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    part, env = Graph(), dict[Node, Node]()
    for node in graph.nodes:
        if node in needed or node.op == "placeholder":
            env[node] = part.node_copy(node, env.__getitem__)
    part.output(None)
    return GraphModule({"training": False}, part)


def _adopted(variant: CapturedModule, module: CapturedModule) -> CapturedModule:
    """``variant``'s graph on ``module``'s tree, so that it sees what a user replaces or hooks there."""
    root = torch.nn.Module()
    root.__dict__.update({k: vars(variant)[k] for k in (*TREE, *variant._attributes)})
    root.__dict__["_modules"] = {**variant._modules, **module._modules}
    own = [k for k in variant._modules if k not in module._modules or k == "output_structure"]
    root._modules.update({k: variant._modules[k] for k in own})
    made = CapturedModule(root, variant.graph, variant.record, variant.lean)
    made.__dict__["_constants"] = {k for k in variant._buffers if k.startswith("constant_")}
    return _follow(made, module)


def _follow(variant: CapturedModule, module: CapturedModule) -> CapturedModule:
    """Give a variant the current parameters, buffers and mode of ``module``'s root."""
    variant._parameters.update(module._parameters)
    own = vars(variant)["_constants"]
    variant._buffers.update({k: b for k, b in module._buffers.items() if k not in own})
    variant.training = module.training
    return variant
