# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Audit a model
#
# Before you trust a gradient map of a model, ask what its backward does. `lg.audit` answers for any model, balanced
# or not. It runs one backward, and compares the gradient mass behind each op with the mass before it
# ([what gradient mass is](../concepts/gradient_mass.py)).
#
# Two models, trained on the same scenes: a ViT with GELU, and an EVA-02 with gated (SwiGLU) MLPs and rotary
# positions.

# %%
import tempfile
from pathlib import Path

import libragrad_fx as lg
from zoo import samples, trained

scene = samples.sample(0)
x, label = scene.input[None], scene.label
vit, eva = trained.load("vit_base"), trained.load("eva02")
ledgers = {
    "ViT": lg.audit(vit, x, label), "EVA-02": lg.audit(eva, x, label)
}
for name, ledger in ledgers.items():
    print(f"{name}: logit {ledger.output:.2f}, "
          f"completeness error {ledger.completeness_error:.2f}")

# %% [markdown]
# A completeness error near zero would say that shares add up to the logit. These do not. Which ops are at fault?
# `lost` and `created` are in units of the logit. Expect LayerNorm, attention and GELU in the first table. In the
# second one there should also be products, from the gates of its MLPs.

# %%
for name, ledger in ledgers.items():
    print(name)
    for op, nodes, lost, created in ledger.by_op()[:6]:
        print(f"  {op:32} {nodes:3} nodes"
              f"  lost {lost:8.2f}  created {created:8.2f}")

# %% [markdown]
# `worst` has the single nodes, with module and source line: where to look in your own code.

# %%
for row in ledgers["EVA-02"].worst(4):
    lost, created = row.moved(ledgers["EVA-02"].output)
    print(f"{row.op} in {row.module}:"
          f" lost {lost:.2f}, created {created:.2f}")
    print(f"  {row.source}")

# %% [markdown]
# ## Why an op is edited
#
# `lg.plan` says what balancing would do. It changes nothing. `explain` has the reason for one node. The first site of
# each kind of edit, with the row of the rules that asks for it:

# %%
plan, root = lg.plan(eva, x), Path(lg.__file__).parents[1]
edits = {}
for edit in plan.edits:
    edits.setdefault(edit.action.name, edit.node)
for node in edits.values():
    print(plan.explain(node).replace(f"{root}/", ""), "\n")

# %% [markdown]
# ## Balanced, and audited again
#
# The same ledger of the transformed model. The errors should be of the size of rounding.

# %%
for name, model in (("ViT", vit), ("EVA-02", eva)):
    ledger = lg.audit(lg.transform(model, x), x, label)
    print(f"{name}: logit {ledger.output:.2f}, "
          f"completeness error {ledger.completeness_error:.1e}")

# %% [markdown]
# ## As a picture
#
# `lg.visualize` draws the same numbers. The ending decides: .html is an explorer in one file, in which modules open
# and close; .svg, .png and .pdf are static, and need the program Graphviz, but for `view="streams"`. All need the
# extra `graph`: `pip install '.[graph]'`.
#
# `view="streams"` compares the residual stream with its branches. In the picture below, look at the two sides: under
# autograd the mass that comes back has nothing to do with the logit; balanced, it adds up to it.

# %%
from IPython.display import SVG

with tempfile.TemporaryDirectory() as folder:
    drawn = lg.visualize(
        vit, Path(folder) / "streams.svg", x, label, view="streams"
    ).read_text("utf-8")
    page = lg.visualize(vit, Path(folder) / "vit.html", x, label)
    print("an explorer of", page.stat().st_size // 1000, "kB")
SVG(drawn)

# %% [markdown]
# More pictures, of five models: [pictures of graphs](../pictures.md). On the command line: `libragrad audit NAME`,
# `libragrad plan NAME --why NODE`, `libragrad graph NAME -o g.html`.
