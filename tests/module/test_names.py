"""A submodule, parameter or buffer may have any name, those of our own attributes among them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.module.captured import CapturedModule
from tests.between import fast_first

F64 = torch.float64
SET = ["_attributes", "_tree", "code", "graph", "lean", "record"]
_DEFINED = {n for n in dir(CapturedModule) if not n.startswith("__") and not hasattr(nn.Module, n)}
OURS = [*SET, *sorted(_DEFINED - set(SET))]
"""Attributes that are set on each module, and those of the class."""


class Named(nn.Module):
    """Two layers, of which one has the name, inside and outside."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        inner = nn.Module()
        for parent in (self, inner):
            parent.add_module(name, nn.Linear(4, 4, dtype=F64))
        self.inner, self.out = inner, nn.Linear(4, 3, dtype=F64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self._modules[self.name], self.inner._modules[self.name]
        assert first is not None
        assert second is not None
        return self.out(nn.functional.gelu(second(first(x))))


@pytest.mark.parametrize("name", fast_first(OURS, 5))
def test_a_submodule_may_be_called_so(name: str) -> None:
    model, x = Named(name), torch.randn(2, 4, dtype=F64)
    module = lg.transform(model, x)
    assert module.state_dict().keys() == model.state_dict().keys()
    for made in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        certificate = lg.verify(model, made, x, 0)
        assert certificate.ok, certificate
    seen = []
    module.inner._modules[name].register_forward_hook(lambda m, a, y: seen.append(y))  # type: ignore[union-attr]
    assert torch.equal(module(x), model(x))  # the whole graph runs, for the hook
    assert len(seen) == 1


class Held(nn.Module):
    """A product with a tensor that has the name, inside and outside."""

    def __init__(self, name: str, place: str) -> None:
        super().__init__()
        self.name, self.place = name, place
        self.inner, self.out = nn.Module(), nn.Linear(4, 3, dtype=F64)
        for holder in (self, self.inner):
            if place == "_buffers":
                holder.register_buffer(name, torch.randn(4, 4, dtype=F64))
            else:
                holder.register_parameter(name, nn.Parameter(torch.randn(4, 4, dtype=F64)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (vars(m)[self.place][self.name] for m in (self, self.inner))
        return self.out(nn.functional.gelu(x @ first) @ second)


@pytest.mark.parametrize("place", ["_parameters", "_buffers"])
@pytest.mark.parametrize("name", fast_first(OURS, 3))
def test_a_tensor_may_be_called_so(name: str, place: str) -> None:
    model, x = Held(name, place), torch.randn(2, 4, dtype=F64)
    module = lg.transform(model, x)
    assert isinstance(module, CapturedModule)  # one graph: none of it was left to Python
    for made in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        certificate = lg.verify(model, made, x, 0)
        assert certificate.ok, certificate
    seen = []
    module.out.register_forward_hook(lambda m, a, y: seen.append(y))  # type: ignore[arg-type]
    assert torch.equal(module(x), model(x))  # the whole graph runs, for the hook
    assert len(seen) == 1
