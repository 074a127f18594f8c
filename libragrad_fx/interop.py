"""What other libraries want of a transformed model. None of them is imported here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from libragrad_fx.attribution import maps
from libragrad_fx.attribution.internals import run
from libragrad_fx.decide.flow import reach
from libragrad_fx.errors import InputError
from libragrad_fx.explain import attribute
from libragrad_fx.module.captured import CapturedModule, anchor, one_graph
from libragrad_fx.module.variants import fitting
from libragrad_fx.module.walk import calls
from libragrad_fx.ops import insert
from libragrad_fx.target import Target


def reshape_transform(
    module: CapturedModule, layer: str | None = None, inputs: Any = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """For pytorch-grad-cam: a function from the output of a layer to feature maps (B, C, H, W).

    Tokens (B, N, C) lose what stands before the patches (class token, registers) and are laid out on the
    grid that ``attribute`` finds for them; (B, H, W, C) gets its channels in front; (B, C, H, W) stays.

    Args:
        module: the result of ``transform`` or ``trace``; its input is an image (B, C, H, W).
        layer: path of the target layer. It is needed only where what comes behind that layer has the
            number of its tokens too, on another grid.
        inputs: what the module will be called with, if that is not zeros of the captured sizes: another
            size, or sizes that ``dynamic`` left free.

    Raises:
        InputError: the module takes no image, or calls no such layer; and from the function, if what it
            is given is not a value of the module for such images, or lies on no grid.
    """
    inputs = _zeros(one_graph(module)) if inputs is None else inputs
    module = one_graph(fitting(module, inputs))
    seen = run(module, inputs, biases=False)
    sizes, images = seen.sizes, [x.shape for x in seen.sources.values() if x.ndim == 4]
    if not images:
        raise InputError("the module takes no image (B, C, H, W), so its tokens lie on no grid")
    batch, image = images[0][0], (images[0][2], images[0][3])
    before = set(sizes) if layer is None else reach([_call(module, layer)], lambda n: n.all_input_nodes)
    upstream = [shape for n, shape in sizes.items() if n in before]
    known = {shape[1:] for shape in sizes.values() if shape[:1] == (batch,)}

    def reshaped(output: torch.Tensor) -> torch.Tensor:
        shape = tuple(output.shape)
        if shape[1:] not in known or len(shape) not in (3, 4):
            raise InputError(
                f"{shape} is not tokens or feature maps of this module for images of {image[0]}x{image[1]}:"
                " name the images that it is called with, reshape_transform(gm, inputs=…)"
            )
        if len(shape) == 4:
            (channels,) = {1, 2, 3} - set(maps.positions(shape, image))
            return output.movedim(channels, 1)
        (patches,) = maps.guessed("", shape, upstream, image).parts
        if len(patches.grid) != 2:
            raise InputError(f"{shape[1]} tokens are no grid of an image of {image[0]}x{image[1]}")
        return output[:, list(patches.order)].unflatten(1, patches.grid).movedim(-1, 1)

    return reshaped


def _call(module: CapturedModule, path: str) -> Node:
    """The node that stands for the call of the module at ``path``."""
    called = calls(module)
    if path not in called:
        some = ", ".join([*called][:6])
        raise InputError(f"no module {path!r} is called in this graph; called are, for example, {some}")
    return called[path]


def _zeros(module: CapturedModule) -> dict[str, torch.Tensor]:
    """Zeros of the sizes that a graph was captured for, two samples of them."""
    given = {}
    for node in module.graph.nodes:
        if node.target is insert.guard:
            x, path, (batch, *sizes), dtype = node.args[:4]
            if x.op != "placeholder" or not all(isinstance(n, int) for n in sizes):
                raise InputError(
                    f"the sizes of {path} are not known: name inputs, reshape_transform(gm, inputs=…)"
                )
            shape = (2 if isinstance(batch, str) else batch, *sizes)
            given[x.name] = torch.zeros(shape, dtype=getattr(torch, dtype), device=anchor(module).device)
    return given


def quantus_explain(
    model: torch.nn.Module, inputs: Any, targets: Target, *, method: str = "fullgrad_plus",
    policy: str | Path | None = None, device: Any = None, **options: Any,
) -> np.ndarray:  # fmt: skip
    """For Quantus: its ``explain_func``. One channel, on the positions of the inputs.

    A map over patches is spread over their pixels; its sum stays.

    Args:
        model: any model, or the result of ``transform`` or ``trace``.
        inputs: an array or tensor: images (B, C, H, W), sequences (B, N, C) or token ids (B, N).
        targets, method, policy: as for ``attribute``.
        device: Quantus names one; what counts is the device that the model is on.
        options: more arguments of ``attribute``.

    Raises:
        InputError: as ``attribute``; or the map has no place in the inputs.
    """
    like = anchor(model)
    x = torch.as_tensor(inputs)
    x = x.to(like) if x.is_floating_point() else x.to(like.device)
    values = attribute(model, x, targets, method=method, policy=policy, **options).values
    if x.ndim == 4:
        values = maps.add([values, values.new_zeros(x.shape[0], *x.shape[2:])])[:, None]
    elif values.shape == x.shape[:2]:
        values = values.reshape(*values.shape, *[1] * (x.ndim - 2))
    else:
        raise InputError(f"a map {tuple(values.shape)} has no place in inputs of shape {tuple(x.shape)}")
    return values.cpu().numpy()
