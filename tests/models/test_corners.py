"""Small models, each with a mechanism that was once missed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import libragrad_fx as lg


class Steps(nn.Module):
    """Ops without a gradient: some have zeros for one, for others autograd refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        steps = torch.floor_divide(h, 0.5) + torch.heaviside(h, h.new_zeros(())) + h.round()
        steps = steps + torch.div(h, 0.3, rounding_mode="trunc")
        slope = torch.div(h, 2, rounding_mode=None)  # a plain division
        first = h.argsort(-1)[:, :2]
        counted = torch.scatter(h, 1, first, h, reduce="multiply")  # no derivative, says PyTorch
        return self.head(slope * h.sigmoid() + 0.1 * steps + 0.1 * counted)


class Bag(nn.Module):
    """An embedding with several outputs starts the signal, beside a float input."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4), nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.head(F.gelu(self.bag(ids) + y))


class Padded(nn.Module):
    """Pooling pads with -inf: what never wins gets no gradient and counts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.pad(F.silu(self.conv(x)), (1, 2), value=float("-inf"))
        return self.head(F.max_pool1d(h, 3, 2).mean(-1))


class Shaped(nn.Module):
    """Constants that take their shape and dtype from the input do not depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(8))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(x * self.scale.expand_as(x).type_as(x)) + self.shift.view_as(x)
        return self.head(h)


class TwoTowers(nn.Module):
    """The second signal starts after the blocks of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.SiLU()) for _ in range(2))
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(F.normalize(x, dim=-1) * F.normalize(self.table(ids).sum(1), dim=-1))


class AsksWhetherExported(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            return x.sigmoid() * x.sum(-1, keepdim=True)
        return torch.special.expit(x) * (x[..., :1] + x[..., 1:2] + x[..., 2:3] + x[..., 3:])


class Chosen(nn.Module):
    """Data decides how many rows a fused projection sees."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.where(x[:, 0] > -99)[0]
        q, k, v = self.qkv(x[rows]).chunk(3, -1)
        mixed = F.softmax(q @ k.mT, -1) @ v
        return self.head(torch.zeros_like(x).index_add(0, rows, mixed))


class Cells(nn.Module):
    """Recurrent cells are written out, in place and by parts that PyTorch calls unsafe."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(4, 6), nn.GRUCell(6, 6), nn.RNNCell(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, c = self.lstm(x)
        h = self.lstm(x, (h, c))[0]
        near = F.cosine_similarity(h, h.flip(0))
        return self.head(self.rnn(self.gru(h, h), h) * near[:, None])


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
CASES: list[tuple[type[nn.Module], Any]] = [
    (Steps, ((2, 4),)),
    (Bag, (IDS, (2, 4))),
    (Padded, ((2, 2, 9),)),
    (Shaped, ((2, 4),)),
    (Chosen, ((3, 4),)),
    (Cells, ((2, 4),)),
    (TwoTowers, ((2, 4), IDS)),
    (AsksWhetherExported, ((2, 4),)),
]


@pytest.mark.parametrize(("make", "shapes"), [
    pytest.param(*c, marks=() if c[0] in (Padded, Shaped, AsksWhetherExported) else pytest.mark.slow)
    for c in CASES
], ids=lambda v: getattr(v, "__name__", ""))  # fmt: skip
def test_balanced(make: type[nn.Module], shapes: Any) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    inputs = tuple(
        s if isinstance(s, torch.Tensor) else torch.randn(s, dtype=torch.float64) for s in shapes
    )
    gm = lg.transform(model, inputs)
    certificate = lg.verify(model, gm, inputs, target=1)
    assert certificate.ok, str(certificate)
    assert certificate.completeness_error < 1e-12
    assert certificate.input_fraction > 1e-3
    if make is Padded:  # the one whose input has positions
        att = lg.attribute(gm, inputs, target=1, method="fullgrad_plus")
        assert float(att.completeness_error.max()) < 1e-12


def test_bits_read_as_another_type_are_a_cut() -> None:
    class Bits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x.view(torch.complex128).view(torch.float64)

    x = torch.randn(2, 4, dtype=torch.float64)
    certificate = lg.verify(Bits().eval(), lg.transform(Bits().eval(), x), x, target=1)
    assert certificate.ok, str(certificate)
    assert certificate.input_share == pytest.approx(certificate.output / 2)


def test_an_operand_that_tells_the_dtype_is_no_signal() -> None:
    class Cast(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.to.other(x, x.sigmoid())

    x = torch.randn(2, 5, dtype=torch.float64)
    assert lg.verify(Cast().eval(), lg.transform(Cast().eval(), x), x, target=1).ok


def test_composite_ops_without_a_row_are_written_out() -> None:
    """``trapezoid`` and ``hstack`` have no rows: their parts have."""

    class Composite(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.trapezoid(torch.hstack([x, x.sigmoid() * x.type_as(x)]), dim=-1)

    model, x = Composite().eval(), torch.randn(2, 5, dtype=torch.float64)
    gm = lg.transform(model, x, on_unknown="raise")
    assert lg.verify(model, gm, x).ok
    names = {str(n.target) for n in gm.graph.nodes}
    assert not any("trapezoid" in n or "hstack" in n for n in names)


class Typed(nn.Module):
    """Token types that only take the batch size from the input: their embedding is a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.types, self.table = nn.Buffer(torch.tensor([[0, 1, 1]])), nn.Embedding(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.gelu(x + self.table(self.types.expand(x.shape[0], -1))).mean(1))


def test_a_shape_is_no_signal() -> None:
    torch.manual_seed(0)
    model, x = Typed().double().eval(), torch.randn(2, 3, 4, dtype=torch.float64)
    gm = lg.transform(model, x)
    certificate = lg.verify(model, gm, x, target=1)
    assert certificate.ok, str(certificate)
    x.requires_grad_()
    (g,) = torch.autograd.grad(gm(x)[:, 1].sum(), x)
    assert certificate.input_share == pytest.approx(float((x * g).sum().detach()))
