"""The input of a pass, which it changes."""

from __future__ import annotations

import dataclasses

from torch.fx import Graph, Node

from libragrad_fx.types import OpFacts


@dataclasses.dataclass
class Work:
    """The graph that a pass changes.

    facts: by node, the row of its op; a pass that adds nodes adds their facts
    noes:  by node, why a pass left it as it is
    """

    graph: Graph
    facts: dict[str, OpFacts]
    noes: dict[str, str] = dataclasses.field(default_factory=dict)

    def no(self, node: Node, reason: str) -> None:
        self.noes[node.name] = reason
