"""What rewrite and optimiser write on a node: one frozen note, under one key of ``node.meta``.

A note is pickled whole with its node, so a pass that adds a field adds nothing else.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from torch.fx import Node

KEY = "libragrad"


class Undo(enum.Enum):
    """How ``erase`` turns a node back into the original's forward graph."""

    OP = "op"
    """Keep the node; if its target is a twin, call the ATen op instead."""
    PASS = "pass"
    """Let its readers read its first argument, which it returns."""
    DROP = "drop"
    """Drop it: it serves the gradient alone, and no node of the original reads it."""
    OUTPUT = "output"
    """Let its readers read the output of the module call that it stands for."""


@dataclasses.dataclass(frozen=True)
class Note:
    """The note on one node.

    rule:  the row or the pass that inserted or replaced the node; "" for a node of the original
    host:  the original's node that the rule applies to
    undo:  see ``Undo``
    bound: a Python binding may replace the op (``ops.binding``)
    gate:  (at, over, halves) of ``ops.gate.gated``, for the halved product of a gated activation
    place: (axis, place, size of the axis), for a ``select`` that gets a gradient
    fixed: a constant: depends on no input and no parameter, only on sizes and other numbers
    over:  the node may write over its first operand
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
