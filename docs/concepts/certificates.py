# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Certificates
#
# A heat map looks plausible whether it is right or not. So each result can be checked, twice and by different means:
#
# - a **static proof** reads the rewritten graph alone, and names each node that no rule balances;
# - a **ledger** runs one backward, and adds up the mass before and behind each node.
#
# `lg.verify` does both, and compares the forward bit by bit.

# %%
import libragrad_fx as lg
from zoo import samples, trained

model, scene = trained.load("eva02"), samples.sample(1)
x = scene.input[None]
gm = lg.transform(model, x)
certificate = lg.verify(model, gm, x, scene.label)
print(certificate)

# %% [markdown]
# It is data: save it beside the picture that it is about.

# %%
text = certificate.to_json()
assert lg.Certificate.from_json(text).ok
print(len(text), "characters of JSON;", "digest of the rules:", certificate.digest[:12])

# %% [markdown]
# ## When something is not balanced
#
# There is no silent wrong answer. An op without a row on a gradient path is an error that names the op, where it is,
# and the row that it needs:

# %%
import torch


class Odd(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.airy_ai(x).sum(1, keepdim=True)


try:
    lg.transform(Odd(), torch.randn(2, 4))
except lg.errors.LibraGradError as e:
    print(type(e).__name__, "-", e)
