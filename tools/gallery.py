"""Writes ``docs/gallery.md`` and ``docs/pictures/gallery-*.png``: what attributions look like.

    python tools/gallery.py [--only 'vit*']

The demo's models are trained, and come with this library. Entries whose weights are not here
(``tools/fetch.py``) are left as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

import libragrad_fx as lg
from libragrad_fx.demo import data as demo
from libragrad_fx.demo import sources
from zoo import real, samples, sets, trained

_EYES, _FUR = (60, 60, 290, 150), (100, 0, 230, 70)  # left, top, right, bottom of the photograph
_WIDTH = 900  # pixels
PAGE, FOLDER = Path("docs/gallery.md"), Path("docs/pictures")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One picture. make: attributions and how they are drawn; needs: weights of ``tools/fetch.py``."""

    name: str
    title: str
    about: str
    make: Callable[[], tuple[Any, dict[str, Any]]]
    needs: str = ""


# --- the demo's models


@functools.cache
def scene(index: int) -> Image.Image:
    picture = demo.scenes(8, "test", 1).images[index].permute(1, 2, 0).numpy()
    return Image.fromarray((picture * 255).round().astype(np.uint8))


@functools.cache
def demo_model(name: str) -> torch.nn.Module:
    return demo.load_demo_model(name)


def steps(picture: Image.Image) -> torch.Tensor:
    return demo.normalise(torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255)


def answers(name: str, index: int, **options: Any) -> list[lg.Attribution]:
    return lg.attribute_each(demo_model(name), scene(index), processor=steps, **options)


def sides(name: str, index: int, methods: list[str]) -> tuple[Any, dict[str, Any]]:
    """Methods below each other; plain, balanced, and balanced for the runner-up."""
    grid = []
    for method in methods:
        plain = answers(name, index, method=method, policy="autograd")
        grid.append([*plain, *answers(name, index, method=method, top=2)])
    return grid, {}


def every_method() -> tuple[Any, dict[str, Any]]:
    module = demo_model("vit")
    found = [m for m, why in lg.methods(module, steps(scene(1))[None]).items() if not why and m != "random"]
    drawn = [answers("vit", 1, method=m)[0] for m in found]
    return [drawn[i : i + 6] for i in range(0, len(drawn), 6)], {"show_colorbar": False}


def why_not() -> tuple[Any, dict[str, Any]]:
    both = answers("vit", 2, targets=[9, 6])
    against = lg.attribute(demo_model("vit"), scene(2), 9, against=6, processor=steps)
    return [[*both, against]], {}


def pixels() -> tuple[Any, dict[str, Any]]:
    options = {"method": "input_x_gradient", "resolution": "pixels"}
    return [[*answers("vit", 1, policy="autograd", **options), *answers("vit", 1, **options)]], {}


def batch() -> tuple[Any, dict[str, Any]]:
    found = lg.attribute(demo_model("mixer"), [scene(3), scene(4)], processor=steps)
    return found, {"names": ["first", "second"], "sign": "positive"}


# --- the zoo's models

_SCENE = 0


def architectures() -> tuple[Any, dict[str, Any]]:
    """One scene, its label, plain and balanced, a row for each network."""
    one = samples.sample(_SCENE)
    picture = Image.open(one.file).convert("RGB")
    grid = []
    for name, seed in (("vit_base", 0), ("eva02", 0), ("mixer", 2)):
        model, family = trained.load(name, seed), trained.recipe(name).family
        found = [
            lg.attribute(model, picture, one.label, processor=sets.steps, policy=p)
            for p in ("autograd", "libra")
        ]
        grid.append([dataclasses.replace(f, target=(f"{family}: {one.name}",)) for f in found])
    return grid, {"scale": "each", "show_colorbar": False}


# --- photographs and texts


def photographs() -> tuple[Any, dict[str, Any]]:
    """DINOv2 has no classes: what of a photograph is like one of its parts rather than like another?"""
    from skimage import data as pictures

    whole = Image.fromarray(pictures.chelsea()).crop((60, 0, 360, 300))
    transform = sources.dinov2_steps()
    model = sources.dinov2()
    with torch.no_grad():
        eyes, fur = (lg.unit(model(transform(whole.crop(box))[None])) for box in (_EYES, _FUR))

    def difference(features: torch.Tensor) -> torch.Tensor:
        return 100 * (lg.unit(features) * (eyes - fur)).sum(1)

    row = []
    for policy in ("autograd", "libra"):
        found = lg.attribute(model, whole, difference, processor=transform, policy=policy)
        row.append(dataclasses.replace(found, target=("like its eyes, against its fur",)))
    return [row], {"scale": "each"}


def text() -> tuple[Any, dict[str, Any]]:
    model, tokenizer = real.smollm2()
    said = "The doctor asked the nurse to help her, and then she thanked the"
    rows = []
    for policy in ("autograd", "libra"):
        options = {"processor": tokenizer, "policy": policy}
        rows.append([
            lg.attribute(model, said, " nurse", **options),
            lg.attribute(model, said, " nurse", against=" doctor", **options),
        ])  # fmt: skip
    return rows, {"scale": "each"}


ENTRIES = (
    Entry(
        "vit", "A vision transformer, plain and balanced",
        "Rows are methods; columns are the plain gradient and the balanced one for the answer, and the"
        " balanced one for the runner-up. The maps of a method are on one scale: the plain gradient of this"
        " model is nearly nothing, as its last LayerNorm destroys it.",
        lambda: sides("vit", 1, ["fullgrad_plus", "input_x_gradient", "gradcam"]),
    ),
    Entry(
        "architectures", "One scene, three architectures",
        "FullGrad+ for the label, plain and balanced, of three networks of the zoo: a ViT, EVA-02 and an"
        " MLP-Mixer. Each map is on a scale of its own.",
        architectures,
    ),
    Entry(
        "mixer", "An MLP-Mixer, plain and balanced", "As above, of a network without attention.",
        lambda: sides("mixer", 1, ["fullgrad_plus", "input_x_gradient"]),
    ),
    Entry(
        "methods", "Every method that this vision transformer supports",
        "Balanced, each map on a scale of its own. Where no value is below zero, colours go from white to"
        " brown.", every_method,
    ),
    Entry(
        "why-not", "Why a nine, and not a six?", "The third map is for the difference of the two answers.",
        why_not,
    ),
    Entry(
        "pixels", "By pixels",
        "Input×Gradient at the pixels (`resolution=\"pixels\"`), not at the first block's input.", pixels,
    ),
    Entry(
        "batch", "A batch, positive values alone", "`attribute(model, pictures).show(sign=\"positive\")`.",
        batch,
    ),
    Entry(
        "photograph", "A photograph, and DINOv2",
        "This model has no classes. Explained is 100 times the cosine of the features of the picture and of"
        " its eyes, cut out, less that of the picture and of a piece of its fur.", photographs, "dinov2",
    ),
    Entry(
        "text", "A text, and SmolLM2",
        "Explained is the logit of the next token \" nurse\", and how much it exceeds that of \" doctor\"."
        " Above plain, below balanced.", text, "smollm2",
    ),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="GLOB", default="*", help="draw these; the page keeps the others")
    only = parser.parse_args().only
    for entry in tqdm([e for e in ENTRIES if fnmatch.fnmatch(e.name, only)]):
        if entry.needs and (said := sources.missing(entry.needs)):
            print(f"{entry.name} is left out: {said}", file=sys.stderr)
            continue
        grid, look = entry.make()
        lg.draw(grid, file_of(entry), **look)
        shrink(file_of(entry))
    PAGE.write_text("\n".join(page()), "utf-8")


def shrink(file: Path) -> None:
    """No larger than a page. A palette of 256 colours would be smaller, and change them."""
    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((_WIDTH, _WIDTH), Image.Resampling.LANCZOS)
    picture.save(file, optimize=True)


def file_of(entry: Entry) -> Path:
    return FOLDER / f"gallery-{entry.name}.png"


def page() -> list[str]:
    lines = [
        "# Gallery", "",
        "Red speaks for what is asked about, blue against it; where the grey picture shows, nothing",
        "is said. Captions say the method, whether the gradient was plain or balanced, what was explained,",
        "and how far the map is from adding up to it. The demo's models read digits on photographs, in",
        "pictures that they were not trained on. Made by `python tools/gallery.py`.",
    ]  # fmt: skip
    for entry in ENTRIES:
        if file_of(entry).is_file():
            picture = f"![{entry.title}](pictures/{file_of(entry).name})"
            lines += ["", f"## {entry.title}", "", entry.about, "", picture]
    return [*lines, ""]


if __name__ == "__main__":
    main()
