# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Gradient mass
#
# An explanation by gradients asks: which part of the answer comes from where? Take an output `f(x)`, its gradient `g`
# at some value `y` inside the model, and the product `⟨y, g⟩`. This number is the **gradient mass** at `y`: the share
# of the answer that passes there. In a linear model it is the answer itself, at every layer.

# %%
import torch

torch.manual_seed(0)
x = torch.randn(8, dtype=torch.float64, requires_grad=True)
w, b = torch.randn(8, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
y = w @ x + b
gx, gb = torch.autograd.grad(y, (x, b))
print(f"f(x) = {y:.6f}   ⟨x, g⟩ + ⟨b, g⟩ = {x @ gx + b * gb:.6f}")

# %% [markdown]
# Sums, matrix products, convolutions, poolings, reshapes and ReLUs pass mass on as they find it: what goes in comes
# out, plus that of their biases. This property is called *FullGrad-completeness*
# ([Srinivas and Fleuret 2019](https://arxiv.org/abs/1905.00780)). Heat maps of convolutional networks are trusted
# because of it.
#
# ## Where Transformers lose it
#
# **A normaliser destroys it.** Scale the input of a LayerNorm by two, and its output stays: so the derivative in the
# direction of the input is zero. All mass that arrives is gone.

# %%
h = torch.randn(16, dtype=torch.float64, requires_grad=True)
out = torch.nn.functional.layer_norm(h, (16,))
g = torch.randn(16, dtype=torch.float64)
(back,) = torch.autograd.grad(out, h, g)
print(f"behind the LayerNorm {out @ g:+.6f}, before it {h @ back:+.6f}")

# %% [markdown]
# **A product counts twice.** Attention is a product of weights and values, and the weights depend on the input too. By
# the product rule each of the two sends the whole answer back.

# %%
a, v = (torch.randn(16, dtype=torch.float64, requires_grad=True) for _ in range(2))
out = (a * v).sum()
ga, gv = torch.autograd.grad(out, (a, v))
print(f"behind the product {out:+.6f}, before it {a @ ga + v @ gv:+.6f}")

# %% [markdown]
# **A gate creates it or destroys it.** GELU is `x` times a gate that depends on `x`. Near zero it passes half of the
# input, and its derivative is a half too. Elsewhere the two differ.

# %%
z = torch.tensor([-2.0, -1.0, 0.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
out = torch.nn.functional.gelu(z)
(slope,) = torch.autograd.grad(out.sum(), z)
for value, mass, back in zip(z.tolist(), out.tolist(), (z * slope).tolist()):
    print(f"x = {value:+.1f}: behind {mass:+.4f}, before {back:+.4f}")

# %% [markdown]
# ## In a whole model
#
# `lg.audit` measures this at each op of any model. Here: a vision transformer that was trained on scenes, and one
# scene. The table says which kinds of ops lose or create mass under plain autograd, in units of the logit.

# %%
import libragrad_fx as lg
from zoo import samples, trained

model, scene = trained.load("vit_base"), samples.sample(0)
print(lg.audit(model, scene.input[None], scene.label))

# %% [markdown]
# What to do about it: [balance](balance.py).
