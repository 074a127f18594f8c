"""Other libraries' explanations, as methods of an evaluation: ``{method: "zoo.rivals:autolrp"}``.

Each takes a module, inputs (B, C, H, W) and a function from the module's output to (B,) scalars, and gives
maps (B, H, W). LXT 2.1, HiLRP and DynamicLRP are not here: they patch classes of libraries for the whole
process, or are on no registry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from libragrad_fx.extras import need


def autolrp(
    module: torch.nn.Module, inputs: torch.Tensor, scalar: Callable[[Any], torch.Tensor]
) -> torch.Tensor:
    """autoLRP 0.2 with its defaults: relevance of pixels, channels summed."""
    x = need("autolrp", "rivals").tensor(inputs)
    total: Any = scalar(module(x)).sum()
    total.lrp()
    return torch.Tensor(x.relevance).sum(1)
