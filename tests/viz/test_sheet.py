"""Pictures of attributions: what they say of scale, sign and target, on every kind of paper."""

from __future__ import annotations

import base64
import dataclasses
import io
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import libragrad_fx as lg
from libragrad_fx.errors import InputError
from libragrad_fx.viz import bars, console, heatmap, palette, paper, words
from libragrad_fx.viz.pieces import readable
from libragrad_fx.viz.sheet import sheet


def made(values: torch.Tensor, **fields: Any) -> lg.Attribution:
    n = len(values)
    numbers = torch.arange(1.0, n + 1, dtype=torch.float64)
    names = ("unplaced", "output", "total", "expected", "positional")
    known: dict[str, Any] = {k: numbers.clone() for k in names} | {
        "values": values.double(), "prefix": None, "others": {}, "completeness_error": numbers * 1e-7,
        "method": "fullgrad_plus", "layers": (), "policy": "libra", "target": (3,) * n,
        "labels": ("tiger shark, fish",) * n, "versions": {},
    }  # fmt: skip
    return lg.Attribution(**{**known, **fields})


@pytest.fixture
def pictured() -> lg.Attribution:
    torch.manual_seed(0)
    pictures = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8)
    return made(torch.randn(2, 6, 6), pictures=pictures)


def test_a_caption_says_what_no_place_of_the_picture_has() -> None:
    total = torch.tensor([4.0, -4.0, 4.0, 0.0], dtype=torch.float64)
    found = made(torch.ones(4, 2, 2), prefix=torch.tensor([[2.0, 1], [2, 1], [0, 0], [1, 1]]), total=total)
    assert [words.apart_words(found, i) for i in range(4)] == [
        "75% of the sum at class tokens", "-75% of the sum at class tokens", "", ""
    ]  # fmt: skip
    (row,) = sheet([[found]], "").rows[:1]
    assert "75% of the sum at class tokens" in row.cells[0].caption


PIECES = ("ĠThe", "Ġcat", "Ġ<b>", "Ġre", "ads", ".", "")


def text() -> lg.Attribution:
    return made(torch.linspace(-1, 1, 7)[None], tokens=(PIECES,), target=((6, 4),), labels=(" mat",))


# --- colours


def lightness(colours: np.ndarray) -> np.ndarray:
    """CIELAB's L*."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    y = linear @ np.array([0.2126, 0.7152, 0.0722])
    return np.where(y > 216 / 24389, 116 * np.cbrt(y) - 16, y * 24389 / 27)


def seen_without(colours: np.ndarray, cone: str) -> np.ndarray:
    """Linear RGB as seen by someone without green (deutan) or red (protan) cones: Viénot et al. 1999."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    shares = {"deutan": (0.29275, 0.70725, -0.02234), "protan": (0.11238, 0.88762, 0.00401)}[cone]
    a, b, c = shares
    return linear @ np.array([[a, b, 0], [a, b, 0], [c, -c, 1]]).T


def test_both_sides_are_equally_light_and_zero_is_the_lightest() -> None:
    ramp = np.linspace(0, 1, 33)
    plus, minus = (lightness(palette.colours(s * ramp, 1.0)) for s in (1, -1))
    assert np.abs(plus - minus).max() < 1.5
    for found in (plus, minus, lightness(palette.colours(ramp, 1.0, signed=False))):
        steps = np.diff(found)
        assert steps.max() < 0
        assert steps.min() > 2 * steps.mean()  # evenly
        assert found[0] > 95
        assert found[-1] < 30


@pytest.mark.parametrize("cone", ["deutan", "protan"])
def test_signs_are_told_apart_by_colour_blind_readers(cone: str) -> None:
    for strength in (0.3, 0.6, 1.0):
        plus, minus = seen_without(palette.colours(np.array([strength, -strength]), 1.0), cone)
        assert minus[2] / minus[0] > 1.5 * plus[2] / plus[0]  # bluish, and not


def test_nan_is_white_and_ends_are_cut() -> None:
    nan, over, end = palette.colours(np.array([np.nan, 9.0, 1.0]), 1.0)
    assert palette.code(nan) == palette.SIGNED[5]
    assert np.array_equal(over, end)
    assert heatmap.shared_scale(np.array([np.nan])) == 1


# --- what is on the page


def test_a_caption_says_method_side_target_and_error(pictured: lg.Attribution) -> None:
    plain = dataclasses.replace(pictured, policy="", method="path_averaged(gradcam)",
                                completeness_error=torch.full((2,), torch.nan))  # fmt: skip
    page = sheet([plain, pictured])
    first, second = (c.caption for c in page.rows[0].cells)
    assert first[:2] == ("Grad-CAM, path-averaged, plain", "class 3 (tiger shark), output 1")
    assert first[2] == "it promises no sum"
    assert second[0] == "FullGrad+, balanced"
    assert second[2] == "completeness error 1.0·10⁻⁷"


@pytest.mark.parametrize(
    ("target", "label", "said"),
    [
        (None, "", "its only output"), ((4,), "", "class 4"), ("f", "", "f"),
        ((3, (1,)), "cat, feline against ", "class 3 (cat) against class 1"),
        ((1, 2), "", "class 1, 2"),
    ],
)  # fmt: skip
def test_targets_in_words(target: Any, label: str, said: str) -> None:
    assert words.target_name(target, label) == said
    assert words.target_name((4, 7), " mat", True) == "token ' mat' at 4"


def test_what_shares_a_scale(pictured: lg.Attribution) -> None:
    large = dataclasses.replace(pictured, values=pictured.values * 100)
    other = dataclasses.replace(large, method="gradcam")

    def ends(**look: Any) -> list[set[float]]:
        page = sheet([[pictured, large], [other]], **look)
        return [{c.scale.end for c in row.cells} for row in page.rows[:2]]

    by_method, over_all, each = ends(), ends(scale="all"), ends(scale="each")
    assert len(by_method[0]) == 1
    assert by_method[0] == by_method[1]  # the same numbers, by another method
    assert over_all[0] == over_all[1]
    assert len(each[0]) == 2
    assert sheet([pictured], scale="each").rows[0].cells[0].caption[-1].startswith("colours end at")


def test_the_scale_ends_at_the_quantile_that_is_said() -> None:
    values = torch.zeros(1, 10, 10)
    values[0, 0, 0], values[0, 5] = 1000.0, 1.0
    page = sheet(made(values), outlier_perc=2)
    assert page.rows[0].cells[0].scale.end == pytest.approx(1.0)
    assert "98% quantile" in page.note


@pytest.mark.parametrize("sign", ["positive", "negative", "absolute_value"])
def test_one_sign_is_drawn_from_zero_on(pictured: lg.Attribution, sign: Any) -> None:
    cell = sheet(pictured, sign=sign).rows[0].cells[0]
    assert not cell.scale.signed
    assert float(cell.values.min()) >= 0
    positive = sheet(dataclasses.replace(pictured, values=pictured.values.abs())).rows[0].cells[0]
    assert not positive.scale.signed
    assert sheet(pictured).rows[0].cells[0].scale.signed


def test_what_cannot_be_drawn_says_so(pictured: lg.Attribution, tmp_path: Path) -> None:
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "draw takes"), ([[]], {}, "draw takes"), ([3], {}, "draw takes"),
        ([pictured, made(torch.ones(1, 2, 2))], {}, "same samples"),
        (pictured, {"sign": "up"}, "sign is one of"), (pictured, {"method": "up"}, "method is one of"),
        (pictured, {"cmap": "jet"}, "no option 'cmap'"), (pictured, {"outlier_perc": 101}, "from 0 to 100"),
        (pictured, {"scale": "none"}, "scale is"),
    ]  # fmt: skip
    for grid, look, said in wrong:
        with pytest.raises(InputError, match=said):
            lg.draw(grid, **look)
    with pytest.raises(InputError, match=r"saved as \.png"):
        lg.draw(pictured, tmp_path / "a.jpg")
    with pytest.raises(InputError, match="holds one page"):
        paper.save([sheet(pictured)] * 2, tmp_path / "a.png")


# --- maps over pictures


@pytest.mark.parametrize("way", heatmap.WAYS)
def test_every_way_of_drawing_is_of_one_size(way: Any) -> None:
    image = np.random.default_rng(0).random((24, 48, 3))
    values = np.zeros((3, 6))
    values[1, 2], values[1, 4] = 1.0, -1.0
    found = heatmap.drawn(values, image, 1.0, way=way)
    assert found.shape == (216, 432, 3)
    if way in ("blended_heat_map", "heat_map"):
        plus, minus = found[108, 180], found[108, 324]
        assert plus[0] > 1.5 * plus[2]
        assert minus[2] > 1.5 * minus[0]
    if way == "masked_image":
        assert found[:, :40].max() < 0.1


def test_frames_stand_in_a_row() -> None:
    assert heatmap.as_picture(np.ones((3, 32, 16))).shape == (32, 3 * 16 + 2)
    assert heatmap.as_picture(np.ones((40, 4, 4))).shape == (4, 8 * 4 + 7)
    assert heatmap.as_picture(np.ones((2, 3, 4, 4))).shape == (4, 6 * 4 + 5)


# --- text


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        (("ĠThe", "Ġcat", "s", "Ċ", "ĠrÃ©", "<s>", ""), "The cats\n ré<s>"),
        (("▁The", "▁cat", "s", "</s>"), "The cats</s>"),
        (("[CLS]", "the", "cat", "##s", ",", "a", "dog", "[SEP]"), "[CLS] the cats, a dog [SEP]"),
        (("a</w>", "pho", "to</w>"), "a photo "),
        (("", "", "the", "cat"), "the cat"),
        ((), ""),
    ],
)
def test_pieces_are_readable(pieces: tuple[str, ...], said: str) -> None:
    found = readable(pieces)
    assert "".join(found) == said
    assert len(found) == len(pieces)


def test_a_text_breaks_into_lines() -> None:
    found = bars.lines(("The", " cat", " reads\n", " and", "", " a" * 20), 10)
    assert [[t for _, t in line] for line in found] == [["The", " cat"], [" reads⏎"], [" and"], [" a" * 20]]
    assert bars.lines((), 10) == [[]]


def test_a_text_in_the_terminal() -> None:
    ((caption, line),) = console.texts(sheet(text()))
    assert line.plain == "The cat <b> reads."
    assert "token ' mat' at 6" in caption
    shown = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor")
    shown.print(line)


# --- papers


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.said = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.said += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert "<script" not in text
    assert "http" not in text
    return reader


def kinds(pictured: lg.Attribution) -> dict[str, lg.Attribution]:
    nan = dataclasses.replace(pictured, values=torch.full((2, 6, 6), torch.nan))
    return {
        "pictures": pictured,
        "maps alone": dataclasses.replace(pictured, pictures=None),
        "frames": dataclasses.replace(pictured, values=torch.randn(2, 3, 4, 5)),
        "text": text(),
        "features": made(torch.randn(2, 60)),
        "zeros": made(torch.zeros(1, 5)),
        "one": made(torch.ones(1, 1)),
        "nan": nan,
    }


@pytest.mark.parametrize(
    "kind", ["pictures", "maps alone", "frames", "text", "features", "zeros", "one", "nan"]
)
def test_every_kind_of_map_is_drawn(pictured: lg.Attribution, kind: str) -> None:
    found = kinds(pictured)[kind]
    figure = found.show(title="$a$ <b>")
    figure.canvas.draw()
    box = figure.bbox
    for axes in figure.axes:
        inside = axes.get_window_extent()
        assert inside.x0 >= 0
        assert inside.y0 >= 0
        assert inside.x1 <= box.width
        assert inside.y1 <= box.height
    reader = read(found._repr_html_())
    assert "FullGrad+, balanced" in reader.said
    images = [a["src"] for t, a in reader.tags if t == "img"]
    for source in images:
        head, _, body = source.partition(",")
        assert head == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(body))).verify()


def test_a_notebook_needs_no_matplotlib(pictured: lg.Attribution, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    read(pictured._repr_html_())
    many = made(torch.randn(20, 2, 2))
    assert "4 more samples are not drawn" in read(many._repr_html_()).said


def test_text_in_html_is_on_its_colours() -> None:
    reader = read(text()._repr_html_())
    assert "The cat <b> reads." in reader.said
    spans = {a["title"]: a["style"] for t, a in reader.tags if t == "span" and "title" in a}
    assert f"background:{palette.SIGNED[0]}" in spans["-1"]


def test_the_same_words_on_every_paper(pictured: lg.Attribution, tmp_path: Path) -> None:
    grid = [[pictured, dataclasses.replace(pictured, policy="")]]
    for ending in paper.ENDINGS:
        lg.draw(grid, tmp_path / f"a{ending}", title="two & two", names=["one", "two"])
    svg = "".join(ET.parse(tmp_path / "a.svg").getroot().itertext())
    html = read((tmp_path / "a.html").read_text("utf-8")).said
    for said in (svg, html):
        for part in ("two & two", "FullGrad+, plain", "class 3 (tiger shark), output 1", "10⁻⁷"):
            assert part in said
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    with Image.open(tmp_path / "a.png") as drawn:
        assert min(drawn.size) > 500


def test_pictures_in_one_figure_are_of_one_size(pictured: lg.Attribution) -> None:
    figure = lg.draw([[pictured, pictured], [pictured]])
    shown = [a for a in figure.axes if a.images and not a.get_yticks().size]
    figure.canvas.draw()
    sizes = {tuple(np.round(a.get_window_extent().size)) for a in figure.axes if not a.axison}
    assert len(sizes) == 1, shown


def test_what_the_model_saw_is_saved_with_it(pictured: lg.Attribution, tmp_path: Path) -> None:
    for ending in ("npz", "safetensors", "json"):
        again = lg.Attribution.load(pictured.save(tmp_path / f"a.{ending}"))
        assert again.pictures is not None
        assert again.pictures.dtype == torch.uint8
        assert torch.equal(again.pictures, pictured.pictures)


def test_each_input_has_a_row(pictured: lg.Attribution) -> None:
    """Its own name, its own map, the scale of the method; a picture stays with the map that lies on it."""
    ids = torch.tensor([[3.0, -1.0, 0.5]] * len(pictured.values))
    both = dataclasses.replace(pictured, others={"input_ids": ids})
    page = sheet([both, both], names=[f"n{i}" for i in range(len(both.values))])
    assert [row.name for row in page.rows[:2]] == ["n0", "input_ids"]
    first, other = page.rows[:2]
    assert first.picture is not None
    assert other.picture is None
    assert [c.values.tolist() for c in other.cells] == [[3.0, -1.0, 0.5]] * 2
    assert {c.scale for c in (*first.cells, *other.cells)} == {first.cells[0].scale}
    with pytest.raises(InputError, match="samples, and 9 names"):
        sheet(both, names=["x"] * 9)


def test_a_text_beside_a_picture_keeps_its_pieces(pictured: lg.Attribution) -> None:
    count = len(pictured.values)
    others = {"input_ids": torch.ones(count, 2)}
    both = dataclasses.replace(pictured, others=others, tokens=(("ĠThe", "Ġcat"),) * count)
    assert sheet(both).rows[1].pieces == ("The", " cat")
