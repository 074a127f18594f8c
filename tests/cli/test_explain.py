"""``libragrad explain`` with many inputs, methods and answers; ``libragrad methods``; Hugging Face."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import libragrad_fx as lg
from libragrad_fx import models
from libragrad_fx.attribution import METHODS
from libragrad_fx.cli import given
from libragrad_fx.errors import InputError
from tests.cli.test_cli import TINY, refusal, run, tiny
from tests.explain.test_call import llama, tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, one of them broken, and a file that is none."""
    found = tmp_path / "in"
    found.mkdir()
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(found / f"p{i}.png")
    (found / "broken.png").write_text("not a picture")
    (found / "notes.txt").write_text("not a picture either")
    return found


def drawn(file: Path) -> str:
    return "".join(ET.parse(file).getroot().itertext())


def test_a_folder_goes_on_after_a_bad_file(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "out"
    done = run("explain", folder, "--model", TINY, "-o", out)
    assert done.exit_code == 1
    assert {p.name for p in out.iterdir()} == {"p0.png", "p0.npz", "p1.png", "p1.npz"}
    (said,) = [x for x in done.stderr.splitlines() if x.startswith("failed: ")]
    assert "broken.png" in said
    assert lg.Attribution.load(out / "p1.npz").pictures is not None


def test_methods_answers_and_policies_in_one_picture(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "a.svg"
    asked = ("--method", "fullgrad_plus,gradcam", "--top", 2, "--compare", "plain")
    done = run("explain", folder / "p0.png", "--model", TINY, *asked, "-o", out)
    assert done.exit_code == 0, done.output
    said = drawn(out)
    for method in ("FullGrad+", "Grad-CAM"):
        for side in ("plain", "balanced"):
            assert said.count(f"{method}, {side}") == 2
    raw = sorted(tmp_path.glob("*.npz"))
    assert len(raw) == 8
    found = [lg.Attribution.load(p) for p in raw]
    assert {(a.method, a.policy) for a in found} == {
        (m, p) for m in ("fullgrad_plus", "gradcam") for p in ("", "libra")
    }


def test_several_inputs_on_pages_of_one_file(tmp_path: Path, folder: Path) -> None:
    done = run("explain", folder / "p*.png", "--model", TINY, "--target", "1", "-o", tmp_path / "a.html")
    assert done.exit_code == 0, done.output
    text = (tmp_path / "a.html").read_text("utf-8")
    assert "p0.png" in text
    assert "p1.png" in text
    assert {p.name for p in tmp_path.glob("*.npz")} == {"a.p0.npz", "a.p1.npz"}


def test_one_answer_against_another_and_raw_values_alone(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "{name}.json"
    asked = ("--target", "1", "--against", "3", "--resolution", "pixels", "--method", "input_x_gradient")
    done = run("explain", folder / "p0.png", "--model", TINY, *asked, "-o", out)
    assert done.exit_code == 0, done.output
    assert "class 1 against class 3" in done.stdout
    found = lg.Attribution.load(tmp_path / "p0.json")
    assert found.values.shape == (1, 32, 32)
    assert {p.name for p in tmp_path.iterdir()} == {"in", "p0.json"}


def test_what_does_not_fit_together(tmp_path: Path, folder: Path) -> None:
    two = ("explain", folder / "p0.png", folder / "p1.png", "--model", TINY)
    one = ("explain", folder / "p0.png", "--model", TINY)
    assert "holds one of 2 inputs" in refusal(*two, "-o", tmp_path / "a.png")
    assert "its ending must be one of .png" in refusal(*one, "-o", tmp_path / "a.jpg")
    assert "no method 'best'" in refusal(*one, "--method", "best")
    assert "--target or --top" in refusal(*one, "--target", "1", "--top", 2)
    assert "--against needs --target" in refusal(*one, "--against", "1")
    assert "does not name its classes" in refusal(*one, "--target", "shark")
    assert "no policy 'none'" in refusal(*one, "--compare", "none")
    assert "no pictures in" in refusal("explain", tmp_path / "*.gif", "--model", TINY)


def test_names_of_files_are_different(tmp_path: Path) -> None:
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "x.png").touch()
    found = given.items([str(tmp_path / "a"), str(tmp_path / "b" / "x.png"), str(tmp_path / "a")], False)
    assert [i.name for i in found] == ["x", "x-2"]
    assert given.places(None, ["x"]) == [Path("out.png")]
    assert given.places(None, ["x", "y"]) == [Path("out/x.png"), Path("out/y.png")]
    assert given.places("o/", ["x"]) == [Path("o/x.png")]
    raw = given.raw_place(Path("o/a.png"), ["path_averaged(x)", 3])
    assert raw == Path("o/a.path_averaged-x.3.npz")


# --- methods


def test_methods_says_what_is_supported_and_why_not() -> None:
    done = run("methods", TINY)
    assert done.exit_code == 0, done.output
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert lines["fullgrad_plus"].split()[1] == "yes"
    assert lines["rollout"].split()[1] == "no"
    assert "use fullgrad_plus" in lines["rollout"]
    found = json.loads(run("methods", TINY, "--json").stdout)
    assert list(found) == list(METHODS)
    assert found == lg.methods(tiny().eval())


@pytest.mark.slow
def test_methods_of_a_text() -> None:
    found = lg.methods(llama(), "the cat sat", processor=tokenizer())
    refused = {name: why for name, why in found.items() if why}
    assert all(METHODS[name].row and "use attcat" in why for name, why in refused.items())
    with pytest.raises(InputError, match="does not fit"):
        lg.attribute(tiny().eval(), torch.randn(1, 3, 32, 32), 9)
    assert all("does not fit" in why for why in lg.methods(tiny().eval(), target=9).values())


# --- Hugging Face


@pytest.fixture(scope="module")
def language(tmp_path_factory: Any) -> Path:
    where = tmp_path_factory.mktemp("llama")
    llama().float().save_pretrained(where)
    tokenizer().save_pretrained(where)
    return where


@pytest.mark.slow
def test_texts_of_a_language_model(tmp_path: Path, language: Path) -> None:
    out = tmp_path / "a.html"
    asked = ("--compare", "plain", "--target", "mat", "-o", out)
    done = run("explain", "the cat sat on the", "a dog", "--model", f"hf:{language}", *asked)
    assert done.exit_code == 0, done.output
    assert "the cat sat on the" in done.stdout
    assert "token 'mat' at 4" in done.stdout
    text = out.read_text("utf-8")
    assert text.count("token &#x27;mat&#x27; at") == 4
    assert lg.Attribution.load(tmp_path / "a.text-2.libra.npz").tokens == (("a", "dog"),)


def test_what_a_config_was_trained_for_decides_the_class(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    names = {0: "cat", 1: "dog"}
    made: list[Any] = [
        ViTForImageClassification(ViTConfig(**small, image_size=32, patch_size=8, id2label=names)),
        BertForSequenceClassification(BertConfig(**small, vocab_size=9)),
    ]
    for i, module in enumerate(made):
        module.save_pretrained(tmp_path / str(i))
        found = models.resolve(f"hf:{tmp_path / str(i)}")
        assert type(found.module) is type(module)
        assert found.weights == "pretrained"
    assert models.label_of(models.resolve(f"hf:{tmp_path / '0'}").module, 1) == "dog"


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    said = refusal("methods", f"hf:{tmp_path / 'none'}")
    assert "could not build hf:" in said
    assert "hf:FOLDER" in said


def test_torchvision_names_its_classes() -> None:
    module = torch.nn.Identity()
    named = models.categories(models.Loaded("torchvision:resnet18", "torchvision", module, "random"))
    assert named[1] == "goldfish"
    assert models.categories(models.Loaded("x:y", "factory", module, "")) == ()
