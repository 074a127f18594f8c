# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Texts
#
# Which words does a language model go by? To check a map, one has to know the answer. So the texts here are made up,
# and say which words matter.
#
# A sentence stops before its verb: "is", "are", "was" or "were". The subject gives the number, and an adverb the
# tense. Other nouns and verbs have a number and a tense of their own, and are there to mislead. The model is
# transformers' Llama in a small size, a decoder with a head of four classes. Its weights come with the checkout.

# %%
import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import libragrad_fx as lg
from libragrad_fx.demo import sentences
from zoo import trained

model = trained.load("llama")
print(json.dumps(trained.about("llama")["accuracy"]))
drawn = [sentences.sentence("test", i) for i in range(200)]
for one in drawn[:3]:
    marked = [
        w.upper() if e else w
        for w, e in zip(one.words, one.evidence, strict=True)
    ]
    print(" ".join(marked), "->", sentences.LABELS[one.label])

# %% [markdown]
# Words in capitals are the evidence. The model does not see capitals.
#
# ## Texts in, maps out
#
# A processor makes tokens of texts. A model of Hugging Face finds its own; this one has one token a word, and its
# tokenizer is made on the spot.

# %%
words = Tokenizer(
    models.WordLevel({w: i for i, w in enumerate(sentences.WORDS)}, "<pad>")
)
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token="<pad>",
    model_input_names=["input_ids"],
)
same = [s for s in drawn if len(s.words) == 9][:4]
texts = [" ".join(s.words) for s in same]
labels = [s.label for s in same]
found = lg.attribute(
    model, texts, labels, method="input_x_gradient",
    processor=tokenizer,
)
print(found.tokens[0])
print(found.values[0].numpy().round(2))

# %% [markdown]
# ## Plain and balanced
#
# Four sentences, plain on the left, balanced on the right. Red speaks for the right verb, blue against it. Look for
# red on the subject and on the adverb. The names of the rows say which words that should be. It is not always so:
# "the" in front of the subject has a share as well, and in the second sentence more than the subject.

# %%
# %matplotlib inline
plain = lg.attribute(
    model, texts, labels, method="input_x_gradient",
    processor=tokenizer, policy="autograd",
)
evidence = [
    " ".join(w for w, e in zip(s.words, s.evidence, strict=True) if e)
    for s in same
]
lg.draw([[plain, found]], names=[
    f"{e}: {sentences.LABELS[s.label]}"
    for e, s in zip(evidence, same, strict=True)
])

# %% [markdown]
# ## Over 200 sentences
#
# Two words of each sentence are the evidence. How often are they the two with the largest values? By chance that is
# rare: the first number is what random maps get. For each method, plain and balanced, as a share of the evidence that
# is found. A method may do well under both: the table says so.

# %%
ids = sentences.encoded(drawn)
labels = torch.tensor([s.label for s in drawn])
truth = torch.zeros(ids.shape, dtype=torch.bool)
for row, one in zip(truth, drawn, strict=True):
    row[: len(one.words)] = torch.tensor(one.evidence)


def share_found(values: torch.Tensor) -> float:
    values = values.masked_fill(ids == 0, -torch.inf)
    best = values.topk(2, 1).indices
    return float(truth.gather(1, best).double().mean())


torch.manual_seed(0)
by_chance = share_found(torch.rand(ids.shape))
print(f"random                     {by_chance:.2f}")
for method in ("input_x_gradient", "attcat", "fullgrad_plus"):
    for policy in ("autograd", "libra"):
        maps = lg.attribute(
            model, ids, labels, method=method, policy=policy
        )
        print(f"{method:16} {policy:9} {share_found(maps.values):.2f}")

# %% [markdown]
# ## Why "are", and not "is"?
#
# `against=` explains the difference of two logits. It is positive where the model says "are" and negative where it
# says "is". Here are the mean shares of the subject, of the adverb and of all other words, over the sentences of each
# answer.
#
# Look at the signs. The subject's share turns with the answer, as it should. The adverb's turns too, though an adverb
# says nothing about number. So a share is not the effect of exchanging a word. It says by which token the logit came,
# and this model seems to put number and tense together at the adverb: in a product, what one word opens counts for
# the other.

# %%
ARE, IS = sentences.LABELS.index("are"), sentences.LABELS.index("is")
adverbs = {"now", "today", "currently", "nowadays"}
is_adverb = torch.tensor([
    [sentences.WORDS[i] in adverbs for i in row] for row in ids.tolist()
])
kinds = {
    "subject": truth & ~is_adverb, "adverb": truth & is_adverb,
    "others": ~truth,
}
for answer in (ARE, IS):
    mine = labels == answer
    maps = lg.attribute(
        model, ids[mine], ARE, against=IS, method="input_x_gradient"
    )
    print(f"{sentences.LABELS[answer]:4} {maps.output.mean():+6.2f}  ", *(
        f"{name} {(maps.values * of[mine]).sum(1).mean():+.2f}"
        for name, of in kinds.items()
    ))

# %% [markdown]
# ## Language models of Hugging Face
#
# These need weights, so they are not run here. `hf:FOLDER` is a folder with a checkpoint, such as SmolLM2's.
#
# ```python
# from transformers import AutoModelForCausalLM
#
# llm = AutoModelForCausalLM.from_pretrained(FOLDER).eval()
# lg.attribute(llm, "The capital of France is", target=" Paris")
# lg.attribute(llm, "The capital of France is",
#              target=" Paris", against=" London")
# lg.attribute_generation(llm, "The capital of France", 5)
# ```
#
# The model knows its tokenizer. Without a target, the next token is explained. `attribute_generation` has one map for
# each token that was written. On the command line:
#
# ```sh
# libragrad explain "The capital of France is" --model hf:FOLDER \
#   --target " Paris" --against " London" -o why.html
# ```
#
# What SmolLM2's maps look like, and where they fail: [language](../language.md).
