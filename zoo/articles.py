"""Insects drawn from five parts, for FunnyBirds' scores (``metrics.parts``; Hesse et al. 2023).

A class is one variant of each part: antennae, wings, legs, spots and tail. Body and head are the same for
all. Pictures are 96 x 96, over a ground with six objects on it. Every part and every object can be left
out, and what it hid is drawn then: nothing changes but the pixels of its mask.

    variants = classes(20)                       # (20, 5): the variant of each part
    seen = scenes(variants, 1000, seed=1)        # poses, grounds, objects; labels in turn
    x, where = pictures(seen), masks(seen)       # (1000, 3, 96, 96) in [0, 1]; (1000, 5, 96, 96) bool
    x = pictures(seen, parts=shown)              # without the parts where shown (1000, 5) is False

    found = measured(forward, explain, variants, seen)       # FunnyBirds' numbers of each picture
    parts.scores(**found, shares=parts.thresholds())         # and what the paper reports of them

Train with parts missing, as FunnyBirds does, so that a model has seen such pictures: ``missing`` draws
which, and ``answers`` says which classes have the parts that are left.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from libragrad_fx.errors import InputError
from libragrad_fx.metrics import parts as protocol

SIZE = 96
OBJECTS = 6
_FINE = 2  # points along the side of a pixel
Tensor = torch.Tensor
Shape = Callable[[Tensor, Tensor], Tensor]
"""Whether points are inside, from coordinates across (mirrored: not negative) and down, about -1 to 1."""
Painter = Callable[[Tensor | None, Tensor | None], Tensor]

# --- parts


def _ellipse(x: float, y: float, across: float, down: float, turn: float = 0.0) -> Shape:
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))

    def inside(u: Tensor, v: Tensor) -> Tensor:
        u, v = u - x, v - y
        return ((c * u + s * v) / across) ** 2 + ((c * v - s * u) / down) ** 2 < 1

    return inside


def _path(radius: float, *points: tuple[float, float]) -> Shape:
    """A line with round ends."""

    def inside(u: Tensor, v: Tensor) -> Tensor:
        found = torch.zeros_like(u, dtype=torch.bool)
        for (x, y), (x2, y2) in itertools.pairwise(points):
            dx, dy = x2 - x, y2 - y
            along = (((u - x) * dx + (v - y) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
            found |= (u - x - along * dx) ** 2 + (v - y - along * dy) ** 2 < radius**2
        return found

    return inside


def _polygon(*corners: tuple[float, float]) -> Shape:
    """A convex one; corners clockwise as seen."""

    def inside(u: Tensor, v: Tensor) -> Tensor:
        found = torch.ones_like(u, dtype=torch.bool)
        for (x, y), (x2, y2) in zip(corners, (*corners[1:], corners[0]), strict=True):
            found &= (x2 - x) * (v - y) - (y2 - y) * (u - x) > 0
        return found

    return inside


def _all(*shapes: Shape) -> Shape:
    def inside(u: Tensor, v: Tensor) -> Tensor:
        return torch.stack([of(u, v) for of in shapes]).any(0)

    return inside


RED, BLUE, YELLOW, GREEN, WHITE, PURPLE = (
    (0.85, 0.15, 0.15), (0.15, 0.3, 0.85), (0.95, 0.8, 0.1),
    (0.1, 0.65, 0.3), (0.95, 0.95, 0.95), (0.6, 0.2, 0.7),
)  # fmt: skip
COLOURS = (RED, BLUE, YELLOW, GREEN, WHITE, PURPLE)
BODY = (0.25, 0.18, 0.12)


class Variant(NamedTuple):
    shape: Shape
    colour: tuple[float, float, float]


_STRAIGHT, _FORKED = (
    _path(0.035, (0.05, -0.5), (0.3, -0.88)),
    _all(
        _path(0.035, (0.05, -0.5), (0.17, -0.68), (0.4, -0.7)), _path(0.035, (0.17, -0.68), (0.14, -0.92))
    ),
)
_ROUND, _LONG = _ellipse(0.42, -0.1, 0.34, 0.22, -15), _ellipse(0.36, 0.16, 0.14, 0.44, -35)
_SHARP = _polygon((0.1, -0.3), (0.85, -0.25), (0.55, 0.1), (0.1, 0.1))
_SHORT = _all(*(_path(0.05, (0.1, y), (0.38, y + 0.02)) for y in (-0.2, 0.06, 0.3)))
_BENT = _all(*(_path(0.04, (0.1, y), (0.4, y - 0.12), (0.6, y + 0.12)) for y in (-0.15, 0.1, 0.33)))
_FORK = _path(0.045, (0.0, 0.5), (0.03, 0.62), (0.2, 0.92))
_FAN = _polygon((0.0, 0.45), (0.28, 0.9), (-0.28, 0.9))
_BALL = _all(_path(0.04, (0.0, 0.5), (0.0, 0.7)), _ellipse(0.0, 0.8, 0.13, 0.13))
PARTS: Mapping[str, tuple[Variant, ...]] = {
    "antennae": (
        Variant(_STRAIGHT, RED), Variant(_STRAIGHT, WHITE), Variant(_FORKED, RED), Variant(_FORKED, BLUE),
    ),
    "wings": (
        Variant(_ROUND, YELLOW), Variant(_ROUND, PURPLE), Variant(_LONG, YELLOW),
        Variant(_LONG, WHITE), Variant(_SHARP, GREEN), Variant(_SHARP, PURPLE),
    ),
    "legs": (Variant(_SHORT, BLUE), Variant(_SHORT, GREEN), Variant(_BENT, BLUE), Variant(_BENT, RED)),
    "spots": (
        Variant(_all(_ellipse(0.08, -0.05, 0.06, 0.06), _ellipse(0.08, 0.2, 0.06, 0.06)), YELLOW),
        Variant(_path(0.06, (0.0, -0.15), (0.0, 0.3)), WHITE),
        Variant(_path(0.06, (0.0, 0.08), (0.12, 0.08)), GREEN),
    ),
    "tail": (
        Variant(_FORK, RED), Variant(_FORK, GREEN), Variant(_FAN, BLUE), Variant(_FAN, YELLOW),
        Variant(_BALL, WHITE), Variant(_BALL, RED),
    ),
}  # fmt: skip
"""What a class chooses from: 4 x 6 x 4 x 3 x 6 = 1728."""
_UNDER, _OVER = ("tail", "legs", "wings", "antennae"), ("spots",)  # of the body, from below
_TRUNK = _all(_ellipse(0.0, 0.1, 0.2, 0.42), _ellipse(0.0, -0.4, 0.15, 0.15))

# --- classes and scenes


def classes(count: int, seed: int = 0) -> Tensor:
    """(K, 5) long: distinct classes, each with two rivals for target sensitivity (``parts.rivals``).

    Raises:
        InputError: fewer than 5 or more than 500 classes, or none found that have rivals.
    """
    if not 5 <= count <= 500:
        raise InputError(f"there are 5 to 500 classes of insects, not {count}")
    generator = torch.Generator().manual_seed(seed)
    most = torch.tensor([len(v) for v in PARTS.values()])
    found = _distinct(torch.empty(0, len(most), dtype=torch.long), count, most, generator)
    for _ in range(1000):
        lonely = (protocol.rivals(found) < 0).any(1)
        if not bool(lonely.any()):
            return found
        keep = found[torch.arange(count) != lonely.nonzero()[0]]
        found = _distinct(keep, count, most, generator)
    raise InputError(f"no {count} classes that have rivals were found with seed {seed}: try another")


def _distinct(kept: Tensor, count: int, most: Tensor, generator: torch.Generator) -> Tensor:
    while len(kept) < count:
        drawn = (torch.rand(len(most), generator=generator) * most).long()
        if not bool((kept == drawn).all(1).any()):
            kept = torch.cat((kept, drawn[None]))
    return kept


@dataclasses.dataclass(frozen=True)
class Scenes:
    """What is drawn, B of them.

    labels:   (B,) the class
    variants: (B, 5) of each part
    pose:     (B, 4) the middle across and down, scale, turn in radians
    light:    (B,) a factor of brightness
    ground:   (B, 2, 3) colours at the upper and the lower edge
    objects:  (B, 6, 4) middle across and down, radius, and which colour; squares and discs in turn
    """

    labels: Tensor
    variants: Tensor
    pose: Tensor
    light: Tensor
    ground: Tensor
    objects: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | Tensor) -> Scenes:
        return Scenes(*(getattr(self, f.name)[rows] for f in dataclasses.fields(self)))


def scenes(variants: Tensor, count: int, seed: int = 0) -> Scenes:
    """Draw ``count`` scenes of classes (K, 5), their labels in turn. Another count is another draw."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    labels = torch.arange(count) % len(variants)
    pose = torch.stack((draw(-0.15, 0.15), draw(-0.15, 0.15), draw(0.7, 0.95), draw(-0.6, 0.6)), 1)
    colour = draw(0, len(COLOURS), OBJECTS).floor()
    around = torch.stack((draw(-1, 1, OBJECTS), draw(-1, 1, OBJECTS), draw(0.06, 0.16, OBJECTS), colour), 2)
    return Scenes(labels, variants[labels], pose, draw(0.75, 1), draw(0.35, 0.75, 2, 3), around)


def missing(count: int, seed: int = 0, share: float = 0.5) -> Tensor:
    """(B, 5) bool: of a share of the pictures some parts are left out, a random number of them."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(count, len(PARTS), generator=generator) < torch.rand(count, 1, generator=generator)
    return kept | (torch.rand(count, 1, generator=generator) >= share)


def answers(variants: Tensor, seen: Scenes, shown: Tensor) -> Tensor:
    """(B, K): equal shares of the classes that have the parts which are shown; all classes if none is."""
    fits = ((variants == seen.variants[:, None]) | ~shown[:, None]).all(2).float()
    return fits / fits.sum(1, keepdim=True)


# --- the protocol


def measured(
    forward: Callable[[Tensor], Tensor],
    explain: Callable[[Tensor, Tensor], Tensor],
    variants: Tensor,
    seen: Scenes,
    *,
    margin: int = 2,
) -> dict[str, Tensor]:
    """FunnyBirds' numbers of each scene, by the names of the arguments of ``parts.scores``.

    forward goes from pictures (B, 3, 96, 96) to outputs (B, K), explain from pictures and targets (B,) to
    maps (B, 96, 96); variants (K, 5) are the classes, margin is that of ``parts.importance``. Batches are
    put together by ``torch.cat`` of each number.
    """
    x, (table, cleared) = pictures(seen), outputs(forward, seen)
    removed = protocol.Removed(variants, seen.labels, table, cleared, masks(seen), object_masks(seen))
    return protocol.measured(
        removed, lambda targets: explain(x, targets), protocol.thresholds(), margin=margin
    )


def outputs(forward: Callable[[Tensor], Tensor], seen: Scenes) -> tuple[Tensor, Tensor]:
    """(B, 32, K) with each set of parts, by its number, and (B, 6, K) without each object."""
    count, paint = len(seen), painter(seen)
    sets, others = protocol.subsets(len(PARTS)), ~torch.eye(OBJECTS).bool()
    with torch.no_grad():
        table = [forward(paint(s.expand(count, -1), None)) for s in sets]
        cleared = [forward(paint(None, s.expand(count, -1))) for s in others]
    return torch.stack(table, 1), torch.stack(cleared, 1)


# --- drawing


class _Layer(NamedTuple):
    """One thing to draw. kind and number: of which part, which object; ("body", 0). inside: (B, S, S)."""

    kind: str
    number: int
    inside: Tensor
    colour: Tensor


def pictures(seen: Scenes, *, parts: Tensor | None = None, objects: Tensor | None = None) -> Tensor:
    """(B, 3, 96, 96) in [0, 1]. parts (B, 5) and objects (B, 6), bool: what is shown; None: all.

    32 scenes at a time fit into a processor's cache, and take a third of the time of 256 at once, each.
    """
    return painter(seen)(parts, objects)


def painter(seen: Scenes) -> Painter:
    """``pictures``, for several calls: from what is shown, parts (B, 5) and objects (B, 6)."""
    layers = [*_layers(seen)]
    return lambda parts, objects: _painted(seen, layers, parts, objects)


def _painted(
    seen: Scenes, layers: Sequence[_Layer], parts: Tensor | None, objects: Tensor | None
) -> Tensor:
    top = _top(layers, parts, objects)
    height = torch.linspace(0, 1, SIZE * _FINE)[:, None]
    upper, lower = seen.ground[:, 0, :, None, None], seen.ground[:, 1, :, None, None]
    colours = torch.stack([torch.zeros(len(seen), 3), *(layer.colour for layer in layers)], 2)
    found = colours.gather(2, top.flatten(1)[:, None].expand(-1, 3, -1)).unflatten(2, top.shape[1:])
    found = torch.where(top[:, None] == 0, upper + (lower - upper) * height, found)
    return torch.nn.functional.avg_pool2d(found, _FINE) * seen.light[:, None, None, None]


def _top(layers: Sequence[_Layer], parts: Tensor | None = None, objects: Tensor | None = None) -> Tensor:
    """(B, S, S) long: which layer is seen, from 1 on; 0: the ground."""
    shown = {"part": parts, "object": objects}
    found = torch.zeros_like(layers[0].inside, dtype=torch.long)
    for n, layer in enumerate(layers, start=1):
        at = shown.get(layer.kind)
        found.masked_fill_(
            layer.inside if at is None else layer.inside & at[:, layer.number, None, None], n
        )
    return found


def masks(seen: Scenes) -> Tensor:
    """(B, 5, 96, 96) bool: the pixels in which each part is seen."""
    return _visible(seen, "part", len(PARTS))


def object_masks(seen: Scenes) -> Tensor:
    """(B, 6, 96, 96) bool: where each object of the background is seen; a hidden one has no pixels."""
    return _visible(seen, "object", OBJECTS)


def _visible(seen: Scenes, kind: str, count: int) -> Tensor:
    layers = [*_layers(seen)]
    top = _top(layers)
    at = {layer.number: n for n, layer in enumerate(layers, start=1) if layer.kind == kind}
    fine = torch.stack([(top == at[number]).float() for number in range(count)], 1)
    return torch.nn.functional.max_pool2d(fine, _FINE) > 0


def _layers(seen: Scenes) -> Iterator[_Layer]:
    """From below."""
    points = (torch.arange(SIZE * _FINE) + 0.5) / (SIZE * _FINE / 2) - 1
    y, x = torch.meshgrid(points, points, indexing="ij")
    palette = torch.tensor(COLOURS)
    for n in range(OBJECTS):
        across, down, radius, colour = (v[:, None, None] for v in seen.objects[:, n].unbind(1))
        dx, dy = (x - across).abs(), (y - down).abs()
        inside = (dx < radius) & (dy < radius) if n % 2 else dx * dx + dy * dy < radius * radius
        yield _Layer("object", n, inside, palette[colour.flatten().long()])
    across, down, scale, turn = (v[:, None, None] for v in seen.pose.unbind(1))
    u, v = (x - across) / scale, (y - down) / scale
    u, v = turn.cos() * u + turn.sin() * v, turn.cos() * v - turn.sin() * u
    for name in _UNDER:
        yield _part(seen, name, u.abs(), v)
    yield _Layer("body", 0, _TRUNK(u.abs(), v), torch.tensor(BODY).expand(len(seen), 3))
    for name in _OVER:
        yield _part(seen, name, u.abs(), v)


def _part(seen: Scenes, name: str, u: Tensor, v: Tensor) -> _Layer:
    number = [*PARTS].index(name)
    inside, colour = torch.zeros_like(u, dtype=torch.bool), torch.zeros(len(seen), 3)
    for k, variant in enumerate(PARTS[name]):
        rows = (seen.variants[:, number] == k).nonzero().flatten()
        inside[rows] = variant.shape(u[rows], v[rows])
        colour[rows] = torch.tensor(variant.colour)
    return _Layer("part", number, inside, colour)
