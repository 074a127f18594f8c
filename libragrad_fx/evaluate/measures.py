"""What is measured of one batch: rows of numbers, one or more for each sample and map.

A metric gets a ``Case``, all that is known of the batch, and the attribution of one method. It gives
``Row``s. The clean forward and the search for tokens are done once for all methods.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from libragrad_fx.attribution import Attribution, blocks
from libragrad_fx.errors import InputError, LibraGradError, TargetWarning
from libragrad_fx.evaluate.config import (
    CompletenessSpec,
    MethodSpec,
    PixelsSpec,
    PlacesSpec,
    SensitivityNSpec,
    TokensSpec,
)
from libragrad_fx.evaluate.data import Item, covering, largest
from libragrad_fx.evaluate.inputs import Sample, size_of
from libragrad_fx.evaluate.removal import removed
from libragrad_fx.evaluate.subject import Subject
from libragrad_fx.explain.call import attribute
from libragrad_fx.explain.kept import AUTOGRAD
from libragrad_fx.metrics import (
    emd_score,
    enlarged,
    faithfulness,
    iou,
    pointing_cell,
    pointing_game,
    precision_at_k,
    relevance_mass,
    relevance_rank,
    segmentation_ap,
)
from libragrad_fx.metrics.parts import Removed
from libragrad_fx.metrics.sanity import sensitivity_n as correlations
from libragrad_fx.models import imported
from libragrad_fx.perturb import Seen, Tokens, masked
from libragrad_fx.target import as_call, first_tensor

Tensor = torch.Tensor


class Row(NamedTuple):
    """A number of one sample. how: what was done to the model ("removed"; "zeroed: why")."""

    sample: int
    measure: str
    value: float
    how: str = ""


@dataclasses.dataclass(frozen=True)
class Probability:
    """(B,): the softmax probability of a class of each sample; of one logit, that of [0, z]."""

    classes: Tensor

    def __call__(self, output: Any) -> Tensor:
        logits = faithfulness.two_sided(first_tensor(output)).softmax(-1)
        return logits.gather(1, self.classes[:, None])[:, 0]


@dataclasses.dataclass(frozen=True)
class Logit:
    """(B,): the logit of a class of each sample; of one logit, z for class 1 and -z for class 0."""

    classes: Tensor

    def __call__(self, output: Any) -> Tensor:
        logits = first_tensor(output)
        if logits.shape[1] == 1:
            return logits[:, 0] * (2 * self.classes - 1)
        return logits.gather(1, self.classes[:, None])[:, 0]


_SCALARS: Mapping[str, Callable[[Tensor], Callable[[Any], Tensor]]] = {
    "logit": Logit, "probability": Probability
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Contrast:
    """(B, 1): the logit of one class less that of another, as of a model that chooses between these two.

    pairs: (B, 2) int64
    """

    pairs: Tensor

    def __call__(self, logits: Tensor) -> Tensor:
        one, other = logits.gather(1, self.pairs).split(1, 1)
        return one - other


@dataclasses.dataclass(frozen=True)
class Case:
    """One batch of prepared pictures (B, C, H, W), with labels and masks by class (H, W); or of texts of
    one length, (B, T) by name, with masks (T,).

    ids: of the samples. With the seed of a method they are the seed of what it draws: another map for
        another batch, and the same one in any process.
    """

    subject: Subject
    ids: Sequence[str]
    inputs: Any
    labels: Sequence[int | None]
    masks: Sequence[Mapping[int, Tensor]]
    against: Sequence[int | None] = ()
    items: Sequence[Item] = ()
    contrast: Contrast | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def size(self) -> tuple[int, ...]:
        """(C, H, W) of a picture, (T,) of a text."""
        return size_of(self.inputs)[1:]

    @functools.cached_property
    def module(self) -> Any:
        """The captured model, with autograd's backward: what forwards run on."""
        return self.subject.captured(self.size, AUTOGRAD)

    @functools.cached_property
    def logits(self) -> Tensor:
        """(B, classes) of the whole samples."""
        args, kwargs = as_call(self.inputs)
        with torch.no_grad():
            return faithfulness.two_sided(self.read(self.subject.module(*args, **kwargs))).detach()

    def read(self, output: Any) -> Tensor:
        """(B, classes) logits; in a contrast (B, 1)."""
        logits = first_tensor(output)
        return logits if self.contrast is None else self.contrast(faithfulness.two_sided(logits))

    @functools.cached_property
    def contrasted(self) -> Case:
        """The same samples, by a model that chooses between the label, class 1, and what that is compared
        with, class 0."""
        given = [*zip(self.labels, self.against, strict=True)]
        labels = [None if None in pair else 1 for pair in given]
        # samples that have none are explained for two classes, to be left out
        pairs = [(0, 1) if a is None or b is None else (a, b) for a, b in given]
        found = torch.tensor(pairs, device=self.subject.device)
        if int(found.max()) >= self.logits.shape[1]:
            raise InputError(f"a contrast of class {int(found.max())} of a model of {self.logits.shape[1]}")
        masks = [{1: m[a]} if a in m else {} for m, (a, _) in zip(self.masks, pairs, strict=True)]
        return dataclasses.replace(self, labels=labels, masks=masks, contrast=Contrast(found))

    def named(self, classes: Tensor) -> Tensor:
        """The classes of the model itself."""
        if self.contrast is None:
            return classes
        return self.contrast.pairs[:, 0].where(classes >= 0, -1)

    @functools.cached_property
    def seen(self) -> Seen:
        """The run on all tokens. Raises ``InputError`` if the model has none."""
        return self.tokens.seen(self.inputs)

    @functools.cached_property
    def removed(self) -> Removed:
        """What the model answers without parts. Raises ``InputError`` if the pictures have none."""
        return removed(self.subject, [item.parts for item in self.items], self.labels)

    @property
    def tokens(self) -> Tokens:
        """Raises ``LibraGradError`` if the model has none."""
        return self.subject.tokens(self.size)

    def target(self, kind: str, least: float = 0.0) -> Tensor:
        """(B,) int64, the class to explain; -1 of samples that have none. A contrast is asked of
        ``contrasted``."""
        if kind == "predicted":
            return self.logits.argmax(1)
        found = [largest(covering(m, least)) for m in self.masks] if kind == "mask" else self.labels
        return torch.tensor([-1 if t is None else t for t in found], device=self.subject.device)

    def attribution(
        self, method: MethodSpec, policy: str, classes: Tensor, scalar: str, **more: Any
    ) -> Attribution:
        """Explain ``classes``; samples that have none are explained for class 0, to be left out."""
        own = ":" in method.method and policy == AUTOGRAD
        module = self.subject.module if own else self.subject.captured(self.size, policy)
        of_classes = _SCALARS[scalar](classes.clamp(min=0))

        def target(output: Any) -> Tensor:
            return of_classes(self.read(output))

        if ":" in method.method:
            return _by_function(method.method, module, self.inputs, target)
        drawn = hashlib.sha256(json.dumps([method.seed, *self.ids]).encode()).digest()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TargetWarning)
            return attribute(
                module, self.inputs, target, method=method.method,
                steps=method.steps, baseline=method.baseline, seed=int.from_bytes(drawn[:4]), **more,
            )  # fmt: skip


def cases(subject: Subject, samples: Iterable[Sample], batch: int) -> list[Case]:
    """Batches, each of samples of one size, in their order."""
    sizes: dict[tuple[int, ...], list[Sample]] = {}
    for sample in samples:
        sizes.setdefault(sample.size, []).append(sample)
    parts = [s[i : i + batch] for s in sizes.values() for i in range(0, len(s), batch)]
    found = []
    for part in parts:
        ids, xs, labels, against, masks, items = zip(*part, strict=True)
        found.append(Case(subject, ids, subject.batch(xs), labels, masks, against, items))
    return found


def _by_function(name: str, module: Any, inputs: Any, scalar: Callable[[Any], Tensor]) -> Attribution:
    """What a function of somebody else says; of its map, that it adds up to the scalar is not promised, and
    measured.

    Raises:
        InputError: it gives no map of each sample.
    """
    values = imported(name)(module, inputs, scalar)
    args, kwargs = as_call(inputs)
    count = len(pytree.tree_leaves(inputs)[0])
    if not isinstance(values, Tensor) or values.ndim < 2 or len(values) != count:
        raise InputError(
            f"{name} gives maps (B, *grid), not {getattr(values, 'shape', type(values).__name__)}"
        )
    values = values.detach().double()
    with torch.no_grad():
        output = scalar(module(*args, **kwargs)).detach()
    total, none = (
        values.flatten(1).sum(1),
        torch.zeros(count, dtype=torch.float64, device=values.device),
    )
    return Attribution(
        values=values, prefix=None, unplaced=none, others={}, output=output, total=total,
        expected=output.double(), completeness_error=(total - output).abs(), positional=none, method=name,
        layers=(),
    )  # fmt: skip


# --- metrics


def tokens(case: Case, found: Attribution, classes: Tensor, spec: TokensSpec) -> Iterator[Row]:
    """Faithfulness on tokens."""
    seen = case.seen
    removes = seen.tokens.plan is not None and not spec.zero
    how = "removed" if removes else f"zeroed: {'as asked' if spec.zero else seen.tokens.why}"
    free = torch.tensor(seen.tokens.cells, device=case.subject.device)
    order = free[faithfulness.ranked(on_grid(found, seen.tokens.grid).flatten(1)[:, free])]

    def without(cells: Tensor) -> Tensor:
        return case.read(seen.kept(cells) if removes else seen.zeroed(cells))

    yield from _curves(
        faithfulness.curves(without, case.read(seen.logits), order, spec.ratios), classes, how
    )


def pixels(case: Case, found: Attribution, classes: Tensor, spec: PixelsSpec) -> Iterator[Row]:
    """Faithfulness on pixels, on the cells of ``cells_of``."""
    if len(case.size) == 1:
        raise InputError("a text has no pixels: its tokens are taken away by the metric tokens")
    grid = cells_of(case, found)

    def without(cells: Tensor) -> Tensor:
        with torch.no_grad():
            shown = masked(case.inputs, cells, grid, spec.fill)
            return case.read(case.subject.module(shown)).detach()

    order = faithfulness.ranked(on_grid(found, grid))
    yield from _curves(
        faithfulness.curves(without, case.logits, order, spec.ratios), classes, f"{spec.fill} pixels"
    )


def _curves(found: faithfulness.Curves, classes: Tensor, how: str) -> Iterator[Row]:
    known = classes.clamp(min=0)
    for name, values in faithfulness.scores(found, known).items():
        yield from rows(name, values, classes, how)
    for order, logits in (("mif", found.mif), ("lif", found.lif)):
        right = faithfulness.agreement(logits, known)
        drop = faithfulness.probability_drop(found.clean, logits, known)
        for i, ratio in enumerate(found.ratios):
            yield from rows(f"{order}_accuracy@{ratio:g}", right[:, i], classes, how)
            yield from rows(f"{order}_drop@{ratio:g}", drop[:, i], classes, how)


def places(case: Case, found: Attribution, classes: Tensor, spec: PlacesSpec) -> Iterator[Row]:
    """Maps against the masks of the classes that are explained: pixels, or tokens of a text.

    Of the map enlarged to the picture's size: ``ap``, ``iou``, ``mass`` and ``rank`` (``segmentation_ap``,
    ``iou``, ``relevance_mass``, ``relevance_rank`` of ``metrics``);

    * ``pointing``: is the most relevant pixel at most ``tolerance`` pixels from the mask;
    * ``precision``: of the k pixels with the largest absolute relevance the share in the mask. All others
      count against the map, suppressors as well;
    * ``emd``: 1 - what it costs to carry absolute relevance to the mask, as a share of the largest
      distance; on a grid, and only if ``emd`` says of how many cells.

    ``pointing_cell`` is of the map as it is: does the most relevant cell of ``cells_of`` overlap the mask.
    """
    masks = [covering(m, spec.least).get(int(c)) for m, c in zip(case.masks, classes, strict=True)]
    at = [i for i, m in enumerate(masks) if m is not None and m.any() and not m.all()]
    if not at:
        return
    marked = torch.stack([masks[i] for i in at])  # type: ignore[misc]
    if len(case.size) == 1:  # a row of tokens is a picture of one line
        maps = cells = on_grid(found, case.size)[at][:, None]
        marked = marked[:, None]
    else:
        maps = enlarged(on_grid(found, found.grid or ())[at], (case.size[1], case.size[2]))
        cells = on_grid(found, cells_of(case, found))[at]
    marked = marked.to(maps.device)
    each = {
        "ap": segmentation_ap(maps, marked), "iou": iou(maps, marked),
        "pointing": pointing_game(maps, marked, spec.tolerance), "mass": relevance_mass(maps, marked),
        "rank": relevance_rank(maps, marked), "precision": precision_at_k(maps, marked, spec.k),
        "pointing_cell": pointing_cell(cells, marked),
    }  # fmt: skip
    if spec.emd is not None:
        each["emd"] = emd_score(maps, marked, grid=(spec.emd, spec.emd))
    for name, values in each.items():
        yield from (Row(i, name, float(v)) for i, v in zip(at, values, strict=True))


def completeness(case: Case, found: Attribution, classes: Tensor, spec: CompletenessSpec) -> Iterator[Row]:
    """What a sum misses of what it promises, and of the logit; nothing of methods that promise none."""
    if not bool(found.expected.isfinite().all()):
        return
    logit = found.output.double().abs()
    yield from rows("error", found.completeness_error, classes)
    yield from rows("relative_error", found.completeness_error / logit, classes)
    if not spec.layers or found.method != "fullgrad":
        return
    for i, path in enumerate(blocks(case.module)):
        policy = found.policy or AUTOGRAD
        one = case.attribution(MethodSpec(method="fullgrad"), policy, classes, "logit", layers=[path])
        yield from rows(f"relative_error@{i}", one.completeness_error / logit, classes)


def sensitivity_n(case: Case, found: Attribution, classes: Tensor, spec: SensitivityNSpec) -> Iterator[Row]:
    """``correlation@r`` of random sets of the share r of the cells, and ``correlation``, their mean."""
    grid, scalar = cells_of(case, found), _SCALARS[spec.scalar](classes.clamp(min=0))
    cells = grid[0] * grid[1]
    each = correlations(
        lambda x: scalar(case.subject.module(x)), case.inputs, on_grid(found, grid),
        [max(1, math.floor(ratio * cells + 1e-9)) for ratio in spec.ratios], subsets=spec.subsets,
        baseline=spec.baseline, seed=spec.seed,
    )  # fmt: skip
    yield from rows("correlation", each.mean(1), classes)
    for i, ratio in enumerate(spec.ratios):
        yield from rows(f"correlation@{ratio:g}", each[:, i], classes)


def cells_of(case: Case, found: Attribution) -> tuple[int, int]:
    """The grid of cells that a map is asked about: that of the model's tokens; of one without tokens, of
    the map.

    Raises:
        InputError: the map is over no picture.
    """
    try:
        grid = case.tokens.grid
    except LibraGradError:
        grid = found.grid
    if grid is None or len(grid) != 2:
        raise InputError(f"a map over {tuple(found.values.shape[1:])} is over no picture")
    return grid[0], grid[1]


def on_grid(found: Attribution, grid: Sequence[int]) -> Tensor:
    """(B, *grid): a map at a grid. One that is finer, as over pixels, is summed in each cell. A coarser
    one, as a CAM of a deep layer, is enlarged, bicubic."""
    if tuple(found.values.shape[1:]) == tuple(grid):
        return found.values
    if found.grid is None or len(found.grid) != len(grid):
        raise InputError(f"a map over {tuple(found.values.shape[1:])} does not fit a grid of {tuple(grid)}")
    sizes = [*zip(found.grid, grid, strict=True)]
    if len(grid) == 2 and all(fine % n == 0 for fine, n in sizes):
        (h, n), (w, m) = sizes
        return found.values.unflatten(2, (m, w // m)).unflatten(1, (n, h // n)).sum((2, 4))
    return found.upsample(grid).values


def rows(name: str, values: Tensor, classes: Tensor, how: str = "") -> Iterator[Row]:
    """One for each sample that has a class to explain."""
    pairs = zip(values.double().tolist(), classes.tolist(), strict=True)
    yield from (Row(i, name, v, how) for i, (v, c) in enumerate(pairs) if c >= 0)


METRICS: Mapping[str, Callable[[Case, Attribution, Tensor, Any], Iterator[Row]]] = {
    "tokens": tokens, "pixels": pixels, "places": places, "completeness": completeness,
    "sensitivity_n": sensitivity_n,
}  # fmt: skip
