"""The trained zoo: every model can be made, missing weights are named, a text's evidence decides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from libragrad_fx.demo import sentences, sources
from libragrad_fx.errors import InputError
from zoo import trained
from zoo.scenes import SPLITS, Split

pytest.importorskip("timm", reason="timm is not installed: pip install timm")
pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")


def inputs(name: str) -> tuple[torch.Tensor, int]:
    """Two samples for a model, and how many logits it returns."""
    if trained.recipe(name).data == "sentences":
        return sentences.encoded([sentences.sentence("val", i) for i in range(2)]), len(sentences.LABELS)
    if trained.recipe(name).data == "tris":
        return torch.randn(2, 3, 64, 64), 2
    return torch.randn(2, 3, 96, 96), 10


@pytest.mark.parametrize("name", trained.MODELS)
def test_every_model_can_be_made(name: str) -> None:
    x, classes = inputs(name)
    model = trained.recipe(name).make().eval()
    with torch.no_grad():
        both, first = model(x), model(x[:1])
    assert both.shape == (2, classes)
    torch.testing.assert_close(both[:1], first, rtol=1e-4, atol=1e-4)  # samples do not mix


@pytest.mark.parametrize("name", ["mixer", "clip", "llama"])
def test_weights_come_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model = pytest.importorskip("safetensors.torch").save_model
    monkeypatch.setenv(sources.VARIABLE, str(tmp_path))
    x, _ = inputs(name)
    torch.manual_seed(3)
    model = trained.recipe(name).make().eval()
    trained.folder().mkdir()
    save_model(model, trained.weights(name, 7).as_posix())
    loaded = trained.load(name, 7)
    assert not loaded.training
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_what_was_not_trained_is_said_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sources.VARIABLE, str(tmp_path))
    for call in (trained.load, trained.about):
        with pytest.raises(FileNotFoundError, match=r"train_zoo.py --only eva02 --seed 9"):
            call("eva02", 9)
        with pytest.raises(InputError, match="no trained model 'resnet'"):
            call("resnet")


trained_here = [
    (n, seed) for n, r in trained.MODELS.items() for seed in r.seeds if trained.weights(n, seed).is_file()
]


@pytest.mark.skipif(not trained_here, reason="nothing is trained here: python tools/train_zoo.py")
@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), trained_here)
def test_what_was_trained_is_no_chance(name: str, seed: int) -> None:
    """Half a dozen standard errors above chance on new samples."""
    from zoo import scenes

    model, recipe = trained.load(name, seed), trained.recipe(name)
    if recipe.data == "sentences":
        drawn = [sentences.sentence("test", i, seed=1) for i in range(200)]
        x, y = sentences.encoded(drawn), torch.tensor([s.label for s in drawn])
    else:
        found = [scenes.scene("test", i, "scenes", seed=1) for i in range(200)]
        x = torch.stack([scenes.normalised(one.picture) for one in found])
        y = torch.tensor([one.label for one in found])
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == y).double().mean().item()
    assert accuracy > 0.25


# --- sentences


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(SPLITS), st.integers(0, 10**9), st.integers(0, 5))
def test_the_evidence_decides(split: Split, index: int, seed: int) -> None:
    """The label is what the two words of evidence say; each split has its own sentences."""
    one = sentences.sentence(split, index, seed)
    assert one == sentences.sentence(split, index, seed)
    assert sentences.split_of(one.words) == split
    said = {w for w, decides in zip(one.words, one.evidence, strict=True) if decides}
    past = any(w in said for w in sentences._ADVERBS[1])
    plural = any(forms[1] in said for forms in sentences._NOUNS)
    assert len(said) == 2
    assert one.label == 2 * past + plural


def test_other_words_do_not_tell() -> None:
    """Among the sentences are such as name a noun of the other number and a verb of the other tense."""
    drawn = [sentences.sentence("train", i) for i in range(300)]
    other = [
        any(forms[1 - one.label % 2] in one.words for forms in sentences._NOUNS) for one in drawn
    ]
    assert sum(other) > 100
    assert {one.label for one in drawn} == {0, 1, 2, 3}
    assert max(len(one.words) for one in drawn) <= sentences.LENGTH
    ids = sentences.encoded(drawn)
    for one, row in zip(drawn, ids.tolist(), strict=True):
        assert [sentences.WORDS[i] for i in row if i] == [*one.words]


def test_bad_arguments_of_sentences_are_named() -> None:
    with pytest.raises(InputError, match="no split 'dev'"):
        sentences.sentence("dev", 0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="must not be negative"):
        sentences.sentence("val", 0, -1)
