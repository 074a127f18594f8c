"""Models that are no single graph: balanced graph by graph, and honest about where they are cut."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.errors import CaptureError, CutWarning, InputError
from libragrad_fx.pieces.dynamo import CutModule

pytestmark = pytest.mark.usefixtures("dynamo_afresh")


class Branching(nn.Module):
    """Two branches, chosen by a value; the gated one runs in another graph than what it gates."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm, self.table = nn.LayerNorm(8), nn.Buffer(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.gelu(self.up(x)) + self.table
        if h.sum() > 0:
            h = h * torch.sigmoid(self.gate(h))
        return self.head(self.norm(h))


class Looping(nn.Module):
    """As many steps as the values ask for, all by the same code with other parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for i in range(int(ids.max())):
            y = nn.functional.silu(self.steps[i](y)) + y
        return y


class Between(nn.Module):
    """An op that autograd passes between two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    @torch._dynamo.disable
    def outside(self, h: torch.Tensor) -> torch.Tensor:
        return torch.exp(h)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        if h.sum() > 1e9:
            h = h / 2
        return self.head(self.outside(h))


def branching() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = Branching().double().eval()
    high, low = torch.randn(2, 4).double(), torch.randn(2, 4).double()
    with torch.no_grad():
        model.table.fill_(3.0)
        model.up.bias.fill_(-0.1)
        low = low - 1e3 * torch.sign(model.up.weight.sum(0))
    return model, high, low


class Rotating(nn.Module):
    """What graphs compute without the input, and steps of it, is used behind a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.frequencies, self.weight = nn.Buffer(torch.rand(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table, weight = torch.cos(torch.arange(4) * self.frequencies), self.weight * 2
        h = self.up(x)
        steps = h.round()
        if h.sum() > -1e9:
            h = h * table + weight * h
        h = nn.functional.silu(h) * h
        if h.sum() > -1e9:
            h = h + 0.1 * steps + 2 * table
        return self.head(h)


def test_graphs_are_made_once() -> None:
    model = Rotating().double().eval()
    x = torch.randn(2, 4, dtype=torch.float64)
    with pytest.warns(CutWarning):
        gm = lg.transform(model, x)
    made = len(gm.pieces)
    for _ in range(5):
        y = torch.randn(2, 4, dtype=torch.float64)
        assert torch.equal(gm(y), model(y))
    with torch.no_grad():
        model.weight.mul_(3)
        model.frequencies.mul_(2)
    assert torch.equal(gm(x), model(x))
    assert len(gm.pieces) == made
    assert lg.verify(model, gm, x, 1).ok
    plain, balanced = ([*torch.autograd.grad(m(x).sum(), m.parameters())] for m in (model, gm))
    assert len(plain) == len(balanced)
    assert all(g.abs().sum() > 0 for g in balanced)


def test_autograd_is_accounted_for_in_a_cut_model_too() -> None:
    model, x = Branching().double().eval(), torch.randn(2, 4, dtype=torch.float64)
    with pytest.warns(CutWarning):
        account = lg.audit(model, x, 1)
    (g,) = torch.autograd.grad(model(x.requires_grad_())[:, 1].sum(), x)
    assert account.input == pytest.approx(float((x.detach() * g).sum()))
    residuals = sum(r.residual for r in account.rows)
    assert account.output - account.input - account.bias == pytest.approx(residuals)
    assert {"aten.layer_norm.default", "aten.gelu.default"} <= {r.op for r in account.worst(4)}


def test_it_has_the_face_of_the_model() -> None:
    model = Branching().eval()
    x = torch.randn(2, 4)
    with pytest.warns(CutWarning):
        gm = lg.transform(model, x)
    assert gm.state_dict().keys() == model.state_dict().keys()
    model.load_state_dict(gm.state_dict())
    assert dict(gm.named_modules()).keys() == dict(model.named_modules()).keys()
    assert gm.get_submodule("norm").weight is model.norm.weight
    for other in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), copy.deepcopy(gm).double()):
        assert other.plan.digest == gm.plan.digest
        assert lg.transform(other) is other
    assert gm.train()._model.training
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.warns(CutWarning):
        gm = lg.transform(frozen, x)
    assert not gm(x).requires_grad
    assert gm(x.clone().requires_grad_()).requires_grad


def test_inputs_are_inferred_for_a_cut_model_too() -> None:
    model = Branching().eval()
    model.example_input_array = torch.randn(2, 4)
    with pytest.warns(CutWarning):
        gm = lg.transform(model)
    x = torch.randn(3, 4)
    assert torch.equal(gm(x), model(x))


def test_both_branches_are_balanced() -> None:
    model, x, _ = branching()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.warns(CutWarning, match=r"test_cuts.py:\d+"):
        gm = lg.transform(model, x)
    assert isinstance(gm, CutModule)
    for table in (3.0, -9.0):
        with torch.no_grad():
            model.table.fill_(table)  # shared: the result sees it, and takes the other branch
        certificate = lg.verify(model, gm, x, target=1)
        assert certificate.ok, str(certificate)
        assert certificate.completeness_error < 1e-12
        assert certificate.cuts
        assert "test_cuts.py" in certificate.cuts[0]
        assert certificate.input_fraction > 1e-3
        assert lg.Certificate.from_json(certificate.to_json()) == certificate
    assert "graph0/" in str(gm.plan)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items() if k != "table")
    plain = lg.audit(gm, x, target=1)
    assert plain.completeness_error < 1e-12


def test_one_piece_of_code_with_several_parameters() -> None:
    model = Looping().double().eval()
    ids, y = torch.tensor([[1], [3]]), torch.randn(2, 4).double()
    gm = lg.transform(model, (ids, y))
    assert isinstance(gm, CutModule)
    for most in (1, 2, 4):
        ids = torch.tensor([[1], [most]])
        certificate = lg.verify(model, gm, (ids, y), target=1)
        assert certificate.ok, str(certificate)
        y2 = y.clone().requires_grad_()
        assert torch.equal(gm(ids, y2), model(ids, y2))


def test_behaves_like_a_module() -> None:
    model, x, _ = branching()
    gm = lg.transform(model, x)
    expected = model(x)
    for other in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert torch.equal(other(x), expected)
        assert lg.verify(model, other, x, target=1).ok
    half = copy.deepcopy(gm).to(torch.float32)
    assert next(model.parameters()).dtype is torch.float64
    assert torch.equal(half(x.float()), copy.deepcopy(model).float()(x.float()))
    gm.train()
    assert not model.training
    with torch.no_grad():
        assert torch.equal(gm(x), expected)
    x.requires_grad_()
    (g,) = torch.autograd.grad(gm(x)[:, 1].sum(), x)
    assert g.shape == x.shape
    assert lg.transform(gm) is gm
    with pytest.raises(InputError, match="captured already"):
        lg.transform(gm, policy="cp_lrp")


def test_ops_between_graphs_are_recorded() -> None:
    """What Dynamo runs between its graphs is out of reach there, and on the tape like any other op."""
    model, x = Between().double().eval(), torch.randn(2, 4).double()
    with pytest.warns(CutWarning, match="recorded"):
        gm = lg.transform(model, x)
    for _ in range(2):
        x = torch.randn(3, 4).double()
        assert lg.verify(model, gm, x, target=1).ok
    assert len(gm.pieces) == 2  # for two rows, and for three
    kept = lg.transform(model, x, on_unknown="keep")
    assert "exp" in lg.verify(model, kept, x, target=1).unbalanced


def test_methods_that_need_the_graph_say_so() -> None:
    model, x, _ = branching()
    gm = lg.transform(model, x)
    with pytest.raises(InputError, match="one captured graph"):
        lg.attribute(gm, x, target=1)


class Counting(nn.Module):
    """A forward that depends on how often it ran; its inner module has a name that is ours as well."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self._model, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.head(nn.functional.gelu(self._model(self.up(x)) * self.calls))


def test_what_counts_its_calls_is_left_as_it_was() -> None:
    model, x = Counting().double().eval(), torch.randn(2, 4, dtype=torch.float64)
    gm = lg.transform(model, x)
    for _ in range(2):
        certificate = lg.verify(model, gm, x, target=1)
        assert certificate.ok, str(certificate)
        lg.audit(gm, x, target=1)
    assert model.calls == gm._model.calls == 0


def test_several_graphs_are_captured_already() -> None:
    model, x, _ = branching()
    gm = lg.transform(model, x)
    for stage in (lg.plan, lg.trace):
        with pytest.raises(InputError, match="captured already"):
            stage(gm, x)


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            raise RuntimeError("no such branch")
        raise RuntimeError("nor this one")


def test_a_model_that_cannot_run_says_what_it_said() -> None:
    with pytest.raises(CaptureError, match=r"Broken itself fails .* nor this one|no such branch"):
        lg.transform(Broken(), torch.randn(2, 3))
    with pytest.raises(CaptureError, match=r"(?s)torch.export could not capture.*Run by Dynamo"):
        lg.transform(Broken(), torch.randn(2, 3), check=False)


class Rebinding(nn.Module):
    """A buffer is another tensor from call to call, so that an activation may get its place in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head, self.count = nn.Linear(4, 4), nn.Linear(4, 4), nn.Buffer(torch.zeros(2, 4))

    @torch._dynamo.disable
    def advance(self) -> None:
        self.count = self.count + 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.gelu(self.up(x))
        self.advance()
        h = torch.tanh(h * 1.5)
        if h.sum() > 1e9:
            h = h + 1
        h = h * 2
        if h.sum() > 1e9:
            h = h * 3
        return self.head(h.tanh())


def test_what_the_model_lets_go_is_not_taken_for_its_own() -> None:
    model, x = Rebinding().double().eval(), torch.randn(2, 4, dtype=torch.float64)
    with pytest.warns(CutWarning):
        gm = lg.transform(model, x)
    found = []
    for i in range(100):
        z = (x * (1 + i % 2)).requires_grad_()
        found.append(torch.autograd.grad(gm(z).sum(), z)[0])
    for i, g in enumerate(found):
        assert torch.equal(g, found[i % 2])
