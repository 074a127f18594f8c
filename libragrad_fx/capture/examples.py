"""The call that a model is captured with: the user's example, or a guess from the model."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from libragrad_fx.errors import InputError
from libragrad_fx.target import Arguments, as_call

_INFERENCE_TRIED = "the model's metadata (timm, torchvision, Hugging Face, Lightning), its first layers"


def example_call(
    model: torch.nn.Module, example_inputs: Any = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the call to be captured.

    Args:
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments;
            None infers them (see ``infer_inputs``).

    Raises:
        InputError: the inputs could not be inferred, or do not fit ``forward``.
    """
    if example_inputs is None:
        with torch.random.fork_rng():
            args, kwargs = infer_inputs(model)
    else:
        args, kwargs = _as_call(example_inputs)
    # export would make one argument of a tensor that is passed twice, so each gets an alias
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
    _check_call(model, args, kwargs)
    return args, kwargs


def _as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, (torch.Tensor, Mapping, tuple, list, Arguments)):
        return as_call(inputs)
    raise InputError(
        f"example inputs must be a tensor, a tuple of positional arguments or a dict of keyword"
        f" arguments; got {type(inputs).__name__}"
    )


def _check_call(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as e:
        sig = inspect.signature(model.forward)
        raise InputError(f"the inputs do not fit {type(model).__name__}.forward{sig}: {e}") from e


def without_cache(model: torch.nn.Module, kwargs: dict[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """``kwargs`` with key-value caches switched off (no graph can return them), and the names added."""
    if "use_cache" in inspect.signature(model.forward).parameters and "use_cache" not in kwargs:
        return {**kwargs, "use_cache": False}, frozenset({"use_cache"})
    return kwargs, frozenset()


def infer_inputs(model: torch.nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs of batch 2, from the model's own metadata or from its first layers.

    Raises:
        InputError: nothing fits; says what was tried.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    place = {"device": like.device, "dtype": like.dtype}
    example = getattr(model, "example_input_array", None)
    if example is not None:
        return pytree.tree_map(lambda t: _placed(t, place), _as_call(example))
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    if isinstance(config, Mapping) and config.get("input_size"):
        size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        size = tuple(size or config["input_size"][-2:])
        conv = next((m for m in model.modules() if isinstance(m, _ConvNd)), None)
        channels = dict.fromkeys([config["input_size"][0], getattr(conv, "in_channels", 3)])
        return _first_that_runs(model, [torch.randn(2, c, *size, **place) for c in channels])
    if type(model).__module__.startswith("torchvision.models"):
        side = 299 if "inception" in type(model).__module__ else 224
        if ".video" in type(model).__module__:
            sizes = ((16, 112, 112), (16, 224, 224))
            return _first_that_runs(model, [torch.randn(2, 3, *s, **place) for s in sizes])
        return (torch.randn(2, 3, side, side, **place),), {}
    if hasattr(model, "dummy_inputs") and hasattr(model, "config"):
        return (), _hugging_face(model, place)
    leaves = (m for m in model.modules() if not list(m.children()) and list(m.parameters()))
    layer = next(leaves, None)
    return _first_that_runs(model, list(_candidates(layer, place)), type(layer).__name__)


def _placed(t: Any, place: dict[str, Any]) -> Any:
    """An example tensor on the model's device and, if it is floating point, in its dtype."""
    if not isinstance(t, torch.Tensor):
        return t
    return t.to(**place) if t.is_floating_point() else t.to(place["device"])


def _hugging_face(model: Any, place: dict[str, Any]) -> dict[str, Any]:
    config = model.config
    if model.main_input_name == "pixel_values":
        side = getattr(config, "image_size", 224)
        side = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.randn(2, channels, *side, **place)}
    ids = model.dummy_inputs.get("input_ids")
    if ids is None:
        raise InputError(
            f"{type(model).__name__} has no dummy input_ids or pixel_values to start from; pass"
            " example_inputs=dict(...) as you would call it"
        )
    return {"input_ids": (ids[:2, :8] % config.get_text_config().vocab_size).to(place["device"])}


def _candidates(layer: Any, place: dict[str, Any]) -> Iterator[torch.Tensor]:
    if isinstance(layer, _ConvNd):
        dims = len(layer.kernel_size)
        for side in (224, 64, 32, 28):
            yield torch.randn(2, layer.in_channels, *[side if dims < 3 else side // 2] * dims, **place)
    elif isinstance(layer, torch.nn.Embedding):
        yield torch.randint(layer.num_embeddings, (2, 16), device=place["device"])
    width = getattr(layer, "in_features", None) or getattr(layer, "input_size", None)
    width = width or getattr(layer, "num_features", None)
    shape = getattr(layer, "normalized_shape", None)
    if width is not None and not isinstance(layer, _ConvNd):
        yield from (torch.randn(2, width, **place), torch.randn(2, 16, width, **place))
    elif shape is not None:
        yield torch.randn(2, *shape, **place)


def _first_that_runs(
    model: torch.nn.Module, candidates: Sequence[torch.Tensor], layer: str = "it"
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first candidate that the model accepts; a single one from metadata is not tried.

    Tried on fake tensors: nothing is computed and nothing written.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for candidate in candidates:
        if len(candidates) == 1 and layer == "it":
            return (candidate,), {}
        mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
        with mode, contextlib.suppress(Exception), torch.no_grad():
            fake: dict[str, Any] = {k: mode.from_tensor(v) for k, v in state.items()}
            torch.func.functional_call(model, fake, (mode.from_tensor(candidate),))
            return (candidate,), {}
    tried = ", ".join(f"{tuple(c.shape)} {c.dtype}" for c in candidates)
    what = f"{layer} takes {tried}" if tried else "no layer to start from"
    raise InputError(
        f"cannot guess inputs for {type(model).__name__}: tried {_INFERENCE_TRIED} ({what}). Pass an"
        " example: transform(model, (x,)), with x as you would call the model, batch first."
    )
