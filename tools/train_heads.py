"""Trains linear heads on frozen features: DINOv2's of the scenes of ``zoo/scenes.py``, MiniLM's of the
sentences of ``zoo/topics.py``.

    python tools/train_heads.py scenes crowded shortcut topics

What is trained already is left alone; features are kept, so that a second try is quick.
"""

from __future__ import annotations

import argparse
import json
from typing import cast

import numpy as np
import sklearn
import timm
import torch
import transformers

from libragrad_fx.demo import sources
from libragrad_fx.evaluate.data import Data
from zoo import heads, sets
from zoo.scenes import KINDS, Kind, Split


def accuracy(head: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float((head(x).argmax(1) == labels).float().mean())


def of(name: str, split: Split, count: int) -> Data:
    """The set of a head: a kind of scenes, or the sentences about topics."""
    return sets.topics(split, count) if name in heads.TEXTS else sets.scenes(split, count, cast(Kind, name))


def train(kind: str, count: int, held: int) -> None:
    """A head of that name, trained on ``count`` samples, measured on ``held`` of val and of test."""
    backbone = heads.backbone_of(kind)
    model = heads.trained(of(kind, "train", count), backbone)
    sizes: dict[Split, int] = {"train": count, "val": held, "test": held}
    known = {split: heads.features(of(kind, split, n), backbone) for split, n in sizes.items()}
    right = {split: accuracy(model.head, *found) for split, found in known.items()}
    said = {
        "name": kind, "backbone": sources.SOURCES[backbone].about, "train": count, "held": held,
        "accuracy": right,
        "versions": {m.__name__: m.__version__ for m in (torch, timm, transformers, sklearn, np)},
        "command": f"python tools/train_heads.py {kind} --count {count} --held {held}",
    }  # fmt: skip
    file = heads.weights(kind)
    file.with_suffix(".json").write_text(json.dumps(said, indent=2) + "\n", "utf-8")
    heads.write({n: t.detach().contiguous() for n, t in model.head.state_dict().items()}, file)
    print(f"{kind}: " + ", ".join(f"{s} {v:.1%}" for s, v in right.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains linear heads on frozen features.")
    names = (*KINDS, *heads.TEXTS)
    parser.add_argument("kinds", nargs="+", choices=names, metavar="KIND", help=", ".join(names))
    parser.add_argument("--count", type=int, default=4000, help="samples to train on")
    parser.add_argument(
        "--held", type=int, default=500, help="samples to measure on, of val and of test each"
    )
    given = parser.parse_args()
    for kind in dict.fromkeys(given.kinds):
        if heads.weights(kind).is_file():
            print(f"{kind}: is there: {heads.weights(kind)}")
        else:
            train(kind, given.count, given.held)


if __name__ == "__main__":
    main()
