# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # A picture and its prompts
#
# CLIP gives a picture and a text a vector each. Their cosine says how well they match, so what is to be explained is
# that cosine: which parts of the picture make it match *this* prompt?
#
# The model is transformers' `CLIPModel`, with two layers a tower. Its weights are random, as nothing is downloaded.
# **So the maps of this page mean nothing.** Only the way to ask is to be seen; at the end stand maps of a trained model.

# %%
import torch
from sklearn.datasets import load_sample_image
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

import libragrad_fx as lg

torch.manual_seed(0)
words = ["<pad>", "a", "photo", "of", "the", "temple", "flower", "<end>"]
layers = {
    "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2,
}
text = {
    "vocab_size": len(words), "max_position_embeddings": 8,
    "bos_token_id": None, "eos_token_id": words.index("<end>"), **layers,
}
vision = {"image_size": 96, "patch_size": 8, **layers}
clip = CLIPModel(
    CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
).eval()


def ids(prompt: str) -> torch.Tensor:
    """int64 (1, T). A published model comes with a tokenizer for this."""
    return torch.tensor([[words.index(w) for w in f"{prompt} <end>".split()]])


levels = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)[None] / 255
picture = (F.interpolate(levels, (96, 96), mode="bilinear") - 0.5) / 0.5
with torch.no_grad():
    said = clip(pixel_values=picture, input_ids=ids("a photo of the temple"))
print({k: tuple(v.shape) for k, v in said.items() if torch.is_tensor(v)})

# %% [markdown]
# ## The target: a likeness
#
# `lg.Likeness` names two parts of the output. The first is explained; the second counts as constant. The number is
# 100 times their cosine. FullGrad's map, with what belongs to no place, adds up to it.

# %%
# %matplotlib inline
of_picture = lg.Likeness("image_embeds", "text_embeds")
prompts = ("a photo of the temple", "a photo of the flower")
maps = [
    lg.attribute(
        clip, {"pixel_values": picture, "input_ids": ids(p)}, of_picture, method="fullgrad"
    )
    for p in prompts
]
for prompt, found in zip(prompts, maps):
    print(f"{prompt}: 100 cos = {float(found.output):.2f},"
          f" error {float(found.completeness_error):.1e}")
lg.draw([maps])

# %% [markdown]
# ## The words instead
#
# Turn the two names round, and the text is explained. A map then has a value for each token.

# %%
of_text = lg.Likeness("text_embeds", "image_embeds")
found = lg.attribute(
    clip, {"pixel_values": picture, "input_ids": ids(prompts[0])}, of_text
)
for word, value in zip(f"{prompts[0]} <end>".split(), found.values[0].tolist()):
    print(f"{word:>7} {value:+8.2f}")

# %% [markdown]
# ## One prompt against the other
#
# With the text constant, a cosine is linear in it. So the map of one prompt less the map of the other is the map of
# their difference: what speaks for the temple *rather than* for the flower.

# %%
difference = maps[0].values - maps[1].values
score = float(maps[0].output - maps[1].output)
print(f"difference of the scores {score:+.3f},",
      f"of the maps' sums {float(maps[0].total - maps[1].total):+.3f}")
print("largest share of a cell", float(difference.abs().max()))

# %% [markdown]
# ## A published model
#
# Its processor makes both inputs from a picture's path and a text, so that the call is short. This is not run here,
# for it downloads the weights:
#
# ```python
# from transformers import CLIPModel, CLIPProcessor
#
# name = "openai/clip-vit-base-patch32"
# clip, processor = CLIPModel.from_pretrained(name), CLIPProcessor.from_pretrained(name)
# given = {"text": "a cat", "images": "cat.jpg"}
# lg.attribute(clip, given, of_picture, processor=processor)
# ```
#
# ## What trained weights say
#
# A small model of the kind learned from pictures of two digits, and prompts that name one. Each picture is asked for
# both. Under plain gradients a map points at the named digit in 30 % of the cases, balanced in 98 %:
# [all figures](../image_text.md).
#
# ![Two prompts on each picture, and the map of each, plain and balanced](../pictures/two-prompts.png)
