"""From shares of positions to one map, and to what it adds up to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
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
    before it, and what leads past it. An input in ``names`` counts for itself. nan where that is not known,
    and without biases of a layer that something leads past.
    """
    output = seen.output.double()
    if not plus or not seen.before:
        return torch.full_like(output, math.nan) if seen.past.keys() & {*names} else output
    sums = [(name, maps.summed(b)) for name, b in biases]
    unseen = [(name, maps.summed(b)) for name, b in shares_of(seen.upstream, output.shape[0])]
    counted = {name for name, _ in [*sums, *unseen]}  # embedded tokens may be constants there
    sources = [(n, maps.summed(product(x, g))) for n, (x, g) in seen.inputs.items() if n not in counted]
    whole = torch.zeros_like(output) + sum(s for _, s in sums) + sum(s for n, s in sources if n in names)
    for name in (n for n in names if n in seen.before):
        before, past = seen.before[name], seen.past.get(name, 0)
        whole = whole + output - past - sum(s for n, s in [*sources, *sums, *unseen] if n not in before)
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
    terms = [*shares, *biases]
    main = _main(seen, [name for name, _ in shares])
    groups: dict[frozenset[str], list[Term]] = {main: []}
    for name, term in terms:
        groups.setdefault(seen.tokens.get(name, frozenset()) or main, []).append((name, term))
    firsts = {seen.tokens[n]: p.shape for n, p in reversed(shares)}
    found = {g: _placed(seen, g, ts, firsts.get(g), g == main) for g, ts in groups.items()}
    each: dict[str, list[torch.Tensor]] = {}
    for source, m in (pair for ps in found.values() for p in ps for pair in p.maps.items()):
        each.setdefault(source, []).append(m)
    placed = {source: _one_map(seen, source, ms) for source, ms in each.items()}
    shown = next((s for s in _sources(seen, main) if s in placed), None)
    if shown is None:
        raise InputError(
            f"inputs of shape {tuple(firsts[main])} have no positions to attribute to; ask for"
            " layers=[…] whose inputs are (B, N, C) or (B, C, H, W)"
        )
    prefix = [p.prefix for p in found[main] if p.prefix is not None]
    rest = [p.rest for ps in found.values() for p in ps]
    rest += [p.prefix.sum(1) for g, ps in found.items() for p in ps if g != main and p.prefix is not None]
    rest += [
        p.sum(1) for p in prefix if p.shape != prefix[0].shape
    ]  # at a layer with other tokens in front
    prefix = [p for p in prefix if p.shape == prefix[0].shape]
    total = torch.stack([maps.summed(t) for _, t in terms]).sum(0)
    return Attribution(
        values=placed[shown],
        prefix=torch.stack(prefix).sum(0) if prefix else None,
        unplaced=torch.stack(rest).sum(0),
        others={s: m for s, m in placed.items() if s != shown},
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
    return nothing + sum(maps.summed(t) for _, t in shares_of(seen.places, nothing.shape[0]))


def shares_of(constants: Sequence[Any], batch: int) -> list[Term]:
    """Additive constants times their gradients, samples first."""
    return [(site.node, maps.by_sample(product(b, g), rows, batch)) for site, rows, b, g in constants]


def _main(seen: Internals, names: Sequence[str]) -> frozenset[str]:
    """The inputs whose positions the map is over: an image, or those of the first term. What no gradient
    came back to (the other tower) is out of the question."""
    tokens = [seen.tokens[n] for n in names if n in seen.reached] or [seen.tokens[n] for n in names]
    pictures = images(seen)
    return next((t for t in tokens if t & pictures.keys()), tokens[0])


def _sources(seen: Internals, group: frozenset[str]) -> list[str]:
    """The names of maps that belong to these inputs: of an image first, of all together, of each."""
    pictures = [n for n in images(seen) if n in group]
    parts = (_together(seen.tokens[n]) for n in seen.inputs if seen.tokens[n] <= group)
    return [*pictures, _together(group), *parts]


def _together(group: frozenset[str]) -> str:
    return " and ".join(sorted(group))


def _placed(
    seen: Internals, group: frozenset[str], terms: Sequence[Term], first: Any, main: bool
) -> list[maps.Placed]:
    """Each term of these inputs where it lies. first: the shape of the first layer over them."""
    # of joined sequences (text before patches) no part is laid out as an image, unless it is known where
    name = _together(group)
    image = images(seen).get(name)
    layouts = layouts_of(seen, group)
    shape = max((t.shape for _, t in terms), key=len) if first is None else first
    layouts.append(maps.guessed(name, shape, seen.shapes if main else [], image))
    return [_term(seen, node, term, layouts, name, image) for node, term in terms]


def _term(
    seen: Internals, node: str, term: torch.Tensor, layouts: Sequence[maps.Layout], name: str, image: Any
) -> maps.Placed:
    if node in seen.inputs and term.ndim > 1 and node in seen.axes:
        shares = maps.kept(term, seen.axes[node])
        return maps.Placed({_together(seen.tokens[node]): shares}, None, shares.new_zeros(term.shape[0]))
    if (own := seen.windows.get(node)) is not None:
        shown = maps.on_tokens(maps.kept(term, own.axes).flatten(1), _renamed(seen, own))
        copies = 0 if shown.prefix is None else shown.prefix.sum(1)  # of class tokens, in each window
        return maps.Placed(shown.maps, None, shown.rest + copies)
    return maps.place(term, layouts, name, image)


def layouts_of(seen: Internals, group: frozenset[str]) -> list[maps.Layout]:
    """How the tokens lie that come from these inputs. Parts of one name would hide each other."""
    mine = (
        _renamed(seen, layout)
        for layout in seen.layouts.values()
        if frozenset().union(*(seen.tokens[p.source] for p in layout.parts)) == group
    )
    return [x for x in mine if len({p.source for p in x.parts}) == len(x.parts)]


def _renamed(seen: Internals, layout: maps.Layout) -> maps.Layout:
    """With its parts named after the inputs that share their positions (words, segments)."""
    parts = (p._replace(source=_together(seen.tokens[p.source])) for p in layout.parts)
    return dataclasses.replace(layout, parts=tuple(parts))


def _one_map(seen: Internals, source: str, found: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of maps of one input; what lies on no channel of a series is a map over time."""
    if len({m.ndim for m in found}) > 1:
        found = [m.flatten(1) for m in found]
    whole, x = maps.add(found), seen.inputs.get(source)
    series = x is not None and x[0].ndim == 3 and seen.axes[source] == (1, 2)
    return whole.squeeze(1) if series and x is not None and x[0].shape[1] > 1 else whole


def images(seen: Internals) -> dict[str, maps.Extents]:
    """The extents of the inputs that are pictures: images, volumes, videos."""
    return {
        n: tuple(seen.inputs[n][0].shape[i] for i in axes)
        for n, axes in seen.axes.items()
        if len(axes) > 1 and n in seen.inputs
    }
