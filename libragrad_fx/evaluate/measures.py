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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

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
from libragrad_fx.evaluate.data import Parts, covering, largest
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
from libragrad_fx.target import first_tensor

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
class Case:
    """One batch of prepared pictures (B, C, H, W), with labels and masks by class (H, W), and with parts.

    ids: of the samples. With the seed of a method they are the seed of what it draws: another map for
        another batch, and the same one in any process.
    """

    subject: Subject
    ids: Sequence[str]
    inputs: Tensor
    labels: Sequence[int | None]
    masks: Sequence[Mapping[int, Tensor]]
    parts: Sequence[Parts | None] = ()

    def __len__(self) -> int:
        return len(self.inputs)

    @functools.cached_property
    def module(self) -> Any:
        """The captured model, with autograd's backward: what forwards run on."""
        return self.subject.captured(self.inputs.shape[1:], AUTOGRAD)

    @functools.cached_property
    def logits(self) -> Tensor:
        """(B, classes) of the whole pictures."""
        with torch.no_grad():
            return faithfulness.two_sided(first_tensor(self.subject.module(self.inputs))).detach()

    @functools.cached_property
    def seen(self) -> Seen:
        """The run on all tokens. Raises ``InputError`` if the model has none."""
        return self.tokens.seen(self.inputs)

    @functools.cached_property
    def removed(self) -> Removed:
        """What the model answers without parts. Raises ``InputError`` if the pictures have none."""
        return removed(self.subject, self.parts, self.labels)

    @property
    def tokens(self) -> Tokens:
        """Raises ``LibraGradError`` if the model has none."""
        return self.subject.tokens(self.inputs.shape[1:])

    def target(self, kind: str, least: float = 0.0) -> Tensor:
        """(B,) int64, the class to explain; -1 of samples that have none."""
        if kind == "predicted":
            return self.logits.argmax(1)
        found = self.labels if kind == "label" else [largest(covering(m, least)) for m in self.masks]
        return torch.tensor([-1 if t is None else t for t in found], device=self.inputs.device)

    def attribution(
        self, method: MethodSpec, policy: str, classes: Tensor, scalar: str, **more: Any
    ) -> Attribution:
        """Explain ``classes``; samples that have none are explained for class 0, to be left out."""
        own = ":" in method.method and policy == AUTOGRAD
        module = self.subject.module if own else self.subject.captured(self.inputs.shape[1:], policy)
        if ":" in method.method:
            return _by_function(method.method, module, self.inputs, _SCALARS[scalar](classes.clamp(min=0)))
        drawn = hashlib.sha256(json.dumps([method.seed, *self.ids]).encode()).digest()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TargetWarning)
            return attribute(
                module, self.inputs, _SCALARS[scalar](classes.clamp(min=0)), method=method.method,
                steps=method.steps, baseline=method.baseline, seed=int.from_bytes(drawn[:4]), **more,
            )  # fmt: skip


def _by_function(name: str, module: Any, inputs: Tensor, scalar: Callable[[Any], Tensor]) -> Attribution:
    """What a function of somebody else says; of its map, that it adds up to the scalar is not promised, and
    measured.

    Raises:
        InputError: it gives no map of each sample.
    """
    values = imported(name)(module, inputs, scalar)
    if not isinstance(values, Tensor) or values.ndim < 2 or len(values) != len(inputs):
        raise InputError(
            f"{name} gives maps (B, *grid), not {getattr(values, 'shape', type(values).__name__)}"
        )
    values = values.detach().double()
    with torch.no_grad():
        output = scalar(module(inputs)).detach()
    total, none = (
        values.flatten(1).sum(1),
        torch.zeros(len(inputs), dtype=torch.float64, device=values.device),
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
    free = torch.tensor(seen.tokens.cells, device=case.inputs.device)
    order = free[faithfulness.ranked(on_grid(found, seen.tokens.grid).flatten(1)[:, free])]
    without = seen.kept if removes else seen.zeroed
    yield from _curves(faithfulness.curves(without, seen.logits, order, spec.ratios), classes, how)


def pixels(case: Case, found: Attribution, classes: Tensor, spec: PixelsSpec) -> Iterator[Row]:
    """Faithfulness on pixels, on the cells of ``cells_of``."""
    grid = cells_of(case, found)

    def without(cells: Tensor) -> Tensor:
        with torch.no_grad():
            shown = masked(case.inputs, cells, grid, spec.fill)
            return first_tensor(case.subject.module(shown)).detach()

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
    """Maps against the masks of the classes that are explained.

    Of the map enlarged to the picture's size: ``ap``, ``iou``, ``mass`` and ``rank`` (``segmentation_ap``,
    ``iou``, ``relevance_mass``, ``relevance_rank`` of ``metrics``);

    * ``pointing``: is the most relevant pixel at most ``tolerance`` pixels from the mask;
    * ``precision``: of the k pixels with the largest absolute relevance the share in the mask. All others
      count against the map, suppressors as well;
    * ``emd``: 1 - what it costs to carry absolute relevance to the mask, as a share of the largest
      distance; on a grid, and only if ``emd`` says of how many cells.

    ``pointing_cell`` is of the map as it is: does the most relevant cell of ``cells_of`` overlap the mask.
    """
    size = tuple(case.inputs.shape[-2:])
    masks = [covering(m, spec.least).get(int(c)) for m, c in zip(case.masks, classes, strict=True)]
    at = [i for i, m in enumerate(masks) if m is not None and m.any() and not m.all()]
    if not at:
        return
    maps = enlarged(on_grid(found, found.grid or ())[at], (size[0], size[1]))
    marked = torch.stack([masks[i] for i in at]).to(maps.device)  # type: ignore[misc]
    each = {
        "ap": segmentation_ap(maps, marked), "iou": iou(maps, marked),
        "pointing": pointing_game(maps, marked, spec.tolerance), "mass": relevance_mass(maps, marked),
        "rank": relevance_rank(maps, marked), "precision": precision_at_k(maps, marked, spec.k),
        "pointing_cell": pointing_cell(on_grid(found, cells_of(case, found))[at], marked),
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
