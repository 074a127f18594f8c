# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Evaluate methods on your data
#
# Does a method serve your model, on your pictures? `libragrad evaluate` measures it: models by policies by methods by
# metrics, from one file. This page runs a tiny one: one model, three methods, two policies, eight pictures.
#
# ## The pictures
#
# A folder `images/CLASS/x.png`, and `masks/CLASS/x.png` beside it if there are masks. What is not 0 in a mask is of
# the picture's class. Classes are numbered by their sorted names: these have to be in the order of the model's
# outputs. So the number leads the name here, and classes without a picture have empty folders.

# %%
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from zoo import samples
from zoo.scenes import CLASSES

work = tempfile.TemporaryDirectory()
root = Path(work.name) / "scenes"
names = [f"{i}-{name.replace(' ', '_')}" for i, name in enumerate(CLASSES)]
for kind in ("images", "masks"):
    for name in names:
        (root / kind / name).mkdir(parents=True)
for i, file in enumerate(samples.files()):
    scene = samples.sample(i)
    place = f"{names[scene.label]}/{i}.png"
    Image.open(file).convert("RGB").save(root / "images" / place)
    mask = (scene.masks == scene.label).numpy()
    Image.fromarray(mask).convert("L").save(root / "masks" / place)
for file in sorted(root.glob("images/*/*")):
    print(file.relative_to(root))

# %% [markdown]
# ## What is asked
#
# - `models`: a name of timm, torchvision or Hugging Face, or `package.module:factory`. `steps` prepares a picture.
# - `policies`: `autograd` is the plain backward, `libra` the balanced one.
# - `tokens`: what becomes of the answer when the most relevant tokens are removed (MIF), and the least relevant (LIF).
# - `places`: maps against masks. `completeness`: does a map add up.

# %%
config = f"""
models:
  vit:
    load: "zoo.trained:load"
    args: {{name: vit_base, seed: 0}}
    steps: "zoo.sets:steps"
data:
  scenes: {{load: "folder:{root}"}}
policies: [autograd, libra]
methods: [random, input_x_gradient, fullgrad_plus]
metrics:
  tokens: {{ratios: [0.25, 0.5, 0.75]}}
  places: {{}}
  completeness: {{}}
batch: 8
chunk: 8
threads: 1
examples: 0
"""
asked = Path(work.name) / "tiny.yaml"
asked.write_text(config, "utf-8")

# %% [markdown]
# ## From Python
#
# A folder of results. Each unit of work is written when it is done, so a killed run goes on where it was.

# %%
from libragrad_fx.evaluate import Config, evaluate

out = Path(work.name) / "out"
results = evaluate(Config.load(asked), out)
print(results.relative_to(work.name))

# %% [markdown]
# ## From the command line
#
# The same file and the same folder: all is done already, so it says what there is, in a moment.

# %%
said = subprocess.run(
    [sys.executable, "-m", "libragrad_fx", "evaluate", asked, "-o", out],
    check=True, capture_output=True, text=True,
)
print(said.stdout.replace(work.name, "..."))

# %% [markdown]
# ## Read the results
#
# A row for each number, with what was asked, of which picture, and why there is none if it failed. Any reader of
# Parquet will do. Three of the measures, as means over the pictures:
#
# - `ap`: average precision of the map against the mask. 1 is best.
# - `srg`: what is lost without the most relevant tokens, less what is lost without the least relevant ones. Over many
#   pictures a random order has 0; eight are few. 1 is best.
# - `relative_error`: what the map misses of the sum that it promises. 0 is best. A random map promises none.
#
# Random maps are there for comparison, and are the same under both policies.

# %%
import pyarrow.parquet as pq

table = pq.read_table(results)
print(table.num_rows, "rows:", ", ".join(table.column_names))
assert table["error"].null_count == table.num_rows
frame = table.to_pandas()
some = frame[frame.measure.isin(["ap", "srg", "relative_error"])]
means = some.groupby(["measure", "method", "policy"]).value.mean()
print(means.unstack("policy").round(2).to_string())

# %% [markdown]
# ## Is a difference more than chance?
#
# Both policies saw the same pictures. `paired` compares them picture by picture: the mean difference, a bootstrap
# interval over pictures, and a sign-flip test. With eight pictures the interval is wide: read its ends and not its
# middle.

# %%
import torch

from libragrad_fx.metrics import paired


def values(measure: str, policy: str) -> torch.Tensor:
    mine = frame[
        (frame.measure == measure) & (frame.policy == policy)
        & (frame.method == "fullgrad_plus")
    ].sort_values("image")
    return torch.tensor(mine.value.to_numpy())


for measure in ("ap", "srg"):
    found = paired(values(measure, "libra"), values(measure, "autograd"))
    d = found.difference
    print(f"{measure}: libra less autograd {d.mean:+.3f} "
          f"[{d.low:+.3f}, {d.high:+.3f}], {found.wins} wins, "
          f"{found.losses} losses, p {found.p:.3f}")
work.cleanup()
