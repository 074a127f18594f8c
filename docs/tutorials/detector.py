# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # A box of a detector
#
# A detector returns boxes, not a row of logits. What is to be explained is then a *function of the output*: one
# number for each picture. This page shows how to write it.
#
# The detector is torchvision's `SSD`, on a backbone of four layers. Its weights are random, as nothing is downloaded.
# **So the maps of this page mean nothing.** Only the way to ask is to be seen.

# %%
import warnings

import torch
from sklearn.datasets import load_sample_image
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD

import libragrad_fx as lg

torch.manual_seed(0)
layers = []
for a, b in ((3, 16), (16, 32), (32, 64), (64, 64)):
    layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.ReLU()]
backbone = nn.Sequential(*layers)
backbone.out_channels = [64]
detector = SSD(
    backbone, DefaultBoxGenerator([[2]]), (128, 128), num_classes=5,
    score_thresh=0.01, detections_per_img=3, topk_candidates=20,
).eval()
levels = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)
picture = F.interpolate(levels[None] / 255, (128, 128))[0]
with torch.no_grad():
    found = detector([picture])
print({name: tuple(v.shape) for name, v in found[0].items()})

# %% [markdown]
# ## The box, before it is sorted out
#
# A detector has many candidates, each with a logit for each class. Then it applies a softmax, drops most candidates,
# and lets boxes suppress one another. All of that only chooses. So explain the *logit* of the candidate that was
# chosen: shares add up to it, and this part of the model is one graph.
#
# A small module returns what the heads say.


# %%
class Heads(nn.Module):
    """(B, 3, H, W) -> the heads' outputs, a row for each candidate."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.head([self.backbone(x)])


heads = Heads(detector).eval()
x = detector.transform([picture])[0].tensors  # its own preprocessing
with torch.no_grad():
    said = heads(x)
print({name: tuple(v.shape) for name, v in said.items()})

# %% [markdown]
# Which candidate became the first box? The one with the largest score of any class but the background, class 0. Its
# score and class should be those of the first box.

# %%
scores = said["cls_logits"][0].softmax(-1)[:, 1:]
candidate, label = divmod(int(scores.argmax()), scores.shape[1])
label += 1
first = {name: v[0].numpy() for name, v in found[0].items()}
print("candidate", candidate, "class", label, "score", float(scores.max()))
print("first box: class", first["labels"], "score", first["scores"])

# %% [markdown]
# ## The target
#
# A target is any function from the output to one number a picture. It gets the output as the model returns it, here a
# dictionary.


# %%
def logit(output: dict[str, torch.Tensor]) -> torch.Tensor:
    return output["cls_logits"][:, candidate, label]


# %% [markdown]
# The map is drawn next. Only the pixels that this candidate sees can have a share: a square around the box's middle.
# With trained weights you would look there for red on the object. Here it is a pattern of random filters. But the sum
# holds for any weights: the error should be small against the logit.

# %%
# %matplotlib inline
why = lg.attribute(heads, x, logit, method="fullgrad")
print("logit", float(why.output), "error", float(why.completeness_error))
print("middle of the box", (first["boxes"][:2] + first["boxes"][2:]) / 2)
lg.draw([why])

# %% [markdown]
# ## Other questions
#
# The same way, with other functions. Why this class and not another one? Why is the box's middle where it is? Both
# errors should be small, too.


# %%
def one_class_against_another(output: dict) -> torch.Tensor:
    mine = output["cls_logits"][:, candidate]
    return mine[:, label] - mine[:, 1 + label % 4]


def horizontal_shift(output: dict) -> torch.Tensor:
    return output["bbox_regression"][:, candidate, 0]


for target in (one_class_against_another, horizontal_shift):
    asked = lg.attribute(heads, x, target, method="fullgrad")
    print(f"{target.__name__} {float(asked.output):+.4f}, "
          f"error {float(asked.completeness_error):.1e}")

# %% [markdown]
# A pixel of a segmentation network is asked for in the same way: `lambda y: y["out"][:, label, row, column]`.
#
# ## Why not the whole detector?
#
# It may be asked too, by a module that takes a batch. But which boxes survive depends on the values of tensors, so it
# is no single graph, and only the methods that look at the input alone are left. And its score is a probability: it
# falls when *another* class rises. Expect the sum of the map to miss it. A warning says that the model had to be
# recorded; it is silenced here. Prefer the logit.


# %%
class Whole(nn.Module):
    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.detector([*x])
        return torch.stack([one["scores"][0] for one in found])


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    whole = lg.attribute(
        Whole(detector).eval(), picture[None], method="input_x_gradient"
    )
print("score", float(whole.output), "sum of the map", float(whole.total))
