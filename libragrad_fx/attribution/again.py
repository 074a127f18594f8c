"""Where things lie, kept from one call of a module to the next.

That is a matter of the graph and of sizes, unless a value of an input says it (an index, a mask that
selects), or chance does: then nothing is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from libragrad_fx.attribution.places import Located, Locator, untold
from libragrad_fx.decide.flow import reach
from libragrad_fx.graph.schema import aten_op
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.ops.insert import probed
from libragrad_fx.ops.places import SIZE
from libragrad_fx.optimise.execute import entry

_MOST = 16  # sizes of inputs that a module keeps places for; the least recently used is dropped
Key = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class _Kept:
    """read: copies of the module's tensors whose values said where things lie."""

    located: Located
    read: Mapping[str, torch.Tensor]


def key(given: Any, *ends: Collection[Node]) -> Key:
    """What may differ between two calls of a graph: sizes, devices, numbers; and what is to be located."""
    leaves, names = pytree.tree_flatten(given)
    forms = [(x.shape, x.device) if isinstance(x, torch.Tensor) else repr(x) for x in leaves]
    return (str(names), tuple(forms), *(tuple(n.name for n in nodes) for nodes in ends))


def recall(module: CapturedModule, asked: Key) -> Located | None:
    """What an earlier call found; None if there was none, or the module's tensors differ now."""
    kept: dict[Key, _Kept] = module.__dict__.setdefault("_located", {})
    found = kept.pop(asked, None)
    if found is None or not all(_same(t, _attribute(module, n)) for n, t in found.read.items()):
        return None
    kept[asked] = found  # the latest used is the last
    return found.located


def keep(module: CapturedModule, asked: Key, locator: Locator) -> Located:
    """What a run found, kept if every run of that key finds the same."""
    found = locator.located()
    names = _attributes_read(module.graph, locator)
    if names is not None:
        tensors = ((n, _attribute(module, n)) for n in names)
        read = {n: t.detach().clone() for n, t in tensors if isinstance(t, torch.Tensor)}
        kept = module.__dict__.setdefault("_located", {})
        kept[asked] = _Kept(found, read)
        for old in [*kept][:-_MOST]:
            kept.pop(old, None)
    return found


def _attributes_read(graph: Graph, locator: Locator) -> list[str] | None:
    """The module's attributes that say where things lie, and of what size values are. None if something in
    an input does, besides its size, or chance."""
    by_value = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    sized = [n for n in graph.nodes if by_value & {*_tags(n)}]
    starts = {*locator.read, *(m for n in sized for m in untold(n, locator.facts(n)))}
    found = reach(starts, lambda n: () if n.target is SIZE else _computed_from(n))
    if any(n.op == "placeholder" or torch.Tag.nondeterministic_seeded in _tags(n) for n in found):
        return None
    return [str(n.target) for n in found if n.op == "get_attr"]


def _computed_from(node: Node) -> list[Node]:
    """What a value is computed from; a probe has what the call returned."""
    returned = [n for n in pytree.tree_leaves(probed(node)) if isinstance(n, Node)]
    return returned or node.all_input_nodes


def _tags(node: Node) -> Sequence[torch.Tag]:
    return getattr(aten_op(node), "tags", ())


def _attribute(module: CapturedModule, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return entry(module.get_submodule(parent), name)


def _same(then: torch.Tensor, now: Any) -> bool:
    return isinstance(now, torch.Tensor) and then.device == now.device and torch.equal(then, now)
