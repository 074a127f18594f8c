"""Builds the page of ``libragrad demo``: its parts, and what is said around them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from urllib.parse import quote

import libragrad_fx as lg
from libragrad_fx.demo import data as demo_data
from libragrad_fx.demo.parts import MEASURED, ONE, PHOTOGRAPHER, SEED, Shown, digits, photographed, spoken
from libragrad_fx.demo.study import METHODS, SIDES, Study
from libragrad_fx.extras import need
from libragrad_fx.types import Action, Edit
from libragrad_fx.viz import heatmap
from libragrad_fx.viz.page import Checked, Example, Page, Part, Summary, render

HERO = ("astronaut", "flower")  # the first of them that is here is what the page begins with
COMMAND = """npm install onnxruntime-web
pip install onnx onnxruntime onnxscript
libragrad demo --browser .              # this page again, with a link to that one
libragrad compile MODEL -o page.html    # the same of your own model"""


def page(shown: int, say: Callable[[str], None] = lambda text: None, browser: str = "") -> str:
    """The page as HTML.

    Args:
        shown: how many scenes and sentences for each model.
        say: gets progress messages.
        browser: the address of ``browser_page``, to be linked.
    """
    for package in ("jinja2", "sklearn", "timm"):
        need(package, "demo")  # fail before the work, not after it
    first = photographed(say)
    parts = [first, *(digits(name, shown, say) for name in demo_data.MODELS), spoken(shown, say)]
    say("drawing")
    return render(describe(parts, browser))


def browser_page(path: Path, runtime: Path) -> None:
    """Write a page that explains with the demo's vision transformer in the browser.

    Args:
        runtime: the folder where ``npm install onnxruntime-web`` was run.

    Raises:
        InputError, LibraGradError: as ``Program.to_page``.
    """
    pictures = demo_data.as_pictures(demo_data.scenes(6, "test", SEED).images)
    program = lg.program(demo_data.vit().requires_grad_(False), pictures[0], method=ONE)
    labels = [f"digit {i}" for i in range(10)]
    program.to_page(
        path, pictures, runtime=runtime, title="a vision transformer that reads digits", labels=labels
    )


def describe(parts: Sequence[Shown], browser: str = "") -> Page:
    """The page of all parts. It begins with a photograph, or, if there is none, with a scene."""
    studies = [s for part in parts for s in part.studies]
    asked, hero, rest = _hero([part.part for part in parts])
    return Page(
        title="Gradient explanations that add up",
        lede=_LEDE,
        asked=asked,
        hero=hero,
        said=f"{METHODS[ONE]}. Each map has a scale of its own.",
        key=heatmap.data_uri(heatmap.legend()),
        parts=rest,
        measured=(
            f"A row is a mean: over all photographs, or over {MEASURED} test scenes or sentences, each"
            " explained for the model's own answer. Input×Gradient leaves biases out: where a network"
            " has some, its sum is not exact, even balanced."
        ),
        summary=tuple(
            _summary(s, method, p.chance) for p in parts for s in p.studies for method in _methods(s)
        ),
        reading=_READING,
        checked=tuple(map(_checked, studies)),
        browser=quote(browser),
        command=COMMAND,
        footer=_footer(studies[0].certificate),
    )


def _hero(parts: Sequence[Part]) -> tuple[str, Example, tuple[Part, ...]]:
    """What the page begins with: its question, its maps of one method, and the parts without it."""
    found = {e.title: e for e in parts[0].examples}
    name = next((n for n in HERO if n in found), "")
    if not name:
        first = parts[1].examples[0]
        asked = f"Asked of a small vision transformer: which digit is this? It says {first.title}."
        return asked, dataclasses.replace(first, pairs=first.pairs[-1:]), tuple(parts)
    others = tuple(e for e in parts[0].examples if e.title != name)
    asked = f"Asked of the {PHOTOGRAPHER}: what tells this photograph from {len(others)} others?"
    return asked, found[name], (dataclasses.replace(parts[0], examples=others), *parts[1:])


def _methods(found: Study) -> list[str]:
    return [m for m in METHODS if (m, SIDES[0]) in found.results]


def _summary(found: Study, method: str, chance: float | None) -> Summary:
    plain, balanced = (found.results[method, side] for side in SIDES)
    errors = (float(plain.errors.mean()), float(balanced.errors.mean()))
    shares = (float(plain.shares.mean()), float(balanced.shares.mean()))
    return Summary(found.title, METHODS[method], errors, None if chance is None else shares, chance)


def _checked(found: Study) -> Checked:
    made = found.plan
    return Checked(
        title=found.title,
        certificate=str(found.certificate),
        certified=found.certificate.ok,
        plan=tuple((e.node, e.module, action(e), e.rule, e.reason) for e in made.edits),
        notes=(*map(str, made.unknown), *map(str, made.unbalanced), *made.notes),
    )


def action(edit: Edit) -> str:
    """An edit in a few words."""
    what = ", ".join(edit.operands) or "output"
    if edit.action is Action.SCALE:
        return f"scale {what} by {edit.factor:g}"
    return f"{edit.action} {what}" if edit.operands else edit.action.replace("_", " ")


def _footer(certificate: lg.Certificate) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in certificate.versions.items())
    return (
        f"Made by libragrad demo with {versions}. Photographs come with scikit-learn and scikit-image,"
        f" digits with scikit-learn. Policy {PurePath(certificate.policy).name}, rules"
        f" {certificate.digest[:12]}."
    )


_LEDE = (
    "The same network and, to the last bit, the same output, explained twice: by PyTorch's own gradient"
    " (plain), and by the balanced one of LibraGrad."
)

_READING = (
    (
        "Colours",
        "Red speaks for the answer, blue against it; where the grey picture shows through, nothing is said."
        ' Every map has a scale of its own, as lg.draw(…, scale="each") draws it: the darkest colour is its'
        " 99 % quantile of |values|. So compare patterns and signs, not strengths. A map has one value for"
        " each patch of pixels and is drawn smoothly (bicubic).",
    ),
    (
        "Sum off by",
        "A map promises a sum: Input×Gradient the score (the logit of the answer), FullGrad+ the score once"
        " for each block of the network, less what does not pass that block, and every bias. Said is how"
        " much of that sum the map loses or invents: 0 % is exact; at 100 % all of it is lost, or as much"
        " again invented. Input×Gradient, taken at the first block, leaves the biases out: where a network"
        " has some, even the balanced map misses what they contribute. FullGrad+ counts them.",
    ),
    (
        "Of red in the box, on the outlined",
        "The part of all red that falls into the digit's box (a patch that the box cuts counts by area), or"
        " on the words that decide. Red strewn evenly would reach the last column of the table.",
    ),
    (
        "Input×Gradient and FullGrad+",
        "Two ways to turn a gradient into a map. The first multiplies what enters the first block by its"
        " gradient; the second adds that up over all blocks, and every bias times its gradient.",
    ),
)
