"""Models of two towers: whichever is explained, its map is the map."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.attribution.towers import towers
from libragrad_fx.errors import InputError
from tests.between import fast_first
from zoo import image_text

F64 = torch.float64
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {"image_size": 32, "patch_size": 8, **SMALL}
METHODS = ("fullgrad", "fullgrad_plus", "xgradcam", "attcat")


def clip() -> nn.Module:
    import transformers

    text = {"vocab_size": 9, "max_position_embeddings": 8, "eos_token_id": 8, **SMALL}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
    )


def siglip() -> nn.Module:
    import transformers

    text = {"vocab_size": 9, "max_position_embeddings": 6, "projection_size": 16, **SMALL}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VISION))


def open_clip(output_dict: bool) -> nn.Module:
    made = pytest.importorskip("open_clip")
    vision = made.CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=8, image_size=32)
    text = made.CLIPTextCfg(context_length=6, vocab_size=9, width=16, heads=2, layers=2)
    return made.CLIP(8, vision, text, output_dict=output_dict)


class Towers(NamedTuple):
    """A model, the parts of its output, and where its towers are."""

    make: Callable[[], nn.Module]
    parts: tuple[Any, Any]
    paths: tuple[str, str]
    names: tuple[str, str] | None = None


HUGGING = ("vision_model.encoder.layers", "text_model.encoder.layers")
OPEN = ("visual.transformer.resblocks", "transformer.resblocks")
MODELS = {
    "CLIP": Towers(clip, ("image_embeds", "text_embeds"), HUGGING, ("pixel_values", "input_ids")),
    "SigLIP": Towers(siglip, ("image_embeds", "text_embeds"), HUGGING, ("pixel_values", "input_ids")),
    "OpenCLIP, a dict": Towers(lambda: open_clip(True), ("image_features", "text_features"), OPEN),
    "OpenCLIP, a tuple": Towers(lambda: open_clip(False), (0, 1), OPEN),
}


def prepared(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for p in model.parameters():
        if p.ndim:
            nn.init.normal_(p, std=0.3)
    return model.double().eval()


@pytest.mark.parametrize("name", fast_first(MODELS, 1))
def test_both_towers_are_explained(name: str) -> None:
    made = MODELS[name]
    model = prepared(made.make())
    ids = torch.tensor([[1, 2, 3, 4, 5, 8], [1, 3, 2, 7, 5, 8]])
    pictures = torch.randn(2, 3, 32, 32, dtype=F64)
    inputs = (pictures, ids) if made.names is None else dict(zip(made.names, (pictures, ids), strict=True))
    module = lg.transform(model, inputs)
    assert towers(module) == [[f"{path}.{i}" for i in (0, 1)] for path in made.paths]
    image, text = made.parts
    for method in METHODS:
        # both in one call: they keep their order
        targets = [lg.Likeness(text, image), lg.Likeness(image, text)]
        found = lg.attribute_each(module, inputs, targets, method=method)
        for answer, of, path, shape in zip(
            found, (text, image), reversed(made.paths), ((2, 6), (2, 4, 4)), strict=True
        ):
            assert tuple(answer.values.shape) == shape, (method, of)
            assert bool(answer.values.any())
            assert all(layer.startswith(f"{path}.") for layer in answer.layers)
            assert not any(bool(m.any()) for m in answer.others.values())
            if method.startswith("fullgrad"):
                assert float(answer.completeness_error.max()) < 1e-9
            if method == "fullgrad":
                torch.testing.assert_close(answer.total, answer.output)


@functools.cache
def small() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """One model, which no test changes: it is captured once."""
    sizes = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = prepared(image_text.build(sizes, out=8))
    ids = image_text.encoded(["a photo of a three", "the digit seven"])
    pictures = torch.randn(1, 3, image_text.HEIGHT, image_text.WIDTH, dtype=F64).expand(2, -1, -1, -1)
    return model, pictures, ids


@pytest.mark.slow
@pytest.mark.parametrize("method", fast_first(["fullgrad", "fullgrad_plus", "input_x_gradient"], 1))
def test_two_prompts_on_one_picture_are_two_maps(method: str) -> None:
    model, pictures, ids = small()
    target = lg.Likeness("image_embeds", "text_embeds")
    found = lg.attribute(model, (pictures, ids), target, method=method)
    assert found.grid == (6, 12)
    assert not torch.allclose(found.values[0], found.values[1], rtol=0.1)
    y = model(pictures, ids)
    torch.testing.assert_close(found.output, 100 * (y.image_embeds * y.text_embeds).sum(1).detach())
    if method != "input_x_gradient":
        assert float(found.completeness_error.max()) < 1e-9
    for i in (0, 1):
        alone = lg.attribute(model, (pictures[:1], ids[i : i + 1]), target, method=method)
        torch.testing.assert_close(alone.values, found.values[i : i + 1], rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_a_tower_without_blocks_is_explained_where_it_begins() -> None:
    model, pictures, ids = small()
    found = lg.attribute(model, (pictures, ids), lg.Likeness("text_embeds", "image_embeds"))
    assert found.layers == ()
    assert found.values.shape == (2, image_text.LENGTH)
    padding = ids == 0
    assert not bool(found.values[padding].any())
    assert bool((found.values[~padding] != 0).all())
    assert float(found.completeness_error.max()) < 1e-9


@pytest.mark.slow
def test_parts_that_are_no_vectors_are_refused() -> None:
    model, pictures, ids = small()
    for target, match in (
        (lg.Likeness("image", "text_embeds"), "the output has no image; it has image_embeds, text_embeds"),
        (lg.Likeness(0, 2), "the output has no 2"),
    ):
        with pytest.raises(InputError, match=match):
            lg.attribute(model, (pictures, ids), target)
    with pytest.raises(InputError, match=r"vectors \(B, D\), two and two: a is \(2, 3\), b is \(2, 4\)"):
        lg.Likeness("a", "b")({"a": torch.ones(2, 3), "b": torch.ones(2, 4)})


def test_pictures_hold_two_different_digits() -> None:
    data = image_text.pairs(40, "test", 0)
    assert bool((data.labels[:, 0] != data.labels[:, 1]).all())
    assert bool((data.boxes[:, 0, 2] <= 48).all())
    assert bool((data.boxes[:, 1, 0] >= 48).all())
    again = image_text.pairs(40, "test", 0)
    assert torch.equal(data.images, again.images)
    assert data.images.shape == (40, 3, image_text.HEIGHT, image_text.WIDTH)
