"""What other libraries do with a captured model: ``docs/interop.md``.

    python tools/interop.py [--small] [-o docs/interop.md]

Every cell is run here, by the code of ``tests/interop``: on timm's ViT-tiny with random parameters
(``--small``: the tests' model of two blocks), and on a small network of convolutions and ReLUs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import io
from collections.abc import Callable, Mapping
from pathlib import Path

import pages
import torch
from torch import nn
from tqdm.auto import tqdm

from tests.interop.matrix import CNN, FORMS, VIT, Use, cnn, missing, outcomes, small_vit, vit_tiny

LIBRARIES = ("captum", "grad-cam", "quantus", "timm", "torch")
PAGE = """# With other libraries

Made by `python tools/interop.py`, with {versions}.
The libraries are unmodified. The same code runs in `tests/interop/`, on a smaller ViT, where each cell of
the columns `original`, `lg.trace` and `lg.transform` is required.

`lg.trace` is the captured model with autograd's backward: what a library says of it must be what it says
of the original. `lg.transform` is balanced: there it must be what `lg.attribute` says, where we have
the method.

| word | means |
|---|---|
| ok | of the original: it runs |
| same | the original's values, to the bit |
| as ours | the values of our own method, to 1e-4 of the largest |
| runs | other values; of `lg.transform`: those of the balanced gradient, by a method that we do not have |
| refused | an error of ours says why, and what to do |
| fails | any other error |

## {vit}

{first}

- No module of a ViT has a rule in Captum's DeepLift, so on the original it is Input x Gradient already.
  `LRP` has no rule for `Identity`.
- `LayerGradCam` takes the axis of tokens for channels: use grad-cam, or our `gradcam`.
- `AblationCAM` puts a layer of its own into the model, which a captured graph cannot know.
- `ShapleyCAM` needs a second derivative, which PyTorch's fused attention does not have; where there is one,
  it forgets its `reshape_transform` and wants convolutions.
- grad-cam's `FullGrad` takes biases of convolutions and batch norms alone; our `fullgrad_plus` takes all.

## Convolutions and ReLUs as modules

A network that is balanced as it is: `same` under `lg.transform`. Methods that rewrite the backward by
module type find their ReLUs here. On exported graphs several of them run, and give another answer without
a word.

{second}
"""


def table(uses: Mapping[str, Use], make: Callable[[], tuple[nn.Module, torch.Tensor]], label: str) -> str:
    @functools.cache
    def form(name: str) -> nn.Module:
        return FORMS[name](*make())

    rows = []
    for name, use in tqdm(uses.items(), desc=label):
        absent = missing(use)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            cells = (
                outcomes(use, FORMS, form, make()[1]) if not absent else (f"needs {absent}",) * len(FORMS)
            )
        rows.append((name, *cells))
    return pages.table(("", *FORMS), rows)


def version(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the model of the tests")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/interop.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    vit = small_vit if options.small else vit_tiny
    page = PAGE.format(
        versions=", ".join(map(version, LIBRARIES)),
        vit="A ViT of two blocks" if options.small else "timm's ViT-tiny",
        first=table(VIT, vit, "vit"),
        second=table(CNN, cnn, "cnn"),
    )
    options.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
