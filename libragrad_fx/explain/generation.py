"""What a language model wrote, token by token."""

from __future__ import annotations

from typing import Any

import torch

from libragrad_fx.attribution import Attribution
from libragrad_fx.errors import InputError
from libragrad_fx.explain.call import attribute_each
from libragrad_fx.explain.inputs import Batch, batches
from libragrad_fx.explain.targets import named


def attribute_generation(
    model: torch.nn.Module,
    prompt: str,
    continuation: str | int = 20,
    *,
    processor: Any = None,
    **options: Any,
) -> list[Attribution]:
    """Explain each token of a continuation: one answer a token, from one forward of the whole text.

    The map of a token is over all tokens of prompt and continuation; those behind it have no share.

    Args:
        model: a causal language model with next tokens (1, T, vocabulary) as logits.
        prompt: what it was given.
        continuation: what it went on with; or how many tokens to let it go on, greedily.
        processor: the tokenizer; a model of Hugging Face knows its own.
        options: as for ``attribute``.

    Raises:
        InputError: no tokens to explain, a model that does not generate, or as ``attribute``.
    """
    (make,) = batches(model, [prompt], processor, None)
    batch = make()
    start = batch.call["input_ids"]
    ids = _went_on(model, batch, continuation)
    if len(ids) == 0:
        raise InputError("the continuation has no tokens: there is nothing to explain")
    whole = torch.cat([start[0], torch.tensor(ids, device=start.device)])[None]
    call = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    targets = [(start.shape[1] + i - 1, token) for i, token in enumerate(ids)]
    pieces = (*(batch.tokens or ((),))[0], *map(batch.piece, ids))  # type: ignore[arg-type]
    said = Batch(call, 0, 1, 1, (pieces,), piece=batch.piece)
    found = attribute_each(model, call, targets, **options)
    return [named(model, said, a, t) for a, t in zip(found, targets, strict=True)]


def _went_on(model: Any, batch: Batch, continuation: str | int) -> list[int]:
    if isinstance(continuation, str):
        return batch.ids(continuation) if batch.ids is not None else []
    if not hasattr(model, "generate"):
        raise InputError("this model does not generate: give the continuation as text")
    written = model.generate(**batch.call, max_new_tokens=continuation, do_sample=False)
    return written[0, batch.call["input_ids"].shape[1] :].tolist()
