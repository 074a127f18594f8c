"""What a pass works on."""

from __future__ import annotations

import dataclasses

from torch.fx import Graph, Node

from libragrad_fx.types import OpFacts


@dataclasses.dataclass
class Work:
    """A graph that is being made to do less.

    facts: by node, the row of its op; a pass adds those of the nodes that it adds
    noes:  why a node that a pass might have changed was left as it is
    """

    graph: Graph
    facts: dict[str, OpFacts]
    noes: dict[str, str] = dataclasses.field(default_factory=dict)

    def no(self, node: Node, reason: str) -> None:
        self.noes[node.name] = reason
