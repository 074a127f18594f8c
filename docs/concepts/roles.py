# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Roles and policies
#
# The pass never asks what a model is called. It asks what each op *is*, and what each value is *for*.
#
# | role | what it is | example |
# |---|---|---|
# | STATIC | it does not depend on the input | a weight, a table of positions |
# | CUT | it depends on the input, but no gradient passes | an index, a mask |
# | GATE | it only says how much of something else passes | attention weights, a sigmoid, 1/σ |
# | VALUE | it carries the signal | tokens, the residual stream |
#
# Roles spread through the graph by abstract interpretation: a sum of values is a value, a product of a gate and a value
# is a value, a softmax makes a gate. Facts about ops are rows of a table, [`rules/ops.yaml`](../reference/rules.md).
#
# A network written by hand, with a gate that no library knows:

# %%
import torch

import libragrad_fx as lg


class Gated(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.value(x) * torch.sigmoid(self.gate(x)))


torch.manual_seed(0)
model, x = Gated().double().eval(), torch.randn(2, 8, dtype=torch.float64)
plan = lg.plan(model, x)
print(plan)

# %% [markdown]
# One site: the product. The sigmoid is a gate, so its path is stopped. Two values would share the mass by halves
# instead:

# %%
class Squared(Gated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.value(x) * self.gate(x))


print(lg.plan(Squared().double().eval(), x))

# %% [markdown]
# ## Policies
#
# A policy is another table. It says what to do at each combination of kind and roles. `libra` is the paper's; others
# are neighbouring methods, and its ablations. A file of your own works as well.

# %%
from libragrad_fx.decide import rulebook

for policy in rulebook.policies():
    found = lg.attribute(model, x, 1, policy=policy, method="fullgrad")
    print(f"{policy:22} sum {float(found.total[0]):+.4f} of {float(found.output[0]):+.4f}")

# %% [markdown]
# The grammar of both tables: [rules](../reference/rules.md).
