"""Models of Hugging Face that read a token at an index computed from their ids: texts, classifiers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import libragrad_fx as lg
from libragrad_fx.attribution import METHODS

F64 = torch.float64
LENGTHS = (7, 4, 5)
WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SIZES = {"vocab_size": 40, "attn_implementation": "eager"}
ENDS = {"bos_token_id": 1, "max_position_embeddings": 16, "projection_dim": 5}
PAIR = {
    f"{side}_{key}": n
    for side in ("encoder", "decoder")
    for key, n in {"layers": 2, "attention_heads": 2, "ffn_dim": 24}.items()
}
KINDS: dict[str, tuple[str, str, dict[str, Any], Callable[[int], str] | None]] = {
    "clip, the largest id": (
        "CLIPTextModelWithProjection", "CLIPTextConfig",
        {**WIDE, **ENDS, "eos_token_id": 2}, None,
    ),
    "clip, the first end": (
        "CLIPTextModelWithProjection", "CLIPTextConfig",
        {**WIDE, **ENDS, "eos_token_id": 39}, None,
    ),
    "gpt2": (
        "GPT2ForSequenceClassification", "GPT2Config",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "pad_token_id": 0}, None,
    ),
    "llama": ("LlamaForSequenceClassification", "LlamaConfig", {**WIDE, "pad_token_id": 0}, None),
    "opt": (
        "OPTForSequenceClassification", "OPTConfig",
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24,
         "pad_token_id": 0, "word_embed_proj_dim": 16, "max_position_embeddings": 16}, None,
    ),
    "bart's decoder": (
        "BartForSequenceClassification", "BartConfig",
        {"d_model": 16, **PAIR, "max_position_embeddings": 20, "pad_token_id": 0, "eos_token_id": 39,
         "bos_token_id": 1, "decoder_start_token_id": 39}, "model.decoder.layers.{}".format,
    ),
    "t5's decoder": (
        "T5ForSequenceClassification", "T5Config",
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "pad_token_id": 0,
         "eos_token_id": 39, "decoder_start_token_id": 0}, "transformer.decoder.block.{}".format,
    ),
}  # fmt: skip


def texts() -> dict[str, torch.Tensor]:
    """Of several lengths, padded behind, their end the largest id."""
    ids = torch.randint(3, 38, (3, max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, kept, n in zip(ids, mask, LENGTHS, strict=True):
        row[n - 1], row[n:], kept[n:] = 39, 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_attention_is_followed_to_the_end_of_each_text(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind, config, options, path = KINDS[name]
    model = getattr(transformers, kind)(getattr(transformers, config)(**SIZES, **options)).double().eval()
    inputs = texts()
    module = lg.transform(model, inputs)
    layers = None if path is None else [path(i) for i in range(2)]
    answer = model(**inputs, output_attentions=True, return_dict=True)
    first, last = (a.double().mean(1) for a in answer.get("attentions") or answer.decoder_attentions)
    one, ends = torch.eye(max(LENGTHS), dtype=F64), torch.tensor(LENGTHS) - 1
    rows = torch.arange(3), ends
    want = {"raw_attention": last[rows], "rollout": ((last + one) @ (first + one) / 4)[rows]}
    for method in (m for m in METHODS if METHODS[m].attention):
        found = lg.attribute(module, inputs, 1, method=method, layers=layers).values
        if method in want:
            torch.testing.assert_close(found, want[method], rtol=1e-12, atol=1e-14)
        for i, n in enumerate(LENGTHS):
            short = {k: v[i : i + 1, :n] for k, v in inputs.items()}
            alone = lg.attribute(module, short, 1, method=method, layers=layers).values[0]
            torch.testing.assert_close(found[i, :n], alone, rtol=1e-9, atol=1e-14)
            assert not found[i, n:].any()
