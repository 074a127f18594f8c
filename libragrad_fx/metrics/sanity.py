"""Does a map depend on the model, and on nothing else? Checks that call the model.

``explain(model, inputs)`` is any function that returns maps (B, H, W) or (B, 1, H, W). It has to use the
model that it is given: a closure over another one passes no check and fails none. ``forward(inputs)``
returns the explained number of each sample, (B,). The user's model is never changed: what is randomised
is a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import nn

from libragrad_fx.errors import InputError
from libragrad_fx.metrics import compare, given

Explain = Callable[[nn.Module, torch.Tensor], torch.Tensor]
Forward = Callable[[torch.Tensor], torch.Tensor]
Order = Literal["top", "bottom", "each"]

# --- another model, another map


class Randomised(NamedTuple):
    """Likeness of a sample's map to the original after each step.

    names:    (L) the modules, in the order of the steps
    spearman: (L, B) rank correlation of signed values
    ssim:     (L, B) structural similarity (``compare.ssim``)
    """

    names: tuple[str, ...]
    spearman: torch.Tensor
    ssim: torch.Tensor


def randomisation(
    model: nn.Module,
    explain: Explain,
    inputs: torch.Tensor,
    *,
    order: Order = "top",
    blocks: Sequence[str] = (),
    seed: int = 0,
) -> Randomised:
    """Model parameter randomisation test. Adebayo et al. 2018 (Sanity Checks for Saliency Maps).

    Module by module the parameters are drawn anew, and the map is compared with the original. Maps that
    stay alike do not depend on what was learned.

    Args:
        order: "top" goes from the output to the input and keeps what was randomised (the paper's cascade);
            "bottom" likewise from the input; "each" randomises one module at a time. Modules are those with
            parameters of their own, in the order of ``named_modules``, which is that of their definition.
        blocks: paths of modules that are one step each, with all modules inside; the others are one by one.
        seed: of the draws; the state of the global generators is kept.

    A module is drawn by its ``reset_parameters``; without one (class tokens, LayerScale) its entries are
    permuted. Quantus's ``MPRT`` resets only modules with that method, each from the same seed, and by
    default compares absolute values: take ``explain`` of ``.abs()`` for those.

    Raises:
        InputError: no module has parameters, nan or inf in a map, or another ``order``.
    """
    first = given.pictures(given.numbers(explain(model, inputs), "maps"), "maps")
    names, ranked, structure = [], [], []
    for name, changed in _steps(model, order, blocks, seed):
        maps = given.pictures(given.numbers(explain(changed, inputs), f"maps after {name!r}"), "maps")
        names.append(name)
        ranked.append(compare.spearman(first.flatten(1), maps.flatten(1)))
        structure.append(compare.ssim(first, maps))
    return Randomised(tuple(names), torch.stack(ranked), torch.stack(structure))


def complexity_rise(
    model: nn.Module, explain: Explain, inputs: torch.Tensor, *, bins: int = 100, seed: int = 0
) -> torch.Tensor:
    """(B,): (H(random) - H(map)) / H(map). Efficient MPRT, Hedström et al. 2023.

    H is the entropy of a histogram of the map's values in ``bins`` equal bins; random is the map after
    all modules were randomised. Larger is better: a map of noise is more complex than one of a trained
    model. nan for a constant map.

    Raises:
        InputError: as ``randomisation``.
    """
    first = given.numbers(explain(model, inputs), "maps")
    *_, (_, changed) = _steps(model, "bottom", (), seed)
    random = given.numbers(explain(changed, inputs), "maps of the random model")
    before, after = compare.entropy(first.flatten(1), bins), compare.entropy(random.flatten(1), bins)
    return (after - before) / before


def _steps(
    model: nn.Module, order: Order, blocks: Sequence[str], seed: int
) -> Iterator[tuple[str, nn.Module]]:
    """The name of what was randomised last, and the model: copies, of which the next step may change
    one."""
    if order not in ("top", "bottom", "each"):
        raise InputError(f"no order {order!r}; there are top, bottom and each")
    names = [n for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))]
    if not names:
        raise InputError(f"{type(model).__name__} has no parameters to randomise")
    steps: dict[str, list[tuple[str, int]]] = {}
    for draw, name in enumerate(names[::-1] if order == "top" else names, start=seed):
        within = next((b for b in blocks if f"{name}.".startswith(f"{b}.")), name)
        steps.setdefault(within, []).append((name, draw))
    changed = copy.deepcopy(model)
    for step, inside in steps.items():
        if order == "each":
            changed = copy.deepcopy(model)
        for name, draw in inside:
            _redraw(changed.get_submodule(name), draw)
        yield step, changed


def _redraw(module: nn.Module, seed: int) -> None:
    """New parameters for a module itself, and for its children if its ``reset_parameters`` says so."""
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.random.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
            return
        for p in module.parameters(recurse=False):
            p.copy_(p.flatten()[torch.randperm(p.numel(), device=p.device)].view_as(p))


# --- another input, nearly the same map


def max_sensitivity(
    model: nn.Module,
    explain: Explain,
    inputs: torch.Tensor,
    *,
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
) -> torch.Tensor:
    """(B,): max over δ of ‖Φ(x + δ) - Φ(x)‖ / ‖Φ(x)‖, Φ the map. Yeh et al. 2019 (max-sensitivity).

    δ is drawn uniformly from [-radius, radius] for each entry of the input, ``samples`` times, the same for
    the whole batch: a lower bound of the maximum. Norms are Euclidean. Relative, as in Captum's
    ``sensitivity_max`` and Quantus's ``MaxSensitivity``, whose noise is of another radius (0.2) by default;
    nan for a map of zeros.

    Raises:
        InputError: inputs that are not floating point, nan or inf in a map, a radius or a number of samples
            that is not positive.
    """
    if not inputs.is_floating_point():
        raise InputError(f"noise is added to floating point inputs, not to {inputs.dtype}")
    if radius <= 0 or samples < 1:
        raise InputError(f"a radius and samples are positive, not {radius} and {samples}")
    first = given.numbers(explain(model, inputs), "maps").flatten(1)
    largest = first.new_zeros(len(first))
    for noise in _noise(inputs, radius, samples, seed):
        maps = given.numbers(explain(model, inputs + noise), "maps of noisy inputs").flatten(1)
        largest = largest.maximum((maps - first).norm(dim=1))
    return largest / first.norm(dim=1)


def _noise(inputs: torch.Tensor, radius: float, samples: int, seed: int) -> Iterator[torch.Tensor]:
    """(1, ...) each, for all samples: drawn on the CPU in float64, the same for all devices and dtypes."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(samples):
        drawn = torch.rand(1, *inputs.shape[1:], dtype=torch.float64, generator=generator)
        yield ((2 * drawn - 1) * radius).to(inputs)


# --- fewer pixels, another output


def sensitivity_n(
    forward: Forward,
    inputs: torch.Tensor,
    maps: torch.Tensor,
    sizes: Sequence[int] | None = None,
    *,
    subsets: int = 100,
    baseline: torch.Tensor | float = 0.0,
    seed: int = 0,
) -> torch.Tensor:
    """Do relevances of n cells add up to what their removal costs? Ancona et al. 2018 (sensitivity-n).

    (B, len(sizes)): for each n the correlation, over random sets S of n cells of the map, of Σ_{i∈S} R_i
    with f(x) - f(x without S). It is 1 for all n if f is linear and the map complete.

    Args:
        inputs: (B, C, H, W).
        maps: (B, h, w), h and w divisors of H and W: a cell is a pixel, or a patch of them.
        sizes: how many cells are removed; None: up to 16 numbers from 1 to 80 % of the cells, evenly
            spaced in logarithm.
        subsets: sets for each n, the same for all samples; a forward of the batch for each.
        baseline: what removed pixels become; a number, or a tensor that broadcasts to the inputs.

    nan where the map or the output does not vary. Quantus's ``SensitivityN`` is another number: it
    removes pixels by falling relevance, one set for each step, and correlates over the samples of the
    batch.

    Raises:
        InputError: maps that do not divide the inputs, sizes outside of 1 to the cells, outputs that are
            not (B,).
    """
    values = _on(inputs, maps)
    h, w = values.shape[1:]
    n = h * w
    sizes = list(sizes) if sizes is not None else _spaced(n)
    if any(not 1 <= size <= n for size in sizes):
        raise InputError(f"sizes are between 1 and the {n} cells of a map, not {sizes}")
    generator = torch.Generator().manual_seed(seed)
    found = []
    with torch.no_grad():
        clean = _outputs(forward, inputs)
        for size in sizes:
            chosen = torch.rand(subsets, n, generator=generator).argsort(1) < size
            drops = [clean - _outputs(forward, _without(inputs, s.view(h, w), baseline)) for s in chosen]
            sums = values.flatten(1) @ chosen.double().T.to(values.device)
            found.append(compare.pearson(sums, torch.stack(drops, 1).to(sums.device)))
    return torch.stack(found, 1)


def _on(inputs: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Maps (B, h, w) in float64, if their cells divide the inputs."""
    values = given.pictures(given.numbers(maps, "maps"), "maps")
    h, w = values.shape[1:]
    if inputs.ndim != 4 or len(inputs) != len(values) or inputs.shape[2] % h or inputs.shape[3] % w:
        raise InputError(
            f"maps of {tuple(values.shape)} do not divide inputs of {tuple(inputs.shape)}: "
            "inputs are (B, C, H, W), and maps (B, h, w) with h and w divisors of H and W"
        )
    return values


def _spaced(cells: int) -> list[int]:
    most = max(1.0, 0.8 * cells)
    return sorted({round(most ** (i / 15)) for i in range(16)})


def _without(inputs: torch.Tensor, cells: torch.Tensor, baseline: torch.Tensor | float) -> torch.Tensor:
    """The inputs with the pixels of some cells replaced."""
    tall, wide = inputs.shape[2] // cells.shape[0], inputs.shape[3] // cells.shape[1]
    where = cells.repeat_interleave(tall, 0).repeat_interleave(wide, 1).to(inputs.device)
    return torch.where(where, torch.as_tensor(baseline).to(inputs), inputs)


def _outputs(forward: Forward, inputs: torch.Tensor) -> torch.Tensor:
    found = given.numbers(forward(inputs), "outputs")
    if found.shape != inputs.shape[:1]:
        raise InputError(
            f"forward returns one number a sample, ({len(inputs)},), not {tuple(found.shape)}: pick one"
        )
    return found
