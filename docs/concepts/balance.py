# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Balance
#
# LibraGrad ([Mehri et al., CVPR 2025](https://arxiv.org/abs/2411.16760)) repairs the backward pass with two edits. The
# forward pass stays as it is.
#
# - **Prune**: a gradient path into a *gate* is cut. Attention weights, the 1/σ of a normaliser and the gate of a GELU
#   are held, as if they were constants. What is left is linear in the value.
# - **Scale**: where two values are multiplied and neither is a gate, each gets half of the mass.
#
# With that, every op obeys one law: `⟨y, g⟩ = Σ⟨operand, its gradient⟩ + ⟨bias, g⟩`. So the sum of a map is the answer.

# %%
import torch

import libragrad_fx as lg

torch.manual_seed(0)
nn = torch.nn
model = nn.Sequential(
    nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4)
).double().eval()
x = torch.randn(1, 8, dtype=torch.float64)
gm = lg.transform(model, x)

print("same forward, to the bit:", torch.equal(gm(x), model(x)))
for name, module in (("autograd", lg.trace(model, x)), ("libra", gm)):
    found = lg.attribute(module, x, 2, method="fullgrad")
    total, logit = float(found.total), float(found.output)
    print(f"{name:9} sum of the map {total:+.6f}, logit {logit:+.6f}")

# %% [markdown]
# ## The edits, one by one
#
# `lg.plan` says what would be edited, where, and why. Nothing is decided by a model's name: an op has a *kind*, a value
# has a *role* ([roles and policies](roles.py)).

# %%
print(lg.plan(model, x))

# %% [markdown]
# ## What it changes in a picture
#
# The same model, the same scene, FullGrad+ under plain autograd and balanced. Red speaks for the class, blue against
# it. FullGrad+ adds the shares of every block, so what its map should add up to is more than one logit; the balanced
# map does, the plain one does not.

# %%
# %matplotlib inline
from zoo import samples, trained

vit, scene = trained.load("vit_base"), samples.sample(0)
x = scene.input[None]
maps = [
    lg.attribute(vit, x, scene.label, policy=policy)
    for policy in ("autograd", "libra")
]
for found in maps:
    total, promised = float(found.total), float(found.expected)
    print(f"{found.policy or 'autograd':9} {total:+.3f}, promised {promised:+.3f}")
lg.draw([maps])

# %% [markdown]
# ## What balance is not
#
# A balanced backward is a rule for sharing an answer, not a derivative. Do not train with it, and do not ask for a
# second derivative. It does not make a wrong model right: it shows what the model uses, with less noise of the method.
# Whether that helps is [measured](../results.md), with the cases where it does not.
