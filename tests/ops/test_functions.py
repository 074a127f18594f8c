"""Functions that were once refused, and cells, behind a linear layer: balanced, in batches too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import libragrad_fx as lg
from libragrad_fx.decide import rulebook
from libragrad_fx.types import Kind
from tests.between import Between, X, certified, fast_first, of_pairs, weighed
from tests.rows.one_op import balance, tensors
from tests.samples import calls

Tensor = torch.Tensor
HANN = torch.hann_window(8, dtype=torch.float64)
COLUMNS = torch.arange(8).expand(4, 8) // 2
FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "stft": lambda y, p: torch.stft(y, 8, 4, window=HANN, return_complex=True).abs(),
    "istft": lambda y, p: torch.istft(
        torch.stft(y.repeat(1, 4), 8, 4, window=HANN, return_complex=True), 8, 4, window=HANN
    ),
    "scatter_reduce": lambda y, p: y.new_zeros(4, 8).scatter_reduce(1, COLUMNS, y, "amax"),
    "index_reduce": lambda y, p: y.new_zeros(4, 8).index_reduce(
        0, torch.tensor([0, 0, 1, 1]), y, "mean"
    ),
    "remainder": lambda y, p: y % 0.7,
    "fmod": lambda y, p: torch.fmod(y, 0.7),
    "frac": lambda y, p: y.frac(),
    "rot90": lambda y, p: y.rot90(),
    "max_unpool1d": lambda y, p: F.max_unpool1d(
        *F.max_pool1d(y[:, None], 2, return_indices=True), 2
    ),
    "logaddexp": lambda y, p: torch.logaddexp(y, p[:4]),
    "logcumsumexp": lambda y, p: y.logcumsumexp(1),
    "var_mean": lambda y, p: torch.cat(torch.var_mean(y, 1)),
    "std_mean": lambda y, p: torch.stack(torch.std_mean(y)),
    "weighted embedding_bag": lambda y, p: F.embedding_bag(
        COLUMNS, p, per_sample_weights=y, mode="sum"
    ),
    "cdist to prototypes": lambda y, p: torch.cdist(y, p),
    "cdist to itself": lambda y, p: torch.cdist(y, 2 * y + 1, 1.0),
    "pdist": lambda y, p: F.pdist(y),
    "hypot": lambda y, p: torch.hypot(y, p[:4]),
    "multi_dot": lambda y, p: torch.linalg.multi_dot([y, p.T, p]),
    "mse_loss": lambda y, p: F.mse_loss(y, p[:4]),
    "nll_loss": lambda y, p: F.nll_loss(y.log_softmax(1), torch.arange(4)),
    "complex tanh": lambda y, p: torch.tanh(of_pairs(y)).real,
    "complex exp": lambda y, p: torch.exp(of_pairs(y)).imag,
    "complex square": lambda y, p: (of_pairs(y) ** 2).real,
}


@pytest.mark.parametrize("name", fast_first(FUNCTIONS, 10))
def test_ops_that_were_refused(name: str) -> None:
    certified(Between(FUNCTIONS[name]))


def test_one_function_has_one_balanced_gradient() -> None:
    """A complex number over its size, by either name; of real numbers ``sgn`` is a step."""
    grads = []
    for f in (lambda z: z.sgn(), lambda z: z / z.abs()):
        module = certified(Between(lambda y, p, f=f: torch.view_as_real(f(of_pairs(y)))))
        x = X.clone().requires_grad_()
        grads.append(torch.autograd.grad(weighed(module(x)), x)[0])
    torch.testing.assert_close(grads[0], grads[1])
    assert grads[0].abs().max() > 0
    for step in (torch.sgn, torch.sign):
        with pytest.raises(lg.errors.NoPathError):
            lg.transform(Between(lambda y, p, step=step: step(y)), X)


BALANCED = [r for r in rulebook.load().facts.values() if r.twin and r.kind is not Kind.CUT]


@pytest.mark.parametrize("row", BALANCED, ids=lambda r: r.op.removeprefix("aten."))
def test_batched_backwards(row: Any) -> None:
    """``is_grads_batched`` (and so ``jacobian(vectorize=True)``) gives what one after another gives."""
    call = calls(row)[0]
    made = balance(rulebook.load(), row, call, [next(iter(_carriers(row, call)))])
    x = [t.clone().requires_grad_() for t in made.inputs]
    y = next(t for t in made.module(*x) if t.requires_grad)
    gs = torch.stack([torch.randn_like(y), torch.randn_like(y), torch.randn_like(y)])
    one = [torch.autograd.grad(y, x[0], g, retain_graph=True)[0] for g in gs]
    (all_,) = torch.autograd.grad(y, x[0], gs, is_grads_batched=True)
    torch.testing.assert_close(all_, torch.stack(one), rtol=1e-12, atol=1e-12)


def _carriers(row: Any, call: Any) -> Any:
    return tensors(call, (*row.stream, *row.factors))


@pytest.mark.parametrize("cell", [nn.GRUCell, nn.LSTMCell, nn.RNNCell])
@pytest.mark.parametrize(
    ("width", "dtype"), [
        pytest.param(n, dtype, marks=() if n == 16 else pytest.mark.slow)
        for n, dtype in ((8, torch.float64), (16, torch.float32), (33, torch.float64))
    ],
)  # fmt: skip
def test_cells_called_step_by_step(cell: Any, width: int, dtype: torch.dtype) -> None:
    """A GRU cell of PyTorch writes in place into parts of a product, whose layout picks the bits."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.cell, self.head = cell(6, width), nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for step in x.unbind(1):
                state = self.cell(step, state)
            return self.head(state[0] if isinstance(state, tuple) else state)

    module = certified(Model().to(dtype), torch.randn(5, 3, 6, dtype=dtype))
    assert isinstance(module, torch.fx.GraphModule)
