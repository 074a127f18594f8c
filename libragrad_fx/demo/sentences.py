"""Sentences that a verb ends: which of "is", "are", "was", "were" comes next, and which words say so.

The subject gives the number and an adverb the tense. Nouns and verbs behind the subject have a number and a
tense of their own and must be passed over (Linzen, Dupoux and Goldberg 2016): "now the old keys that the
teacher liked near the box" is followed by "are", for "now" and "keys".
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import zlib
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import nn

from libragrad_fx.demo.data import ASSETS
from libragrad_fx.errors import InputError
from libragrad_fx.extras import need

T = TypeVar("T")
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
LABELS = ("is", "are", "was", "were")
_NOUNS = (
    ("key", "keys"), ("book", "books"), ("dog", "dogs"), ("child", "children"), ("teacher", "teachers"),
    ("car", "cars"), ("letter", "letters"), ("bird", "birds"), ("picture", "pictures"), ("man", "men"),
    ("woman", "women"), ("mouse", "mice"), ("tree", "trees"), ("box", "boxes"), ("student", "students"),
    ("house", "houses"),
)  # fmt: skip
_VERBS = (
    ("likes", "like", "liked"), ("sees", "see", "saw"), ("moves", "move", "moved"),
    ("draws", "draw", "drew"), ("needs", "need", "needed"), ("finds", "find", "found"),
)  # fmt: skip
_ADVERBS = (("now", "today", "currently", "nowadays"), ("yesterday", "then", "formerly", "once"))
_ADJECTIVES = ("old", "small", "red", "quiet", "strange", "new")
_PREPOSITIONS = ("near", "behind", "beside", "under", "with", "above")

WORDS = (
    "<pad>", "the", "that", *_PREPOSITIONS, *_ADJECTIVES, *(w for forms in _ADVERBS for w in forms),
    *(w for forms in _NOUNS for w in forms), *(w for forms in _VERBS for w in forms),
)  # fmt: skip
LENGTH = 14  # words of the longest sentence


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A sentence without its last verb.

    label:    an index into ``LABELS``
    evidence: for each word, whether the label depends on it
    """

    words: tuple[str, ...]
    label: int
    evidence: tuple[bool, ...]


def sentence(split: Split, index: int, seed: int = 0) -> Sentence:
    """One sentence: the same for the same arguments. No sentence is in two splits.

    Raises:
        InputError: no such split, or a negative index or seed.
    """
    return of_split(split, index, seed, _drawn, lambda found: found.words)


def of_split(
    split: Split, index: int, seed: int, draw: Callable[[np.random.Generator], T],
    words: Callable[[T], tuple[str, ...]],
) -> T:  # fmt: skip
    """What is drawn until its words belong to a split: the same for the same arguments.

    Raises:
        InputError: as ``sentence``.
    """
    if split not in SPLITS:
        raise InputError(f"no split {split!r} of sentences: choose from {', '.join(SPLITS)}")
    if index < 0 or seed < 0:
        raise InputError(f"index {index} and seed {seed} of a sentence must not be negative")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    while split_of(words(found := draw(rng))) != split:
        pass
    return found


def split_of(words: tuple[str, ...]) -> Split:
    """The split that a sentence belongs to, by a checksum: 8 in 10 are for train."""
    tenth = zlib.crc32(" ".join(words).encode()) % 10
    return "val" if tenth == 8 else "test" if tenth == 9 else "train"


def encoded(sentences: list[Sentence]) -> torch.Tensor:
    """int64 (B, ``LENGTH``): each sentence's words, then padding (0)."""
    rows = [[_IDS[w] for w in s.words] for s in sentences]
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])


_IDS = {w: i for i, w in enumerate(WORDS)}


def tokenizer() -> Any:
    """Of transformers, with these words as its tokens: "the keys near the box" has five."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel(_IDS, unk_token=WORDS[0]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=WORDS[0], model_input_names=["input_ids"]
    )


# --- the decoder that was trained on them


class Labels(nn.Module):
    """A transformers classifier as a function of token ids (B, T) alone -> logits (B, labels)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.net(input_ids=input_ids, use_cache=False).logits


def untrained() -> nn.Module:
    """A small Llama with random weights: token ids (B, T) -> logits (B, 4), of ``LABELS``.

    Raises:
        LibraGradError: transformers is not installed.
    """
    transformers = need("transformers", "models")
    options: dict[str, Any] = {
        "vocab_size": len(WORDS), "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH, "num_labels": len(LABELS),
        "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return Labels(transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**options)))


def decoder() -> nn.Module:
    """``untrained`` with the weights that come with this package, in eval mode.

    Raises:
        LibraGradError: transformers is not installed.
    """
    from safetensors.torch import load_model

    model = untrained()
    with importlib.resources.as_file(ASSETS / "llama-0.safetensors") as path:
        load_model(model, path.as_posix())
    return model.eval()


def about() -> dict[str, Any]:
    """How the decoder was trained, with its ``accuracy`` in [0, 1] by set."""
    return json.loads((ASSETS / "llama-0.json").read_text("utf-8"))


# --- how a sentence is drawn


def _drawn(rng: np.random.Generator) -> Sentence:
    plural, past = (int(rng.integers(2)) for _ in range(2))
    subject = _noun(plural, rng)
    words, evidence = list(subject), [False] * (len(subject) - 1) + [True]
    for _ in range(rng.integers(3)):
        words += _phrase(rng) if rng.random() < 0.5 else _clause(rng)
    evidence += [False] * (len(words) - len(evidence))
    adverb, place = str(rng.choice(_ADVERBS[past])), 0 if rng.random() < 0.5 else len(words)
    words.insert(place, adverb)
    evidence.insert(place, True)
    return Sentence(tuple(words), 2 * past + plural, tuple(evidence))


def _noun(plural: int, rng: np.random.Generator) -> list[str]:
    noun = _NOUNS[rng.integers(len(_NOUNS))][plural]
    return ["the", str(rng.choice(_ADJECTIVES)), noun] if rng.random() < 0.4 else ["the", noun]


def _phrase(rng: np.random.Generator) -> list[str]:
    return [str(rng.choice(_PREPOSITIONS)), *_noun(int(rng.integers(2)), rng)]


def _clause(rng: np.random.Generator) -> list[str]:
    plural, past = (int(rng.integers(2)) for _ in range(2))
    verb = _VERBS[rng.integers(len(_VERBS))][2 if past else plural]
    return ["that", *_noun(plural, rng), verb]
