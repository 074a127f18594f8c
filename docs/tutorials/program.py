# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # An explanation as a program
#
# `attribute` runs Python: a forward, a backward, and the arithmetic of the method. `lg.program` traces all of it
# once, into one flat graph of PyTorch's ops. The graph runs without autograd. It can be saved, and run where this
# package is not installed.

# %%
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import libragrad_fx as lg
from zoo import samples, trained

model = trained.load("vit_base")
x = torch.stack([samples.sample(i).input for i in range(4)])
program = lg.program(model, x, method="input_x_gradient")
print(program)

# %% [markdown]
# ## It is the answer of `attribute`
#
# The same call, the same answer. `difference` says how far the values were apart when the graph was traced, relative
# to the largest. It is 0 where they are equal to the bit. Otherwise it is a rounding, as here: what the backward
# would compute of zeros is left out, and products of fewer rows round otherwise.

# %%
found = program(x, target=8)
want = lg.attribute(model, x, target=8, method="input_x_gradient")
print("difference at birth", program.difference(x))
far = (found.values - want.values).abs().max()
most = want.values.abs().max()
print("largest difference", float(far), "of", float(most))
torch.testing.assert_close(found.values, want.values, rtol=1e-4, atol=1e-5)

# %% [markdown]
# A program follows its model. What is trained or loaded later counts: after the head is doubled, so is the logit.

# %%
before = program(x, target=8).output
with torch.no_grad():
    model.head.weight.mul_(2)
    model.head.bias.mul_(2)
print((program(x, target=8).output / before).numpy())
with torch.no_grad():
    model.head.weight.div_(2)
    model.head.bias.div_(2)

# %% [markdown]
# ## Save it
#
# A `.pt2` file holds the graph and its parameters. `signature` says what it takes, and `outputs` what it returns, the
# map first. A target of -1 is the model's own answer.

# %%
folder = tempfile.TemporaryDirectory()
file = program.save(Path(folder.name) / "explain.pt2", x)
print(file.stat().st_size // 1000, "kB")
print("takes  ", program.signature(x))
print("returns", program.outputs(x))

# %% [markdown]
# ## Load it where nothing of this is installed
#
# Another Python process loads the file with `torch.export.load`. It is started in the file's folder, and asserts that
# neither this package nor timm was imported. The largest difference of its map should be 0, or a rounding.

# %%
torch.save(x, Path(folder.name) / "x.pt")
script = """
import sys, torch
run = torch.export.load("explain.pt2").module()
x = torch.load("x.pt")
values, *rest = run(x, torch.full((len(x),), 8))
assert "libragrad_fx" not in sys.modules and "timm" not in sys.modules
torch.save(values, "map.pt")
print("a map", tuple(values.shape), "without libragrad_fx")
"""
said = subprocess.run(
    [sys.executable, "-c", script], cwd=folder.name,
    check=True, capture_output=True, text=True,
)
print(said.stdout)
there = torch.load(Path(folder.name) / "map.pt")
print("largest difference", float((there - found.values).abs().max()))
folder.cleanup()

# %% [markdown]
# ## Other files, other modes
#
# ```python
# program.package("explain.aoti.pt2", x)  # machine code: Python and C++
# program.to_onnx("explain.onnx", x)      # ONNX Runtime
# lg.program(model, x, mode="compile")    # fused ops
# lg.program(model, x, mode="cuda_graph") # one launch, on a GPU
# ```
#
# What they cost and save is measured in [performance](../performance.md), and depends on the machine, the batch and
# the model. Methods that average over many runs (`smoothgrad`, `integrated_gradients`) have no program: the error
# says so. More: [programs](../programs.md).
