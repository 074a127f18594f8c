# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Tables
#
# A row of a table goes in, a logit comes out. Which columns carry it? The data are scikit-learn's breast cancer
# table: 569 rows, 30 columns of measured cells, and whether a tumour is benign.

# %%
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.nn import functional as F

import libragrad_fx as lg

torch.manual_seed(0)
data = load_breast_cancer()
columns = list(data.feature_names)
raw = torch.tensor(data.data, dtype=torch.float32)
labels = torch.tensor(data.target, dtype=torch.float32)  # 1: benign
order = torch.randperm(len(raw))
train, test = order[:400], order[400:]
rows = (raw - raw[train].mean(0)) / raw[train].std(0)
print("rows", tuple(rows.shape), "benign", int(labels.sum()))

# %% [markdown]
# ## The network
#
# A small FT-Transformer ([Gorishniy et al. 2021](https://arxiv.org/abs/2106.11959)). Each column becomes a token: its
# value times a learned direction, plus a learned bias. PyTorch's `TransformerEncoder` mixes them. The logit is read
# from a class token.


# %%
class TableTransformer(nn.Module):
    def __init__(self, columns: int, width: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(columns, width) * 0.3)
        self.bias = nn.Parameter(torch.randn(columns, width) * 0.3)
        self.summary = nn.Parameter(torch.randn(1, 1, width) * 0.3)
        layer = nn.TransformerEncoderLayer(
            width, 4, 32, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, 2, enable_nested_tensor=False
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x[..., None] * self.weight + self.bias
        first = self.summary.expand(len(x), -1, -1)
        tokens = self.encoder(torch.cat([first, tokens], 1))
        return self.head(self.norm(tokens[:, 0]))


# %% [markdown]
# Twelve epochs. Expect an accuracy above 0.9 on rows that it has not seen.

# %%
model = TableTransformer(30)
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
for _ in range(12):
    for part in train[torch.randperm(400)].split(50):
        loss = F.binary_cross_entropy_with_logits(
            model(rows[part])[:, 0], labels[part]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
model.eval()
with torch.no_grad():
    answers = (model(rows[test])[:, 0] > 0).float()
print("accuracy", float((answers == labels[test]).float().mean()))

# %% [markdown]
# ## One row
#
# FullGrad on the balanced backward has a signed share for each column. Biases that belong to a column's own token are
# in its share. What belongs to no column is in `prefix` (the class token) and `unplaced`. Together they are the
# logit: the last two numbers should be equal. A positive share speaks for benign, a negative one for malignant.

# %%
x = rows[test][:1]
found = lg.attribute(model, x, method="fullgrad")
shares = found.values[0]
for i in shares.abs().argsort(descending=True)[:6].tolist():
    print(f"{columns[i]:24} z {x[0, i]:+.2f}   share {shares[i]:+.3f}")
rest = float(found.total - shares.sum())
print(f"all 30 columns {shares.sum():+.3f}, no column {rest:+.3f}")
print(f"sum {float(found.total):+.5f}, logit {float(found.output):+.5f}")

# %% [markdown]
# Is that so under plain autograd too? The sum should miss the logit.

# %%
plain = lg.attribute(model, x, method="fullgrad", policy="autograd")
print(f"sum {float(plain.total):+.5f}, logit {float(plain.output):+.5f}")

# %% [markdown]
# ## Which columns carry the answers
#
# Over many rows: the mean of the absolute share. The bars show the twelve largest. All rows that the model has not
# seen are explained at once.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt

every = lg.attribute(model, rows[test], method="fullgrad")
assert every.completeness_error.max() < 1e-3
mean = every.values.abs().mean(0)
top = mean.argsort(descending=True)[:12].tolist()
figure, axes = plt.subplots(figsize=(7, 4))
axes.barh([columns[i] for i in top][::-1], mean[top].flip(0).numpy())
axes.set_xlabel("mean |share| of the logit")
figure.tight_layout();

# %% [markdown]
# ## Does the model need them?
#
# Set the five columns with the largest mean to their average, and look at the accuracy. Then five of the smallest.
# The first should cost more than the second.

# %%
def without(chosen: list[int]) -> float:
    changed = rows[test].clone()
    changed[:, chosen] = 0
    with torch.no_grad():
        answers = (model(changed)[:, 0] > 0).float()
    return float((answers == labels[test]).float().mean())


ranked = mean.argsort(descending=True).tolist()
print(f"without the five largest  {without(ranked[:5]):.3f}")
print(f"without the five smallest {without(ranked[-5:]):.3f}")

# %% [markdown]
# ## What this does not say
#
# Many of these columns say nearly the same thing (radius, perimeter, area). The model may use one, and another
# training may use another. A share says what *this* model used. It says nothing of causes.
