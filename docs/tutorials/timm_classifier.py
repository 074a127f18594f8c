# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # A classifier of timm
#
# The model here is timm's own `VisionTransformer`, in a small size. It was trained on scenes: several articles of
# clothing on one picture, one of which is the class. Its weights, and eight scenes with masks, come with the
# checkout. So this page needs no network. It is a small model, and wrong on every third scene. Expect a few wrong
# answers below.

# %%
import tempfile
from pathlib import Path

import torch
from PIL import Image

import libragrad_fx as lg
from libragrad_fx.metrics import enlarged, segmentation_ap
from zoo import samples, sets, trained

model = trained.load("vit_base")
scenes = [samples.sample(i) for i in range(8)]
x = torch.stack([s.input for s in scenes])
labels = torch.tensor([s.label for s in scenes])
with torch.no_grad():
    answers = model(x).argmax(1)
print("accuracy on test scenes",
      trained.about("vit_base")["accuracy"]["scenes/test"])
print(type(model).__name__, tuple(x.shape))
print("right on", int((answers == labels).sum()), "of", len(labels))

# %% [markdown]
# ## What explains it
#
# `lg.methods` runs each method once. It gives an empty text for one that the model supports, else why not. A ViT with
# a class token supports all of them: the second number should be 0.

# %%
offered = lg.methods(model, x[:1])
refused = {name: why for name, why in offered.items() if why}
print(len(offered), "methods;", len(refused), "refused", refused)

# %% [markdown]
# ## Several methods
#
# Each column is a method: FullGrad+, AttCAT, HiResCAM, and attention rollout. Each row is a scene. Red speaks for the
# label, blue against it. Look for red on one article and little elsewhere. Rollout does not know the label: its map
# is the same for every class, and has no sign. Pictures go in here, with a function that prepares them, so that the
# maps are drawn over them.

# %%
# %matplotlib inline
names = ("fullgrad_plus", "attcat", "hirescam", "rollout")
pictures = [Image.open(s.file).convert("RGB") for s in scenes[:3]]
maps = [
    lg.attribute(
        model, pictures, labels[:3], method=m, processor=sets.steps
    )
    for m in names
]
lg.draw([maps], names=[s.name for s in scenes[:3]])

# %% [markdown]
# ## Do the maps lie where the article is?
#
# The masks say which pixels show the class. `segmentation_ap` is the average precision of a map over the pixels: 1 if
# all pixels of the mask come first, and about the mask's share of the picture by chance. That share is printed first.
# Then each method, plain and balanced. Expect the balanced FullGrad+ well above the plain one. Rollout has the same
# number twice.

# %%
masks = torch.stack([s.masks == s.label for s in scenes])
print(f"share of the mask {masks.double().mean():.2f}")
for m in names:
    for policy in ("autograd", "libra"):
        found = lg.attribute(model, x, labels, method=m, policy=policy)
        ap = segmentation_ap(enlarged(found.values, 96), masks)
        print(f"{m:14} {policy:9} AP {ap.mean():.2f}")

# %% [markdown]
# Rollout has a high number here: it tells articles from background. But look at the second and third scenes above. It
# is darkest on an article that is not the class, and its map would be the same for any other class. It does not
# explain an answer.
#
# Eight scenes are an illustration and no measurement. Thirteen families on two sets, with intervals:
# [does balancing help](../results.md).
#
# ## Keep it
#
# `save` writes the values to the bit, with method, policy, target and versions. The ending may be .npz, .safetensors
# or .json. The answer of `load` is the same: the assertion passes.

# %%
found = lg.attribute(model, x, labels)
with tempfile.TemporaryDirectory() as folder:
    file = found.save(Path(folder) / "maps.npz")
    again = lg.Attribution.load(file)
    size = file.stat().st_size
assert torch.equal(again.values, found.values)
print(again.method, again.policy, tuple(again.values.shape), size, "bytes")

# %% [markdown]
# ## The same with pretrained weights
#
# This needs timm's weights, from the network or its cache, so it is not run here. A model of timm knows its own
# preprocessing: give paths. A class may be given by its name.
#
# ```python
# import timm
#
# model = timm.create_model("vit_base_patch16_224", pretrained=True).eval()
# found = lg.attribute(model, ["cat.jpg", "dog.jpg"])
# found = lg.attribute(model, "cat.jpg", target="tabby, tabby cat")
# found.show()
# ```
#
# On the command line:
#
# ```sh
# libragrad explain cat.jpg --model vit_base_patch16_224 --pretrained \
#   --method fullgrad_plus,attcat --compare plain -o cat.png
# ```
#
# Without `pretrained=True` the weights are random, and so is the map.
