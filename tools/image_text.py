"""Trains and measures a small model of pictures and prompts: ``docs/image_text.md`` and its picture.

    python tools/image_text.py --train
    python tools/image_text.py

The first takes some minutes on one core and writes the weights to ``~/.cache/libragrad_fx/image-text``, or
into the folder that LIBRAGRAD_DATA names; the second measures. The text around the tables is in
``tools/image_text.md``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import timm
import torch
from pages import fill, table
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm.auto import tqdm

import libragrad_fx as lg
from libragrad_fx.demo.data import normalise, scenes
from libragrad_fx.viz import heatmap
from zoo import image_text as zoo

EPOCHS = 14
EPOCH_SCENES = 8192  # of the demo; each is the left one of a picture, and may be the right one of others
BATCH = 64
WARM_UP = 100  # steps
TEMPLATE = "a photo of a {}"
TARGET = lg.Likeness("image_embeds", "text_embeds")
METHODS = {
    "fullgrad_plus": "FullGrad+",
    "input_x_gradient": "Input×Gradient",
    "fullgrad": "FullGrad",
}
DRAWN = ("fullgrad_plus", "input_x_gradient")
SIDES = ("plain", "balanced")  # that are drawn
SEED = 1  # of the test pictures
EACH = 100  # pictures at once
TIMES = 3  # pixels of the drawing for each of a picture
GAP, SPACE, HEAD, FONT = 6, 14, 34, 16
INK, COLOURS = (30, 30, 30), 256
RATES = {
    "image.": 1e-3,
    "": 2e-3,
}  # peaks, by the start of a parameter's name: the picture tower is trained


def train(model: zoo.ImageText, epochs: int, seed: int) -> None:
    """AdamW on the sigmoid loss of SigLIP: a prompt and a picture match if its digit is in it. In place.

    Each step shows 64 pictures and ten prompts, one of each digit, in words drawn at random.
    """
    steps = epochs * (EPOCH_SCENES // BATCH)
    groups = []
    for matrices in (True, False):
        found: dict[float, list[torch.nn.Parameter]] = {}
        for name, p in model.named_parameters():
            rate = next(r for start, r in RATES.items() if name.startswith(start))
            if (p.ndim > 1) == matrices:
                found.setdefault(rate, []).append(p)
        decay = 0.05 if matrices else 0.0
        groups += [{"params": ps, "lr": rate, "weight_decay": decay} for rate, ps in found.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )
    rng = np.random.default_rng(seed)
    model.train()
    with tqdm(total=steps, unit="step", mininterval=5) as bar:
        for epoch in range(epochs):
            data = scenes(EPOCH_SCENES, "train", seed + 1_000_000 * (epoch + 1))
            labels = data.labels.numpy()
            right = zoo.partners(labels, labels, rng)
            total = 0.0
            for left in np.split(np.arange(EPOCH_SCENES), EPOCH_SCENES // BATCH):
                other = right[left]
                images = torch.cat([data.images[left], data.images[other]], 3)
                prompts = [zoo.prompt(d, str(rng.choice(zoo.TEMPLATES))) for d in range(10)]
                with torch.autocast("cpu", torch.bfloat16):
                    pictures, texts = (
                        model.of_images(normalise(images)),
                        model.of_texts(zoo.encoded(prompts)),
                    )
                cosines = pictures.float() @ texts.float().T
                match = torch.zeros(BATCH, 10)
                match[torch.arange(BATCH), labels[left]] = 1
                match[torch.arange(BATCH), labels[other]] = 1
                logits = model.scale.exp() * cosines + model.bias
                loss = F.binary_cross_entropy_with_logits(logits, match, reduction="sum") / BATCH
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                total += loss.item()
                bar.update()
            bar.write(f"epoch {epoch + 1}: loss {total * BATCH / EPOCH_SCENES:.3f}")


def trained(epochs: int, seed: int) -> None:
    """Train, and save the weights with what made them."""
    torch.manual_seed(seed)
    # on a CPU the backward of the fused attention is slow in bfloat16
    timm.layers.set_fused_attn(False)
    model = zoo.from_demo()
    start = time.perf_counter()
    train(model, epochs, seed)
    about = {
        "epochs": str(epochs),
        "seed": str(seed),
        "minutes": f"{(time.perf_counter() - start) / 60:.0f}",
        "versions": json.dumps({"torch": torch.__version__, "timm": timm.__version__}),
    }
    zoo.path().parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, zoo.path(), about)
    print(f"{zoo.path()}: {zoo.path().stat().st_size:,} bytes")


# --- what is measured


class Maps(NamedTuple):
    """One method on one side: pictures (n), each asked by the prompts of both its digits (2).

    values: (n, 2, h, w)
    errors: (n, 2), |total - expected|
    output: (n, 2), what was explained
    """

    values: torch.Tensor
    errors: torch.Tensor
    output: torch.Tensor


class Pointing(NamedTuple):
    """How maps fall on digits.

    named, other: mean shares of a map's positive part in the box of the named digit, and in the other's
    points: of how many maps the first is larger
    both:   of how many pictures that is so for both prompts
    """

    named: float
    other: float
    points: float
    both: float


def asked(data: zoo.Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Each picture twice, with the prompt of its left and of its right digit."""
    prompts = [zoo.prompt(int(d), TEMPLATE) for d in data.labels.flatten()]
    return normalise(data.images).repeat_interleave(2, 0), zoo.encoded(prompts)


def maps(module: Any, inputs: tuple[torch.Tensor, torch.Tensor], method: str) -> Maps:
    found = lg.attribute(module, inputs, TARGET, method=method, batch_size=EACH)
    return Maps(*(t.unflatten(0, (-1, 2)) for t in (found.values, found.completeness_error, found.output)))


def inside(values: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """(n, 2, 2): the share of each map's positive part in either box; a patch is spread over its pixels."""
    positive = values.clamp(min=0).repeat_interleave(zoo.HEIGHT // values.shape[2], 2)
    positive = positive.repeat_interleave(zoo.WIDTH // values.shape[3], 3)
    shares = torch.einsum("njhw,nkhw->njk", positive, filled(boxes))
    return shares / positive.sum((2, 3))[..., None].clamp(min=1e-300)


def filled(boxes: torch.Tensor) -> torch.Tensor:
    """(n, 2, HEIGHT, WIDTH): 1 in each box, else 0."""
    left, top, right, bottom = boxes[..., None, None].unbind(2)
    y, x = torch.arange(zoo.HEIGHT)[:, None], torch.arange(zoo.WIDTH)
    return ((x >= left) & (x < right) & (y >= top) & (y < bottom)).double()


def pointing(shares: torch.Tensor) -> Pointing:
    """Of shares (n, prompt, box)."""
    named = shares.diagonal(dim1=1, dim2=2)
    other = shares.flip(2).diagonal(dim1=1, dim2=2)
    right = named > other
    means = (named, other, right.double(), right.all(1).double())
    return Pointing(*(float(t.mean()) for t in means))


def alike(values: torch.Tensor) -> float:
    """The mean cosine between the two maps of a picture."""
    return float(F.cosine_similarity(values[:, 0].flatten(1), values[:, 1].flatten(1)).mean())


@torch.no_grad()
def accuracy(model: zoo.ImageText, data: zoo.Pairs) -> tuple[float, float]:
    """Of how many pictures the two best of ten prompts are those of its digits, and of how many the best is
    one of them."""
    texts = model.of_texts(zoo.encoded([zoo.prompt(d, TEMPLATE) for d in range(10)]))
    pictures = torch.cat([model.of_images(normalise(images)) for images in data.images.split(EACH)])
    best = (pictures @ texts.T).topk(2).indices
    found = (best[..., None] == data.labels[:, None]).any(2)
    return float(found.all(1).double().mean()), float(found[:, 0].double().mean())


def measured(found: Mapping[tuple[str, str], Maps], boxes: torch.Tensor) -> dict[str, str]:
    """The tables."""
    rows, against, sums = [], [], []
    for (method, side), m in found.items():
        p = pointing(inside(m.values, boxes))
        rows.append([f"`{method}`", side, *map(percent, p), f"{alike(m.values):.2f}"])
        # with its text constant a cosine is linear in the text: the difference of two maps is the map of
        # the difference of two prompts
        difference = m.values[:, 0] - m.values[:, 1]
        p = pointing(inside(torch.stack([difference, -difference], 1), boxes))
        against.append([f"`{method}`", side, *map(percent, p)])
        sums.append([f"`{method}`", side, f"{m.errors.mean():.2g}", f"{m.errors.max():.2g}"])
    head = ["method", "backward", "in the named box", "in the other", "points at the named", "both do"]
    return {
        "pointing": table([*head, "cosine of the two maps"], rows),
        "against": table(head, against),
        "sums": table(["method", "backward", "mean error", "largest"], sums),
    }


def percent(share: float) -> str:
    return f"{share:.1%}"


# --- the picture


def picture(data: zoo.Pairs, found: Mapping[tuple[str, str], Maps], shown: int) -> Image.Image:
    """The first pictures, two rows each: a prompt and its maps. The thick frame is the named digit's box.

    The two maps of a picture, by one method on one side, have one scale.
    """
    keys = [(method, side) for method in DRAWN for side in SIDES]
    width, height = zoo.WIDTH * TIMES + GAP, zoo.HEIGHT * TIMES + FONT + 2 * GAP
    size = (GAP + width * (1 + len(keys)), HEAD + shown * (2 * height + SPACE))
    sheet = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")  # Pillow's own has no ×
    plain, bold = (ImageFont.truetype(str(fonts / f"DejaVuSans{x}.ttf"), FONT) for x in ("", "-Bold"))
    for c, (method, side) in enumerate(keys, 1):
        draw.text((GAP + c * width, GAP), f"{METHODS[method]}, {side}", INK, bold)
    for i in range(shown):
        image = np.asarray(heatmap.enlarged(data.images[i].permute(1, 2, 0).numpy(), TIMES)) / 255
        scales = [heatmap.shared_scale(*found[key].values[i].numpy()) for key in keys]
        for j in (0, 1):
            top = HEAD + i * (2 * height + SPACE) + j * height
            draw.text((GAP, top), f"“{prompt_of(data, i, j)}”", INK, plain)
            values = [found[key].values[i, j].numpy() for key in keys]
            drawn = [heatmap.overlay(image, v, s) for v, s in zip(values, scales, strict=True)]
            for c, panel in enumerate([image, *drawn]):
                framed = frames(heatmap.enlarged(panel, 1), data.boxes[i].tolist(), j)
                sheet.paste(framed, (GAP + c * width, top + FONT + GAP))
    return sheet.quantize(COLOURS, dither=Image.Dither.NONE)


def prompt_of(data: zoo.Pairs, i: int, j: int) -> str:
    return zoo.prompt(int(data.labels[i, j]), TEMPLATE)


def frames(panel: Image.Image, boxes: Sequence[Sequence[int]], named: int) -> Image.Image:
    """With the boxes of both digits: thin, black in white, and the named one's thick."""
    panel, thick = panel.copy(), (1, 3)
    draw = ImageDraw.Draw(panel)
    for k, box in enumerate(boxes):
        left, top, right, bottom = (v * TIMES for v in box)
        n = thick[k == named]
        draw.rectangle((left - n, top - n, right - 1 + n, bottom - 1 + n), outline=(255, 255, 255), width=n)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=(0, 0, 0), width=n)
    return panel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true", help="train the model, and do nothing else")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"of {EPOCH_SCENES} pictures each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=500, help="test pictures that are measured")
    parser.add_argument("--shown", type=int, default=4, help="how many of them are drawn: the first")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/image_text.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.train:
        return trained(options.epochs, options.seed)
    if not zoo.path().is_file():
        raise SystemExit(f"there is no {zoo.path()}: python tools/image_text.py --train")
    model, data = zoo.load(), zoo.pairs(options.scenes, "test", SEED)
    inputs = asked(data)
    example = tuple(t[:2] for t in inputs)
    longer = copy.deepcopy(model)
    longer.unit = False  # so that only the target divides by the length, and holds it
    sides = {
        "plain": lg.trace(model, example),
        "plain, length held": lg.trace(longer, example),
        "balanced": lg.transform(model, example),
    }
    keys = [(method, side) for method in METHODS for side in sides]
    found = {(m, side): maps(sides[side], inputs, m) for m, side in tqdm(keys, unit="map")}
    both, one = accuracy(model, data)
    made = zoo.about()
    parts = {
        "scenes": str(options.scenes),
        "epochs": made["epochs"],
        "epoch": str(EPOCH_SCENES),
        "words": str(len(zoo.WORDS) - 1),
        "minutes": made["minutes"],
        "both": percent(both),
        "one": percent(one),
        "score": f"{float(next(iter(found.values())).output.mean()):.1f}",
        "area": percent(float(filled(data.boxes).mean())),
        "shown": str(options.shown),
        "versions": f"torch {torch.__version__}, timm {timm.__version__}, one CPU thread",
        **measured(found, data.boxes),
    }
    fill("image_text.md", parts, options.output)
    where = options.output.parent / "pictures" / "two-prompts.png"
    where.parent.mkdir(exist_ok=True)
    picture(data, found, options.shown).save(where, optimize=True)
    print(f"{where}: {where.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
