"""Language and image-text models: next tokens, classes, spans, tokens, generations, likeness."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.errors import InputError
from tests.between import fast_first
from tests.explain.test_call import llama, picture, tokenizer

F64 = torch.float64
TEXTS = ["the cat sat on the mat", "a dog"]
FLOAT32 = 1e-7  # of outputs below 1: transformers' RMSNorm computes in float32, also of a model in float64
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@functools.cache
def bert(kind: str, names: tuple[str, ...] = ("bad", "good")) -> Any:
    import transformers

    torch.manual_seed(0)
    labels = dict(enumerate(names))
    config = transformers.BertConfig(vocab_size=9, max_position_embeddings=16, id2label=labels, **SMALL)
    model = getattr(transformers, f"BertFor{kind}")(config).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def test_a_word_is_a_target() -> None:
    model, words = llama(), tokenizer()
    found = lg.attribute(model, TEXTS, "dog", processor=words, method="fullgrad")
    assert found.target == ((5, 8), (1, 8))
    assert found.labels == ("dog", "dog")
    logits = model(**words(TEXTS, return_tensors="pt", padding=True)).logits
    want = torch.stack([logits[0, 5, 8], logits[1, 1, 8]])
    torch.testing.assert_close(found.output, want.detach())
    assert float(found.completeness_error.max()) < FLOAT32
    number = lg.attribute(model, TEXTS, 8, processor=words, method="fullgrad")
    torch.testing.assert_close(number.values, found.values)
    each = lg.attribute(model, TEXTS, ["dog", "cat"], processor=words, method="fullgrad", batch_size=1)
    torch.testing.assert_close(each.output, torch.stack([logits[0, 5, 8], logits[1, 1, 3]]).detach())


@pytest.mark.parametrize("method", ["raw_attention", "rollout", "genatt", "tokentm"])
def test_attention_is_followed_to_the_end_of_each_text(method: str) -> None:
    model, words = llama(), tokenizer()
    found = lg.attribute(model, TEXTS, processor=words, method=method)
    for i, text in enumerate(TEXTS):
        alone = lg.attribute(model, text, processor=words, method=method)
        n = alone.values.shape[1]
        torch.testing.assert_close(found.values[i, :n], alone.values[0], rtol=1e-6, atol=1e-9)


def test_this_word_and_not_that() -> None:
    model, words = llama(), tokenizer()
    found = lg.attribute(model, TEXTS, "dog", against=["cat", "mat"], processor=words, method="fullgrad")
    targets = ["dog", ["cat", "mat"]]
    this, that = lg.attribute_each(model, TEXTS, targets, processor=words, method="fullgrad")
    torch.testing.assert_close(found.values, this.values - that.values, rtol=0, atol=FLOAT32)
    assert found.labels == ("dog against cat", "dog against mat")


def test_words_that_are_no_target() -> None:
    model, words = llama(), tokenizer()
    with pytest.raises(InputError, match="is 2 tokens of this model"):
        lg.attribute(model, TEXTS, "the dog", processor=words)
    with pytest.raises(InputError, match="3 targets for 2 texts"):
        lg.attribute(model, TEXTS, ["dog", "cat", "mat"], processor=words)
    with pytest.raises(InputError, match="give an index instead of 'dog'"):
        lg.attribute(nn.Linear(4, 3), torch.randn(2, 4), "dog", method="fullgrad")


def test_classes_of_a_text_have_names() -> None:
    model, words = bert("SequenceClassification", names=("bad", "good")), tokenizer()
    found = lg.attribute(model, TEXTS, "good", processor=words)
    number = lg.attribute(model, TEXTS, 1, processor=words)
    assert torch.equal(found.values, number.values)
    assert found.labels == number.labels == ("good", "good")
    assert lg.attribute(model, TEXTS, -1, processor=words).labels == ("good", "good")
    own = lg.attribute(model, TEXTS, processor=words)
    assert set(own.labels) <= {"bad", "good"}
    with pytest.raises(InputError, match="no classes are called 'goood'; did you mean good"):
        lg.attribute(model, TEXTS, "goood", processor=words)


@pytest.mark.slow
def test_a_span_answers_a_question() -> None:
    model, words = bert("QuestionAnswering"), tokenizer()
    inputs = {"text": ["the cat", "a dog"], "text_pair": ["sat on the mat", "a mat"]}
    found = lg.attribute(model, inputs, processor=words, method="fullgrad")
    y = model(**words(inputs["text"], inputs["text_pair"], return_tensors="pt", padding=True))
    for i, (a, b) in enumerate(found.target):
        assert a <= b < (6, 4)[i]
        torch.testing.assert_close(found.output[i], (y.start_logits[i, a] + y.end_logits[i, b]).detach())
    assert float(found.completeness_error.max()) < 1e-10
    given = lg.attribute(model, inputs, lg.Span([(1, 2), (0, 3)]), processor=words)
    assert given.target == ((1, 2), (0, 3))


@pytest.mark.slow
def test_a_token_has_a_class() -> None:
    model, words = bert("TokenClassification", names=("a", "b", "c")), tokenizer()
    found = lg.attribute(model, TEXTS, (1, 2), processor=words, method="fullgrad")
    want = model(**words(TEXTS, return_tensors="pt", padding=True)).logits[:, 1, 2].detach()
    torch.testing.assert_close(found.output, want)
    with pytest.raises(InputError, match="say which target"):
        lg.attribute(model, TEXTS, processor=words)


# BERT counts positions from the first token, padding or not: padded on the left it says something else
@pytest.mark.parametrize(("kind", "side"), fast_first(
    [("llama", "left"), ("llama", "right"), ("bert", "right")], 2
))
def test_padding_changes_nothing(kind: str, side: str) -> None:
    words = tokenizer()
    words.padding_side = side
    model = llama() if kind == "llama" else bert("SequenceClassification")
    found = lg.attribute(model, TEXTS, 1, processor=words, method="fullgrad_plus")
    assert found.tokens is not None
    for i, text in enumerate(TEXTS):
        alone = lg.attribute(model, text, 1, processor=words, method="fullgrad_plus")
        real = torch.tensor([bool(t) for t in found.tokens[i]])
        torch.testing.assert_close(found.output[i], alone.output[0])
        torch.testing.assert_close(found.values[i, real], alone.values[0], rtol=1e-8, atol=1e-10)


def test_every_token_of_a_generation() -> None:
    model, words = llama(), tokenizer()
    rows = lg.attribute_generation(model, "the cat sat", 4, processor=words, method="fullgrad")
    assert len(rows) == 4
    whole = rows[0].tokens
    assert all(r.tokens == whole and len(r.tokens[0]) == 7 for r in rows)
    for i, row in enumerate(rows):
        assert row.labels[0] == whole[0][3 + i]
        assert not bool(row.values[0, 3 + i :].any())
        assert float(row.completeness_error.max()) < FLOAT32
    ids = words("the cat sat", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(rows[0].output[0], model(ids).logits[0, -1].max().detach())
    given = lg.attribute_generation(model, "the cat sat", "on the mat", processor=words)
    assert [r.labels[0] for r in given] == ["on", "the", "mat"]
    with pytest.raises(InputError, match="no tokens"):
        lg.attribute_generation(model, "the cat sat", "", processor=words)


def clip() -> tuple[Any, Any]:
    import transformers

    torch.manual_seed(0)
    text = {"vocab_size": 9, "max_position_embeddings": 8, "eos_token_id": 8, **SMALL}
    vision = {"image_size": 32, "patch_size": 8, **SMALL}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = transformers.CLIPModel(config).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    words = tokenizer()

    def processor(text: list[str], images: list[Any], **options: Any) -> dict[str, Any]:
        from tests.explain.test_call import to_tensor

        made = words(text, **options)
        return {**made, "pixel_values": torch.stack([to_tensor(i) for i in images])}

    processor.tokenizer = words
    return model, processor


@pytest.mark.slow
def test_two_prompts_on_one_picture_are_two_maps() -> None:
    model, processor = clip()
    inputs = {"text": ["a cat", "the dog"], "images": [picture(0), picture(0)]}
    target = lg.Likeness("image_embeds", "text_embeds")
    found = lg.attribute(model, inputs, target, processor=processor, method="fullgrad")
    y = model(**processor(**inputs, return_tensors="pt", padding=True))
    cosines = torch.nn.functional.cosine_similarity(y.image_embeds, y.text_embeds)
    torch.testing.assert_close(found.output, 100 * cosines.detach())
    assert float(found.completeness_error.max()) < 1e-8
    picture_maps = found.values if found.grid else found.others["pixel_values"]
    assert not torch.allclose(picture_maps[0], picture_maps[1])
    one = {k: v[:1] for k, v in inputs.items()}
    alone = lg.attribute(model, one, target, processor=processor, method="fullgrad")
    torch.testing.assert_close(alone.values, found.values[:1], rtol=1e-8, atol=1e-10)
    with pytest.raises(InputError, match="the output has no nothing"):
        lg.attribute(model, inputs, lg.Likeness("nothing", "text_embeds"), processor=processor)
    with pytest.raises(InputError, match="each sample needs one of everything"):
        lg.attribute(model, inputs | {"text": "a cat"}, target, processor=processor)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.gelu(self.up(self.norm(self.embed(ids))))).mean(1)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("chunk", [2, 32])
def test_likeness_of_two_texts_by_pairs(balanced: bool, chunk: int) -> None:
    """Against its definition: products of the maps of every entry, one backward at a time."""
    model = Encoder().double().eval()
    a, b = torch.randint(11, (2, 4)), torch.randint(11, (2, 6))
    module = (lg.transform if balanced else lg.trace)(model, a)
    embed = lambda y: lg.unit(y)  # noqa: E731
    found = lg.similarity(module, a, b, embed=embed, chunk=chunk)
    want = torch.zeros(2, 4, 6, dtype=F64)
    for k in range(5):
        left, right = (
            lg.attribute(module, ids, lambda y: lg.unit(y)[:, k], method="input_x_gradient").values  # noqa: B023
            for ids in (a, b)
        )
        want += left[:, :, None] * right[:, None, :]
    torch.testing.assert_close(found.values, want, rtol=1e-9, atol=1e-12)
    cosines = torch.nn.functional.cosine_similarity(model(a), model(b)).detach()
    torch.testing.assert_close(found.output, cosines)
    assert float(found.completeness_error.max()) < 1e-12
    with pytest.raises(InputError, match=r"vectors \(B, D\), and gave \(2,\)"):
        lg.similarity(module, a, b, embed=lambda y: y.sum(1))
