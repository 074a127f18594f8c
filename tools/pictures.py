"""Writes ``docs/pictures.md`` and ``docs/pictures/``: five models, and what their pictures show.

    python tools/pictures.py [--only 'vit'] [--screenshots]

The demo's models are trained, the others have random weights. The explorers (.html) carry a layout
engine of a megabyte and go to ``out/pictures``; ``--screenshots`` takes their pictures in Chromium,
which needs ``pip install playwright``.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

import libragrad_fx as lg
from libragrad_fx.demo import data as demo_data
from libragrad_fx.viz.flow import bottlenecks, imbalance, streams, strongest_paths
from libragrad_fx.viz.write import write

PAGE, FOLDER, EXPLORERS = Path("docs/pictures.md"), Path("docs/pictures"), Path("out/pictures")


class Network(nn.Module):
    """Written by hand, of no known family: two streams that gate, weigh and normalise each other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(12, 24), nn.Linear(12, 24)
        self.mix, self.norm = nn.Linear(24, 24), nn.LayerNorm(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.left(x), torch.tanh(self.right(x))
        product = a * b  # two signals multiplied: each carries half
        gate = torch.sigmoid(self.mix(product))  # a signal that only modulates
        weight = torch.softmax(a, 1)  # likewise
        y = self.norm(product * gate + (weight * b).sum(1, keepdim=True))
        return self.head(y.mean(1))


@dataclasses.dataclass(frozen=True)
class Subject:
    """One model on one input; ``focus`` is the block drawn op by op, ``lesson`` what one learns."""

    name: str
    title: str
    make: Callable[[], tuple[nn.Module, torch.Tensor]]
    focus: str
    lesson: str


def _trained(name: str) -> tuple[nn.Module, torch.Tensor]:
    images = demo_data.scenes(1, "test", 1).images
    return demo_data.load_demo_model(name), demo_data.normalise(images)


def _timm(name: str, **kwargs: Any) -> tuple[nn.Module, torch.Tensor]:
    import timm

    return timm.create_model(name, **kwargs).eval(), torch.randn(1, 3, 224, 224)


SUBJECTS = (
    Subject(
        "vit", "A vision transformer (the demo's, trained)", lambda: _trained("vit"), "blocks.1",
        "The last LayerNorm takes everything. A normaliser does not change when its input is scaled, so"
        " its gradient is orthogonal to its input: of the mass that reaches it none comes back, and"
        " whatever Input×Gradient shows below it is what later nodes happen to create and lose. Balanced,"
        " every join has the whole output. The strip then says how this model works: the class token has"
        " next to nothing of its own before the last block, whose attention brings it the picture.",
    ),
    Subject(
        "eva02", "EVA-02 tiny: SwiGLU, rotary positions (random weights)",
        lambda: _timm("eva02_tiny_patch14_224"), "blocks.1",
        "A product of another kind than attention's: in the SwiGLU both factors carry signal, so each gets"
        " half of the gradient (scale), and the SiLU before it is a secant. The rotary tables are"
        " constants, and queries and keys only modulate, so all that turns them is dashed. Untrained, the"
        " branches carry little: nearly all comes back along the residual stream, by one path.",
    ),
    Subject(
        "mixer", "An MLP-Mixer (the demo's, trained)", lambda: _trained("mixer"), "blocks.1",
        "No attention, and the same illness: normalisers and GELUs. Nothing is pruned here, only scales"
        " and slopes are held. Token mixing and channel mixing carry as much as the residual stream does,"
        " or more, so no single path stands for the model: the strongest goes through most branches and"
        " has only a small share of what comes back.",
    ),
    Subject(
        "convnext", "ConvNeXt atto (random weights, layer scales of 1)",
        lambda: _timm("convnext_atto", ls_init_value=1.0), "stages.1.blocks.0",
        "A convolutional network with a transformer's norms. The residual stream itself goes through"
        " normalisers between the stages, and the last norm stands before the classifier: under autograd"
        " the stream is all but gone before it reaches the first stage. Balanced it arrives whole.",
    ),
    Subject(
        "network", "A network written by hand (random weights)",
        lambda: (Network().eval(), torch.randn(1, 6, 12)), "",
        "What the pass does where it knows no family. The product of two signals is scaled: each gets"
        " half. The sigmoid gate and the softmax weights are computed from the signal but only modulate"
        " it: they are pruned, with all that leads to them alone (dashed). The tanh carries: its slope"
        " becomes the secant.",
    ),
)  # fmt: skip


def draw(subject: Subject) -> str:
    """Write a subject's pictures; its section of the page."""
    torch.manual_seed(0)
    model, x = subject.make()
    target = int(model(x).argmax())
    graph = lg.gradient_graph(model, x, target)
    for kind, focus in (("model", ""), ("block", subject.focus)):
        if kind == "model" or focus:
            write(graph, FOLDER / f"{subject.name}-{kind}.svg", focus=focus)
    write(graph, EXPLORERS / f"{subject.name}.html", focus=subject.focus)
    joins = streams(graph)
    if joins:
        write(graph, FOLDER / f"{subject.name}-streams.svg", "streams")
    return section(subject, graph, bool(joins))


def section(subject: Subject, graph: Any, joined: bool) -> str:
    share, path = strongest_paths(graph, 1)[0]
    passed = [d for _, d in graph.nodes(data=True) if d["plain"] or d["balanced"]]
    facts = (
        f"{sum(d['op'] != 'target' for d in passed)} ops that a gradient passes,"
        f" {sum(bool(d['action']) for _, d in graph.nodes(data=True))} edits;"
        f" {100 * imbalance(graph, 'plain'):.3g} % of the output is lost and created under autograd,"
        f" {100 * imbalance(graph, 'balanced'):.1g} % when balanced (float32);"
        f" {len(bottlenecks(graph))} nodes that everything goes through;"
        f" the strongest path has {len(path)} nodes and {100 * share:.3g} % of what comes back."
    )
    kinds = ["model", *(["block"] if subject.focus else []), *(["streams"] if joined else [])]
    says = {"model": "the whole", "block": f"`{subject.focus}` op by op", "streams": "streams"}
    links = ", ".join(f"[{says[k]}](pictures/{subject.name}-{k}.svg)" for k in kinds)
    fill = textwrap.wrap(subject.lesson, 104)
    last = [f"![Streams of {subject.title}](pictures/{subject.name}-streams.svg)", ""] * joined
    return "\n".join([f"## {subject.title}", "", *fill, "", f"{facts} Pictures: {links}.", "", *last])


def screenshots(names: list[str]) -> None:
    """The explorers as a reader sees them, with the balanced flow."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 860})
        for name in names:
            page.goto((EXPLORERS / f"{name}.html").resolve().as_uri())
            page.wait_for_selector("body[data-layouts='1']")
            page.click("text=balanced")
            page.click("text=flow")
            page.screenshot(path=FOLDER / f"{name}-explorer.png")
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="*", help="subjects whose name matches this pattern")
    parser.add_argument("--screenshots", action="store_true", help="of the explorers, in Chromium")
    options = parser.parse_args()
    for folder in (FOLDER, EXPLORERS):
        folder.mkdir(parents=True, exist_ok=True)
    chosen = [s for s in SUBJECTS if fnmatch.fnmatch(s.name, options.only)]
    sections = [draw(s) for s in tqdm(chosen, unit="model")]
    if options.only == "*":
        intro = (Path(__file__).parent / "pictures.md").read_text("utf-8").rstrip()
        PAGE.write_text("\n".join([intro, "", *sections]).rstrip() + "\n", "utf-8")
    if options.screenshots:
        screenshots([s.name for s in chosen])


if __name__ == "__main__":
    main()
