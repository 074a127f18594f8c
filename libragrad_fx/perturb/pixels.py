"""Puts other pixels in place of a picture's: for models without tokens, and beside them for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch

from libragrad_fx.errors import InputError
from libragrad_fx.extras import need

Fill = Literal["zero", "mean", "blur", "inpaint"]
_BLURS = 8  # a blur's standard deviation is the picture's shorter side, divided by this
_NOISE = 0.01  # of the imputation, in the paper's code
_NEIGHBOURS = {(0, 1): 1 / 6, (1, 0): 1 / 6, (1, 1): 1 / 12, (1, -1): 1 / 12}
"""Half of the eight, with their weights; the other half mirrors them."""


def masked(
    pictures: torch.Tensor, cells: torch.Tensor, grid: Sequence[int], fill: Fill = "mean", seed: int = 0
) -> torch.Tensor:
    """Pictures of which only some cells are seen.

    Args:
        pictures: (B, C, H, W), as the model takes them.
        cells: (B, K) int64, of each sample the cells that are seen, counted row by row.
        grid: (h, w), at most (H, W). A pixel belongs to the cell that its centre lies in.
        fill: what the others become. ``zero``: 0, which is the mean of the data where inputs are
            normalised. ``mean``: the picture's own mean, of each channel. ``blur``: the picture behind a
            Gaussian of standard deviation min(H, W) / 8 pixels. ``inpaint``: noisy linear imputation (Rong
            et al. 2022, "A Consistent and Efficient Evaluation Strategy for Attribution Methods", §4): the
            weighted mean of the eight neighbours, 1/6 and on diagonals 1/12, plus noise of 0.01. Where
            nothing is seen, the picture's mean and noise.
        seed: of that noise; each picture gets the same.

    Raises:
        InputError: another fill, pictures that are no numbers, a grid that does not fit, or no such cells.
        LibraGradError: blur needs torchvision, inpaint needs scipy.
    """
    if pictures.ndim != 4 or not pictures.is_floating_point():
        raise InputError(
            f"pictures are (B, C, H, W) in floating point, got {tuple(pictures.shape)} {pictures.dtype}"
        )
    if not bool(pictures.isfinite().all()):
        raise InputError("pictures hold nan or inf, which would be what stands in for others")
    if fill not in get_args(Fill):
        raise InputError(f"fill is one of {', '.join(get_args(Fill))}; got {fill!r}")
    seen = visible(cells, grid, pictures.shape[-2:]).to(pictures.device)
    if len(seen) != len(pictures):
        raise InputError(f"cells are of {len(seen)} pictures, got {len(pictures)}")
    return torch.where(seen[:, None], pictures, _FILLS[fill](pictures, seen, seed))


def visible(cells: torch.Tensor, grid: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    """(B, H, W) bool: the pixels of the cells (B, K) of a grid, as of ``masked``."""
    height, width = size
    if len(grid) != 2 or not (0 < grid[0] <= height and 0 < grid[1] <= width):
        raise InputError(f"a grid of {tuple(grid)} does not fit a picture of {tuple(size)}")
    h, w = grid
    if cells.ndim != 2 or cells.dtype is not torch.int64:
        raise InputError(f"cells is (B, K) int64, got {tuple(cells.shape)} {cells.dtype}")
    if cells.numel() and not 0 <= int(cells.min()) <= int(cells.max()) < h * w:
        raise InputError(f"cells of a grid of {tuple(grid)} are 0 to {h * w - 1}, got {cells.tolist()}")
    on = torch.zeros(len(cells), h * w, dtype=torch.bool, device=cells.device).scatter_(1, cells, True)
    rows = ((torch.arange(height, device=cells.device) + 0.5) * h / height).long()
    columns = ((torch.arange(width, device=cells.device) + 0.5) * w / width).long()
    return on.view(-1, h, w)[:, rows][:, :, columns]


# --- fills: what stands in for a picture (B, C, H, W), of which ``seen`` (B, H, W) stays


def _zero(pictures: torch.Tensor, seen: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.zeros_like(pictures)


def _mean(pictures: torch.Tensor, seen: torch.Tensor, seed: int) -> torch.Tensor:
    return pictures.mean((2, 3), keepdim=True).expand_as(pictures)


def _blur(pictures: torch.Tensor, seen: torch.Tensor, seed: int) -> torch.Tensor:
    blur = need("torchvision.transforms.v2.functional", "models").gaussian_blur
    side = min(pictures.shape[-2:])
    kernel = min(2 * (side // 4) + 1, 2 * ((side - 1) // 2) + 1)  # two deviations each way, and odd
    return blur(pictures, [kernel, kernel], [side / _BLURS] * 2)


def _inpaint(pictures: torch.Tensor, seen: torch.Tensor, seed: int) -> torch.Tensor:
    filled = [_imputed(x, s) for x, s in zip(pictures.detach().cpu().double(), seen.cpu(), strict=True)]
    draw = torch.Generator().manual_seed(seed)
    noise = _NOISE * torch.randn(pictures.shape[1:], generator=draw, dtype=torch.float64)
    return (torch.stack(filled) + noise).to(pictures)


def _imputed(picture: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """One picture (C, H, W): each pixel that is not seen is the weighted mean of its neighbours, all at
    once. Weights are shared among the neighbours that are in the picture."""
    sparse, linalg = need("scipy.sparse", "evaluate"), need("scipy.sparse.linalg", "evaluate")
    if bool(seen.all()):
        return picture
    if not bool(seen.any()):
        return picture.mean((1, 2), keepdim=True).expand_as(picture)
    h, w = seen.shape
    at = torch.arange(h * w).view(h, w)
    rows, columns, weights = [], [], []
    for (dy, dx), weight in _NEIGHBOURS.items():
        here = at[: h - dy, max(-dx, 0) : w - max(dx, 0)].flatten()
        there = at[dy:, max(dx, 0) : w + min(dx, 0)].flatten()
        rows += [here, there]
        columns += [there, here]
        weights += [torch.full_like(here, weight, dtype=torch.float64)] * 2
    index = torch.cat(rows), torch.cat(columns)
    near = sparse.csr_matrix((torch.cat(weights).numpy(), [i.numpy() for i in index]), shape=(h * w, h * w))
    near = sparse.diags(1 / near.sum(1).A1) @ near
    known = seen.flatten().numpy()
    values = picture.flatten(1).T.numpy()
    left = sparse.identity(int((~known).sum()), format="csc") - near[~known][:, ~known]
    found = values.copy()
    found[~known] = linalg.splu(left.tocsc()).solve(near[~known][:, known] @ values[known])
    return torch.from_numpy(found).T.view_as(picture)


_FILLS: Mapping[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "zero": _zero, "mean": _mean, "blur": _blur, "inpaint": _inpaint,
}  # fmt: skip
