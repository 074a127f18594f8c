"""The tensors that metrics are given: checked, and brought to one form. Numbers are computed in float64."""

from __future__ import annotations

import torch

from libragrad_fx.errors import InputError


def numbers(values: torch.Tensor, what: str) -> torch.Tensor:
    """Real numbers (B, ...) of any dtype in float64, detached.

    Raises:
        InputError: no tensor, complex numbers, or nan or inf in a sample; it names the samples.
    """
    if not isinstance(values, torch.Tensor) or values.is_complex() or not values.ndim:
        kind = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
        raise InputError(f"{what} are a tensor of real numbers with samples in front, not {kind}")
    found = values.detach().double()
    fine = found.isfinite().flatten(1).all(1) if found.ndim > 1 else found.isfinite()
    if not bool(fine.all()):
        bad = (~fine).nonzero().flatten().tolist()
        raise InputError(
            f"{what} hold nan or inf in {named(bad)} of {len(fine)}: leave those out, or mend their source"
        )
    return found


def named(samples: list[int], most: int = 8) -> str:
    """ "sample 3", or "samples 1, 4, …"."""
    said = ", ".join(map(str, samples[:most])) + (", …" if len(samples) > most else "")
    return f"sample {said}" if len(samples) == 1 else f"samples {said}"


def pictures(values: torch.Tensor, what: str) -> torch.Tensor:
    """(B, H, W) from (B, H, W) or (B, 1, H, W)."""
    found = values.squeeze(1) if values.ndim == 4 and values.shape[1] == 1 else values
    if found.ndim != 3 or not found.shape[1] or not found.shape[2]:
        raise InputError(f"{what} are (B, H, W) or (B, 1, H, W), not {tuple(values.shape)}")
    return found


def flags(values: torch.Tensor, what: str) -> torch.Tensor:
    """bool, from bool or 0 and 1.

    Raises:
        InputError: there are other values; it names the samples.
    """
    if isinstance(values, torch.Tensor) and values.dtype == torch.bool:
        return values.detach()
    found = numbers(values, what)
    other = (
        ((found != 0) & (found != 1)).flatten(1).any(1) if found.ndim > 1 else (found != 0) & (found != 1)
    )
    if bool(other.any()):
        bad = other.nonzero().flatten().tolist()
        raise InputError(f"{what} are bool, or 0 and 1; {named(bad)} holds other values: pass {what} == id")
    return found > 0


def maps_and_masks(maps: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps (B, H, W) in float64 and masks (B, H, W) in bool, on the device of the maps.

    Raises:
        InputError: nan or inf in a map, values in a mask but 0 and 1, or other shapes.
    """
    found = pictures(numbers(maps, "maps"), "maps")
    inside = pictures(flags(masks, "masks"), "masks").to(found.device)
    if found.shape != inside.shape:
        raise InputError(
            f"maps are {tuple(found.shape)} and masks {tuple(inside.shape)}: one mask a map, of its size; "
            "enlarged(maps, size) brings maps to the size of masks"
        )
    return found, inside
