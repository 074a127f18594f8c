"""Texts: as ``attribute`` reads them, in batches of one length, with next tokens as classes."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import libragrad_fx as lg
from libragrad_fx.errors import InputError
from libragrad_fx.evaluate import Config, Share, evaluate, runner
from libragrad_fx.evaluate import inputs as reading
from libragrad_fx.evaluate.config import MethodSpec, ModelSpec
from libragrad_fx.evaluate.data import Item
from libragrad_fx.evaluate.data.items import hashed
from libragrad_fx.evaluate.examples import example
from libragrad_fx.evaluate.measures import Case, Contrast, cases, places, tokens
from libragrad_fx.evaluate.report import report
from libragrad_fx.evaluate.store import EXAMPLES, RESULTS
from libragrad_fx.evaluate.strips import strips
from libragrad_fx.evaluate.subject import Subject, loaded
from libragrad_fx.evaluate.tables import Results
from tests.evaluate import small, words

CPU = torch.device("cpu")
FLOAT32 = 1e-6  # transformers' RMSNorm computes in float32, also of a model in float64


def subject(model: dict[str, Any]) -> Subject:
    return loaded(ModelSpec(**model), CPU, "float64")


@pytest.fixture(scope="module")
def llama() -> Subject:
    return subject(words.MODEL)


@pytest.fixture(scope="module")
def bert() -> Subject:
    return subject(words.BERT)


@pytest.fixture(scope="module")
def once(llama: Subject, bert: Subject) -> Iterator[None]:
    """Models that are loaded, and so captured, once for several evaluations."""
    of = {words.MODEL["load"]: llama, words.BERT["load"]: bert}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "loaded", lambda spec, *_: of[spec.load])
        yield


@pytest.fixture(scope="module")
def made(once: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder and the results of one process."""
    folder = tmp_path_factory.mktemp("texts")
    return folder, rows(evaluate(Config.of(words.config()), folder))


def rows(file: Path | None) -> list[dict[str, Any]]:
    assert file is not None
    return parquet.read_table(file).to_pylist()


def batch_of(of: Subject, data: Any, batch: int = 8) -> list[Case]:
    return cases(of, [of.inputs.sample(data.get(i)) for i in range(data.count)], batch)


# --- what a model gets


def test_batches_are_of_one_length_and_without_padding(llama: Subject) -> None:
    found = batch_of(llama, words.prompts())
    assert [(case.ids, case.size) for case in found] == [(("0", "1", "3"), (6,)), (("2", "4"), (3,))]
    for case in found:
        texts = [words.TEXTS[int(i)] for i in case.ids]
        alone = words.tokenizer()(texts, return_tensors="pt")
        assert torch.equal(case.inputs["input_ids"], alone["input_ids"])
        assert bool(case.inputs["attention_mask"].all())


def test_next_tokens_are_classes(llama: Subject) -> None:
    for case in batch_of(llama, words.prompts()):
        wanted = words.llama()(**case.inputs).logits[:, -1]
        assert torch.equal(case.logits, wanted)
        assert torch.equal(case.target("predicted"), wanted.argmax(1))
        assert case.labels == (words.WORDS.index("dog"),) * len(case)


def test_a_classifier_of_texts_has_its_own_classes(bert: Subject) -> None:
    (case, other) = batch_of(bert, words.feelings())
    assert torch.equal(case.logits, words.bert()(**case.inputs).logits)
    assert (case.labels, other.labels) == ((0, 1, 1), (0, 0))
    assert case.against == (0, 0, 0)  # "bad", by its name


def test_a_contrast_is_a_choice_between_two(llama: Subject) -> None:
    """Its logits are [0, z_a - z_b]; a sample that names nothing to compare with has no class."""
    for case in batch_of(llama, words.prompts()):
        dog, cat = (case.logits[:, words.WORDS.index(w)] for w in ("dog", "cat"))
        one = case.contrasted
        asked = [int(i) for i, name in enumerate(case.ids) if name != "2"]
        assert torch.equal(one.logits[asked], torch.stack([torch.zeros_like(dog), dog - cat], 1)[asked])
        wanted = torch.tensor([-1 if name == "2" else 1 for name in case.ids])
        assert torch.equal(one.target("contrast"), wanted)
        assert torch.equal(one.named(wanted), wanted.masked_fill(wanted == 1, words.WORDS.index("dog")))
        assert [m.keys() for m in one.masks] == [{1} if n != "2" else set() for n in case.ids]


def test_a_contrast_of_a_model_of_one_logit() -> None:
    z = torch.tensor([[3.0], [-2.0]])
    both = torch.cat([torch.zeros(2, 1), z], 1)
    assert torch.equal(Contrast(torch.tensor([[1, 0], [0, 1]]))(both), torch.tensor([[3.0], [2.0]]))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["input_x_gradient", "fullgrad_plus", "rollout"])
def test_maps_are_those_of_attribute(llama: Subject, method: str) -> None:
    """Of a text, a word and another one, asked for by their names."""
    processor, model = words.tokenizer(), llama.module.model  # without the last token's choice
    for case in batch_of(llama, words.prompts()):
        one = case.contrasted
        found = one.attribution(MethodSpec(method=method), "libra", one.target("contrast"), "logit")
        for i, name in enumerate(case.ids):
            if name == "2":
                continue
            text = words.TEXTS[int(name)]
            alone = lg.attribute(model, text, "dog", against="cat", processor=processor, method=method)
            torch.testing.assert_close(found.values[i], alone.values[0], rtol=0, atol=FLOAT32)
            torch.testing.assert_close(found.output[i], alone.output[0], rtol=0, atol=FLOAT32)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(words.WORDS[2:9]), st.booleans()), min_size=1, max_size=9))
def test_a_token_is_marked_if_one_of_its_characters_is(said: list[tuple[str, bool]]) -> None:
    """Brackets are no characters of the text."""
    text = " ".join(w for w, _ in said)
    mask = np.array([m for w, mark in said for m in (*[mark] * len(w), False)][:-1])
    for of in (READERS["llama"], READERS["bert"]):
        marks = of.sample(Item("a", text, masks={0: mask})).masks[0].tolist()
        ends = [False] if of is READERS["bert"] else []
        assert marks == [*ends, *(m for _, m in said), *ends]


READERS = {
    "llama": reading.Texts(torch.nn.Linear(1, 1), words.tokenizer(), True),
    "bert": reading.Texts(torch.nn.Linear(1, 1), words.bracketed(), False),
}


def test_noise_is_of_usual_tokens_and_the_same_each_time() -> None:
    for reader in READERS.values():
        one, other = (reader.noise((5,)) for _ in range(2))
        assert len(one) == 2
        for a, b in zip(one, other, strict=True):
            assert isinstance(a, dict)
            assert isinstance(b, dict)
            assert torch.equal(a["input_ids"], b["input_ids"])
            assert not {*a["input_ids"].tolist()} & {*reader.tokenizer.all_special_ids}
            assert a["attention_mask"].tolist() == [1] * 5


# --- what is measured


@pytest.mark.slow
def test_every_number_is_there(made: tuple[Path, list[dict[str, Any]]]) -> None:
    found = [r for r in made[1] if r["metric"] != "pixels"]
    assert {r["error"] for r in found} == {None}
    assert {r["how"] for r in found if r["metric"] == "tokens"} == {"removed"}
    dog = words.WORDS.index("dog")
    assert {r["label"] for r in found} == {dog}
    assert {r["explained"] for r in found if r["target"] != "predicted"} == {dog}
    images = {(r["metric"], r["target"]): set() for r in found}
    for r in found:
        images[r["metric"], r["target"]].add(r["image"])
    both, named = {"0", "1", "2", "3", "4"}, {"0", "1", "3", "4"}
    assert images == {
        ("tokens", "predicted"): both, ("tokens", "contrast"): named, ("places", "label"): both,
        ("places", "contrast"): named, ("completeness", "contrast"): named,
    }  # fmt: skip


def test_balanced_maps_of_a_contrast_add_up(made: tuple[Path, list[dict[str, Any]]]) -> None:
    by = {
        p: [r["value"] for r in made[1] if r["measure"] == "relative_error" and r["policy"] == p]
        for p in ("autograd", "libra")
    }
    assert max(by["libra"]) < 1e-4 < min(by["autograd"])


def test_the_drop_of_a_contrast_is_that_of_the_difference(llama: Subject) -> None:
    """By hand: the three most relevant of six tokens are gone. The model reads its last token by its place,
    so that one stays."""
    (case, *_) = batch_of(llama, words.prompts())
    one = case.contrasted
    spec = Config.of(words.config()).metrics.tokens
    classes = one.target("contrast")
    found = one.attribution(MethodSpec(method="input_x_gradient"), "libra", classes, "logit")
    values = {r.sample: r.value for r in tokens(one, found, classes, spec) if r.measure == "mif_logit"}
    assert one.seen.tokens.cells == [*range(5)]
    for i in range(3):
        gone = found.values[i, :5].topk(2).indices  # floor(0.5 * 5)
        left = torch.tensor([[c for c in range(5) if c not in gone]]).expand(3, -1)
        logits = one.seen.kept(left)[i]
        dog, cat = (words.WORDS.index(w) for w in ("dog", "cat"))
        clean = case.logits[i]
        drop = (clean[dog] - clean[cat]) - (logits[dog] - logits[cat])
        assert values[i] == pytest.approx(float(drop), abs=1e-9)


def test_localisation_by_hand(llama: Subject) -> None:
    """Pointing: whether the largest value is at the word that is marked, the second of each text."""
    (case, *_) = batch_of(llama, words.prompts())
    spec = Config.of(words.config()).metrics.places
    for at in range(6):
        values = torch.zeros(3, 6, dtype=torch.float64)
        values[:, at] = 1.0
        base = case.attribution(MethodSpec(method="random"), "autograd", case.target("label"), "logit")
        found = dataclasses.replace(base, values=values)
        hits = [r.value for r in places(case, found, case.target("label"), spec) if r.measure == "pointing"]
        assert hits == [float(at == 1)] * 3


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same(
    made: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each loads and captures the model by itself, and begins with other texts."""
    monkeypatch.setattr(runner, "loaded", loaded)
    config = Config.of(words.config(methods=["input_x_gradient"], policies=["libra"]))
    for rank in (1, 0):
        evaluate(config, tmp_path, share=Share(rank, 2))
    found = rows(tmp_path / RESULTS)
    assert found == [r for r in made[1] if (r["method"], r["policy"]) == ("input_x_gradient", "libra")]


def test_batches_have_no_say(llama: Subject) -> None:
    by: list[dict[str, torch.Tensor]] = []
    for size in (1, 8):
        found = {}
        for case in batch_of(llama, words.prompts(), size):
            method = MethodSpec(method="fullgrad_plus")
            one = case.attribution(method, "libra", case.target("label"), "logit")
            found |= dict(zip(case.ids, one.values, strict=True))
        by.append(found)
    assert [*map(len, by)] == [5, 5]
    for name, values in by[0].items():
        torch.testing.assert_close(values, by[1][name], rtol=0, atol=FLOAT32)


@pytest.mark.slow
def test_a_model_is_measured_on_its_own_sets(once: None, tmp_path: Path) -> None:
    """A language model and a classifier, each on texts of its kind."""
    sets = {n: {"load": f"tests.evaluate.words:{n}"} for n in ("prompts", "feelings")}
    models = {"llama": {**words.MODEL, "data": ["prompts"]}, "bert": {**words.BERT, "data": ["feelings"]}}
    changed = {"metrics": {"places": {"least": 0.0}}, "policies": ["autograd"], "methods": ["random"]}
    config = Config.of(words.config(data=sets, models=models, **changed))
    found = rows(evaluate(config, tmp_path))
    assert {(r["model"], r["data"]) for r in found} == {("llama", "prompts"), ("bert", "feelings")}
    assert {r["error"] for r in found} == {None}
    assert {r["explained"] for r in found if r["model"] == "bert"} == {0, 1}
    with pytest.raises(InputError, match="there is no set gone"):
        Config.of(words.config(models={"llama": {**words.MODEL, "data": ["gone"]}}))


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".md", ".html"])
def test_a_report_of_texts(
    made: tuple[Path, list[dict[str, Any]]], tmp_path: Path, ending: str
) -> None:
    text = report(made[0], tmp_path / f"report{ending}").read_text("utf-8")
    assert "llama" in text
    assert "contrast" in text


# --- what is no text, or no answer


def test_examples_of_texts_are_their_pieces(made: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = made
    rows_ = parquet.read_table(folder / EXAMPLES).to_pylist()
    assert {(r["policy"], r["method"]) for r in rows_} == {
        (p, m) for p in ("autograd", "libra") for m in ("random", "input_x_gradient")
    }
    for row in rows_:
        pieces = json.loads(row["pieces"])
        assert "".join(pieces) == words.TEXTS[int(row["image"])]
        assert (row["height"], row["width"], row["picture"]) == (1, len(pieces), None)
        assert row["explained"] == row["predicted"] in map(repr, words.WORDS)
    shown, _ = strips(Results(folder), ("autograd", "libra"))
    assert all(re.sub("<[^>]+>", "", m) in words.TEXTS for s in shown for m in s.maps.values())


def test_an_example_of_a_contrast_names_both(llama: Subject) -> None:
    (case, *_) = batch_of(llama, words.prompts(), 1)
    found: Any = type("Found", (), {"values": torch.arange(6.0)[None]})()
    row = example(case.contrasted, found, torch.tensor([1]), 0, ())
    assert row["explained"] == "'dog' against 'cat'"
    assert (row["label"], row["predicted"] in ("'dog'", "'cat'")) == ("'dog'", True)
    assert np.asarray(Image.open(io.BytesIO(row["mask"]))).tolist() == [[False, True, *[False] * 4]]
    assert example(case.contrasted, found, torch.tensor([-1]), 0, ()) == {}


def test_a_text_has_no_pixels(made: tuple[Path, list[dict[str, Any]]]) -> None:
    found = [r for r in made[1] if r["metric"] == "pixels"]
    assert {r["error"] for r in found} == {
        "InputError: a text has no pixels: its tokens are taken away by the metric tokens"
    }
    assert {r["image"] for r in found} == {"0", "1", "2", "3", "4"}


def test_samples_that_a_model_does_not_take(llama: Subject, bert: Subject) -> None:
    picture = Item("p", Image.new("RGB", (24, 24)), 0)
    with pytest.raises(InputError, match="p is a picture, and this model takes texts"):
        llama.inputs.sample(picture)
    with pytest.raises(InputError, match="t is a text, and this model takes pictures"):
        subject(small.NET).inputs.sample(Item("t", "the cat"))
    with pytest.raises(InputError, match="'the dog' is 2 tokens of this model"):
        llama.inputs.sample(Item("t", "the cat", "the dog"))
    with pytest.raises(InputError, match="no classes are called 'dog'"):
        bert.inputs.sample(Item("t", "the cat", "dog"))


def test_names_are_classes_of_texts_alone() -> None:
    with pytest.raises(InputError, match="label 'dog' is no class index"):
        Item("p", Image.new("RGB", (4, 4)), "dog")
    with pytest.raises(InputError, match="label -1 is negative"):
        Item("t", "the cat", 0, against=-1)
    with pytest.raises(InputError, match=r"is bool \(3,\), not bool \(7,\)"):
        Item("t", "the cat", masks={"dog": np.ones(3, bool)})


def test_models_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="returned LlamaForCausalLM, not a PreTrainedTokenizerBase"):
        subject({**words.MODEL, "tokenizer": words.MODEL["load"]})
    with pytest.raises(InputError, match=r"give tokenizer: package\.module:factory"):
        subject({"load": words.MODEL["load"]})
    with pytest.raises(InputError, match="the model fails on a text"):
        subject({**small.NET, "steps": None, "tokenizer": words.MODEL["tokenizer"]})
    with pytest.raises(InputError, match="steps are of pictures and a tokenizer is of texts: say one"):
        Config.of(words.config(models={"m": {**words.MODEL, "steps": "tests.evaluate.small:steps"}}))


def test_what_is_published_with_a_model_is_its_tokenizer(tmp_path: Path) -> None:
    model, tokenizer = words.llama(), words.tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = subject({"load": f"hf:{tmp_path}"})
    assert isinstance(found.inputs, reading.Texts)
    assert found.inputs.nexts
    assert found.inputs.sample(words.prompts().get(0)).label == words.WORDS.index("dog")


# --- what a number depends on


def test_another_tokenizer_or_contrast_has_another_key() -> None:
    tokenizers = words.MODEL["tokenizer"], words.BERT["tokenizer"]
    one, two = (subject({**words.MODEL, "tokenizer": name}).identity for name in tokenizers)
    assert (one.weights, one.code) == (two.weights, two.code)
    assert one.steps != two.steps
    item = words.prompts().get(0)
    changes: list[dict[str, Any]] = [
        {}, {"against": None}, {"against": "mat"}, {"label": "cat"}, {"label": 8}, {"masks": {}}
    ]  # fmt: skip
    assert len({hashed(dataclasses.replace(item, **change)) for change in changes}) == len(changes)
