"""Trained models, if ``tools/fetch.py`` got them: maps add up, and a batch of texts is each text."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

import libragrad_fx as lg
from libragrad_fx.demo import sources
from zoo import real

pytestmark = pytest.mark.slow  # SmolLM2 is captured in a minute


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(bool(sources.missing(name)), reason=sources.missing(name))


class Balanced(NamedTuple):
    """A model, its transform, and its tokenizer."""

    model: Any
    gm: Any
    tokenizer: Any


@pytest.fixture(scope="module")
def smollm2() -> Balanced:
    model, tokenizer = real.smollm2()
    # what the check at birth would run is run by the tests
    gm = lg.transform(model, real.encoded(tokenizer, [real.PROMPTS[0].text]), check=False)
    return Balanced(model, gm, tokenizer)


@pytest.fixture(scope="module")
def minilm() -> Balanced:
    encoder, tokenizer = real.minilm()
    model = real.Similarity(encoder, real.encoded(tokenizer, [real.SECOND])).eval()
    gm = lg.transform(model, real.encoded(tokenizer, [real.SENTENCES[0]]))
    return Balanced(model, gm, tokenizer)


@needs("smollm2")
@pytest.mark.parametrize("prompt", real.PROMPTS, ids=lambda p: p.right.strip())
def test_the_tokens_of_a_prompt_add_up_to_the_logit_difference(
    smollm2: Balanced, prompt: real.Prompt
) -> None:
    inputs = real.encoded(smollm2.tokenizer, [prompt.text])
    target = real.difference(smollm2.tokenizer, prompt, inputs["attention_mask"])
    found = lg.attribute(smollm2.gm, inputs, target, method="input_x_gradient")
    with torch.no_grad():
        wanted = target(smollm2.model(**inputs))
    assert float(wanted) > 1  # the model knows the answer
    torch.testing.assert_close(found.values.sum(1), wanted.double(), rtol=1e-4, atol=0)


@needs("smollm2")
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_several_lengths_in_a_batch(smollm2: Balanced, side: str) -> None:
    prompt, texts = real.PROMPTS[0], [real.PROMPTS[0].text, "Mary gave a drink to", real.PROMPTS[2].text]
    inputs = real.encoded(smollm2.tokenizer, texts, side)
    kept = inputs["attention_mask"].bool()
    assert not kept.all()
    with torch.no_grad():
        assert torch.equal(smollm2.model(**inputs).logits, smollm2.gm(**inputs).logits)
    target = real.difference(smollm2.tokenizer, prompt, kept.int())
    batch = lg.attribute(smollm2.gm, inputs, target, method="input_x_gradient").values
    assert torch.all(batch[~kept] == 0)
    for values, here, text in zip(batch, kept, texts, strict=True):
        alone = real.encoded(smollm2.tokenizer, [text])
        target = real.difference(smollm2.tokenizer, prompt, alone["attention_mask"])
        wanted = lg.attribute(smollm2.gm, alone, target, method="input_x_gradient").values[0]
        torch.testing.assert_close(values[here], wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@needs("minilm")
@pytest.mark.parametrize("method", ["fullgrad", "fullgrad_plus"])
def test_sentences_add_up_to_their_cosines(minilm: Balanced, method: str) -> None:
    inputs = real.encoded(minilm.tokenizer, real.SENTENCES)
    kept = inputs["attention_mask"].bool()
    assert not kept.all()
    batch = lg.attribute(minilm.gm, inputs, method=method)
    with torch.no_grad():
        torch.testing.assert_close(batch.output, minilm.model(**inputs))
    torch.testing.assert_close(batch.total, batch.expected, rtol=1e-4, atol=1e-5)
    for values, here, text in zip(batch.values, kept, real.SENTENCES, strict=True):
        alone = lg.attribute(minilm.gm, real.encoded(minilm.tokenizer, [text]), method=method).values[0]
        torch.testing.assert_close(values[here], alone, rtol=0, atol=1e-5 * float(alone.abs().max()))


@needs("dinov2")
def test_photographs_add_up() -> None:
    model, pictures = sources.dinov2(), real.photographs()
    gm = lg.transform(model, pictures, check=False)
    found = lg.attribute(gm, pictures, lambda y: y.norm(dim=1))
    assert found.values.shape == (2, 16, 16)
    # what the weights gave when they were first loaded
    torch.testing.assert_close(found.output, torch.tensor([38.925, 47.574]), rtol=1e-3, atol=0)
    torch.testing.assert_close(found.total, found.expected, rtol=1e-4, atol=0)
