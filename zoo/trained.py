"""The zoo of small trained models: one or more of each family, on the scenes of ``zoo/scenes.py``.

``python tools/train_zoo.py`` trains them, in minutes a model on one core. They are timm's and transformers'
own classes in small sizes, configured as the checkpoints that LibraGrad (CVPR 2025) is measured on. Models
of pictures take normalised float32 (B, 3, 96, 96) and return logits (B, 10); ``llama`` takes token ids
(B, T) of ``demo/sentences.py`` and returns logits (B, 4). ``tris_mlp`` and ``tris_mixer`` take tetrominoes
of ``zoo/tris.py``, (B, 3, 64, 64), and return logits (B, 2): ``xor`` on ``correlated``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from libragrad_fx.demo import sentences, sources
from libragrad_fx.demo.data import ASSETS
from libragrad_fx.errors import InputError
from zoo.scenes import CLASSES, SIZE

KEPT = (Path(__file__).parent / "kept", Path(str(ASSETS)))
Data = Literal["scenes", "shortcut", "sentences", "tris"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model and how it is trained.

    family:  the family's name in tables
    make:    the model with random weights
    samples: how many samples it sees in training
    rate:    the peak learning rate
    data:    what it is trained on
    seeds:   the seeds that ``tools/train_zoo.py`` trains
    patches: FlexiViT: the patch sizes to draw from in training, in pixels; () for a fixed size
    """

    family: str
    make: Callable[[], nn.Module]
    samples: int = 96_000
    rate: float = 3e-3
    data: Data = "scenes"
    seeds: tuple[int, ...] = (0,)
    patches: tuple[int, ...] = ()


def load(name: str, seed: int = 0) -> nn.Module:
    """A trained model in eval mode, float32.

    Raises:
        InputError: no such model.
        FileNotFoundError: it was not trained here; with the command.
    """
    from safetensors.torch import load_model

    model = recipe(name).make()
    load_model(model, require(name, seed).as_posix())
    return model.eval()


def about(name: str, seed: int = 0) -> dict[str, Any]:
    """How a model was trained: steps, versions, seconds, and ``accuracy`` in [0, 1] by set.

    Raises:
        InputError: no such model.
        FileNotFoundError: it was not trained here; with the command.
    """
    return json.loads(require(name, seed).with_suffix(".json").read_text())


def recipe(name: str) -> Recipe:
    if name not in MODELS:
        raise InputError(f"no trained model {name!r}: choose from {', '.join(MODELS)}")
    return MODELS[name]


def folder() -> Path:
    """Where weights lie that were trained here."""
    return sources.folder() / "zoo"


def weights(name: str, seed: int = 0) -> Path:
    """The file of the weights: in ``KEPT`` where they came with the checkout, else in ``folder()``. The
    same name with ``.json`` says how they were trained."""
    file = f"{name}-{seed}.safetensors"
    return next((kept for place in KEPT if (kept := place / file).is_file()), folder() / file)


def require(name: str, seed: int = 0) -> Path:
    """The file of the weights.

    Raises:
        InputError: no such model.
        FileNotFoundError: it was not trained here; with the command.
    """
    recipe(name)
    if not (file := weights(name, seed)).is_file():
        raise FileNotFoundError(f"{name} with seed {seed} is not trained here: {command(name, seed)}")
    return file


def command(name: str, seed: int) -> str:
    return f"python tools/train_zoo.py --only {name} --seed {seed}"


# --- what no library has as one model


class Captioned(nn.Module):
    """CLIP as a classifier: normalised pictures (B, 3, 96, 96) -> logits (B, 10), one a class's caption.

    captions: int64 (10, ``LENGTH``), "a photo of a ..." by class
    """

    captions: torch.Tensor

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("captions", captions(TEMPLATES[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.clip(pixel_values=x, input_ids=self.captions).logits_per_image


TEMPLATES = ("a photo of a {}", "a {}", "the {}", "there is a {}", "a picture of the {}", "a large {}")
_SAID = sorted({word for t in TEMPLATES for word in t.replace("{}", "").split()})
WORDS = ("<pad>", "<start>", *_SAID, *CLASSES, "<end>")
LENGTH = max(len(t.split()) for t in TEMPLATES) + 2


def captions(template: str) -> torch.Tensor:
    """int64 (10, ``LENGTH``): the template filled with each class's name, between <start> and <end>."""
    rows = [["<start>", *template.format(c).split(), "<end>"] for c in CLASSES]
    return torch.tensor([[WORDS.index(w) for w in r] + [0] * (LENGTH - len(r)) for r in rows])


# --- the models


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=len(CLASSES), **options)

    return make


def _tokens(name: str, width: int = 64, depth: int = 6, **options: Any) -> Callable[[], nn.Module]:
    """A transformer of 64 patches, heads 32 wide."""
    heads = max(2, width // 32)
    sizes = {"img_size": SIZE, "patch_size": 12, "embed_dim": width, "depth": depth, "num_heads": heads}
    return _timm(name, **(sizes | options))


def _waves(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The model, its learned positions begun as sines and cosines: small ones learn sooner so (Beyer et al.
    2022, "Better plain ViT baselines")."""

    def made() -> nn.Module:
        from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed

        model: Any = make()
        clip = getattr(model, "clip", None)
        table = (
            model.pos_embed[0] if clip is None else clip.vision_model.embeddings.position_embedding.weight
        )
        places = table[-64:]  # before them, the class token's
        with torch.no_grad():
            places.copy_(build_sincos2d_pos_embed([8, 8], dim=places.shape[1]) / 2)
        return model

    return made


def _mixer(**options: Any) -> nn.Module:
    """As gmixer_24_224, with gated (SwiGLU) MLPs; ``options`` make another of timm's mixers of it."""
    from timm.layers import GluMlp
    from timm.models.mlp_mixer import MlpMixer

    gated = {"mlp_ratio": (1.0, 4.0), "mlp_layer": GluMlp, "act_layer": nn.SiLU}
    sizes: dict[str, Any] = {"img_size": SIZE, "patch_size": 12, "embed_dim": 64, "num_blocks": 8}
    return MlpMixer(num_classes=len(CLASSES), **sizes, **(options or gated))


def _tris_mixer() -> nn.Module:
    """``_mixer``, smaller."""
    from timm.layers import GluMlp
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(
        img_size=64, patch_size=8, embed_dim=32, num_blocks=3, num_classes=2, mlp_ratio=(1.0, 4.0),
        mlp_layer=GluMlp, act_layer=nn.SiLU,
    )  # fmt: skip


def _tris_mlp() -> nn.Module:
    layers = nn.Linear(3 * 64 * 64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2)
    return nn.Sequential(nn.Flatten(), *layers)


def _gmlp() -> nn.Module:
    """As gmlp_s16_224."""
    from timm.layers import GatedMlp
    from timm.models.mlp_mixer import SpatialGatingBlock

    return _mixer(mlp_ratio=4, block_layer=SpatialGatingBlock, mlp_layer=GatedMlp)


def _poolformer() -> nn.Module:
    """As poolformer_s12."""
    from timm.layers import GroupNorm1
    from timm.models.metaformer import MetaFormer

    options: dict[str, Any] = {
        "downsample_norm": None, "mlp_act": nn.GELU, "mlp_bias": True, "norm_layers": GroupNorm1,
        "layer_scale_init_values": 0.1, "res_scale_init_values": None, "use_mlp_head": False,
    }  # fmt: skip
    return MetaFormer(num_classes=len(CLASSES), **options, **_STAGES)


def _clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    text = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
        "vocab_size": len(WORDS), "max_position_embeddings": LENGTH, "bos_token_id": 1, "pad_token_id": 0,
        "eos_token_id": len(WORDS) - 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 256,
        "image_size": SIZE, "patch_size": 12,
    }  # fmt: skip
    options: dict[str, Any] = {"text_config": text, "vision_config": vision, "projection_dim": 64}
    return Captioned(CLIPModel(CLIPConfig(**options)))


_STAGES: Mapping[str, Any] = {"depths": (1, 1, 4), "dims": (24, 48, 96)}
_CONVNEXT = _timm(
    "convnext_atto", patch_size=8, depths=(2, 3, 1, 1), dims=(48, 96, 96, 96), output_stride=16,
    ls_init_value=0.1,
)  # fmt: skip
_SWIN = _timm(
    "swin_tiny_patch4_window7_224", img_size=SIZE, patch_size=6, window_size=4, embed_dim=48, depths=(2, 4),
    num_heads=(2, 4), drop_path_rate=0.0,
)  # fmt: skip
_VIT = _waves(_tokens("vit_tiny_patch16_224"))
_EVA02 = _tokens("eva02_tiny_patch14_224", ref_feat_shape=(8, 8))
_BEITV2 = _tokens("beitv2_base_patch16_224", init_values=0.1)
_DEIT3 = _waves(_tokens("deit3_small_patch16_224", init_values=0.1))
_FLEXIVIT = _waves(_tokens("flexivit_small", dynamic_img_size=True))
_SIGLIP = _waves(_tokens("vit_so400m_patch14_siglip_gap_378", mlp_ratio=4))
_SIGLIP_MAP = _waves(_tokens("vit_so400m_patch14_siglip_378", mlp_ratio=4))
_THREE = (0, 1, 2)

MODELS: Mapping[str, Recipe] = {
    "vit_base": Recipe("ViT", _VIT, seeds=_THREE),
    "eva02": Recipe("EVA-02", _EVA02, seeds=_THREE),
    "mixer": Recipe("MLP-Mixer", _mixer, seeds=_THREE),
    "beitv2": Recipe("BEiTv2", _BEITV2),
    "siglip": Recipe("SigLIP", _SIGLIP),
    "deit3": Recipe("DeiT3", _DEIT3),
    "flexivit": Recipe("FlexiViT", _FLEXIVIT, patches=(8, 12, 16, 24)),
    "clip": Recipe("CLIP", _waves(_clip)),
    "convnext": Recipe("ConvNeXt", _CONVNEXT),
    "swin": Recipe("Swin", _SWIN),
    "mambaout": Recipe("MambaOut", _timm("mambaout_femto", **_STAGES)),
    "gmlp": Recipe("gMLP", _gmlp),
    "poolformer": Recipe("PoolFormer", _poolformer),
    "vit_tiny": Recipe("ViT", _waves(_tokens("vit_tiny_patch16_224", 48, 4))),
    "vit_small": Recipe("ViT", _waves(_tokens("vit_tiny_patch16_224", 64, 4))),
    "vit_large": Recipe("ViT", _waves(_tokens("vit_tiny_patch16_224", 96, 8))),
    "vit_shortcut": Recipe("ViT", _VIT, samples=64_000, data="shortcut"),
    "eva02_shortcut": Recipe("EVA-02", _EVA02, samples=64_000, data="shortcut"),
    "mixer_shortcut": Recipe("MLP-Mixer", _mixer, samples=64_000, data="shortcut"),
    "siglip_map": Recipe("SigLIP", _SIGLIP_MAP),
    "llama": Recipe("Llama", sentences.untrained, samples=128_000, rate=1e-3, data="sentences"),
    "tris_mlp": Recipe("MLP", _tris_mlp, samples=16_000, rate=1e-3, data="tris"),
    "tris_mixer": Recipe("MLP-Mixer", _tris_mixer, samples=16_000, data="tris"),
}
"""By name. Their order is that of training: a family each, then sizes and shortcuts."""
