"""What the passes write on a node: one frozen note, under one key of ``node.meta``.

A note is pickled whole with its node, so a pass that adds a field adds nothing else.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from torch.fx import Node

KEY = "libragrad"


class Undo(enum.Enum):
    """How ``erase`` gets the original's forward graph back."""

    OP = "op"
    """The node stays, and calls the op that its target is the twin of, if it is one."""
    PASS = "pass"
    """The node returns its first argument: its readers read that."""
    DROP = "drop"
    """The node is there for the gradient alone: no node of the original reads it."""
    OUTPUT = "output"
    """The node stands for the output of a module call."""


@dataclasses.dataclass(frozen=True)
class Note:
    """What is known of one node.

    rule:  the row or the pass that made the node what it is; "" for a node of the original
    host:  the original's node that the rule speaks of
    undo:  see ``Undo``
    bound: a Python binding does what the op does with such arguments (``ops.binding``)
    gate:  how the node is the halved product of a gated activation, in the words of ``gated``
    place: of a ``select`` that a gradient comes back through: axis, place and how many places there are
    fixed: the node depends on no input and no parameter, but for sizes and other numbers: once for each of
        these is enough
    over:  the node may be computed in the memory of its first operand
    """

    rule: str = ""
    host: str = ""
    undo: Undo = Undo.OP
    bound: bool = False
    gate: tuple[int, bool, tuple[int, bool] | None] | None = None
    place: tuple[int, int, int] | None = None
    fixed: bool = False
    over: bool = False


_NOTHING = Note()


def note(node: Node) -> Note:
    """The note on a node; an empty one where there is none."""
    return node.meta.get(KEY, _NOTHING)  # type: ignore[no-any-return]


def annotate(node: Node, **changes: Any) -> None:
    """Change fields of the note on a node."""
    node.meta[KEY] = dataclasses.replace(note(node), **changes)
