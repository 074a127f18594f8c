"""Small models of texts, of random weights, and texts with evidence; configs name them as factories."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from libragrad_fx.evaluate.data import Data, Item

WORDS = ("[PAD]", "[UNK]", "the", "cat", "sat", "on", "mat", "a", "dog", "[CLS]", "[SEP]")
TEXTS = (
    "the cat sat on the mat", "a dog sat on the mat", "the mat sat", "the dog sat on a cat", "a cat sat"
)  # fmt: skip
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MODEL = {"load": "tests.evaluate.words:llama", "tokenizer": "tests.evaluate.words:tokenizer"}
BERT = {"load": "tests.evaluate.words:bert", "tokenizer": "tests.evaluate.words:bracketed"}


def tokenizer(brackets: bool = False) -> Any:
    """Of words; with brackets as BERT's, around each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if brackets:
        ends = [(w, WORDS.index(w)) for w in ("[CLS]", "[SEP]")]
        made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")


def bracketed() -> Any:
    return tokenizer(True)


def llama(seed: int = 0) -> Any:
    """Next tokens (B, T, 11)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=1, max_position_embeddings=16,
                         use_cache=False, eos_token_id=None, **SIZES)  # fmt: skip
    return drawn(LlamaForCausalLM(config))


def bert() -> Any:
    """Two classes (B, 2)."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    names = {0: "bad", 1: "good"}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, id2label=names, **SIZES)
    return drawn(BertForSequenceClassification(config))


def drawn(model: Any) -> Any:
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.double().eval()


def marked(text: str, word: str) -> np.ndarray:
    """bool (N,): the characters of a word."""
    start = text.index(word)
    return np.array([start <= i < start + len(word) for i in range(len(text))])


def prompts() -> Data:
    """What a dog or a cat goes on from; the third has nothing to be compared with."""

    def get(i: int) -> Item:
        text, against = TEXTS[i], None if i == 2 else "cat"
        return Item(str(i), text, "dog", {"dog": marked(text, text.split()[1])}, against)

    return Data("prompts", len(TEXTS), get)


def feelings() -> Data:
    def get(i: int) -> Item:
        return Item(str(i), TEXTS[i], i % 2, {i % 2: marked(TEXTS[i], TEXTS[i].split()[1])}, "bad")

    return Data("feelings", len(TEXTS), get, ("bad", "good"))


def config(**changed: Any) -> dict[str, Any]:
    found = {
        "models": {"llama": MODEL},
        "data": {"prompts": {"load": "tests.evaluate.words:prompts"}},
        "policies": ["autograd", "libra"],
        "methods": ["random", "input_x_gradient"],
        "metrics": {
            "tokens": {"targets": ["predicted", "contrast"], "ratios": [0.5], "scalar": "logit"},
            "places": {"targets": ["label", "contrast"], "least": 0.0},
            "completeness": {"targets": ["contrast"]}, "pixels": {},
        },
        "batch": 2, "chunk": 3, "threads": 1, "dtype": "float64",
    }  # fmt: skip
    return {**found, **changed}
