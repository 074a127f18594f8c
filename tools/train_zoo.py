"""Trains the zoo of ``zoo/trained.py`` from scratch, in minutes a model on one core.

    python tools/train_zoo.py                          all of it, one model after the other
    python tools/train_zoo.py --only 'vit_*' --seed 0

A killed run goes on where its last checkpoint was, and what is trained is skipped. To train on several
cores, start one process for each with other names in ``--only``.

Small transformers learn slowly from labels alone. So each model of pictures is taught by the exact masks
too: a linear layer on its last tokens says which classes each token's patch shows (token labelling, Jiang
et al. 2021). That layer is thrown away after training.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import timm
import torch
import transformers
from safetensors.torch import save_model
from timm.layers.patch_embed import resample_patch_embed
from timm.optim.muon import zeropower_via_newtonschulz
from torch import nn
from torch.nn import functional as F

from libragrad_fx.demo import sentences
from zoo import scenes, trained, tris
from zoo.scenes import CLASSES, Kind, Split

DRAWN = {"train": 98_304, "val": 2_000, "test": 4_000}  # scenes of a split
BATCH = 32
WARM_UP = 200  # steps
DECAY = 0.05
MOMENTUM, QUINTIC = 0.95, (3.4445, -4.7750, 2.0315)  # of Muon
LOGITS = 16  # a linear layer of no more outputs gives logits
SMOOTHING = 0.05
TOKENS = 1.0  # weight of the tokens' loss
GRID = 24  # cells along a side on which the classes of the masks are kept
SAVE_EVERY = 60  # seconds


class Drawn(NamedTuple):
    """Scenes of a split. pictures: uint8 (N, 96, 96, 3). maps: uint8 (N, 24, 24), the class at each cell's
    middle, 10 for none. labels: uint8 (N,)."""

    pictures: np.ndarray
    maps: np.ndarray
    labels: np.ndarray


def drawn(kind: Kind, split: Split, seed: int = 0) -> Drawn:
    """The scenes, from disk if they were drawn before. A file appears in its place when it is complete."""
    n = DRAWN[split]
    place = trained.folder() / "drawn"
    files = [place / f"{kind}-{split}-{seed}-{n}-{part}.npy" for part in Drawn._fields]
    if not all(f.is_file() for f in files):
        place.mkdir(parents=True, exist_ok=True)
        shapes = ((n, scenes.SIZE, scenes.SIZE, 3), (n, GRID, GRID), (n,))
        parts = [f.with_suffix(f".part{os.getpid()}") for f in files]
        arrays = [
            np.lib.format.open_memmap(p, "w+", np.uint8, s) for p, s in zip(parts, shapes, strict=True)
        ]
        for i in range(n):
            one = scenes.scene(split, i, kind, seed)
            for array, value in zip(arrays, (one.picture, class_map(one), one.label), strict=True):
                array[i] = value
        for array, part, file in zip(arrays, parts, files, strict=True):
            array.flush()
            part.replace(file)
    return Drawn(*(np.load(f, mmap_mode="r") for f in files))


def class_map(one: scenes.Scene) -> np.ndarray:
    """uint8 (24, 24): the class that shows at the middle of each cell, 10 where none does."""
    found = np.full((scenes.SIZE, scenes.SIZE), len(CLASSES), np.uint8)
    for c, mask in one.masks.items():
        found[mask] = c
    step = scenes.SIZE // GRID
    return found[step // 2 :: step, step // 2 :: step]


# --- what is trained


class Taught(nn.Module):
    """A model of pictures and the layer that tells the classes of its last tokens.

    forward: (B, 3, 96, 96) -> logits (B, 10), and the tokens' logits (B, 11, h, w)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.classes = nn.LazyLinear(len(CLASSES) + 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        model = cast(Any, self.model)
        if isinstance(model, trained.Captioned):
            template = trained.TEMPLATES[int(torch.randint(len(trained.TEMPLATES), ()))]
            out = model.clip(pixel_values=x, input_ids=trained.captions(template))
            logits, features = out.logits_per_image, out.vision_model_output.last_hidden_state
        else:
            features = model.forward_features(x)
            logits = model.forward_head(features)
        return logits, self.classes(grid(features)).movedim(-1, 1)


def grid(features: torch.Tensor) -> torch.Tensor:
    """Features by place (B, h, w, C), of tokens (B, [1 +] h w, C) or of maps, channels first or last."""
    if features.ndim == 4:
        return features if features.shape[1] == features.shape[2] else features.movedim(1, -1)
    side = math.isqrt(features.shape[1])
    return features[:, -side * side :].unflatten(1, (side, side))


def token_loss(logits: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Cross entropy of tokens' logits (B, 11, h, w) with the classes' parts of each token's patch."""
    parts = F.one_hot(maps.long(), len(CLASSES) + 1).movedim(-1, 1).float()
    return F.cross_entropy(logits, F.adaptive_avg_pool2d(parts, (logits.shape[2], logits.shape[3])))


def caption_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """CLIP's other half: of each caption (10 columns), the pictures (B rows) that it fits, all alike."""
    fits = F.one_hot(labels, len(CLASSES)).bool()
    right = logits.masked_fill(~fits, -math.inf).logsumexp(0)[fits.any(0)]
    return (logits.logsumexp(0)[fits.any(0)] - right).mean()


def answers(taught: Taught, x: torch.Tensor, patches: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``taught`` returns; FlexiViT at a random patch size (Beyer et al. 2023, §3)."""
    if not patches:
        return taught(x)
    proj = cast(Any, taught.model).patch_embed.proj
    side, size = proj.stride, patches[int(torch.randint(len(patches), ()))]
    resized = {"model.patch_embed.proj.weight": resample_patch_embed(proj.weight, [size, size])}
    proj.stride = (size, size)
    try:
        return torch.func.functional_call(taught, resized, (x,))
    finally:
        proj.stride = side


def taught_loss(taught: Taught, recipe: trained.Recipe, batch: Drawn) -> torch.Tensor:
    x, maps = scenes.normalised(batch.pictures), torch.from_numpy(batch.maps)
    labels = torch.from_numpy(batch.labels).long()
    logits, tokens = answers(taught, x, recipe.patches)
    loss = F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
    if isinstance(taught.model, trained.Captioned):
        loss = (loss + caption_loss(logits, labels)) / 2
    return loss + TOKENS * token_loss(tokens, maps)


def batches(data: Drawn, seed: int, steps: int, first: int) -> Iterator[Drawn]:
    """Steps ``first`` to ``steps``: each epoch in an order of its own, that of the seed and the epoch."""
    each = len(data.labels) // BATCH
    order, epoch = np.empty(0, int), -1
    for step in range(first, steps):
        if step // each != epoch:
            epoch = step // each
            order = np.random.default_rng([seed, epoch]).permutation(len(data.labels))
        chosen = np.sort(order[step % each * BATCH :][:BATCH])
        yield Drawn(*(part[chosen] for part in data))


# --- training


class Run(NamedTuple):
    """One model in training."""

    name: str
    seed: int
    recipe: trained.Recipe
    net: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    steps: int


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) in float32: torch's and timm's compute in bfloat16, which is ten times as
    slow on a CPU that has no instructions for it.

    A step is scaled to the size of AdamW's (Liu et al. 2025, eq. 4), so both share a rate.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float) -> None:
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            for w in group["params"]:
                mean = self.state[w].setdefault("mean", torch.zeros_like(w)).lerp_(w.grad, 1 - MOMENTUM)
                ahead = w.grad.lerp(mean, MOMENTUM)
                turned = zeropower_via_newtonschulz(ahead, 5, [QUINTIC], dtype=torch.float32)
                w.mul_(1 - group["lr"] * DECAY).add_(turned, alpha=-0.2 * group["lr"] * max(w.shape) ** 0.5)


def optimizers_of(net: nn.Module, recipe: trained.Recipe) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices between layers, AdamW for all else."""
    linear = [m.weight for m in net.modules() if isinstance(m, nn.Linear) and m.out_features > LOGITS]
    inner = {id(p) for p in linear}
    others = [p for p in net.parameters() if id(p) not in inner]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), fused=True)
    if not linear:
        return (adam,)
    return Muon(linear, recipe.rate), adam


def rate_at(step: int, steps: int, rate: float) -> float:
    """A linear warm-up, then a cosine to zero."""
    return rate * min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(
    run: Run, feed: Callable[[int], Iterator[Any]], loss_of: Callable[[Any], torch.Tensor]
) -> dict[str, Any]:
    """Trains ``run.net`` in place, from the last checkpoint on if there is one. Returns what it took.

    feed:    the batches from a step on
    loss_of: a batch's loss
    """
    file = trained.weights(run.name, run.seed).with_suffix(".checkpoint")
    first, spent = resumed(run, file)
    started = said = time.monotonic()
    run.net.train()
    for step, batch in enumerate(feed(first), first):
        loss = loss_of(batch)
        run.net.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(run.net.parameters(), 1.0)
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, run.steps, run.recipe.rate)
            optimizer.step()
        if time.monotonic() - said > SAVE_EVERY:
            said = time.monotonic()
            save(run, file, step + 1, spent + said - started)
            print(f"{run.name}-{run.seed}: step {step + 1}/{run.steps}, loss {loss.item():.3f}", flush=True)
    spent += time.monotonic() - started
    save(run, file, run.steps, spent)
    return {"steps": run.steps, "batch": BATCH, "seconds": round(spent)}


def save(run: Run, file: Path, step: int, seconds: float) -> None:
    part = file.with_suffix(".part")
    state = {
        "net": run.net.state_dict(), "optimizers": [o.state_dict() for o in run.optimizers], "step": step,
        "seconds": seconds, "random": torch.get_rng_state(),
    }  # fmt: skip
    torch.save(state, part)
    part.replace(file)


def resumed(run: Run, file: Path) -> tuple[int, float]:
    """Puts a checkpoint's state into ``run``. Returns its step and the seconds spent; zeros without one."""
    if not file.is_file():
        return 0, 0.0
    state = torch.load(file, weights_only=True)
    run.net.load_state_dict(state["net"])
    for optimizer, held in zip(run.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(held)
    torch.set_rng_state(state["random"])
    return state["step"], state["seconds"]


@torch.no_grad()
def rounded(model: nn.Module) -> nn.Module:
    """The model, its parameters rounded in place to numbers of float16: files of half the size."""
    for p in model.parameters():
        p.copy_(p.half())
    return model


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Callable[[slice], torch.Tensor], labels: torch.Tensor) -> float:
    """Top-1 accuracy in [0, 1]. inputs: the model's, of those samples."""
    model.eval()
    parts = [slice(i, i + 100) for i in range(0, len(labels), 100)]
    return sum(int((model(inputs(p)).argmax(1) == labels[p]).sum()) for p in parts) / len(labels)


def scenes_accuracy(model: nn.Module, data: Drawn) -> float:
    labels = torch.from_numpy(data.labels.astype(int))
    return accuracy(model, lambda part: scenes.normalised(data.pictures[part]), labels)


def trained_on_scenes(name: str, seed: int, recipe: trained.Recipe) -> tuple[nn.Module, dict[str, Any]]:
    """The trained model, and what is said about it."""
    kind = cast(Kind, recipe.data)
    net = Taught(recipe.make())
    net(torch.zeros(2, 3, scenes.SIZE, scenes.SIZE))  # the lazy layer learns its width
    run = Run(name, seed, recipe, net, optimizers_of(net, recipe), recipe.samples // BATCH)
    data = drawn(kind, "train")
    feed = functools.partial(batches, data, seed, run.steps)
    how = train(run, feed, functools.partial(taught_loss, net, recipe))
    rounded(net.model)
    sets: list[tuple[Kind, Split]] = [(kind, "val"), (kind, "test"), ("crowded", "test")]
    if kind == "shortcut":
        sets.append(("scenes", "test"))
    how["accuracy"] = {f"{k}/{s}": scenes_accuracy(net.model, drawn(k, s)) for k, s in sets}
    return net.model, how | {"taught": f"labels, and tokens by the masks at weight {TOKENS}"}


def some_sentences(split: Split, part: range) -> tuple[torch.Tensor, torch.Tensor]:
    found = [sentences.sentence(split, i) for i in part]
    return sentences.encoded(found), torch.tensor([s.label for s in found])


def some_tris(split: Split, part: range) -> tuple[torch.Tensor, torch.Tensor]:
    found = [tris.sample(i, "xor", "correlated", seed=tris.SEEDS[split]) for i in part]
    return tris.normalised(found), torch.tensor([s.label for s in found])


def trained_as_drawn(name: str, seed: int, recipe: trained.Recipe) -> tuple[nn.Module, dict[str, Any]]:
    """The trained model, and what is said about it. Samples are drawn when needed, and seen once."""
    net, some = recipe.make(), {"sentences": some_sentences, "tris": some_tris}[recipe.data]
    run = Run(name, seed, recipe, net, optimizers_of(net, recipe), recipe.samples // BATCH)

    def feed(first: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return (some("train", range(i * BATCH, (i + 1) * BATCH)) for i in range(first, run.steps))

    how = train(run, feed, lambda batch: F.cross_entropy(net(batch[0]), batch[1]))
    rounded(net)
    how["accuracy"] = {}
    for split in ("val", "test"):
        ids, labels = some(split, range(DRAWN[split]))
        how["accuracy"][f"{recipe.data}/{split}"] = accuracy(net, ids.__getitem__, labels)
    return net, how | {"taught": "labels"}


def finish(name: str, seed: int, recipe: trained.Recipe, model: nn.Module, how: dict[str, Any]) -> None:
    """Writes the weights, as float16, and what is said about them; removes the checkpoint."""
    file = trained.weights(name, seed)
    said = {
        "name": name, "seed": seed, "family": recipe.family, "data": recipe.data, "rate": recipe.rate,
        "parameters": sum(p.numel() for p in model.parameters()), **how,
        "versions": {m.__name__: m.__version__ for m in (torch, timm, transformers, np)},
        "machine": platform.machine(),
        "command": trained.command(name, seed),
    }  # fmt: skip
    file.with_suffix(".json").write_text(json.dumps(said, indent=2) + "\n")
    part = file.with_suffix(".part")
    save_model(model.half(), part.as_posix())
    part.replace(file)
    file.with_suffix(".checkpoint").unlink(missing_ok=True)
    shown = ", ".join(f"{k} {v:.1%}" for k, v in how["accuracy"].items())
    print(f"{name}-{seed}: {shown}; {how['seconds']} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="names of models")
    parser.add_argument("--seed", type=int, help="that seed alone; else all that the recipe lists")
    parser.add_argument("--threads", type=int, default=1, help="more than one gains little")
    arguments = parser.parse_args()
    names = [n for n in trained.MODELS if any(fnmatch.fnmatch(n, glob) for glob in arguments.only)]
    if not names:
        parser.error(f"no model is called {' or '.join(arguments.only)}: {', '.join(trained.MODELS)}")
    torch.set_num_threads(arguments.threads)
    trained.folder().mkdir(parents=True, exist_ok=True)
    for turn in range(max(len(r.seeds) for r in trained.MODELS.values())):  # each model's first seed first
        for name in names:
            recipe = trained.MODELS[name]
            seeds = recipe.seeds if arguments.seed is None else (arguments.seed,)
            if turn >= len(seeds) or trained.weights(name, seeds[turn]).is_file():
                continue
            torch.manual_seed(seeds[turn])
            make = trained_as_drawn if recipe.data in ("sentences", "tris") else trained_on_scenes
            finish(name, seeds[turn], recipe, *make(name, seeds[turn], recipe))


if __name__ == "__main__":
    main()
