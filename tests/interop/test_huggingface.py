"""Models of Hugging Face: inputs by name, embeddings as inputs, a ``ModelOutput``; and Captum on them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import libragrad_fx as lg
from tests.between import fast_first
from tests.interop.matrix import randomised

Tensor = torch.Tensor
attr = pytest.importorskip("captum.attr", reason="needs captum (extra: dev)")
transformers = pytest.importorskip("transformers", reason="needs transformers (extra: models)")
MAKE = {"trace": lg.trace, "transform": lg.transform}
Text = dict[str, Tensor]


@pytest.fixture(scope="module")
def bert() -> tuple[Any, Text, Text]:
    """A classifier of two layers; ids and a mask; the embeddings of those ids, and the mask."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    model = randomised(transformers.BertForSequenceClassification(config).double())
    ids, mask = torch.randint(1, 50, (2, 7)), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    embedded = model.bert.embeddings.word_embeddings(ids).detach()
    by_id = {"input_ids": ids, "attention_mask": mask}
    return model, by_id, {"inputs_embeds": embedded, "attention_mask": mask}


@pytest.fixture(scope="module")
def made(bert: Any) -> Callable[[str, int], Any]:
    """The model as captured with its first or second inputs."""
    return functools.cache(lambda make, inputs: MAKE[make](bert[0], bert[inputs]))


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKE)
def test_inputs_embeds(make: str, bert: Any, made: Any) -> None:
    model, by_id, inputs = bert
    of_ids, gm = made(make, 1), made(make, 2)
    given = gm(**inputs)
    assert type(given) is type(model(**inputs))
    assert torch.equal(given.logits, model(**inputs).logits)

    def wrapped(module: Any) -> Any:
        return lambda embedded, mask: module(inputs_embeds=embedded, attention_mask=mask).logits

    for name, method, options in (
        ("InputXGradient", "input_x_gradient", {}),
        ("IntegratedGradients", "integrated_gradients", {"n_steps": 8}),
    ):
        found, known = (
            getattr(attr, name)(wrapped(m)).attribute(
                inputs["inputs_embeds"].clone(), target=1,
                additional_forward_args=(inputs["attention_mask"],), **options,
            ).detach()
            for m in (gm, model)
        )  # fmt: skip
        assert torch.equal(found, known) is (make == "trace")
        own = lg.attribute(gm, inputs, 1, method=method, steps=8, resolution="pixels")
        torch.testing.assert_close(own.values, found.sum(-1))
        other = lg.attribute(of_ids, by_id, 1, method=method, steps=8, resolution="pixels")
        torch.testing.assert_close(own.values, other.values)  # of ids, the signal starts at the embeddings


@pytest.mark.parametrize("make", fast_first(["transform", "trace"], 1))
def test_layers_of_token_ids(make: str, bert: Any, made: Any) -> None:
    model, inputs, _ = bert
    gm, path = made(make, 1), "bert.embeddings.word_embeddings"

    def explained(module: Any, name: str, **options: Any) -> Tensor:
        def forward(ids: Tensor, mask: Tensor) -> Tensor:
            return module(input_ids=ids, attention_mask=mask).logits

        ids, mask = inputs.values()
        method = getattr(attr, name)(forward, module.get_submodule(path))
        return method.attribute(ids, target=1, additional_forward_args=(mask,), **options).detach()

    for name, options in (("LayerIntegratedGradients", {"n_steps": 8}), ("LayerGradientXActivation", {})):
        found, known = explained(gm, name, **options), explained(model, name, **options)
        assert torch.equal(found, known) is (make == "trace")
    own = lg.attribute(gm, inputs, 1, method="input_x_gradient", resolution="pixels").values
    torch.testing.assert_close(own, found.sum(-1))


def test_text_sums_up_to_the_logit(bert: Any, made: Any) -> None:
    model, inputs, _ = bert
    gm = made("transform", 1)
    found = lg.attribute(gm, inputs, [1, 2])
    assert found.values.shape == (2, 7)
    assert torch.equal(found.output, model(**inputs).logits[[0, 1], [1, 2]].detach())
    assert found.completeness_error.max() < 1e-10
