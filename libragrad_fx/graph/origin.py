"""Where in the user's code a node comes from, and what shape it had at capture."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.fx import Node

FORM = "libragrad_fx_form"
"""Where a graph that was pickled has the forms of its nodes, in their ``meta``: it holds no tensors."""


def origin(node: Node) -> dict[str, Any]:
    """The entries of a node's ``meta`` that say where it comes from, to be given to its replacement."""
    return {k: node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in node.meta}


def form(node: Node) -> tuple[tuple[int, ...], tuple[str, ...]] | None:
    """A tensor's shape in the example; and as text, with letters for free sizes (``64*s77``). None of what
    is no tensor, or has sizes that depend on data."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return node.meta.get(FORM)
    if any(isinstance(n, torch.SymInt) and not n.node.has_hint() for n in value.shape):
        return None
    return tuple(map(in_example, value.shape)), tuple(map(str, value.shape))


def in_example(size: Any) -> int:
    return int(size.node.hint if isinstance(size, torch.SymInt) else size)  # type: ignore[arg-type]


def source_line(node: Node) -> str:
    """The user's ``file:line`` that made a node: its innermost frame outside PyTorch."""
    frames = [ln.strip() for ln in (node.meta.get("stack_trace") or "").splitlines()]
    places = [_place(ln) for ln in frames if ln.startswith('File "')]
    outside = [p for p in places if "/torch/" not in p]
    return short_place((outside or places or [""])[-1])


def _place(frame: str) -> str:
    file, line = frame.split('"')[1], frame.split("line ")[1].split(",")[0]
    return f"{file}:{line}"


def short_place(place: str) -> str:
    """A place without the machine's folders: relative to site-packages, or to the working directory."""
    return place.rpartition("site-packages/")[2].removeprefix(os.getcwd() + os.sep)


def module_path(node: Node) -> str:
    """Dotted path of the submodule a node was traced in; ``""`` for the root."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else ""
