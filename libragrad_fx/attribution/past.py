"""What leads past a layer: the reads, behind it, of what it is itself computed from.

A decoder's block reads the encoder, which the blocks before it have read too; a block in a branch has what
goes by the other. Each such read sees a view of its own, so one backward tells the share of each.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from libragrad_fx.account.observe import Observer
from libragrad_fx.decide.flow import reach
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.module.walk import origin, senders
from libragrad_fx.ops.insert import leaf

Read = tuple[Node, Node]
"""A node, and an operand of it."""


def reads_past(module: CapturedModule, layers: Mapping[str, Node]) -> dict[str, list[Read]]:
    """By layer the reads on a gradient's path that lead past it; of layers that have some."""
    sends = senders(module)

    def leads(node: Node) -> Sequence[Node]:
        returns = node.op == "output" or node.target == "output_structure"
        return node.all_input_nodes if returns else sends(node)

    end = next(n for n in reversed(module.graph.nodes) if n.op == "output")
    found = {}
    for path, node in layers.items():
        before, itself = reach([node], sends), origin(node)
        behind = reach([end], lambda n, before=before: () if n in before else leads(n)) - before
        pairs = [(n, m) for n in module.graph.nodes if n in behind for m in dict.fromkeys(leads(n))]
        found[path] = [(n, m) for n, m in pairs if m in before and origin(m) is not itself]
    return {path: reads for path, reads in found.items() if reads}


class Apart(Observer):
    """An ``Observer`` in which ``reads`` see a view of their own, kept in ``seen`` where it is a tensor."""

    def __init__(self, module: CapturedModule, reads: Collection[Read], *args: Any, **kwargs: Any) -> None:
        super().__init__(module, *args, **kwargs)
        self.reads, self.seen = {n: [m for k, m in reads if k is n] for n, _ in reads}, dict[Read, Any]()

    def run_node(self, n: Node) -> Any:
        mine, read = self.reads.get(n, ()), n.all_input_nodes
        own = {m: y for m in mine if m in read and isinstance(y := self.env[m], torch.Tensor)}
        for m, y in own.items():
            self.seen[n, m] = self.env[m] = y.view_as(y)
        found = super().run_node(n)
        self.env.update(own)
        if n.target is leaf and isinstance(found, torch.Tensor):
            for m in mine:  # the node itself, as a module returned it
                self.seen[n, m] = found = found.view_as(found)
        return found
