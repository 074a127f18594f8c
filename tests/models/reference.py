"""An independent LibraGrad backward for timm vision models, written with stop-gradients.

Every function here re-states one piece of a stock timm forward with plain tensor operations on the
model's own parameters, and puts ``.detach()`` exactly where the method says a factor is constant.
Nothing is shared with the code under test, which is the whole use of this file: a mistake would
have to be made twice, in two different formulations, to go unnoticed.

The rules (``cst`` is the stop-gradient):

* softmax attention ``A V``: ``A`` constant, so only the values carry a gradient;
* LayerNorm, RMSNorm: the reciprocal root constant, the LayerNorm mean differentiable;
* gated activation ``x * gate(x)`` (GELU in either form, SiLU, QuickGELU): the gate constant;
* GLU product ``act(a) * b``: the gradient at the product halved, the gate rule inside ``act``;
* everything else is affine and untouched.

Shapes: ``B`` batch, ``T`` tokens (prefix first), ``C`` width, ``H`` heads, ``D`` head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import activations as timm_activations
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.norm import RmsNorm
from timm.layers.patch_embed import PatchEmbed
from timm.models import beit, eva, mlp_mixer, vision_transformer
from torch import Tensor, nn

Family = tuple[str, str, dict[str, Any]]

# Registered depth throughout; small images and few classes keep a float64 run to about a second.
# A family that timm registers at base width and up only is narrowed: width is not a kind of layer.
_NARROW: dict[str, Any] = {"embed_dim": 192, "num_heads": 3}

FAMILIES: list[Family] = [
    ("vit", "vit_tiny_patch16_224", {"img_size": 112, "num_classes": 10}),
    ("deit3", "deit3_small_patch16_224", {"img_size": 112, "num_classes": 10}),
    ("flexivit", "flexivit_small", {"img_size": 112, "num_classes": 10}),
    ("clip", "vit_base_patch32_clip_224", {"num_classes": 10, **_NARROW}),
    (
        "siglip_gap",
        "vit_base_patch16_siglip_gap_224",
        {"img_size": 112, "num_classes": 10, **_NARROW},
    ),
    ("siglip_map", "vit_base_patch16_siglip_224", {"img_size": 112, "num_classes": 10, **_NARROW}),
    ("beitv2", "beitv2_base_patch16_224", {"img_size": 112, "num_classes": 10, **_NARROW}),
    ("eva02", "eva02_tiny_patch14_224", {"img_size": 112, "num_classes": 10}),
    # Unpacked qkv and SwiGLU, with the norms inside the MLP and inside the attention.
    (
        "eva02_inner_norms",
        "eva02_base_patch16_clip_224",
        {"img_size": 112, "num_classes": 10, **_NARROW},
    ),
    ("gmixer", "gmixer_24_224", {"img_size": 112, "num_classes": 10}),
    ("mixer", "mixer_s32_224", {"num_classes": 10}),
]

# The paper's deep checkpoints at their registered depth (24 to 32 blocks), narrowed.
DEEP: list[Family] = [
    ("vit_l", "vit_large_patch16_224", {"img_size": 112, "num_classes": 10, **_NARROW}),
    ("beitv2_l", "beitv2_large_patch16_224", {"img_size": 112, "num_classes": 10, **_NARROW}),
    ("flexivit_l", "flexivit_large", {"img_size": 112, "num_classes": 10, **_NARROW}),
    (
        "siglip_so400m",
        "vit_so400m_patch14_siglip_gap_378",
        {"img_size": 112, "num_classes": 10, **_NARROW},
    ),
    ("clip_h", "vit_huge_patch14_clip_224", {"img_size": 112, "num_classes": 10, **_NARROW}),
    ("deit3_h", "deit3_huge_patch14_224", {"img_size": 112, "num_classes": 10, **_NARROW}),
]

# Rule branches that no paper family reaches: tanh GELU, QuickGELU, RMSNorm, q/k-norm, registers.
VARIANTS: list[Family] = [
    (
        "gelu_tanh",
        "vit_tiny_patch16_224",
        {"img_size": 112, "num_classes": 10, "act_layer": "gelu_tanh"},
    ),
    ("quick_gelu", "vit_base_patch32_clip_quickgelu_224", {"num_classes": 10, **_NARROW}),
    (
        "rmsnorm_qknorm_reg",
        "vit_tiny_patch16_224",
        {
            "img_size": 112,
            "num_classes": 10,
            "norm_layer": "rmsnorm",
            "qk_norm": True,
            "reg_tokens": 4,
        },
    ),
]

# The checkpoints of the paper's classification tables, by their timm names. Only the architecture
# is of interest here: they are built with random weights.
PAPER_CHECKPOINTS: tuple[str, ...] = (
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "vit_large_patch16_224.augreg_in21k_ft_in1k",
    "eva02_small_patch14_336.mim_in22k_ft_in1k",
    "beitv2_large_patch16_224.in1k_ft_in22k_in1k",
    "flexivit_large.1200ep_in1k",
    "vit_so400m_patch14_siglip_gap_378.webli_ft_in1k",
    "vit_huge_patch14_clip_224.laion2b_ft_in12k_in1k",
    "deit3_huge_patch14_224.fb_in22k_ft_in1k",
    "gmixer_24_224.ra3_in1k",
)


@dataclass(frozen=True)
class Rules:
    """Which rules are on. All on is LibraGrad; all off is the ordinary gradient."""

    attention: bool = True
    norm: bool = True
    activation: bool = True
    halve: bool = True


LIBRA = Rules()
ORDINARY = Rules(attention=False, norm=False, activation=False, halve=False)


@dataclass(frozen=True)
class Reference:
    """Gradients of ``sum_b logits[b, target]``.

    ``logit`` is ``(B,)``, ``grad_input`` is ``(B, 3, height, width)``; ``grads`` has one entry per
    named parameter, in that parameter's shape, zero where no gradient arrives.
    """

    logit: Tensor
    grad_input: Tensor
    grads: dict[str, Tensor]


def create(name: str, **kwargs: Any) -> nn.Module:
    """The stock timm model in evaluation mode, without its pretrained weights."""
    return timm.create_model(name, pretrained=False, **kwargs).eval()


def reference(model: nn.Module, x: Tensor, target: int, *, rules: Rules = LIBRA) -> Reference:
    """Logit and rule-modified gradients of one class; ``x`` is ``(B, 3, height, width)``.

    The model is only read: neither ``.grad`` nor any flag of it changes.
    """
    if model.training:
        raise ValueError("the reference describes evaluation mode; call model.eval() first")
    named = dict(model.named_parameters())
    if frozen := [name for name, p in named.items() if not p.requires_grad]:
        raise ValueError(f"parameters that do not require grad: {frozen[:3]}")
    leaf = x.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        logit = logits(model, leaf, rules)[:, target]
    inputs = [leaf, *named.values()]
    grads = torch.autograd.grad(logit.sum(), inputs, allow_unused=True, materialize_grads=True)
    by_name = dict(zip(named, grads[1:], strict=True))
    return Reference(logit=logit.detach(), grad_input=grads[0], grads=by_name)


def logits(model: nn.Module, x: Tensor, rules: Rules) -> Tensor:
    """``(B, 3, height, width)`` to ``(B, classes)`` through the re-written forward."""
    # Exact types: a subclass (distilled DeiT, say) may add a path that is not written here.
    forward = _FORWARDS.get(type(model))
    if forward is None:
        raise TypeError(f"no reference for {type(model).__name__}")
    return forward(model, x, rules)


# ------------------------------------------------------------------------------ what adds to f

_ADDITIVE_LEAVES = frozenset({"bias", "q_bias", "v_bias", "cls_token", "reg_token", "pos_embed"})


def additive_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters that enter by addition or concatenation, so that ``b * df/db`` is a share of f.

    Besides every bias these are the prefix tokens and the position embedding, because
    completeness is stated at the pixels here and not at the embedded tokens. Multiplicative
    parameters (weights, layer scales) and whatever acts through the attention probabilities alone
    (relative-position tables, the latent query of a pooling head) are not among them.
    """
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in _ADDITIVE_LEAVES:
            yield name, parameter


def completeness_gap(model: nn.Module, x: Tensor, result: Reference) -> float:
    """``sum x*dx + sum b*db - sum_b f_b``, which the rules make zero up to rounding."""
    shares = (x.detach() * result.grad_input).sum()
    for name, parameter in additive_parameters(model):
        shares = shares + (parameter.detach() * result.grads[name]).sum()
    return float(shares - result.logit.sum())


# ------------------------------------------------------------------------------ random weights


def randomise(model: nn.Module, seed: int) -> None:
    """Fill every parameter in place so that none is at zero, at one, or otherwise neutral.

    Maps have unit gain and the last map of each residual branch is scaled by ``1/sqrt(2 * depth)``,
    so the residual stream stays O(1) over any depth. No buffer is touched: in these families all
    of them are constants (rotary tables, index tables, and the key bias that is zero by design).
    The draw is float32 on the CPU, so models of different dtype or device agree up to rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = len(model.blocks)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_scaled(name, noise, depth))


_TOKEN_LEAVES = frozenset({"cls_token", "reg_token", "pos_embed", "relative_position_bias_table"})
_GAMMA_LEAVES = frozenset({"gamma", "gamma_1", "gamma_2"})
_BRANCH_ENDS = (".attn.proj.weight", ".fc2.weight")


def _scaled(name: str, noise: Tensor, depth: int) -> Tensor:
    """Standard normal ``noise`` brought to the size that suits the parameter's place."""
    leaf = name.rpartition(".")[2]
    if leaf == "latent":
        return noise
    if leaf in _TOKEN_LEAVES:
        return 0.5 * noise
    if leaf in _GAMMA_LEAVES:
        return 1.0 + 0.2 * noise.tanh()  # around one, never changing sign
    if leaf.endswith("bias"):
        return 0.2 * noise
    if noise.ndim == 1:  # a norm's weight
        return 1.0 + 0.2 * noise.tanh()
    if noise.ndim in (2, 4) and leaf == "weight":
        gain = 1.0 / math.sqrt(2 * depth) if name.endswith(_BRANCH_ENDS) else 1.0
        return gain / math.sqrt(noise[0].numel()) * noise
    raise TypeError(f"no scale known for parameter {name} of shape {tuple(noise.shape)}")


# ------------------------------------------------------------------------------ the rules


def _cst(x: Tensor, on: bool) -> Tensor:
    """The stop-gradient, where the rule that asks for it is on."""
    return x.detach() if on else x


def _norm(module: nn.Module, x: Tensor, rules: Rules) -> Tensor:
    """LayerNorm, RMSNorm or nothing over the last dimension, with a constant reciprocal root."""
    if isinstance(module, nn.Identity):
        return x
    if isinstance(module, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)  # the variance below is the mean square of this
    elif not isinstance(module, (RmsNorm, nn.RMSNorm)):
        raise TypeError(f"no norm rule for {type(module).__name__}")
    if x.shape[-1:] != torch.Size(module.normalized_shape):
        raise TypeError(f"norm over more than the last dimension: {module}")
    y = x * _cst((x.square().mean(-1, keepdim=True) + module.eps).rsqrt(), rules.norm)
    y = y if module.weight is None else y * module.weight
    bias = getattr(module, "bias", None)
    return y if bias is None else y + bias


def _gate(module: nn.Module, x: Tensor) -> Tensor:
    """``gate(x)`` of an activation that is ``x * gate(x)``; same shape as ``x``."""
    if isinstance(module, nn.SiLU):
        return torch.sigmoid(x)
    if isinstance(module, timm_activations.QuickGELU):
        return torch.sigmoid(1.702 * x)
    exact = isinstance(module, timm_activations.GELU)
    tanh = isinstance(module, timm_activations.GELUTanh)
    if isinstance(module, nn.GELU):
        exact, tanh = module.approximate == "none", module.approximate == "tanh"
    if exact:
        return 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))
    if tanh:
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    raise TypeError(f"no gate known for {type(module).__name__}")


def _activation(module: nn.Module, x: Tensor, rules: Rules) -> Tensor:
    return x * _cst(_gate(module, x), rules.activation)


def _product(a: Tensor, b: Tensor, rules: Rules) -> Tensor:
    """``a * b`` with the gradient at the product halved; both halves of the value are exact."""
    y = a * b
    return 0.5 * y + 0.5 * y.detach() if rules.halve else y


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rules: Rules) -> Tensor:
    """Softmax attention with constant probabilities.

    ``q`` is ``(B, H, Tq, D)``, ``k`` and ``v`` are ``(B, H, T, D)``, ``bias`` broadcasts against
    ``(B, H, Tq, T)``; the result is ``(B, Tq, H*D)``.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias
    out = _cst(scores.softmax(-1), rules.attention) @ v
    return out.transpose(1, 2).flatten(2)


# ------------------------------------------------------------------------------ shared pieces


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    if type(module) is not nn.Linear:
        raise TypeError(f"expected a plain Linear, got {type(module).__name__}")
    return F.linear(x, module.weight, module.bias)


def _heads(x: Tensor, count: int) -> Tensor:
    """``(B, T, H*D)`` to ``(B, H, T, D)``."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _scale(gamma: Tensor | None, x: Tensor) -> Tensor:
    return x if gamma is None else gamma * x


def _mlp(module: nn.Module, x: Tensor, rules: Rules) -> Tensor:
    """Any of timm's MLPs over the last dimension: plain, packed GLU, GLU with separate maps."""
    kind = type(module)
    if kind is Mlp:
        hidden = _activation(module.act, _linear(module.fc1, x), rules)
    elif kind is GluMlp:
        if module.chunk_dim != -1:
            raise TypeError("convolutional GLU")
        first, second = _linear(module.fc1, x).chunk(2, dim=-1)
        gated, plain = (second, first) if module.gate_last else (first, second)
        hidden = _product(_activation(module.act, gated, rules), plain, rules)
    elif kind is SwiGLU:
        gated, plain = _linear(module.fc1_g, x), _linear(module.fc1_x, x)
        hidden = _product(_activation(module.act, gated, rules), plain, rules)
    else:
        raise TypeError(f"no reference for {kind.__name__}")
    return _linear(module.fc2, _norm(module.norm, hidden, rules))


def _patches(module: nn.Module, x: Tensor, rules: Rules) -> Tensor:
    """``(B, 3, height, width)`` to patch tokens ``(B, N, C)``."""
    if type(module) is not PatchEmbed or module.dynamic_img_pad or not module.flatten:
        raise TypeError("only the fixed-size patch embedding is written here")
    conv = module.proj
    tokens = F.conv2d(x, conv.weight, conv.bias, stride=conv.stride)
    return _norm(module.norm, tokens.flatten(2).transpose(1, 2), rules)


def _embed(model: nn.Module, tokens: Tensor) -> Tensor:
    """Prepend class and register tokens and add the positions: ``(B, N, C)`` to ``(B, T, C)``."""
    batch = tokens.shape[0]
    prefix = [
        token.expand(batch, -1, -1)
        for token in (model.cls_token, getattr(model, "reg_token", None))
        if token is not None
    ]
    patches_only = getattr(model, "no_embed_class", False)
    if model.pos_embed is not None and patches_only:
        tokens = tokens + model.pos_embed
    tokens = torch.cat([*prefix, tokens], dim=1)
    if model.pos_embed is not None and not patches_only:
        tokens = tokens + model.pos_embed
    return tokens


def _pool(model: nn.Module, x: Tensor) -> Tensor:
    """``(B, T, C)`` to ``(B, C)``: the class token, or the mean over the patches."""
    if getattr(model, "pool_include_prefix", False):
        raise TypeError("pooling over prefix tokens")
    if model.global_pool == "token":
        return x[:, 0]
    if model.global_pool == "avg":
        return x[:, getattr(model, "num_prefix_tokens", 0) :].mean(1)
    raise TypeError(f"no reference for pooling {model.global_pool!r}")


def _latent_pool(module: nn.Module, x: Tensor, rules: Rules) -> Tensor:
    """Attention pooling by a learned query: ``(B, T, C)`` to ``(B, C)``."""
    if type(module) is not AttentionPoolLatent or module.pool != "token":
        raise TypeError("only the latent attention pool with token output is written here")
    if module.mlp is None or module.pos_embed is not None:
        raise TypeError("latent pool without its MLP, or with its own positions")
    latent = module.latent.expand(x.shape[0], -1, -1)
    q = _heads(_linear(module.q, latent), module.num_heads)
    k, v = (_heads(part, module.num_heads) for part in _linear(module.kv, x).chunk(2, dim=-1))
    q, k = _norm(module.q_norm, q, rules), _norm(module.k_norm, k, rules)
    pooled = _linear(module.proj, _attend(q, k, v, None, rules))
    pooled = pooled + _mlp(module.mlp, _norm(module.norm, pooled, rules), rules)
    return pooled[:, 0]


# ------------------------------------------------------------------------------ ViT


def _vit_attention(module: nn.Module, x: Tensor, rules: Rules) -> Tensor:
    if type(module) is not Attention or module.gate is not None:
        raise TypeError("only the plain attention layer is written here")
    q, k, v = (_heads(part, module.num_heads) for part in _linear(module.qkv, x).chunk(3, dim=-1))
    q, k = _norm(module.q_norm, q, rules), _norm(module.k_norm, k, rules)
    out = _norm(module.norm, _attend(q, k, v, None, rules), rules)
    return _linear(module.proj, out)


def _vit_block(block: nn.Module, x: Tensor, rules: Rules) -> Tensor:
    if type(block) is not vision_transformer.Block:
        raise TypeError(f"no reference for block {type(block).__name__}")
    gamma_1, gamma_2 = (getattr(scale, "gamma", None) for scale in (block.ls1, block.ls2))
    x = x + _scale(gamma_1, _vit_attention(block.attn, _norm(block.norm1, x, rules), rules))
    return x + _scale(gamma_2, _mlp(block.mlp, _norm(block.norm2, x, rules), rules))


def _vit(model: nn.Module, x: Tensor, rules: Rules) -> Tensor:
    """ViT, DeiT3, FlexiViT, CLIP-ViT and SigLIP, which timm builds from one class."""
    x = _norm(model.norm_pre, _embed(model, _patches(model.patch_embed, x, rules)), rules)
    for block in model.blocks:
        x = _vit_block(block, x, rules)
    x = _norm(model.norm, x, rules)
    if model.attn_pool is None:
        x = _pool(model, x)
    else:
        x = _latent_pool(model.attn_pool, x[:, model.num_prefix_tokens :], rules)
    return _linear(model.head, _norm(model.fc_norm, x, rules))


# ------------------------------------------------------------------------------ BEiT


def _packed_qkv(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed projection with separate query and value biases and none on the keys (BEiT, EVA)."""
    q, k, v = F.linear(x, module.qkv.weight).chunk(3, dim=-1)
    if module.q_bias is not None:
        q, k, v = q + module.q_bias, k + module.k_bias, v + module.v_bias
    return q, k, v


def _beit_attention(module: nn.Module, x: Tensor, rules: Rules) -> Tensor:
    q, k, v = (_heads(part, module.num_heads) for part in _packed_qkv(module, x))
    # (T, T) indices into a (distances, H) table give the (H, T, T) bias inside the softmax.
    table, index = module.relative_position_bias_table, module.relative_position_index
    bias = None if table is None else table[index].permute(2, 0, 1)
    return _linear(module.proj, _attend(q, k, v, bias, rules))


def _beit(model: nn.Module, x: Tensor, rules: Rules) -> Tensor:
    if model.rel_pos_bias is not None:
        raise TypeError("relative positions shared between blocks")
    x = _embed(model, _patches(model.patch_embed, x, rules))
    for block in model.blocks:
        out = _beit_attention(block.attn, _norm(block.norm1, x, rules), rules)
        x = x + _scale(block.gamma_1, out)
        x = x + _scale(block.gamma_2, _mlp(block.mlp, _norm(block.norm2, x, rules), rules))
    x = _pool(model, _norm(model.norm, x, rules))
    return _linear(model.head, _norm(model.fc_norm, x, rules))


# ------------------------------------------------------------------------------ EVA-02


def _rotate(x: Tensor, table: Tensor, prefix: int) -> Tensor:
    """Interleaved rotary embedding of ``x`` ``(B, H, T, D)``; the first ``prefix`` tokens stay.

    ``table`` is ``(T - prefix, 2*D)``: sines, then cosines, each repeated for a pair of channels.
    """
    sin, cos = table.chunk(2, dim=-1)
    kept, moved = x[:, :, :prefix], x[:, :, prefix:]
    even, odd = moved[..., 0::2], moved[..., 1::2]
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return torch.cat((kept, moved * cos + turned * sin), dim=2)


def _eva_attention(module: nn.Module, x: Tensor, table: Tensor, rules: Rules) -> Tensor:
    if type(module) is not eva.EvaAttention or module.rotate_half or module.gate is not None:
        raise TypeError("only the plain EVA attention with interleaved rotation is written here")
    if module.qkv is not None:
        parts = _packed_qkv(module, x)
    else:
        parts = tuple(_linear(p, x) for p in (module.q_proj, module.k_proj, module.v_proj))
    q, k, v = (_heads(part, module.num_heads) for part in parts)
    q, k = _norm(module.q_norm, q, rules), _norm(module.k_norm, k, rules)
    q, k = (_rotate(part, table, module.num_prefix_tokens) for part in (q, k))
    out = _norm(module.norm, _attend(q, k, v, None, rules), rules)
    return _linear(module.proj, out)


def _eva(model: nn.Module, x: Tensor, rules: Rules) -> Tensor:
    table = getattr(model.rope, "pos_embed", None)
    if table is None or model.rope_mixed or model.attn_pool is not None:
        raise TypeError("EVA without one fixed rotary table, or with an attention pool")
    x = _norm(model.norm_pre, _embed(model, _patches(model.patch_embed, x, rules)), rules)
    for block in model.blocks:
        if type(block) is not eva.EvaBlock:
            raise TypeError(f"no reference for block {type(block).__name__}")
        out = _eva_attention(block.attn, _norm(block.norm1, x, rules), table, rules)
        x = x + _scale(block.gamma_1, out)
        x = x + _scale(block.gamma_2, _mlp(block.mlp, _norm(block.norm2, x, rules), rules))
    x = _pool(model, _norm(model.norm, x, rules))
    return _linear(model.head, _norm(model.fc_norm, x, rules))


# ------------------------------------------------------------------------------ Mixer


def _mixer(model: nn.Module, x: Tensor, rules: Rules) -> Tensor:
    x = _patches(model.stem, x, rules)
    for block in model.blocks:
        if type(block) is not mlp_mixer.MixerBlock:
            raise TypeError(f"no reference for block {type(block).__name__}")
        mixed = _mlp(block.mlp_tokens, _norm(block.norm1, x, rules).transpose(1, 2), rules)
        x = x + mixed.transpose(1, 2)
        x = x + _mlp(block.mlp_channels, _norm(block.norm2, x, rules), rules)
    return _linear(model.head, _pool(model, _norm(model.norm, x, rules)))


_FORWARDS: dict[type[nn.Module], Callable[[Any, Tensor, Rules], Tensor]] = {
    vision_transformer.VisionTransformer: _vit,
    beit.Beit: _beit,
    eva.Eva: _eva,
    mlp_mixer.MlpMixer: _mixer,
}
