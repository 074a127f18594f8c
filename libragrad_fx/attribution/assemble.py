"""From shares of positions to one map, and to what it adds up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from libragrad_fx.attribution import maps
from libragrad_fx.attribution.formulas import Term
from libragrad_fx.attribution.internals import Internals
from libragrad_fx.attribution.result import Attribution
from libragrad_fx.errors import InputError
from libragrad_fx.target import product


def expected(seen: Internals, names: Sequence[str], biases: Sequence[Term], plus: bool) -> torch.Tensor:
    """(B,): what all terms add up to if the backward is balanced.

    The term of a layer is the output less what does not come by it: biases and inputs that are not
    before it. An input in ``names`` counts for itself.
    """
    output = seen.output.double()
    if not plus or not seen.before:
        return output
    sums = [(name, maps.summed(b)) for name, b in biases]
    counted = {name for name, _ in biases}  # embedded tokens that pass no layer are a constant there
    unseen = [(name, maps.summed(b)) for name, b in shares_of(seen.upstream, len(output))]
    sources = [(n, maps.summed(product(x, g))) for n, (x, g) in seen.inputs.items() if n not in counted]
    whole = torch.zeros_like(output) + sum(s for _, s in sums) + sum(s for n, s in sources if n in names)
    for before in (seen.before[n] for n in names if n in seen.before):
        whole = whole + output - sum(s for name, s in [*sources, *sums, *unseen] if name not in before)
    return whole


def assemble(
    seen: Internals, shares: Sequence[Term], biases: Sequence[Term],
    whole: torch.Tensor, **said: Any,
) -> Attribution:  # fmt: skip
    """The shares of positions as one map.

    Args:
        biases: shares of additive constants.
        whole: (B,) what all of it adds up to.
        said: the fields of ``Attribution`` that a caller knows.
    """
    pictures = images(seen)
    terms = [*shares, *biases]
    main = _main(seen, [name for name, _ in shares], pictures)
    groups: dict[frozenset[str], list[torch.Tensor]] = {main: []}
    for name, term in terms:
        groups.setdefault(seen.tokens.get(name, frozenset()) or main, []).append(term)
    firsts = {seen.tokens[n]: p.shape for n, p in reversed(shares)}
    found: dict[frozenset[str], list[maps.Placed]] = {}
    for source, group in groups.items():
        # of joined sequences (text before patches) no part is laid out as an image
        image = pictures.get(next(iter(source))) if len(source) == 1 else None
        shape = firsts.get(source)
        shape = max((t.shape for t in group), key=len) if shape is None else shape
        where = maps.layout(shape, seen.shapes if source == main else [], image)
        found[source] = [maps.place(t, where, image) for t in group]
    placed = {
        source: maps.add(shown)
        for source, ps in found.items()
        if (shown := [p.map for p in ps if p.map is not None])
    }
    if main not in placed:
        raise InputError(
            f"inputs of shape {tuple(firsts[main])} have no positions to attribute to; ask for"
            " layers=[…] whose inputs are (B, N, C) or (B, C, H, W)"
        )
    prefix = [p.prefix for p in found[main] if p.prefix is not None]
    rest = [p.rest for ps in found.values() for p in ps]
    rest += [
        p.prefix.sum(1)
        for source, ps in found.items()
        for p in ps
        if source != main and p.prefix is not None
    ]
    total = torch.stack([maps.summed(t) for _, t in terms]).sum(0)
    return Attribution(
        values=placed[main],
        prefix=torch.stack(prefix).sum(0) if prefix else None,
        unplaced=torch.stack(rest).sum(0),
        others={" and ".join(sorted(s)): m for s, m in placed.items() if s != main},
        output=seen.output,
        total=total,
        expected=whole,
        completeness_error=(total - whole).abs(),
        positional=_positional(seen),
        **said,
    )


def _positional(seen: Internals) -> torch.Tensor:
    """(B,): what the output owes to tables of positions."""
    nothing = torch.zeros_like(seen.output, dtype=torch.float64)
    return nothing + sum(maps.summed(t) for _, t in shares_of(seen.places, len(nothing)))


def shares_of(constants: Sequence[Any], batch: int) -> list[Term]:
    """Additive constants times their gradients, samples first."""
    return [(site.node, maps.by_sample(product(b, g), rows, batch)) for site, rows, b, g in constants]


def _main(seen: Internals, names: Sequence[str], images: Mapping[str, Any]) -> frozenset[str]:
    """The input whose positions the map is over: an image, or that of the first term. What no gradient came
    back to (the other tower) is out of the question."""
    tokens = [seen.tokens[n] for n in names if n in seen.reached] or [seen.tokens[n] for n in names]
    return next((t for t in tokens if t & set(images)), tokens[0])


def images(seen: Internals) -> dict[str, tuple[int, int]]:
    """Height and width of the inputs that are images."""
    return {n: (x.shape[-2], x.shape[-1]) for n, (x, _) in seen.inputs.items() if x.ndim == 4}
