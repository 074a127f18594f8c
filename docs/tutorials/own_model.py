# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # A network of your own
#
# You have an `nn.Module` and one of its answers. This page trains a small attention network in seconds, explains what
# it says, draws plain and balanced maps, and checks them.
#
# The data are scikit-learn's digits: 1,797 pictures of 8 × 8 pixels, ten classes.

# %%
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import libragrad_fx as lg

torch.manual_seed(0)
data = load_digits()
images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
labels = torch.tensor(data.target)
order = torch.randperm(len(images))
train, test = order[:1400], order[1400:]
print("pictures", tuple(images.shape), "labels", tuple(labels.shape))

# %% [markdown]
# ## The network
#
# A token for each patch of 2 × 2 pixels, attention written by hand, a gated MLP, LayerNorms, and a mean over the
# tokens. No class comes from a model library, so nothing can be recognised by its name.


# %%
class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        gate, value = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


class Network(nn.Module):
    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.places = nn.Parameter(torch.randn(16, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


# %% [markdown]
# ## Train it
#
# Fifteen epochs. Expect an accuracy above 0.9 on pictures that it has not seen.

# %%
model = Network()
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
for _ in range(15):
    for part in train[torch.randperm(1400)].split(64):
        loss = F.cross_entropy(model(images[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
model.eval()
with torch.no_grad():
    answers = model(images[test]).argmax(1)
print("accuracy", float((answers == labels[test]).float().mean()))

# %% [markdown]
# ## Explain it
#
# One call. Without a target, the model's own answer is explained. The method is FullGrad+, on the balanced backward.
# The answer has a number for each token. `completeness_error` says how far the map is from the sum that it promises:
# it should be small against `output`.

# %%
x = images[test][:3]
found = lg.attribute(model, x)
print("map", tuple(found.values.shape), "of the classes", found.target)
print("logits", found.output.numpy().round(3))
print("errors", found.completeness_error.numpy())

# %% [markdown]
# ## Plain and balanced
#
# `policy="autograd"` is the same method on the plain backward. The left column is plain, the right one balanced. Red
# speaks for the class, blue against it. One scale is used for both. The plain maps do not add up; their errors are
# printed first.

# %%
# %matplotlib inline
plain = lg.attribute(model, x, policy="autograd")
print("errors, plain", plain.completeness_error.numpy().round(3))
lg.draw([[plain, found]])

# %% [markdown]
# ## Down to the pixels
#
# A token is 2 × 2 pixels. `resolution="pixels"` goes to the input itself. Ink has a value, and black paper is zero:
# so Input × Gradient puts nothing on black pixels. It also leaves out the biases. So its sum is the share of the
# input, and no promise is made that this is the logit: both are printed.

# %%
fine = lg.attribute(
    model, x, method="input_x_gradient", resolution="pixels"
)
print("sum of the pixels", fine.total.numpy().round(3))
print("logits           ", fine.output.numpy().round(3))
lg.draw([fine])

# %% [markdown]
# ## Check it
#
# `lg.transform` makes the module that `attribute` used. `lg.verify` checks it by two means: a proof on the graph, and
# a ledger of one backward. Each line of the table should say that it holds.

# %%
gm = lg.transform(model, x)
assert torch.equal(gm(x), model(x))
print(lg.verify(model, gm, x, list(found.target)))

# %% [markdown]
# ## Why this, and not that?
#
# `against=` explains the difference of two logits. Red pixels speak for the first class more than for the second.
# Here: each picture's answer against the model's second choice.

# %%
with torch.no_grad():
    first, second = model(x).topk(2).indices.T.tolist()
print("answers", first, "second choices", second)
lg.draw([lg.attribute(model, x, first, against=second)])

# %% [markdown]
# ## What this does not say
#
# A map says what the model used, not what a digit is. It says nothing of a model that you did not train: draw one of
# a fresh `Network()` and look at it, before you believe another. On which models balancing helps is
# [measured](../results.md).
