"""A forward of a model that is not one graph, with its inputs in view: it is cut, or recorded at each call.

Blocks, attention and the constants of the whole are out of sight: the roles of values end with a graph. The
gradient that comes back to an input is the model's own, whatever graphs ran on the way.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from libragrad_fx.account.observe import Observer, flat_arguments
from libragrad_fx.attribution.formulas import Method
from libragrad_fx.attribution.internals import Run, facts_of
from libragrad_fx.attribution.places import Locator
from libragrad_fx.decide.flow import reach
from libragrad_fx.errors import InputError
from libragrad_fx.module.captured import CapturedModule, InGraphs
from libragrad_fx.target import as_call, differentiable, inexact

Leaves = Mapping[str, torch.Tensor]


def asks_outside(how: Method) -> bool:
    """Whether a method looks at the inputs of a model alone."""
    at_inputs = how.layers in ("input", "first") and how.path != "whole"
    return at_inputs and not how.biases and not how.attention


@dataclasses.dataclass(frozen=True)
class Outside(Run):
    """As ``Run``, without layers and constants. tokens: as in ``Internals``."""

    tokens: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def layout(self) -> Mapping[str, Any]:
        return {
            "shapes": (), "apart": frozenset(), "before": {}, "tokens": self.tokens,
            "axes": self.located.axes, "layouts": {}, "streams": (), "read": None,
        }  # fmt: skip


class _Graph(Observer):
    """Runs one of the graphs. Embeddings at which the signal starts become leaves; other values stay on
    their path to the inputs.

    inputs: by node, the input of the model that it is
    found:  the embeddings, by name, with the names of the inputs that index them
    """

    def __init__(self, name: str, module: CapturedModule, leaves: Leaves, locator: Locator) -> None:
        super().__init__(module, self.follow)
        self.name, self.leaves, self.locator = name, leaves, locator
        self.inputs: dict[Node, str] = {}
        self.found: dict[str, frozenset[str]] = {}
        locator.facts = facts_of(module)

    def started(self, n: Node, x: Any) -> Any:
        if n.name not in self.embeddings:
            path = next((p for p, t in self.leaves.items() if t is x), None)
            if path is not None:
                self.inputs[n] = path
                if inexact(x):
                    self.locator.start(n, path, x, False)
        elif inexact(x):
            name = f"{self.name}/{n.name}"
            self.sources[name] = x = x.detach().requires_grad_()
            read = reach([n], lambda m: m.all_input_nodes) & self.inputs.keys()
            self.found[name] = frozenset(self.inputs[m] for m in read) or frozenset([name])
            self.locator.start(n, name, x, True)
        return x

    def follow(self, n: Node, y: Any) -> None:
        self.locator.see(n, lambda: self.fetch_args_kwargs_from_env(n), y)
        self.locator.forget(self.user_to_last_uses.get(n, ()))


def run_outside(module: InGraphs, inputs: Any, given: Leaves | None = None) -> Outside:
    """Run ``module`` forward once.

    Args:
        inputs: as ``module`` takes them: a tensor, a tuple, or a dict of keyword arguments.
        given: values of the floating-point inputs to run it on instead, in their order.

    Raises:
        InputError: ``given`` has values of embeddings. The model's own Python has run before those.
    """
    locator = Locator(lambda n: None, lambda n: 0, (), ())
    ran: list[_Graph] = []

    def show(name: str, graph: CapturedModule, leaves: Any, args: Any, kwargs: Any) -> Any:
        again = sum(r.name.partition("#")[0] == name for r in ran)  # a loop runs a graph several times
        ran.append(_Graph(f"{name}#{again + 1}" if again else name, graph, leaves, locator))
        return ran[-1].run(*flat_arguments(graph, args, kwargs))

    with differentiable(), module.unchanged():
        forward = module.run_by(show, *_replaced(*as_call(inputs), given))
    sources = {path: x for path, x in forward.leaves.items() if inexact(x)}
    tokens = {path: frozenset([path]) for path in sources}
    for path, x in sources.items():
        locator.shapes.setdefault(path, tuple(x.shape))
    for graph in ran:
        sources |= graph.sources
        tokens |= graph.found
    return Outside(
        module, locator.facts, forward.output, sources, {}, {}, (), (), {}, (), (), {}, locator.located(),
        {}, tokens=tokens,
    )  # fmt: skip


def _replaced(args: Any, kwargs: Any, given: Leaves | None) -> tuple[Any, Any]:
    """A call with other values of its floating-point tensors."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [i for i, x in enumerate(leaves) if inexact(x)]
    if given is None:
        return args, kwargs
    if len(given) > len(places):
        raise InputError(
            "a method that averages over other inputs cannot move embedded token ids in a model that had to"
            " be cut into several graphs, or to be recorded: give it embeddings as its inputs"
            " (inputs_embeds), or use input_x_gradient"
        )
    for i, x in zip(places, given.values(), strict=True):
        leaves[i] = x
    return pytree.tree_unflatten(leaves, spec)
