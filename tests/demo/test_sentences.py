"""The decoder of the demo is as good as it says."""

from __future__ import annotations

import pytest
import torch

from libragrad_fx.demo import sentences

pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")


def test_the_decoder_is_as_good_as_it_says() -> None:
    model = sentences.decoder()
    assert not model.training
    drawn = [sentences.sentence("test", i, seed=2) for i in range(200)]
    with torch.no_grad():
        answers = model(sentences.encoded(drawn)).argmax(1)
    right = (answers == torch.tensor([s.label for s in drawn])).double().mean().item()
    assert right == pytest.approx(sentences.about()["accuracy"]["sentences/test"], abs=0.02)
