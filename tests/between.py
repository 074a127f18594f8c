"""A function between a linear layer and the target, and what its transform must satisfy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from tests.samples import randn

Tensor = torch.Tensor
X = randn(4, 6)


def fast_first(values: Iterable[Any], fast: int) -> list[Any]:
    """Parameters of a test: the first few in the fast suite, the others in the slow one."""
    each = [v if isinstance(v, tuple) else (v,) for v in values]
    return [pytest.param(*v, marks=() if i < fast else pytest.mark.slow) for i, v in enumerate(each)]


def fast_of(values: Iterable[Any], fast: Collection[Any]) -> list[Any]:
    """Parameters of a test: these few in the fast suite, the others in the slow one."""
    each = [(v, v if isinstance(v, tuple) else (v,)) for v in values]
    return [pytest.param(*v, marks=() if whole in fast else pytest.mark.slow) for whole, v in each]


class Between(nn.Module):
    """A function of (B, 8) and of a parameter (5, 8), behind a linear layer."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f, self.fc, self.p = f, nn.Linear(6, 8), nn.Parameter(torch.randn(5, 8))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.fc(x), self.p)


def define(library: str, name: str, takes: str, f: Any) -> torch.library.Library:
    """An op of a library of its own, which is there as long as the result is."""
    made = torch.library.Library(library, "FRAGMENT")
    made.define(f"{name}({takes}) -> Tensor")
    made.impl(name, f, "CompositeExplicitAutograd")
    made.impl(name, f, "AutogradCPU")
    return made


def weighed(y: Any) -> Tensor:
    y = next(t for t in torch.utils._pytree.tree_leaves(y) if t.requires_grad)
    return (y * torch.arange(y.numel(), dtype=y.dtype).cos().view(y.shape)).sum()


def certified(model: nn.Module, x: Any = X, **options: Any) -> Any:
    module = lg.transform(model, x, **options)
    certificate = lg.verify(model, module, x, weighed)
    assert certificate.ok, certificate
    return module


def of_pairs(y: Tensor) -> Tensor:
    return torch.complex(y, y.flip(0))
