"""What an attribution method answers with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from libragrad_fx.attribution import storage
from libragrad_fx.errors import InputError


@dataclasses.dataclass(frozen=True, repr=False)
class Attribution:
    """A signed, un-normalised attribution.

    values:       over the positions of the main input, float64: (B, H, W) pixels or patches; (B, N) tokens
                  or columns of a table; (B, frames, H, W); (B, D, H, W) voxels; (B, C, T) of a series
                  (B, C, T) at its input, where channels are variables, and (B, T) behind it
    prefix:       (B, P) class and register tokens, or None
    unplaced:     (B,) what belongs to no position
    others:       where a model has several inputs with positions: the maps of the others, by input. Inputs
                  whose values are added position by position (words, segments) have one
    output:       (B,) what was explained
    total:        (B,) what ``values``, ``prefix``, ``unplaced`` and ``others`` add up to
    expected:     (B,) what they add up to where the backward is balanced: the output, for Input x
                  Gradient only if no bias carries; for FullGrad+ over blocks (method §4), for each of them
                  the output less what does not pass it (biases, other inputs, what the blocks behind read
                  past it: a decoder's the encoder), and all biases once; of integrated gradients the
                  difference to the output at the baseline. nan for methods that promise no sum, of Input x
                  Gradient at a layer that something leads past, and where that something does not say which
                  of its rows are whose
    completeness_error: (B,) |total - expected|
    positional:   (B,) Σ⟨p, ∂f/∂p⟩ over the tables of positions p that are added to tokens or pixels: the
                  share of the output that is about where things are (PA-LRP). It is part of the sums above
                  and no further term. Rotary positions are factors of q and k: theirs is zero wherever q
                  and k are held, as by ``libra``
    method:       as it was asked for
    layers:       module paths whose inputs were used (empty: the model's own input); of a module that is
                  called several times, the second call is ``path#2``
    policy:       what the backward was balanced by; "" for autograd's own
    digest:       of that policy and of the facts, as in a certificate
    target:       of each sample, the index that was explained, or what was asked for
    labels:       of each sample, what the target is called; "" where nothing is known
    tokens:       of each sample, the pieces of its text, padding as ""; None for anything else
    versions:     of Python, torch and this library
    pictures:     (B, H, W, 3) uint8, what the model saw, where it was asked about pictures; else None
    stages:       with ``layers="stages"``, layer -> its own map, at its own resolution: what the method
                  gives for that layer alone. A layer is the input of the first block at a resolution
    parts:        with ``by=``, who has what part in the output, in float64:
                  ``"head"``: attention -> (B, heads), what comes by each head's values. Over heads they
                  add up to ⟨y, ∂f/∂y⟩ of what that attention returns, before its projection; over
                  attentions to nothing, as one reads what another wrote.
                  ``"block"``: layer -> (B,), what it adds to what it gets, times the gradient behind it:
                  over blocks they add up to nothing, as a later block reads what an earlier one adds. Of a
                  block that changes the shape, all that it returns.
                  ``"module"``: module -> (B,) its own biases; ``input of LAYER``, and inputs, their share.
                  They add up to ``total`` of methods that count biases or are the share of the input
    """

    values: torch.Tensor
    prefix: torch.Tensor | None
    unplaced: torch.Tensor
    others: Mapping[str, torch.Tensor]
    output: torch.Tensor
    total: torch.Tensor
    expected: torch.Tensor
    completeness_error: torch.Tensor
    positional: torch.Tensor
    method: str
    layers: tuple[str, ...]
    policy: str = ""
    digest: str = ""
    target: tuple[Any, ...] = ()
    labels: tuple[str, ...] = ()
    tokens: tuple[tuple[str, ...], ...] | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    pictures: torch.Tensor | None = None
    stages: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    parts: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, ...] | None:
        """(H, W) of a map over a picture, (frames, H, W) or (D, H, W) of one; None for tokens in a row."""
        return tuple(self.values.shape[1:]) if self.values.ndim > 2 else None

    def normalized(self, quantile: float = 0.99) -> Attribution:
        """Each sample's map divided by that quantile of its |values|, and cut to [-1, 1]; signs stay.

        A map of zeros stays one. What the map adds up to is that of the map before.
        """
        flat = self.values.abs().flatten(1)
        top = flat.quantile(quantile, 1)
        top = torch.where(top > 0, top, flat.amax(1))
        top = torch.where(top > 0, top, 1.0).view(-1, *[1] * (self.values.ndim - 1))
        return dataclasses.replace(self, values=(self.values / top).clamp(-1, 1))

    def upsample(self, size: Sequence[int]) -> Attribution:
        """The map of a picture at ``size`` (H, W), bicubic, as the field draws and scores it; of a video or
        volume at (frames, H, W), trilinear.

        Raises:
            InputError: tokens in a row have no picture.
        """
        if self.grid is None:
            raise InputError(
                f"a map of shape {tuple(self.values.shape)} is over no picture: there is no size"
            )
        if len(size) != len(self.grid):
            raise InputError(f"a map over {self.grid} is enlarged to as many numbers, got {tuple(size)}")
        mode = "bicubic" if len(size) == 2 else "trilinear"
        larger = torch.nn.functional.interpolate(self.values[:, None], tuple(size), mode=mode)[:, 0]
        return dataclasses.replace(self, values=larger)

    def topk(self, k: int) -> list[list[tuple[tuple[int, ...], float]]]:
        """Of each sample the ``k`` positions with the largest values, in falling order: (position, value).

        Raises:
            InputError: there are fewer positions.
        """
        flat, shape = self.values.flatten(1), self.values.shape[1:]
        if not 1 <= k <= flat.shape[1]:
            raise InputError(f"k is from 1 to the number of positions, {flat.shape[1]}; got {k!r}")
        best = flat.topk(k, 1)
        places = [
            [tuple(int(i) for i in torch.unravel_index(p, shape)) for p in row] for row in best.indices
        ]
        return [[*zip(row, vs, strict=True)] for row, vs in zip(places, best.values.tolist(), strict=True)]

    @staticmethod
    def joined(parts: Sequence[Attribution]) -> Attribution:
        """The samples of several answers to one question, in their order.

        Raises:
            InputError: maps of different sizes.
        """
        if len(parts) == 1:
            return parts[0]
        if len({tuple(p.values.shape[1:]) for p in parts}) > 1:
            raise InputError("the maps of these batches differ in size: explain them one by one")
        first, fields = parts[0], {}
        for name, value in vars(first).items():
            values = [getattr(p, name) for p in parts]
            if isinstance(value, torch.Tensor):
                fields[name] = torch.cat(values)
            elif name in _BY_SAMPLE and value is not None:
                fields[name] = sum(values, ())
        for name in storage.MAPPINGS:
            fields[name] = {
                k: torch.cat([getattr(p, name)[k] for p in parts]) for k in getattr(first, name)
            }
        return dataclasses.replace(first, **fields)

    def show(self, title: str = "", **look: Any) -> Any:
        """A matplotlib figure: maps over their pictures or alone, texts on colours, other numbers as bars.

        Args:
            look: ``method``, ``sign``, ``outlier_perc``, ``alpha_overlay`` and ``show_colorbar`` as
                of Captum's ``visualize_image_attr``, and ``scale``: see ``libragrad_fx.viz.sheet.Look``.

        Raises:
            InputError: an option that there is not. LibraGradError: matplotlib is not installed.
        """
        from libragrad_fx.viz import figure, sheet  # here, so that only drawing imports it

        return figure.figure(sheet.sheet(self, title, **look))

    def __repr__(self) -> str:
        """What was asked, and of each sample what was explained and what its map adds up to."""
        from libragrad_fx.viz import words  # here, as in ``show``

        of = f"{words.method_name(self.method)}, {words.side_name(self.policy)}"
        lines = [f"Attribution of {of}: values {tuple(self.values.shape)}"]
        for i in range(min(len(self.output), _SHOWN)):
            label = self.labels[i] if i < len(self.labels) else ""
            known = i < len(self.target)
            said = (
                words.target_name(self.target[i], label, self.tokens is not None)
                if known
                else f"sample {i}"
            )
            told = words.error_words(float(self.completeness_error[i]))
            lines.append(f"  {said}: {self.output[i]:.5g}, the map adds up to {self.total[i]:.5g} ({told})")
        more = len(self.output) - _SHOWN
        return "\n".join([*lines, *([f"  and {more} more"] if more > 0 else [])])

    def _repr_html_(self) -> str:
        """For notebooks: static HTML of at most ``_SHOWN`` samples."""
        from libragrad_fx.viz import html, sheet

        return html.fragment(sheet.sheet(self, most=_SHOWN))

    def save(self, path: str | Path) -> Path:
        """Write all of it, values to the bit, as .npz, .safetensors or .json; ``load`` reads it back.

        Raises:
            InputError: another ending, or a path that cannot be written.
        """
        return storage.save(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> Attribution:
        """What ``save`` wrote.

        Raises:
            InputError: no such file, or another kind of file.
        """
        return storage.load(Path(path))


_SHOWN = 16  # samples in a notebook
_BY_SAMPLE = ("target", "labels", "tokens")
