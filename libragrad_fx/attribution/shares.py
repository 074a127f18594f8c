"""Who has a part in an output: heads, blocks, modules; and which layers see a new resolution first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from libragrad_fx.attribution import maps
from libragrad_fx.attribution.formulas import Term
from libragrad_fx.attribution.internals import Internals
from libragrad_fx.attribution.places import samples_axis
from libragrad_fx.errors import InputError
from libragrad_fx.graph.origin import form
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.module.walk import argument, blocks, bypassed, calls, origin, senders
from libragrad_fx.ops import insert
from libragrad_fx.target import product

By = Literal["head", "block", "module"]
BY = ("head", "block", "module")


def stages(module: CapturedModule) -> list[str]:
    """The blocks that see a new resolution first, in their order: a layer is the *input* of its block, so
    the map of a stage is over what the stage gets. Blocks in branches are none. Without repeated blocks,
    any module that the whole stream goes through.

    Raises:
        InputError: no module has an input with positions.
    """
    called, sends, samples = calls(module), senders(module), samples_axis(module)
    given = (form(n) for n in module.graph.nodes if n.target is insert.guard)
    inputs = [sizes for sizes, _ in filter(None, given) if len(sizes) > 3]
    image = inputs[0][2:] if inputs else None
    found: dict[str, str] = {}
    for name in blocks(module) or [*called]:
        node = argument(called[name])
        shape = None if node is None else form(origin(node))
        if node is None or shape is None or len(shape[0]) < 3:
            continue
        sizes, names = (_samples_first(part, samples(node)) for part in shape)
        size = str([names[i] for i in maps.positions(sizes, image)])
        if size not in found and not bypassed(module, node, sends):
            found[size] = name
    if not found:
        raise InputError(
            "layers='stages' needs modules that the whole picture goes through, and this graph has none"
            " with positions: name paths with layers=[…]"
        )
    return [*found.values()]


def _samples_first(sizes: Sequence[Any], axis: int) -> tuple[Any, ...]:
    return (sizes[axis], *sizes[:axis], *sizes[axis + 1 :])


def parts(
    by: By, seen: Internals, terms: Sequence[Term], biases: Sequence[Term]
) -> dict[str, torch.Tensor]:
    """The parts of heads, blocks or modules; see ``Attribution.parts``.

    Raises:
        InputError: heads of a model without attention, or blocks where no layer is a block.
    """
    if by == "module":
        return _by_module(seen, terms, biases)
    found = _by_head(seen) if by == "head" else _by_block(seen)
    if not found:
        needed = "attention" if by == "head" else "blocks: name some with layers=[…]"
        raise InputError(f"by={by!r} needs {needed}, and this graph has none")
    return found


def _by_module(seen: Internals, terms: Sequence[Term], biases: Sequence[Term]) -> dict[str, torch.Tensor]:
    modules = {site.node: site.module for site, *_ in seen.biases}
    found: dict[str, torch.Tensor] = {}
    for name, term in terms:
        found[f"input of {name}" if name in seen.layers else name] = maps.summed(term)
    for node, term in biases:
        where = modules[node]
        found[where] = found.get(where, 0) + maps.summed(term)
    return found


def _by_head(seen: Internals) -> dict[str, torch.Tensor]:
    batch, found = seen.output.shape[0], dict[str, torch.Tensor]()
    for attention in seen.attention:
        each = (attention.weights * attention.gradient).sum((2, 3))  # ⟨A, dO Vᵀ⟩ = ⟨A V, dO⟩
        whole = each.unflatten(0, (batch, -1)).sum(1)  # windows of a sample lie together
        name, count = attention.module, 1
        while name in found:
            name, count = f"{attention.module}#{count + 1}", count + 1
        found[name] = whole
    return found


def _by_block(seen: Internals) -> dict[str, torch.Tensor]:
    found = {}
    for (name, (h, _)), (y, g) in zip(seen.layers.items(), seen.returned, strict=True):
        added = y.double() - h.double() if y.shape == h.shape else y
        found[name] = maps.summed(product(added, g))
    return found
