"""Train the demo's two small models from scratch, in minutes on a CPU.

    python tools/train_demo.py --model vit -o libragrad_fx/assets
    python tools/train_demo.py --model mixer -o libragrad_fx/assets

Every epoch is made of scenes that no earlier epoch showed.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm

from libragrad_fx.demo.data import MODELS, SIZE, build_model, normalise, scenes

# 36 patches: few tokens keep an epoch short on a CPU
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": (
        "VisionTransformer",
        {
            "img_size": SIZE,
            "patch_size": 8,
            "embed_dim": 96,
            "depth": 4,
            "num_heads": 3,
            "num_classes": 10,
        },
    ),
    "mixer": (
        "MlpMixer",
        {"img_size": SIZE, "patch_size": 8, "embed_dim": 96, "num_blocks": 4, "num_classes": 10},
    ),
}
EPOCHS = {"vit": 32, "mixer": 14}
EPOCH_SCENES = 8192
BATCH = 64
WARM_UP = 200  # steps
TEST_SCENES, TEST_SEED = 2000, 0
MAX_BYTES = 2_000_000


def train(model: torch.nn.Module, epochs: int, seed: int, rate: float) -> None:
    """AdamW, a linear warm-up, a cosine to zero; float32 weights, bfloat16 products. In place."""
    steps = epochs * (EPOCH_SCENES // BATCH)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )
    model.train()
    with tqdm(total=steps, unit="step", mininterval=5) as bar:
        for epoch in range(epochs):
            # apart from the seeds of other runs, as long as they are fewer than a million
            data = scenes(EPOCH_SCENES, "train", seed + 1_000_000 * (epoch + 1))
            right = 0
            for images, labels in zip(data.images.split(BATCH), data.labels.split(BATCH), strict=True):
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(normalise(images)).float()
                loss = F.cross_entropy(logits, labels, label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                right += int((logits.argmax(1) == labels).sum())
                bar.update()
            bar.write(f"epoch {epoch + 1}: train accuracy {right / EPOCH_SCENES:.1%}")


@torch.no_grad()
def test_accuracy(model: torch.nn.Module) -> float:
    """Top-1 accuracy in [0, 1] on unseen digits over unseen parts of the photographs."""
    model.eval()
    data = scenes(TEST_SCENES, "test", TEST_SEED)
    logits = torch.cat([model(normalise(images)) for images in data.images.split(256)])
    return (logits.argmax(1) == data.labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--epochs", type=int, help=f"of {EPOCH_SCENES} scenes each")
    parser.add_argument("--rate", type=float, default=2e-3, help="the peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more than one gains little")
    parser.add_argument("-o", "--output", type=Path, default=Path("out"), help="folder for the weights")
    arguments = parser.parse_args()
    name, seed, rate = arguments.model, arguments.seed, arguments.rate
    epochs = arguments.epochs or EPOCHS[name]

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(seed)
    # on a CPU the backward of the fused attention is slow in bfloat16: twice the time a step
    timm.layers.set_fused_attn(False)
    architecture, kwargs = ARCHITECTURES[name]
    model = build_model(architecture, kwargs)
    train(model, epochs, seed, rate)
    accuracy = test_accuracy(model)
    print(f"{name}: test accuracy {accuracy:.2%} on {TEST_SCENES} scenes")

    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"{name}.safetensors"
    about = {
        "architecture": architecture,
        "kwargs": json.dumps(kwargs),
        "test_accuracy": f"{accuracy:.4f}",
        "test_scenes": str(TEST_SCENES),
        "test_seed": str(TEST_SEED),
        "seed": str(seed),
        "versions": json.dumps({"torch": torch.__version__, "timm": timm.__version__}),
        "command": f"python tools/train_demo.py --model {name} --epochs {epochs}"
        f" --rate {rate} --seed {seed}",
    }
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path, about)
    size = path.stat().st_size
    print(f"{path}: {size:,} bytes")
    if size > MAX_BYTES:
        raise SystemExit(f"{path} is larger than the {MAX_BYTES:,} bytes the package allows")


if __name__ == "__main__":
    main()
