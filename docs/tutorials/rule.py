# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # An op without a row
#
# The pass knows ops by a table, [`rules/ops.yaml`](../reference/rules.md). Your library may bring an op that is not
# in it. Then you get an error and no map. This page adds the row.
#
# The op here is an activation, written for `torch.library`: `f(x) = x (1 + x / √(1 + x²)) / 2`. It is smooth, and
# looks like a GELU.

# %%
import torch
from torch import nn

import libragrad_fx as lg


@torch.library.custom_op("mylib::bend", mutates_args=())
def bend(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + x * (1 + x * x).rsqrt()) / 2


@bend.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, grad):
    (x,) = ctx.saved_tensors
    root = (1 + x * x).rsqrt()
    return grad * (1 + 2 * x * root - x**3 * root**3) / 2


bend.register_autograd(backward, setup_context=keep)


class Bend(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return bend(x)


torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(8, 16), nn.LayerNorm(16), Bend(), nn.Linear(16, 3)
).double().eval()
x = torch.randn(2, 8, dtype=torch.float64)
print("its derivative is right:",
      torch.autograd.gradcheck(bend, x.clone().requires_grad_()))

# %% [markdown]
# ## The error
#
# `transform` refuses. The message names the op, where it is, and a row to begin with.

# %%
try:
    lg.transform(model, x)
except lg.errors.UnknownOpError as e:
    print(e)

# %% [markdown]
# ## How much is at stake?
#
# `lg.audit` needs no row. It says what the op loses and creates under autograd. Look for `mylib.bend`: an op that
# loses or creates nothing could be `linear` or `homogeneous`. This one does.

# %%
print(lg.audit(model, x[:1], 1))

# %% [markdown]
# ## The row
#
# A row says what the op *is*; what to do about it is the policy's part.
#
# - `kind: gated`: it is x times a gate that depends on x, like GELU.
# - `stream`: the argument that carries the signal, by its name in the schema.
# - `slope`: f'(0). `at_zero`: f(0). The balanced backward of a function of one value is made of them:
#   `(f(x) - f(0)) / x`, and the slope where x is 0.
#
# With the row, the op is edited like any activation: see its line in the plan.

# %%
row = {
    "op": "mylib.bend", "kind": "gated", "stream": ["x"],
    "slope": 0.5, "at_zero": 0, "why": "x times a smooth gate",
}
print(lg.plan(model, x, rules=[row]))

# %% [markdown]
# ## Transform, and verify
#
# The certificate should be ok, with the gated activation among the balanced nodes.

# %%
gm = lg.transform(model, x, rules=[row])
assert torch.equal(gm(x), model(x))
certificate = lg.verify(model, gm, x, target=1)
assert certificate.ok
print(certificate)

# %% [markdown]
# `attribute` takes the transformed module. The sum of the map is the logit:

# %%
found = lg.attribute(gm, x, 1, method="fullgrad")
print("sums  ", found.total.numpy())
print("logits", found.output.numpy())

# %% [markdown]
# ## A wrong row does not pass
#
# What if the row says that the op is linear? Then nothing is edited, and the ledger of the first backward does not
# add up. `transform` notices, and returns no module.

# %%
wrong = {
    "op": "mylib.bend", "kind": "linear", "stream": ["x"],
    "why": "it is not",
}
try:
    lg.transform(model, x, rules=[wrong])
except lg.errors.LibraGradError as e:
    print(type(e).__name__, "-", e)

# %% [markdown]
# A wrong `slope` is not noticed so: it only counts where x is exactly 0. Derive it, or ask autograd for it.
#
# Rows may also be in a YAML file: `rules="my_ops.yaml"`. The whole grammar: [rules](../reference/rules.md). If you do
# not know what the op is, `on_unknown="keep"` leaves autograd's gradient there, and the plan says so.
