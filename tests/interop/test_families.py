"""Grids and targets for every family: pytorch-grad-cam and ``reshape_transform`` against the original."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.errors import InputError
from tests.between import fast_of
from tests.interop.matrix import Convolutions, randomised

Tensor = torch.Tensor
SMALL = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2}
SWIN = {"img_size": 56, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2), "num_classes": 5}


def tokens(prefix: int, height: int, width: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t[:, prefix:].reshape(len(t), height, width, -1).permute(0, 3, 1, 2)


def torchvision_vit() -> nn.Module:
    models = pytest.importorskip("torchvision.models", reason="needs torchvision (extra: models)")
    return models.VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=5)


def hugging_face() -> nn.Module:
    """Its output is a ``ModelOutput``; grad-cam wants a tensor, and finds the layers by their path."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra: models)")
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, num_labels=5,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


class Logits(nn.Module):
    """The wrapper that grad-cam's users write around a model of Hugging Face."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x)
        return y if isinstance(y, Tensor) else y.logits


def vit(**options: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **SMALL, **options)


# the model, its input, a layer, the layer whose input that layer's output is, and what lays it out by hand
Reshape = Callable[[Tensor], Tensor]
FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, str, Reshape]] = {
    "vit": (vit, (32, 48), "blocks.0", "blocks.1", tokens(1, 4, 6)),
    "registers": (lambda: vit(reg_tokens=2), (32, 48), "blocks.0", "blocks.1", tokens(3, 4, 6)),
    "pooled": (
        lambda: vit(class_token=False, global_pool="avg"), (32, 48), "blocks.0", "blocks.1",
        tokens(0, 4, 6),
    ),
    "swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", **SWIN), (56, 56),
        "layers.0", "layers.1", lambda t: t.permute(0, 3, 1, 2),
    ),
    "cnn": (Convolutions, (16, 24), "relu1", "conv2", lambda t: t),
    "torchvision": (
        torchvision_vit, (32, 32), "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1",
        tokens(1, 4, 4),
    ),
    "hugging face": (hugging_face, (32, 32), "vit.layers.0", "vit.layers.1", tokens(1, 4, 4)),
}  # fmt: skip


def hires(model: nn.Module, path: str, reshape: Callable[[Tensor], Tensor], x: Tensor) -> np.ndarray:
    cams = pytest.importorskip("pytorch_grad_cam", reason="needs grad-cam (extra: dev)")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    layers = [model.get_submodule(path)]
    with cams.HiResCAM(model=Logits(model), target_layers=layers, reshape_transform=reshape) as cam:
        return cam(input_tensor=x, targets=[ClassifierOutputTarget(i) for i in (1, 3)])
    raise AssertionError("the context swallowed an error")


@pytest.mark.parametrize("family", fast_of(FAMILIES, ["cnn"]))
def test_grad_cam(family: str) -> None:
    make, size, layer, behind, by_hand = FAMILIES[family]
    model, x = randomised(make(), 0.2), torch.randn(2, 3, *size)
    plain, balanced = lg.trace(model, x), lg.transform(model, x)
    known = hires(model, layer, by_hand, x)
    for named in (None, layer):
        found = hires(plain, layer, lg.reshape_transform(plain, named), x)
        np.testing.assert_allclose(found, known, rtol=1e-5, atol=1e-6)  # NumPy adds channels as they lie
    found = hires(balanced, layer, lg.reshape_transform(balanced), x)
    own = lg.attribute(balanced, x, [1, 3], method="hirescam", layers=[behind]).values
    from pytorch_grad_cam.utils.image import scale_cam_image

    want = scale_cam_image(scale_cam_image(np.maximum(own.numpy(), 0), size[::-1]))
    np.testing.assert_allclose(found, want, atol=1e-3)
    assert not np.array_equal(found, known) or family == "cnn"


@pytest.mark.slow
def test_what_lies_on_no_grid_is_refused() -> None:
    model = randomised(timm.create_model("swin_tiny_patch4_window7_224", **SWIN))
    gm = lg.trace(model, torch.randn(2, 3, 56, 56))
    reshape = lg.reshape_transform(gm)
    for shape in ((8, 49, 12), (2, 5), (2, 50, 24), (2, 14, 14, 13)):  # windows, logits, another image's
        with pytest.raises(InputError, match="not tokens or feature maps"):
            reshape(torch.zeros(shape))
    with pytest.raises(InputError, match=r"no module 'blocks\.7' is called"):
        lg.reshape_transform(gm, "blocks.7")
    text = lg.trace(nn.Sequential(nn.Linear(4, 4), nn.GELU()).eval(), torch.randn(2, 3, 4))
    with pytest.raises(InputError, match="takes no image"):
        lg.reshape_transform(text)


def test_images_of_another_size_are_named() -> None:
    model = randomised(Convolutions())
    x = torch.randn(2, 3, 16, 24)
    gm = lg.transform(model, x, dynamic={"x": {2: "height", 3: "width"}})
    with pytest.raises(InputError, match=r"name inputs, reshape_transform\(gm, inputs=…\)"):
        lg.reshape_transform(gm)
    output = torch.randn(3, 4, 16, 24)
    assert lg.reshape_transform(gm, inputs=x)(output) is not None
    fixed, other = lg.transform(model, x), torch.randn(2, 3, 8, 8)
    with pytest.raises(InputError, match="name the images"):
        lg.reshape_transform(fixed)(torch.randn(2, 4, 8, 8))
    assert lg.reshape_transform(fixed, inputs=other)(torch.randn(2, 4, 8, 8)).shape == (2, 4, 8, 8)


def test_a_copy_and_a_pickle_find_the_grid_too() -> None:
    import copy
    import pickle

    gm = lg.transform(randomised(vit()), torch.randn(2, 3, 32, 48))
    for again in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert lg.reshape_transform(again)(torch.zeros(5, 25, 24)).shape == (5, 24, 4, 6)
