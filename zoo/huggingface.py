"""Architectures of Hugging Face transformers, each as a tiny network with random weights.

Nothing is downloaded. Sizes come from one table; an entry names its class and what differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from libragrad_fx.coverage.suites import Subject
from libragrad_fx.extras import need
from libragrad_fx.target import first_tensor

Inputs = Callable[[Any], dict[str, Tensor]]

_LENGTH = 8  # tokens of a text
_PADDED = 2  # of the second text, at its end
_TOKEN = (_LENGTH - _PADDED - 1, 3)  # an entry at the last position that is a token in both texts

# a config takes the entries that it has a field for, also under its own names (``attribute_map``)
_SIZES: Mapping[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "projection_dim": 16,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48, "ffn_dim": 48,
    "n_head": 4, "n_layer": 2, "d_head": 8, "d_inner": 48, "embedding_size": 16,
    "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1, "forced_eos_token_id": None, "use_cache": False,
    "sliding_window": 4, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "image_size": 32, "patch_size": 8, "num_channels": 3, "initializer_range": 0.2,
    "init_std": 0.2,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One network: its builder, its inputs (batch 2), and the target to explain.

    family: "vision", "language", "multimodal" or "audio"
    inputs: from the model to keyword arguments of its forward
    target: as for ``verify``
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    target: Any


# --- models


def _config(cls: Any, options: Mapping[str, Any]) -> Any:
    """A config: the fields in ``_SIZES``, overridden by ``options``; its sub-configs likewise."""
    fields = {f.name for f in dataclasses.fields(cls)}
    names: Mapping[str, str] = cls.attribute_map
    sizes = {names.get(k, k): v for k, v in _SIZES.items()}
    wanted = {names.get(k, k): v for k, v in options.items()}
    parts = {k: _part(v, options.get(k)) for k, v in cls.sub_configs.items()}
    made = {k: v for k, v in parts.items() if v is not None}
    return cls(**{k: v for k, v in sizes.items() if k in fields} | wanted | made)


def _part(cls: Any, options: Any) -> Any:
    """A sub-config; where the outer one takes any, ``options["model_type"]`` says which."""
    if cls.__name__ == "AutoConfig":
        if options is None:
            return None
        kinds = need("transformers", "coverage").CONFIG_MAPPING
        return _config(kinds[options["model_type"]], options)
    return _config(cls, options or {}).to_dict()


def _model(model_class: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        cls = getattr(need("transformers", "coverage"), model_class)
        return randomised(cls(_config(cls.config_class, options)))

    return build


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` with noise added to constant parameters: zero heads, zero biases, unit scales."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and p.numel() and bool((p == p.flatten()[0]).all()):
                p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.2)
    return model


# --- inputs


def _mask() -> Tensor:
    mask = torch.ones(2, _LENGTH, dtype=torch.long)
    mask[1, -_PADDED:] = 0
    return mask


def _embeds(model: Any) -> Tensor:
    return torch.randn(2, _LENGTH, model.get_input_embeddings().weight.shape[-1])


def _text(model: Any) -> dict[str, Tensor]:
    return {"inputs_embeds": _embeds(model)}


def _padded_text(model: Any) -> dict[str, Tensor]:
    return {"inputs_embeds": _embeds(model), "attention_mask": _mask()}


def _masked_text(model: Any) -> dict[str, Tensor]:
    """A text, with a mask in the form that attention adds to its scores."""
    return {**_text(model), "attention_mask": torch.zeros(2, 1, 1, _LENGTH, dtype=torch.long)}


def _answer(model: Any) -> dict[str, Tensor]:
    """Inputs of a decoder behind an encoder."""
    return {"decoder_inputs_embeds": _embeds(model)}


def _two_texts(model: Any) -> dict[str, Tensor]:
    return {**_padded_text(model), **_answer(model)}


def _pixels(model: Any) -> dict[str, Tensor]:
    config = getattr(model.config, "vision_config", model.config)
    side = getattr(config, "image_size", 32)
    sides = side if isinstance(side, (tuple, list)) else (side, side)
    return {"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), *sides)}


def _video(model: Any) -> dict[str, Tensor]:
    side = model.config.image_size
    return {"pixel_values": torch.randn(2, model.config.num_frames, 3, side, side)}


def _ids(model: Any) -> dict[str, Tensor]:
    size = model.config.get_text_config().vocab_size
    return {"input_ids": torch.randint(3, size, (2, _LENGTH)), "attention_mask": _mask()}


def _wave(length: int) -> Inputs:
    return lambda model: {"input_values": torch.randn(2, length)}


def _random(**shapes: tuple[int, ...]) -> Inputs:
    """Normal noise under each name, batch 2."""
    return lambda model: {k: torch.randn(2, *s) for k, s in shapes.items()}


def _both(*parts: Inputs) -> Inputs:
    return lambda model: {k: v for part in parts for k, v in part(model).items()}


# --- the table


def _vision(
    name: str, model_class: str, target: Any = 3, inputs: Inputs = _pixels, **options: Any
) -> Architecture:
    if model_class.endswith("Classification"):
        options["num_labels"] = 5
    return Architecture(name, "vision", _model(model_class, **options), inputs, target)


def _language(
    name: str, model_class: str, inputs: Inputs = _padded_text, target: Any = _TOKEN, **options: Any
) -> Architecture:
    return Architecture(name, "language", _model(model_class, **options), inputs, target)


def _audio(
    name: str, model_class: str, inputs: Inputs, target: Any = (1, 3), **options: Any
) -> Architecture:
    return Architecture(name, "audio", _model(model_class, **options), inputs, target)


def _multimodal(name: str, model_class: str, inputs: Inputs, target: Any, **options: Any) -> Architecture:
    return Architecture(name, "multimodal", _model(model_class, **options), inputs, target)


_MAP = (1, 2, 2)  # an entry of a dense output
_HIDDEN = (1, 3)  # an entry of hidden states
_DEPTHS: dict[str, Any] = {"depths": [1, 1], "hidden_sizes": [16, 32]}
_WINDOWS: dict[str, Any] = {
    "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4,
}  # fmt: skip
_PYRAMID: dict[str, Any] = {
    "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4], "hidden_sizes": [8, 16, 16, 32],
    "mlp_ratios": [2, 2, 2, 2], "image_size": 64,
}  # fmt: skip


def _mean(output: Any) -> Tensor:
    """The mean of a map: a single entry may be zero, behind a relu."""
    return first_tensor(output).flatten(1).mean(1)


_FILM: dict[str, Any] = {"num_frames": 4}
_RESNET: dict[str, Any] = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
    "out_features": ["stage2"],
}  # fmt: skip
_DINO: dict[str, Any] = {"model_type": "dinov2", "out_indices": [1, 2, 3, 4], "num_hidden_layers": 4,
         "apply_layernorm": True, "reshape_hidden_states": False}  # fmt: skip
_NECK: dict[str, Any] = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8}

_VISION = [
    _vision("vit", "ViTForImageClassification"),
    _vision("vit-mae", "ViTMAEModel", _HIDDEN, mask_ratio=0.0,
            inputs=_both(_pixels, lambda model: {"noise": torch.rand(2, 16)})),
    _vision("vit-msn", "ViTMSNForImageClassification"),
    _vision("deit", "DeiTForImageClassification"),
    _vision("ijepa", "IJepaForImageClassification"),
    _vision("dinov2", "Dinov2ForImageClassification"),
    _vision("dinov2-registers", "Dinov2WithRegistersForImageClassification"),
    _vision("dinov3-vit", "DINOv3ViTModel", _HIDDEN, num_register_tokens=2, use_gated_mlp=True),
    _vision("dinov3-convnext", "DINOv3ConvNextModel", _HIDDEN, depths=[1, 1, 1, 1],
            hidden_sizes=[8, 8, 16, 32]),
    _vision("pixio", "PixioModel", _HIDDEN, n_cls_tokens=2),
    _vision("mlcd", "MLCDVisionModel", _HIDDEN),
    _vision("aimv2", "Aimv2VisionModel", _HIDDEN),
    _vision("swin", "SwinForImageClassification", **_WINDOWS),
    _vision("swinv2", "Swinv2ForImageClassification", **_WINDOWS),
    _vision("swin2sr", "Swin2SRForImageSuperResolution", (1, 9, 9), embed_dim=16, depths=[2],
            num_heads=[2], window_size=4, image_size=16, patch_size=1),
    _vision("siglip-vision", "SiglipForImageClassification"),
    _vision("siglip2-vision", "Siglip2VisionModel", _HIDDEN, num_patches=16, inputs=lambda model: {
        "pixel_values": torch.randn(2, 16, 192),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [2, 8]]),
    }),
    _vision("clip-vision", "CLIPVisionModelWithProjection"),
    _vision("beit", "BeitForImageClassification", use_relative_position_bias=True),
    _vision("data2vec-vision", "Data2VecVisionForImageClassification"),
    _vision("vitdet", "VitDetModel", _MAP, window_block_indices=[0], window_size=2,
            use_relative_position_embeddings=True, pretrain_image_size=32),
    _vision("sam-vision", "SamVisionModel", _MAP, output_channels=16, window_size=2,
            global_attn_indexes=[1], mlp_dim=48),
    _vision("hiera", "HieraForImageClassification", embed_dim=8, image_size=[32, 32],
            patch_size=[3, 3], patch_stride=[2, 2], patch_padding=[1, 1], depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2], masked_unit_size=[8, 8]),
    _vision("convnext", "ConvNextForImageClassification", num_stages=2, **_DEPTHS),
    _vision("convnextv2", "ConvNextV2ForImageClassification", num_stages=2, **_DEPTHS),
    _vision("focalnet", "FocalNetForImageClassification", embed_dim=8, depths=[1, 1],
            hidden_sizes=[8, 16], focal_levels=[2, 2], focal_windows=[3, 3], patch_size=4),
    _vision("poolformer", "PoolFormerForImageClassification", **_PYRAMID),
    _vision("segformer", "SegformerForSemanticSegmentation", _MAP, decoder_hidden_size=16,
            num_labels=5, **_PYRAMID),
    _vision("glpn", "GLPNForDepthEstimation", _mean, decoder_hidden_size=16, **_PYRAMID),
    _vision("pvt", "PvtForImageClassification", **_PYRAMID),
    _vision("pvtv2", "PvtV2ForImageClassification", **_PYRAMID),
    _vision("cvt", "CvtForImageClassification", embed_dim=[8, 16, 32], num_heads=[1, 2, 4],
            depth=[1, 2, 3]),
    _vision("levit", "LevitForImageClassification", image_size=64, patch_size=16, hidden_sizes=[16, 24, 32],
            num_attention_heads=[2, 3, 4], depths=[1, 1, 1], key_dim=[8, 8, 8]),
    _vision("mobilevit", "MobileViTForImageClassification", patch_size=2, hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32], image_size=64),
    _vision("mobilevitv2", "MobileViTV2ForImageClassification", patch_size=2, image_size=64,
            n_attn_blocks=[1, 1, 1], base_attn_unit_dims=[16, 24, 32], width_multiplier=0.25),
    _vision("swiftformer", "SwiftFormerForImageClassification", depths=[1, 1, 1, 1],
            embed_dims=[8, 16, 16, 32], image_size=64),
    _vision("mobilenet-v1", "MobileNetV1ForImageClassification", depth_multiplier=0.25),
    _vision("mobilenet-v2", "MobileNetV2ForImageClassification", depth_multiplier=0.1),
    _vision("efficientnet", "EfficientNetForImageClassification", width_coefficient=0.25,
            depth_coefficient=0.1, hidden_dim=320),
    _vision("resnet", "ResNetForImageClassification", embedding_size=8, **_DEPTHS),
    _vision("regnet", "RegNetForImageClassification", embedding_size=8, groups_width=8, **_DEPTHS),
    _vision("bit", "BitForImageClassification", embedding_size=8, num_groups=2, **_DEPTHS),
    _vision("hgnet-v2", "HGNetV2ForImageClassification", embedding_size=8, depths=[1, 1],
            hidden_sizes=[16, 32], stem_channels=[3, 8, 8], stage_in_channels=[8, 16],
            stage_mid_channels=[8, 8], stage_out_channels=[16, 32], stage_num_blocks=[1, 1],
            stage_downsample=[False, True], stage_downsample_strides=[2, 2],
            stage_light_block=[False, True], stage_kernel_size=[3, 5], stage_numb_of_layers=[2, 2]),
    _vision("textnet", "TextNetForImageClassification", stem_out_channels=8,
            hidden_sizes=[8, 8, 16, 16, 32], image_size=[32, 32],
            conv_layer_kernel_sizes=[[[3, 3]], [[3, 1]], [[1, 3]], [[3, 3]]],
            conv_layer_strides=[[2], [2], [2], [1]]),
    _vision("dpt", "DPTForDepthEstimation", _mean, num_hidden_layers=4,
            backbone_out_indices=[0, 1, 2, 3], **_NECK),
    _vision("depth-anything", "DepthAnythingForDepthEstimation", _mean, backbone_config=_DINO,
            reassemble_hidden_size=32, head_hidden_size=8, patch_size=8, **_NECK),
    _vision("upernet", "UperNetForSemanticSegmentation", _MAP, hidden_size=16, num_labels=5,
            auxiliary_channels=8, pool_scales=[1, 2], backbone_config={
                "model_type": "convnext", "num_stages": 4, "depths": [1, 1, 1, 1],
                "hidden_sizes": [8, 8, 16, 16],
                "out_features": ["stage1", "stage2", "stage3", "stage4"]}, image_size=64),
    _vision("yolos", "YolosForObjectDetection", _HIDDEN, image_size=[32, 32],
            num_detection_tokens=5, num_labels=5),
    _vision("detr", "DetrForObjectDetection", _HIDDEN, d_model=32, num_queries=5,
            num_labels=5, backbone_config=_RESNET),
    _vision("conditional-detr", "ConditionalDetrForObjectDetection", _HIDDEN, d_model=32,
            num_queries=5, num_labels=5, backbone_config=_RESNET),
    _vision("deformable-detr", "DeformableDetrForObjectDetection", _HIDDEN, d_model=32,
            num_queries=5, num_labels=5, num_feature_levels=2, backbone_config=_RESNET),
    _vision("rt-detr", "RTDetrForObjectDetection", _HIDDEN, d_model=32, num_queries=5, num_labels=5,
            encoder_hidden_dim=32, encoder_in_channels=[8, 16], feat_strides=[4, 8],
            decoder_in_channels=[32, 32], num_feature_levels=2, encode_proj_layers=[1],
            num_denoising=0, image_size=64, backbone_config={
                "model_type": "rt_detr_resnet", "embedding_size": 8, "hidden_sizes": [8, 16],
                "depths": [1, 1], "layer_type": "basic", "out_features": ["stage1", "stage2"]}),
    _vision("imagegpt", "ImageGPTForImageClassification", inputs=lambda model: {
        "input_ids": torch.randint(3, 64, (2, _LENGTH))}),
    _vision("timesformer", "TimesformerForVideoClassification", inputs=_video, **_FILM),
    _vision("videomae", "VideoMAEForVideoClassification", inputs=_video, **_FILM),
    _vision("vivit", "VivitForVideoClassification", inputs=_video, tubelet_size=[2, 8, 8], **_FILM),
    _vision("vjepa2", "VJEPA2Model", _HIDDEN, crop_size=32, frames_per_clip=4, pred_hidden_size=16,
            pred_num_attention_heads=2, pred_num_hidden_layers=1,
            inputs=_random(pixel_values_videos=(4, 3, 32, 32))),
]  # fmt: skip

_SSM: dict[str, Any] = {
    "state_size": 4,
    "head_dim": 8,
    "num_heads": 8,
    "n_groups": 2,
    "chunk_size": 4,
}
_HYBRID: dict[str, Any] = {
    "mamba_d_state": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_chunk_size": 4,
}
_LATENT: dict[str, Any] = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
           "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4, "first_k_dense_replace": 1,
           "n_shared_experts": 1}  # fmt: skip
_LINEAR: dict[str, Any] = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
           "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
_EXPERTS: dict[str, Any] = {"experts_implementation": "batched_mm"}  # the default has no kernel for float64

_ENCODERS: dict[str, Any] = {
    "bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert",
    "albert": "Albert", "electra": "Electra", "mpnet": "MPNet", "deberta": "Deberta",
    "deberta-v2": "DebertaV2", "modernbert": "ModernBert", "megatron-bert": "MegatronBert",
    "rembert": "RemBert", "roformer": "RoFormer", "ernie": "Ernie", "eurobert": "EuroBert",
    "layoutlm": "LayoutLM", "esm": "Esm",
}  # fmt: skip
_DECODERS: dict[str, Any] = {
    "gpt2": "GPT2", "gpt-neox": "GPTNeoX", "gpt-bigcode": "GPTBigCode", "opt": "OPT",
    "bloom": "Bloom", "biogpt": "BioGpt", "llama": "Llama", "mistral": "Mistral",
    "ministral3": "Ministral3", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma": "Gemma",
    "gemma2": "Gemma2", "gemma3": "Gemma3", "phi": "Phi", "phi3": "Phi3", "olmo": "Olmo",
    "olmo2": "Olmo2", "olmo3": "Olmo3", "falcon": "Falcon", "stablelm": "StableLm",
    "cohere": "Cohere", "cohere2": "Cohere2", "granite": "Granite", "smollm3": "SmolLM3",
    "starcoder2": "Starcoder2", "glm": "Glm", "glm4": "Glm4", "nemotron": "Nemotron",
    "persimmon": "Persimmon", "helium": "Helium", "exaone4": "Exaone4", "ernie4.5": "Ernie4_5",
    "seed-oss": "SeedOss", "apertus": "Apertus", "arcee": "Arcee", "diffllama": "DiffLlama",
    "nanochat": "NanoChat", "hunyuan": "HunYuanDenseV1", "bitnet": "BitNet",
}  # fmt: skip
_MOE: dict[str, Any] = {
    "mixtral": "Mixtral", "qwen2-moe": "Qwen2Moe", "qwen3-moe": "Qwen3Moe", "olmoe": "Olmoe",
    "gpt-oss": "GptOss", "granite-moe": "GraniteMoe", "phimoe": "Phimoe",
}  # fmt: skip

_LANGUAGE = [
    *(_language(n, f"{c}ForMaskedLM") for n, c in _ENCODERS.items()),
    _language("distilbert", "DistilBertForMaskedLM", hidden_dim=48),
    _language("squeezebert", "SqueezeBertForMaskedLM", embedding_size=32),
    _language("mobilebert", "MobileBertForMaskedLM", intra_bottleneck_size=16),
    _language("convbert", "ConvBertForMaskedLM", conv_kernel_size=3),
    _language("longformer", "LongformerForMaskedLM", attention_window=4),
    _language("bigbird", "BigBirdForMaskedLM", attention_type="original_full"),
    _language("funnel", "FunnelForMaskedLM", block_sizes=[1, 1]),
    _language("fnet", "FNetForMaskedLM", _text),
    _language("nystromformer", "NystromformerForMaskedLM", _masked_text, num_landmarks=4,
              segment_means_seq_len=8, conv_kernel_size=3),
    _language("xlnet", "XLNetLMHeadModel"),
    _language("xlm", "XLMWithLMHeadModel"),
    *(_language(n, f"{c}{'LMHeadModel' if c == 'GPT2' else 'ForCausalLM'}")
      for n, c in _DECODERS.items()),
    _language("openai-gpt", "OpenAIGPTLMHeadModel"),
    _language("ctrl", "CTRLLMHeadModel", _ids, dff=48),
    _language("gpt-neo", "GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]],
              window_size=4),
    _language("gptj", "GPTJForCausalLM", rotary_dim=4),
    _language("codegen", "CodeGenForCausalLM", rotary_dim=4),
    _language("mpt", "MptForCausalLM", max_seq_len=64),
    *(_language(n, f"{c}ForCausalLM", **_EXPERTS) for n, c in _MOE.items()),
    _language("deepseek-v2", "DeepseekV2ForCausalLM", **_LATENT, **_EXPERTS),
    _language("deepseek-v3", "DeepseekV3ForCausalLM", n_group=2, topk_group=1, **_LATENT, **_EXPERTS),
    _language("qwen3-next", "Qwen3NextForCausalLM", **_LINEAR, **_EXPERTS),
    _language("qwen3.5", "Qwen3_5ForCausalLM", **_LINEAR),
    _language("mamba", "MambaForCausalLM", state_size=4),
    _language("mamba2", "Mamba2ForCausalLM", **_SSM),
    _language("falcon-mamba", "FalconMambaForCausalLM", state_size=4),
    _language("falcon-h1", "FalconH1ForCausalLM", mamba_d_ssm=64, **_HYBRID),
    _language("bamba", "BambaForCausalLM", attn_layer_indices=[1], **_HYBRID),
    _language("jamba", "JambaForCausalLM", attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4,
              mamba_dt_rank=4, use_mamba_kernels=False, **_EXPERTS),
    _language("lfm2", "Lfm2ForCausalLM", layer_types=["conv", "full_attention"],
              block_multiple_of=8),
    _language("zamba2", "Zamba2ForCausalLM", layers_block_type=["mamba", "hybrid"], mamba_d_state=4,
              n_mamba_heads=8, chunk_size=4, use_mamba_kernels=False),
    _language("minimax", "MiniMaxForCausalLM", block_size=4, **_EXPERTS,
              layer_types=["linear_attention", "full_attention"]),
    _language("llama4", "Llama4ForCausalLM", intermediate_size_mlp=48, moe_layers=[1],
              attention_chunk_size=4),
    _language("gemma3n", "Gemma3nForCausalLM", vocab_size_per_layer_input=64,
              hidden_size_per_layer_input=8, num_kv_shared_layers=0, laurel_rank=8,
              inputs=_ids),
    _language("rwkv", "RwkvForCausalLM", _text, rescale_every=0),
    _language("recurrent-gemma", "RecurrentGemmaForCausalLM", lru_width=32,
              block_types=["recurrent", "attention"]),
    _language("xlstm", "xLSTMForCausalLM", _text, chunk_size=4),
    _language("t5", "T5ForConditionalGeneration", _two_texts),
    _language("t5-gated", "T5ForConditionalGeneration", _two_texts, feed_forward_proj="gated-gelu"),
    _language("mt5", "MT5ForConditionalGeneration", _two_texts),
    _language("umt5", "UMT5ForConditionalGeneration", _two_texts),
    _language("longt5", "LongT5ForConditionalGeneration", _two_texts, local_radius=3),
    _language("switch-transformers", "SwitchTransformersForConditionalGeneration", _two_texts),
    _language("bart", "BartForConditionalGeneration", _two_texts),
    _language("mbart", "MBartForConditionalGeneration", _two_texts),
    _language("pegasus", "PegasusForConditionalGeneration", _two_texts),
    _language("marian", "MarianMTModel", _two_texts),
    _language("m2m100", "M2M100ForConditionalGeneration", _two_texts),
    _language("led", "LEDForConditionalGeneration", _two_texts, attention_window=4,
              max_encoder_position_embeddings=64, max_decoder_position_embeddings=64),
    _language("prophetnet", "ProphetNetForConditionalGeneration", _both(_text, _answer),
              num_encoder_layers=2, num_encoder_attention_heads=4, num_decoder_attention_heads=4),
    _language("blenderbot", "BlenderbotForConditionalGeneration", _two_texts),
]  # fmt: skip


def _first_pair(output: Any) -> Tensor:
    """How well each image matches the first text."""
    return output.logits_per_image[:, 0]


def _image_then_text(model: Any) -> dict[str, Tensor]:
    """Token ids: 16 image tokens (id 63), then 8 text tokens."""
    ids = torch.randint(3, 60, (2, 16 + _LENGTH))
    ids[:, :16] = 63
    return {"input_ids": ids}


def _prefix(model: Any) -> dict[str, Tensor]:
    """0 for tokens of the prefix, which all attend to each other; 1 for those after it."""
    return {"token_type_ids": torch.tensor([[0] * 16 + [1] * _LENGTH] * 2)}


_PAIR = _both(_pixels, _ids)
_IN_TEXT = _both(_pixels, _image_then_text)
_LLAMA: dict[str, Any] = {"model_type": "llama"}

_MULTIMODAL = [
    _multimodal("clip-text", "CLIPTextModelWithProjection", _ids, 3),
    _multimodal("clip", "CLIPModel", _PAIR, _first_pair),
    _multimodal("metaclip2", "MetaClip2Model", _PAIR, _first_pair),
    _multimodal("siglip-text", "SiglipTextModel", _ids, _HIDDEN),
    _multimodal("siglip", "SiglipModel", _PAIR, _first_pair),
    _multimodal("altclip", "AltCLIPModel", _PAIR, _first_pair,
                text_config={"project_dim": 16}),
    _multimodal("chinese-clip", "ChineseCLIPModel", _PAIR, _first_pair),
    _multimodal("groupvit", "GroupViTModel", _PAIR, _first_pair, vision_config={
        "depths": [1, 1, 1], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 2]}),
    _multimodal("owlv2", "Owlv2Model", _PAIR, _first_pair),
    _multimodal("blip", "BlipModel", _PAIR, _first_pair, text_config={"encoder_hidden_size": 32}),
    _multimodal("blip-captioning", "BlipForConditionalGeneration", _PAIR, _TOKEN,
                text_config={"encoder_hidden_size": 32}),
    _multimodal("git", "GitForCausalLM", _PAIR, _TOKEN),
    _multimodal("layoutlmv3", "LayoutLMv3Model", _both(_pixels, _ids), _HIDDEN, input_size=32,
                coordinate_size=6, shape_size=4, max_2d_position_embeddings=64),
    _multimodal("vilt", "ViltForQuestionAnswering", _PAIR, 3, num_labels=5),
    _multimodal("llava", "LlavaForConditionalGeneration", _IN_TEXT, (-1, 3), text_config=_LLAMA,
                vision_config={"model_type": "clip_vision_model"}, image_token_index=63),
    _multimodal("paligemma", "PaliGemmaForConditionalGeneration",
                _both(_IN_TEXT, _prefix), (-1, 3),
                text_config={"model_type": "gemma"}, projection_dim=32, image_token_index=63,
                vision_config={"model_type": "siglip_vision_model"}),
]  # fmt: skip

_WAVES: dict[str, Any] = {
    "conv_dim": [16, 16], "conv_kernel": [8, 4], "conv_stride": [4, 4],
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
_MEL = _random(input_features=(16, 32))

_AUDIO = [
    *(_audio(n, f"{c}ForCTC", _wave(400), **_WAVES) for n, c in {
        "wav2vec2": "Wav2Vec2", "hubert": "Hubert", "wavlm": "WavLM", "sew": "SEW",
        "unispeech": "UniSpeech", "unispeech-sat": "UniSpeechSat",
        "data2vec-audio": "Data2VecAudio", "wav2vec2-conformer": "Wav2Vec2Conformer",
    }.items()),
    _audio("wav2vec2-layer-norm", "Wav2Vec2ForCTC", _wave(400), do_stable_layer_norm=True,
           feat_extract_norm="layer", **_WAVES),
    _audio("sew-d", "SEWDForCTC", _wave(400), max_position_embeddings=64, position_buckets=8,
           **_WAVES),
    _audio("wav2vec2-bert", "Wav2Vec2BertForCTC", _random(input_features=(16, 20)),
           feature_projection_input_dim=20, conv_depthwise_kernel_size=3),
    _audio("whisper-encoder", "WhisperForAudioClassification", _MEL, 3, num_mel_bins=16,
           max_source_positions=16, classifier_proj_size=16, num_labels=5),
    _audio("whisper", "WhisperForConditionalGeneration",
           _both(_MEL, _answer), _TOKEN, num_mel_bins=16, max_source_positions=16),
    _audio("speech2text", "Speech2TextForConditionalGeneration",
           _both(_random(input_features=(32, 16)),
                 lambda model: {"decoder_input_ids": torch.randint(3, 64, (2, _LENGTH))}), _TOKEN,
           input_feat_per_channel=16, conv_channels=16, max_source_positions=64),
    _audio("moonshine", "MoonshineForConditionalGeneration",
           _both(_wave(1600), _answer), _TOKEN,
           encoder_num_hidden_layers=2, decoder_num_hidden_layers=2, encoder_num_attention_heads=4,
           decoder_num_attention_heads=4),
    _audio("ast", "ASTForAudioClassification", _random(input_values=(32, 16)), 3, max_length=32,
           num_mel_bins=16, time_stride=4, frequency_stride=4, num_labels=5),
    _audio("parakeet", "ParakeetForCTC", _random(input_features=(32, 16)), encoder_config={
        "num_mel_bins": 16, "subsampling_conv_channels": 8, "conv_kernel_size": 3}),
]  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {a.name: a for a in (*_VISION, *_LANGUAGE, *_MULTIMODAL, *_AUDIO)}


def names() -> dict[str, str]:
    """Every architecture, with its family."""
    need("transformers", "coverage")
    return {n: a.family for n, a in ARCHITECTURES.items()}


def build(name: str) -> Subject:
    """An architecture in eval mode, with random weights."""
    found = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = found.build().eval()
    return Subject(name, model, found.inputs(model), found.target)
