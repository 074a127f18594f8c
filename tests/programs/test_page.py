"""A page for browsers: opened from disk, without a network, it computes and draws what Python does."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import libragrad_fx as lg
from libragrad_fx.demo import data
from libragrad_fx.errors import InputError
from libragrad_fx.explain.inputs import picture_steps
from libragrad_fx.explain.pixels import Pixels, pixels
from libragrad_fx.programs import page as pages
from libragrad_fx.viz import browser, heatmap

pytest.importorskip("onnxruntime", reason="needs: pip install 'libragrad-fx[onnx]'")
WHERE = os.environ.get("ONNXRUNTIME_WEB", ".")
"""The folder where npm install onnxruntime-web was run."""


def classifier() -> torch.nn.Module:
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 4, 4), torch.nn.GELU(), torch.nn.Flatten(),
                               torch.nn.Linear(64, 5)).eval()  # fmt: skip
    body.example_input_array = torch.rand(2, 3, 16, 16)  # type: ignore[assignment]
    return body


def fitted(picture: Image.Image) -> torch.Tensor:
    return Pixels((16, 16), (16, 16), "squash", "bilinear", False, (0.0,) * 3, (1.0,) * 3)(picture)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """Files of the runtime's names, in the place where npm puts them."""
    folder = tmp_path / "node_modules" / "onnxruntime-web" / "dist"
    folder.mkdir(parents=True)
    for name in browser.RUNTIME:
        (folder / name).write_text(name)
    return tmp_path


# --- without a browser


@pytest.fixture(scope="module")
def small() -> Any:
    return lg.program(classifier(), torch.rand(1, 3, 16, 16), method="hirescam", processor=fitted)


@pytest.mark.parametrize("labels", [["a", "b"], "abcde", [1, 2, 3, 4, 5]])
def test_labels_are_one_text_for_each_class(labels: Any, small: Any, engine: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="labels"):
        small.to_page(tmp_path / "x.html", Image.new("RGB", (20, 30)), runtime=engine, labels=labels)


def test_all_that_a_page_needs_is_in_it(small: Any, engine: Path, tmp_path: Path) -> None:
    path, photo = tmp_path / "new" / "x.html", Image.new("RGB", (20, 30), "red")
    title = "</script><b>mine"
    small.to_page(path, [photo, photo], runtime=engine, title=title, labels=["<i>", *"bcde"])
    text = path.read_text("utf-8")
    assert title not in text
    assert "<i>" not in text
    assert not re.search(r"""(src|href)="(?!data:)""", text)
    assert text.count('src="data:image/png') == 2
    for part, name in zip(("engine", "wasm"), browser.RUNTIME, strict=True):
        (packed,) = re.findall(rf'id="{part}">(.*?)<', text)
        assert gzip.decompress(base64.b64decode(packed)).decode() == name


def test_an_example_is_prepared_as_the_picture_is() -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 131, 3), np.uint8))
    for way, scaled in (("edge", (56, 56)), ("squash", (56, 56)), ("cover", (48, 48))):
        steps = Pixels((48, 48), scaled, way, "bicubic", False, (0.0,) * 3, (1.0,) * 3)  # type: ignore[arg-type]
        assert torch.equal(steps(steps.resized(photo)), steps(photo))


def test_no_runtime_is_said_before_the_work(small: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="npm install onnxruntime-web"):
        small.to_page(tmp_path / "x.html", torch.rand(1, 3, 16, 16), runtime=tmp_path)
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize(("name", "says"), [("x.htm", "writes .html"), ("", "writes .html"),
                                           ("folder.html", "it is a folder"),
                                           ("file/x.html", "cannot write")])  # fmt: skip
def test_places_that_cannot_be_written(name: str, says: str, engine: Path) -> None:
    (engine / "folder.html").mkdir()
    (engine / "file").write_text("")
    with pytest.raises(InputError, match=says):
        pages.require(engine / name, engine)


@pytest.mark.parametrize("call", [torch.rand(1, 6), torch.rand(1, 9, 8, 8), torch.rand(1, 3, 8, 8).double(),
                                  {"a": torch.rand(1, 3, 8, 8), "b": torch.rand(1, 4)}])  # fmt: skip
def test_models_of_no_picture(call: Any) -> None:
    with pytest.raises(InputError, match=r"a page explains pictures.* this model takes float"):
        pages.require_picture(call)


def test_models_that_do_not_classify(engine: Path) -> None:
    body = torch.nn.Sequential(classifier()[:2], torch.nn.Flatten(2)).eval()
    made = lg.program(body, torch.rand(1, 3, 16, 16), processor=fitted, target=lambda y: y[:, 0, 0])
    with pytest.raises(InputError, match="answers of a classifier"):
        made.to_page(engine / "x.html", torch.rand(1, 3, 16, 16), runtime=engine)


def test_pictures_of_another_size(small: Any, engine: Path) -> None:
    made = lg.program(small.model, torch.rand(1, 3, 16, 16), method="hirescam", processor=data_steps())
    with pytest.raises(InputError, match=r"\(16, 16\), its preprocessing gives \(48, 48\)"):
        made.to_page(engine / "x.html", torch.rand(1, 3, 16, 16), runtime=engine)


def data_steps() -> Any:
    return Pixels((48, 48), (48, 48), "edge", "bicubic", False, (0.0,) * 3, (1.0,) * 3)


def test_a_program_may_be_too_large(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "_MOST", 10)
    about = {"title": "", "examples": [], "method": "", "side": "", "made": ""}
    with pytest.raises(InputError, match=r"a page holds no program of 0 MiB: write \.onnx"):
        browser.html(about, b"0" * 100, browser.runtime(engine))


# --- in a browser


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def runs() -> str:
    """Why nothing can be run here, or ""."""
    try:
        browser.runtime(WHERE)
    except InputError as e:
        return str(e)
    return "" if CHROMIUM else "no chromium is installed"


slow = [pytest.mark.slow, pytest.mark.skipif(bool(runs()), reason=runs())]


def marked(test: Any) -> Any:
    for mark in slow:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    return data.as_pictures(data.scenes(2, "test", 1).images)


@pytest.fixture(scope="module")
def program(scenes: list[Image.Image]) -> Any:
    model = data.vit().requires_grad_(False)
    return lg.program(model, scenes[0], method="fullgrad_plus")


@pytest.fixture(scope="module")
def file(program: Any, scenes: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    return program.to_page(path, scenes, runtime=WHERE, title="the demo's")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright")
    with playwright.sync_playwright() as p:
        running = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


LOCAL = ("file:", "blob:", "data:")


@pytest.fixture
def opened(chromium: Any) -> Iterator[Any]:
    """A function that opens a page from disk, without a network; what it complains of fails the test."""
    complaints: list[str] = []
    context = chromium.new_context(offline=True)

    def open_(path: Path, before: str = "") -> Any:
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text))
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.on("request", lambda r: r.url.startswith(LOCAL) or complaints.append(r.url))
        page.add_init_script(before)
        page.goto(path.as_uri())
        return page

    yield open_
    assert complaints == []
    context.close()


def shown(page: Any, count: int) -> dict[str, Any]:
    """What the page has computed, when it has shown so many maps."""
    page.wait_for_selector(f'body[data-shown="{count}"]', timeout=60_000)
    return page.evaluate("({...result, input: [...result.input]})")


def painted(page: Any, name: str) -> np.ndarray:
    """A canvas (H, W, 3) in [0, 1]."""
    code = """(name) => { const c = document.getElementById(name);
      return [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]; }"""
    width, height, values = page.evaluate(code, name)
    return np.array(values).reshape(height, width, 4)[..., :3] / 255


@marked
def test_maps_are_those_of_python(opened: Any, file: Path, program: Any, scenes: list[Image.Image]) -> None:
    page = opened(file)
    x = picture_steps(program.model, None)(scenes[0])[None]
    first = shown(page, 1)
    torch.testing.assert_close(torch.tensor(first["input"]), x.flatten(), atol=1e-6, rtol=0)
    other = int(page.locator("#classes button").nth(2).get_attribute("data-index"))
    page.locator("#classes button").nth(2).click()
    for got, target in ((first, None), (shown(page, 2), other)):
        found = program(x, target)
        assert got["chosen"] == (found.target[0][0] if target is None else other)
        want = found.values.flatten().tolist()
        assert got["values"] == pytest.approx(want, abs=1e-4 * max(map(abs, want)))
        assert got["output"] == pytest.approx(float(found.output), rel=1e-4)
        assert got["error"] == pytest.approx(0, abs=1e-4 * abs(float(found.output)))
        probabilities = program.model(x).softmax(1)[0].tolist()
        assert got["probabilities"] == pytest.approx(probabilities, abs=1e-5)
    assert f"class {other}, output" in page.inner_text("#caption")
    drawn, values = painted(page, "map"), found.values[0].numpy()
    image = np.asarray(scenes[0]).repeat(drawn.shape[0] // 48, 0).repeat(drawn.shape[1] // 48, 1) / 255
    want = heatmap.overlay(image, values, heatmap.shared_scale(values))
    assert np.abs(drawn - want).max() < 1.5 / 255
    assert np.abs(painted(page, "seen") - image).max() == 0


PHOTO = np.random.default_rng(1).integers(0, 256, (90, 131, 3), np.uint8)


@marked
@pytest.mark.parametrize(
    ("change", "shape"),
    [
        ({}, (90, 131)),
        ({"scaled": (55, 55), "filter": "bilinear"}, (131, 90)),
        ({"scaled": (60, 52), "way": "squash", "filter": "lanczos"}, (90, 131)),
        ({"way": "cover", "filter": "box"}, (40, 31)),
    ],
)
def test_pictures_are_prepared_as_pillow_does(
    opened: Any, file: Path, program: Any, tmp_path: Path, change: dict[str, Any], shape: tuple[int, int]
) -> None:
    """To the bit of each level; numbers to rounding."""
    steps = dataclasses.replace(pixels(picture_steps(program.model, None)), **change)
    text = file.read_text("utf-8")
    for name, value in change.items():
        said = f'"{value}"' if isinstance(value, str) else f"[{value[0]},{value[1]}]"
        text, count = re.subn(rf'"{name}":("\w+"|\[[\d,]+\])', f'"{name}":{said}', text)
        assert count == 1
    changed, photo = tmp_path / "page.html", Image.fromarray(np.resize(PHOTO, (*shape, 3)))
    changed.write_text(text, "utf-8")
    photo.save(tmp_path / "photo.png")
    page = opened(changed)
    shown(page, 1)
    page.set_input_files("#file", tmp_path / "photo.png")
    got = torch.tensor(shown(page, 2)["input"])
    torch.testing.assert_close(got, steps(photo).flatten(), atol=1e-6, rtol=0)


@marked
def test_what_is_no_picture_is_said(opened: Any, file: Path, tmp_path: Path) -> None:
    page = opened(file)
    shown(page, 1)
    (tmp_path / "notes.png").write_text("not a picture")
    page.set_input_files("#file", tmp_path / "notes.png")
    page.wait_for_selector("#status.bad")
    assert page.inner_text("#status") == "“notes.png” is no picture that this browser can read."
    page.locator("#examples button").nth(1).click()
    shown(page, 2)
    assert page.inner_text("#status") == ""


@marked
def test_a_picture_is_dropped(opened: Any, file: Path, scenes: list[Image.Image]) -> None:
    page = opened(file)
    first = shown(page, 1)
    drop = """(uri) => { const held = new DataTransfer();
      const bytes = Uint8Array.from(atob(uri.split(',')[1]), (c) => c.charCodeAt(0));
      held.items.add(new File([bytes], 'x.png', { type: 'image/png' }));
      dispatchEvent(new DragEvent('drop', { dataTransfer: held, cancelable: true })); }"""
    page.evaluate(drop, heatmap.data_uri(scenes[1]))
    dropped = shown(page, 2)
    assert page.locator("#examples [aria-pressed=true]").count() == 0
    page.locator("#examples button").nth(1).click()
    assert first["values"] != dropped["values"] == shown(page, 3)["values"]
    assert page.locator("#examples [aria-pressed=true]").count() == 1


@marked
def test_a_browser_without_webassembly_is_told(opened: Any, file: Path) -> None:
    page = opened(file, "delete globalThis.WebAssembly")
    page.wait_for_selector("#status.bad")
    assert page.inner_text("#status") == "The model cannot run here: this browser has no WebAssembly."
    assert page.is_disabled("#choose")
