"""Models of libraries on some of their tokens, against their own modules called one by one on a shorter
sequence, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import libragrad_fx as lg
from libragrad_fx.perturb import Tokens, tokens
from tests.between import fast_first

F64 = torch.float64
SMALL: dict[str, Any] = {"img_size": 48, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 3}
CELLS = torch.tensor([[0, 3, 4], [8, 2, 1], [5, 7, 6]])
"""Of three samples, of a grid of 3 x 3."""


def created(name: str, fused: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    model: Any = timm.create_model(name, **{**SMALL, **options}).to(F64).eval()
    drawn(model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model


def drawn(model: nn.Module) -> None:
    """No parameter is zero or one: scales of layers, biases and class tokens count."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            width = p[0].numel() if p.ndim > 1 and p.shape[0] > 1 else 4
            p.copy_(torch.randn(p.shape, generator=draw) * 2 / width**0.5)


def pictures(side: int = 48) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(3, 3, side, side, generator=draw, dtype=F64)


def require_equal(model: nn.Module, by_hand: Callable[[Tensor, Tensor], Tensor], x: Any = None) -> Tokens:
    """by_hand: from one picture and its cells in rising order to an answer."""
    x = pictures() if x is None else x
    of = tokens(lg.trace(model, x[:2]), x[:2])
    assert of.plan is not None, of.why
    seen = of.seen(x)
    with torch.no_grad():
        want = torch.cat([by_hand(a[None], c.sort().values) for a, c in zip(x, CELLS, strict=True)])
    got = seen.kept(CELLS)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(got, seen.logits, rtol=0, atol=1e-5)
    return of


def taken(h: Tensor, cells: Tensor, front: int) -> Tensor:
    """The tokens (1, T, C) of some cells, behind ``front`` others."""
    return torch.cat([h[:, :front], h[:, front:][:, cells]], 1)


# --- timm

VITS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", {}),
    "mean of patches": ("vit_base_patch16_siglip_gap_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 42, "dynamic_img_size": False}),
    "eager attention": ("vit_tiny_patch16_224", {"fused": False}),
    "layer scale": ("deit3_small_patch16_224", {}),
    "norm before": ("vit_base_patch32_clip_224", {"img_size": 96}),
    "attention pool": ("vit_base_patch16_siglip_224", {}),
    "attention pool, eager": ("vit_base_patch16_siglip_224", {"fused": False}),
    "norms of q and k": ("vit_tiny_patch16_224", {"qk_norm": True, "reg_tokens": 1, "global_pool": "avg"}),
    "two class tokens": ("deit_tiny_distilled_patch16_224", {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", fast_first(VITS, 1))
def test_vits(kind: str) -> None:
    name, options = VITS[kind]
    model = created(name, **options)

    def by_hand(x: Tensor, cells: Tensor) -> Tensor:
        h = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        h = taken(h, cells, model.num_prefix_tokens)
        return model.forward_head(model.norm(model.blocks(h)))

    require_equal(model, by_hand, pictures(options.get("img_size", 48)))


@pytest.mark.parametrize("name", fast_first(["eva02_base_patch16_clip_224", "eva02_tiny_patch14_224"], 1))
def test_rotary_tables(name: str) -> None:
    """A table of sines and cosines for each patch, as LibraGrad's code indexes it."""
    size = 42 if "14" in name else 48
    model = created(name, img_size=size)

    def by_hand(x: Tensor, cells: Tensor) -> Tensor:
        h, rotary = model._pos_embed(model.patch_embed(x))
        h = taken(h, cells, model.num_prefix_tokens)
        for block in model.blocks:
            h = block(h, rope=rotary[cells])
        return model.forward_head(model.norm(h))

    require_equal(model, by_hand, pictures(size))


@pytest.mark.parametrize("fused", fast_first([True, False], 1))
def test_relative_positions(fused: bool) -> None:
    """A bias for each pair of places."""
    model = created("beitv2_base_patch16_224", fused)

    def by_hand(x: Tensor, cells: Tensor) -> Tensor:
        h = torch.cat([model.cls_token, model.patch_embed(x)], 1)
        h = h if model.pos_embed is None else h + model.pos_embed
        h, at = taken(h, cells, 1), torch.cat([torch.zeros(1, dtype=torch.int64), cells + 1])
        for block in model.blocks:
            whole = block.attn._get_rel_pos_bias
            block.attn._get_rel_pos_bias = lambda whole=whole: whole()[:, :, at][:, :, :, at]
            h = block(h)
            del block.attn._get_rel_pos_bias
        return model.forward_head(model.norm(h))

    require_equal(model, by_hand)


@pytest.mark.slow
def test_class_attention() -> None:
    """The class token comes behind the blocks (CaiT), whose heads talk."""
    model = created("cait_xxs24_224", depth_token_only=1)

    def by_hand(x: Tensor, cells: Tensor) -> Tensor:
        h = model.blocks(taken(model.patch_embed(x) + model.pos_embed, cells, 0))
        token = model.cls_token
        for block in model.blocks_token_only:
            token = block(h, token)
        return model.forward_head(model.norm(torch.cat([token, h], 1)))

    require_equal(model, by_hand)


# --- others


@pytest.mark.slow
def test_torchvision_joins_samples_and_heads() -> None:
    zoo = pytest.importorskip("torchvision.models", reason="needs torchvision")
    model = zoo.VisionTransformer(48, 16, 2, 2, 32, 48, num_classes=3).to(F64).eval()
    drawn(model)

    def by_hand(x: Tensor, cells: Tensor) -> Tensor:
        h = torch.cat([model.class_token, model._process_input(x)], 1) + model.encoder.pos_embedding
        return model.heads(model.encoder.ln(model.encoder.layers(taken(h, cells, 1)))[:, 0])

    require_equal(model, by_hand)


@pytest.mark.slow
def test_hugging_face_vit() -> None:
    t = pytest.importorskip("transformers", reason="needs transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = t.ViTForImageClassification(t.ViTConfig(**sizes, image_size=48, num_labels=3)).to(F64).eval()
    drawn(model)

    def by_hand(x: Tensor, cells: Tensor) -> Tensor:
        h = taken(model.vit.embeddings(x), cells, 1)
        for layer in next(m for m in model.vit.modules() if isinstance(m, nn.ModuleList)):
            h = layer(h)
        return model.classifier(model.vit.layernorm(h)[:, 0])

    require_equal(model, by_hand)


@pytest.mark.parametrize("attention", fast_first(["sdpa", "eager"], 1))
def test_bert_with_padding(attention: str) -> None:
    """Texts of two lengths: the mask goes with the tokens, and the first token stays."""
    t = pytest.importorskip("transformers", reason="needs transformers")
    config = t.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=50,
        num_labels=3, attn_implementation=attention,
    )  # fmt: skip
    model = t.BertForSequenceClassification(config).to(F64).eval()
    drawn(model)
    ids = torch.randint(1, 50, (3, 9))
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 8 + [0]])
    inputs = {"input_ids": ids, "attention_mask": mask}
    of = tokens(lg.trace(model, inputs), inputs)
    assert (of.plan is not None, of.stays, of.grid) == (True, {0}, (9,)), of.why
    cells = torch.tensor([[1, 2, 5, 8], [2, 5, 6, 8], [1, 3, 4, 7]])  # of the second, two are padding
    got = of.seen(inputs).kept(cells)
    for i in range(3):
        at = torch.tensor([0, *(c for c in cells[i].tolist() if mask[i, c])])
        with torch.no_grad():
            h = model.bert.embeddings(ids[[i]])[:, at]
            for layer in model.bert.encoder.layer:
                h = layer(h)
                h = h[0] if isinstance(h, tuple) else h
            want = model.classifier(model.bert.pooler(h))
        torch.testing.assert_close(got[[i]], want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", fast_first(["GPT2", "Llama", "Qwen3"], 1))
def test_decoders_answer_at_the_tokens_that_are_left(name: str) -> None:
    """Their logits are of every place; positions are those of the whole text."""
    t = pytest.importorskip("transformers", reason="needs transformers")
    config = getattr(t, f"{name}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=50,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        **({} if name == "GPT2" else {"num_key_value_heads": 1, "head_dim": 16}),
    )  # fmt: skip
    model = getattr(t, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config)
    model = model.to(F64).eval()
    model.config.use_cache = False
    drawn(model)
    ids, at = torch.randint(1, 50, (2, 9)), torch.tensor([0, 2, 3, 7])
    of = tokens(lg.trace(model, {"input_ids": ids}), {"input_ids": ids})
    assert of.plan is not None, of.why
    got = of.seen({"input_ids": ids}).kept(at.expand(2, -1))
    with torch.no_grad():
        mask = torch.ones(2, len(at), dtype=torch.int64)  # without, gaps of positions are ends of texts
        want = model(ids[:, at], attention_mask=mask, position_ids=at.expand(2, -1)).logits
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


REFUSED = {
    "windows": ("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": (2,), "embed_dim": 32}, "rows"),
    "token mixing": ("mixer_s32_224", {"img_size": 64}, "needs all tokens"),
    "gated mixing": ("gmlp_ti16_224", {"img_size": 48}, "needs all tokens"),
    "convolutions": ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (8, 8, 8, 8)}, "rows"),
    "a convolution over the grid": (
        "xcit_nano_12_p16_224", {"img_size": 48, "depth": 2, "embed_dim": 32, "num_heads": 2}, "rows"),
}  # fmt: skip


@pytest.mark.parametrize("kind", fast_first(REFUSED, 1))
def test_models_that_need_all_tokens_say_why(kind: str) -> None:
    name, options, why = REFUSED[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **options).to(F64).eval()
    drawn(model)
    x = pictures(options.get("img_size", 64))
    of = tokens(lg.trace(model, x), x)
    assert of.plan is None
    assert why in of.why
    cells = torch.tensor([of.cells[:2]] * 3)
    assert not torch.allclose(of.seen(x).zeroed(cells), of.seen(x).logits)
