"""Measures real models, two of language and one of pictures: ``docs/language.md``.

    python tools/fetch.py smollm2 minilm dinov2
    python tools/language.py

Four prompts about indirect objects under every policy, the tokens' shares of one, sentences compared by
a text encoder, photographs, and texts of several lengths in one batch. The text around the tables is in
``tools/language.md``. Some ten minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from pages import fill, table
from tqdm.auto import tqdm

import libragrad_fx as lg
from libragrad_fx.attribution import METHODS
from libragrad_fx.decide import rulebook
from libragrad_fx.demo import sources
from libragrad_fx.errors import InputError
from zoo import real

PLAIN = "plain"
SIDES = ("libra", PLAIN)
SHOWN = (PLAIN, "libra", "relp", "attn_lrp", "gim")
"""The backwards whose maps over tokens are shown."""
LENGTHS = (
    real.PROMPTS[0].text,
    "Mary gave a drink to",
    "After Sarah and David went to the office early in the cold morning, David handed a letter to",
)
"""Texts of three lengths, for the first prompt's name."""

Target = Callable[[Any], torch.Tensor]


class Sum(NamedTuple):
    """What was explained, what a map adds up to, and what it should."""

    output: float
    total: float
    expected: float

    @property
    def error(self) -> float:
        return abs(self.total - self.expected) / abs(self.expected)


def policies() -> list[str]:
    """The names of all policies, libra first."""
    return sorted(rulebook.policies(), key=lambda name: name != "libra")


def captured(model: Any, inputs: Any, policy: str) -> Any:
    """The model with autograd's own backward, or with a policy's."""
    if policy == PLAIN:
        return lg.trace(model, inputs)
    return lg.transform(model, inputs, policy=policy, check=policy == "libra")


def sums(module: Any, inputs: Any, target: Any, method: str) -> list[Sum]:
    """One of each sample."""
    a = lg.attribute(module, inputs, target, method=method)
    return [Sum(*map(float, each)) for each in zip(a.output, a.total, a.expected, strict=True)]


def numbered(texts: Iterable[str]) -> str:
    return "\n".join(f"{i}. {t}" for i, t in enumerate(texts, 1))


# --- indirect objects


def asked(text: real.Text, prompt: real.Prompt) -> tuple[dict[str, torch.Tensor], Target]:
    inputs = real.encoded(text.tokenizer, [prompt.text])
    return inputs, real.difference(text.tokenizer, prompt, inputs["attention_mask"])


def language(text: real.Text) -> dict[str, str]:
    """The tables about SmolLM2."""
    first, _ = asked(text, real.PROMPTS[0])
    rows: list[list[str]] = []
    maps: dict[str, list[float]] = {}
    outputs: list[str] = []
    for policy in tqdm([*policies(), PLAIN], desc="policies"):
        module = captured(text.model, first, policy)
        questions = [asked(text, p) for p in real.PROMPTS]
        found = [sums(module, *q, "input_x_gradient")[0] for q in questions]
        worst = max(s.error for s in found)
        rows.append([policy, *(f"{s.total:.3f}" for s in found), f"{worst:.1e}"])
        outputs = [f"{s.output:.3f}" for s in found]
        if policy in SHOWN:
            a = lg.attribute(module, *questions[0], method="input_x_gradient")
            maps[policy] = a.values[0].tolist()
    head = ["backward", *(str(i + 1) for i in range(len(real.PROMPTS))), "largest relative error"]
    named = [text.tokenizer.decode([t]).strip() for t in first["input_ids"][0].tolist()]
    shares = [[t, *(f"{maps[p][i]:+.2f}" for p in SHOWN)] for i, t in enumerate(named)]
    total = ["*sum*", *(f"{sum(maps[p]):+.2f}" for p in SHOWN)]
    return {
        "prompts": numbered(
            f"{p.text} **{p.right.strip()}** (not {p.wrong.strip()})" for p in real.PROMPTS
        ),
        "policies": table(head, [["*logit difference*", *outputs, ""], *rows]),
        "tokens": table(["token", *SHOWN], [*shares, total]),
    }


def calls(text: real.Text) -> dict[str, str]:
    """The table of ways in which SmolLM2 is called."""
    inputs, target = asked(text, real.PROMPTS[0])
    model, ids = text.model, inputs["input_ids"]
    embedded = model.get_input_embeddings()(ids).detach()
    vectors = {"inputs_embeds": embedded, "attention_mask": inputs["attention_mask"]}
    filler = " The quick brown fox jumps over the lazy dog." * 40
    long, of_long = asked(text, real.PROMPTS[0]._replace(text=f"{filler} {real.PROMPTS[0].text}"))
    first = captured(model, inputs, "libra")
    rows = []

    def row(name: str, module: Any, given: Any, of: Target) -> None:
        (s,) = sums(module, given, of, "input_x_gradient")
        n = next(iter(given.values())).shape[1]
        rows.append([name, str(n), f"{s.output:.4f}", f"{s.total:.4f}", f"{s.error:.1e}"])

    row("token ids and mask, float32", first, inputs, target)
    row("a long text, the same graph", first, long, of_long)
    row("token ids alone", lg.transform(model, {"input_ids": ids}), {"input_ids": ids}, target)
    row("vectors in place of token ids", lg.transform(model, vectors), vectors, target)
    cached, eager = copy.deepcopy(model), copy.deepcopy(model)
    cached.config.use_cache = True
    eager.set_attn_implementation("eager")
    row("a cache is returned", lg.transform(cached, inputs), inputs, target)
    row("attention written out", lg.transform(eager, inputs), inputs, target)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        row(str(dtype), lg.transform(copy.deepcopy(model).to(dtype), inputs), inputs, target)
    return {"calls": table(["call", "tokens", "output", "sum", "relative error"], rows)}


# --- sentences


def cosine(other: torch.Tensor, mask: torch.Tensor) -> Target:
    return lambda y: torch.nn.functional.normalize(real.pooled(y.last_hidden_state, mask), dim=-1) @ other


def coordinate(index: int, mask: torch.Tensor) -> Target:
    return lambda y: real.pooled(y.last_hidden_state, mask)[:, index]


def sentences(text: real.Text) -> dict[str, str]:
    """The tables about MiniLM."""
    encoded = [real.encoded(text.tokenizer, [s]) for s in real.SENTENCES]
    similarity = real.Similarity(text.model, real.encoded(text.tokenizer, [real.SECOND])).eval()
    cases: Mapping[str, tuple[Any, Callable[[Any], Any]]] = {
        "cosine, in the model": (similarity, lambda mask: None),
        "cosine, in the target": (text.model, lambda mask: cosine(similarity.other, mask)),
        "coordinate 5": (text.model, lambda mask: coordinate(5, mask)),
    }
    rows = []
    for name, (model, target_of) in cases.items():
        balanced, plain = (captured(model, encoded[0], side) for side in SIDES)
        for i, inputs in enumerate(encoded, 1):
            target = target_of(inputs["attention_mask"])
            account = lg.audit(balanced, inputs, target)
            ours, theirs = (sums(m, inputs, target, "fullgrad")[0] for m in (balanced, plain))
            numbers = (ours.output, account.input, account.bias, ours.total, theirs.total)
            errors = (ours.error, theirs.error)
            rows.append([name, str(i), *(f"{n:.4f}" for n in numbers), *(f"{e:.1e}" for e in errors)])
    head = [
        "target",
        "sentence",
        "output",
        "words",
        "biases",
        "FullGrad",
        "plain",
        "relative error",
        "plain's",
    ]
    return {
        "second": real.SECOND,
        "sentences": numbered(real.SENTENCES),
        "cosines": table(head, rows),
    }


# --- photographs


def photographs() -> dict[str, str]:
    """The table about DINOv2."""
    model, pictures = sources.dinov2(), real.photographs()
    targets: Mapping[str, Any] = {"length of the features": lambda y: y.norm(dim=1), "feature 0": 0}
    modules = {side: captured(model, pictures, side) for side in SIDES}
    rows = []
    for name, target in targets.items():
        for side, module in modules.items():
            found = sums(module, pictures, target, "fullgrad_plus")
            for picture, s in zip(sources.PHOTOGRAPHS, found, strict=True):
                numbers = (s.output, s.expected, s.total)
                rows.append([name, picture, side, *(f"{n:.3f}" for n in numbers), f"{s.error:.1e}"])
    head = ["target", "picture", "backward", "output", "expected", "FullGrad+", "relative error"]
    return {"photographs": table(head, rows)}


# --- texts of several lengths in one batch


class Batch(NamedTuple):
    """A captured model, texts of several lengths, and the target that goes with their mask."""

    name: str
    module: Any
    tokenizer: Any
    texts: Sequence[str]
    target: Callable[[torch.Tensor], Any]
    side: str

    def values(self, texts: Sequence[str], method: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The map, and which of its tokens are no padding."""
        inputs = real.encoded(self.tokenizer, texts, self.side)
        mask = inputs["attention_mask"]
        options = {"steps": 4} if METHODS[method].path else {}
        found = lg.attribute(self.module, inputs, self.target(mask), method=method, **options)
        return found.values, mask.bool()


def apart(batch: Batch, method: str) -> tuple[str, str]:
    """By how much a text's shares in the batch differ from those alone, and the padding's part."""
    try:
        alone = [batch.values([t], method)[0][0] for t in batch.texts]
        values, kept = batch.values(batch.texts, method)
    except InputError:
        return "refused", ""
    differences = [
        float((v[k] - a).abs().max() / a.abs().max()) for v, k, a in zip(values, kept, alone, strict=True)
    ]
    pads = float(values.masked_fill(kept, 0).abs().sum() / values.abs().sum())
    return f"{max(differences):.1e}", f"{pads:.1%}"


def batches(causal: real.Text, encoder: real.Text) -> dict[str, str]:
    """The table about padding."""
    first, (name,) = real.PROMPTS[0], causal.tokenizer(real.PROMPTS[0].right)["input_ids"]
    lm = captured(causal.model, real.encoded(causal.tokenizer, [first.text]), "libra")
    bert = captured(encoder.model, real.encoded(encoder.tokenizer, [real.SENTENCES[0]]), "libra")
    cases = (
        Batch("SmolLM2, left", lm, causal.tokenizer, LENGTHS, lambda m: (m.shape[1] - 1, name), "left"),
        Batch("SmolLM2, right", lm, causal.tokenizer, LENGTHS, lambda m: ends(m, name), "right"),
        Batch("MiniLM, right", bert, encoder.tokenizer, real.SENTENCES, lambda m: (0, 5), "right"),
    )
    rows = []
    for method in tqdm(METHODS, desc="padding"):
        rows.append([f"`{method}`", *(cell for case in cases for cell in apart(case, method))])
    head = ["method", *(f"{case.name}: {what}" for case in cases for what in ("apart", "pads"))]
    return {"batches": table(head, rows)}


def ends(mask: torch.Tensor, index: int) -> list[tuple[int, int]]:
    """Of each text the last token, and an entry."""
    return [(int(n) - 1, index) for n in mask.sum(1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/language.md"))
    options = parser.parse_args()
    if lack := [said for name in ("smollm2", "minilm", "dinov2") if (said := sources.missing(name))]:
        raise SystemExit("\n".join(lack))
    torch.set_num_threads(1)
    causal, encoder = real.smollm2(), real.minilm()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, one CPU thread."
    parts = ({"versions": versions}, language(causal), calls(causal), sentences(encoder), photographs())
    whole = {k: v for part in (*parts, batches(causal, encoder)) for k, v in part.items()}
    fill("language.md", whole, options.output)


if __name__ == "__main__":
    main()
