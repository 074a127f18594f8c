"""The static proof names exactly what is missing, and the account closes at every boundary."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import pickle
import warnings
from typing import Any

import pytest
import torch

import libragrad_fx as lg
from libragrad_fx.account.certificate import tolerance_of
from libragrad_fx.account.proof import prove
from libragrad_fx.errors import GateOutputWarning
from libragrad_fx.stages import Decision, balance, decide, plain, rewritten
from libragrad_fx.target import dot
from libragrad_fx.types import Certificate, Edit, Ledger, LedgerRow
from tests.between import fast_of
from tests.models.zoo import ZOO, build

timm = pytest.importorskip("timm")

FAST = ("rms_norm", "fused_attention", "tanh_gelu")  # a norm, attention, an activation
EACH = fast_of(ZOO, FAST)


@functools.cache
def decided(name: str) -> Decision:
    model, x = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GateOutputWarning)
        return decide(model, x, "libra", "raise", None)


@pytest.mark.parametrize("name", EACH)
def test_without_one_edit_the_proof_names_its_node(name: str) -> None:
    """Every edit is needed, and the proof sees it without running anything."""
    made = decided(name)
    assert not prove(rewritten(made)).open
    for edit in made.plan.edits:
        others = tuple(e for e in made.plan.edits if e is not edit)
        lame = dataclasses.replace(made.plan, edits=others)
        found = {f.node for f in prove(rewritten(dataclasses.replace(made, plan=lame))).open}
        assert edit.node in found, f"{edit} is missing and not noticed; open: {found}"


@pytest.mark.parametrize("name", ["swiglu", "star_product"])
def test_a_wrong_scale_is_named(name: str) -> None:
    if name not in ZOO:
        name = next(n for n in ZOO if any(e.factor == 0.5 for e in decided(n).plan.edits))
    made = decided(name)

    def halved(edit: Edit) -> Edit:
        return dataclasses.replace(edit, factor=edit.factor and edit.factor / 2)

    lame = dataclasses.replace(made.plan, edits=tuple(map(halved, made.plan.edits)))
    scaled = {e.node for e in made.plan.edits if e.factor}
    found = {f.node for f in prove(rewritten(dataclasses.replace(made, plan=lame))).open}
    assert found == scaled
    assert scaled


@functools.cache
def vit() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = timm.create_model("test_vit").double().eval()
    return model, torch.randn(2, 3, 160, 160, dtype=torch.float64)


@functools.cache
def sides() -> tuple[Any, Any]:
    """Balanced and plain; for tests that do not change them."""
    return lg.transform(*vit()), lg.trace(*vit())


@pytest.fixture(scope="module")
def accounts() -> tuple[Ledger, Ledger, Certificate]:
    (model, x), (gm, plain) = vit(), sides()
    return lg.audit(gm, x, 3), lg.audit(plain, x, 3), lg.verify(model, gm, x, 3)


def test_every_row_and_every_boundary_closes(accounts: tuple[Ledger, Ledger, Certificate]) -> None:
    balanced, plain, certificate = accounts
    for account in (balanced, plain):
        for r in account.rows:
            assert r.out == pytest.approx(
                r.streams + r.sources + r.bias + r.residual, rel=1e-12, abs=1e-12
            )
        # what is sent to the input, row by row, is what arrives there
        assert sum(r.sources for r in account.rows) == pytest.approx(account.input, abs=1e-12)
        lost = sum(r.residual for r in account.rows)
        assert account.output == pytest.approx(account.input + account.bias + lost, abs=1e-12)
    assert [b.after for b in balanced.boundaries] == lg.blocks(sides()[1])
    assert all(b.error < 1e-12 for b in balanced.boundaries)
    assert max(b.error for b in plain.boundaries) > 1e-3
    assert certificate.boundaries == balanced.boundaries
    assert 0 < certificate.input_fraction < 1


def test_the_target_is_a_row_of_the_account() -> None:
    """A probability as target is no linear reading of the outputs: its own row says so."""
    account = lg.audit(sides()[0], vit()[1], lambda y: y.softmax(-1)[:, 3])
    assert account.worst(1)[0].node == "output"
    assert account.rows[-1].op == "target"


def test_by_op_sums_up_the_residuals(accounts: tuple[Ledger, Ledger, Certificate]) -> None:
    _, plain, _ = accounts
    total = sum(lost - created for _, _, lost, created in plain.by_op())
    residuals = sum(r.residual for r in plain.rows)
    assert total == pytest.approx(residuals * (-1 if plain.output < 0 else 1))
    assert "layer_norm" in str(plain)
    assert "% of output" in str(plain)


def test_bounds_at_infinity_are_no_bias() -> None:
    class Clamp(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("low", torch.tensor(-math.inf))
            self.register_buffer("high", torch.tensor([1.0, math.inf, math.inf]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.clamp(self.low, self.high)

    x = torch.tensor([[3.0, 3.0, -3.0]])
    account = lg.audit(Clamp(), x, lambda y: y.sum())
    assert account.bias == 1.0
    assert account.completeness_error == 0.0


def test_what_stands_for_infinity_is_a_bias() -> None:
    class Bounded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("far", torch.tensor([0.0, math.inf, -math.inf, math.nan]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nan_to_num(x + self.far, nan=4.0, posinf=2.0, neginf=-1.0)

    account = lg.audit(Bounded(), torch.tensor([[3.0, 3.0, -3.0, 1.0]]), lambda y: y.sum())
    assert (account.output, account.input, account.bias) == (8.0, 3.0, 5.0)


class Writes(torch.nn.Module):
    """Columns of the input, or of a constant, written to the places of an index."""

    def __init__(self, write: Any, at: list[int]) -> None:
        super().__init__()
        self.write = write
        self.register_buffer("at", torch.tensor(at))
        self.register_buffer("fixed", torch.ones(2, 3, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.write(x, self.at, x[:, :3], self.fixed)


WRITES = {
    "index_copy": (lambda x, at, y, _: x.index_copy(1, at, y), True),
    "index_put": (lambda x, at, y, _: x.T.index_put([at], y.T), True),
    "scatter": (lambda x, at, y, _: x.scatter(1, at.expand(2, -1), y), True),
    "index_put adds": (lambda x, at, y, _: x.T.index_put([at], y.T, accumulate=True), False),
    "index_copy of a constant": (lambda x, at, _, c: x.index_copy(1, at, c), False),
    "scatter of a number": (lambda x, at, *_: x.scatter(1, at.expand(2, -1), 2.0), False),
}


@pytest.mark.parametrize("name", WRITES)
def test_the_proof_says_that_no_two_indices_may_coincide(name: str) -> None:
    """Of two values for one place the last stays and autograd answers both: the ledger sees it."""
    (write, conditional), x = WRITES[name], torch.randn(2, 4, dtype=torch.float64)
    for at in ([3, 0, 1], [3, 0, 3]):
        model = Writes(write, at)
        certificate = lg.verify(model, lg.transform(model, x, check=False), x, lambda y: y.sum())
        assert any("indices coincide" in r for r in certificate.proof) is conditional
        assert certificate.ok is not (conditional and at[0] == at[2]), str(certificate)


def test_of_a_negative_output_negative_mass_is_lost() -> None:
    row = LedgerRow("n", "op", "", "", out=-3.0, streams=-1.0, sources=0.0, bias=0.0, residual=-2.0)
    assert row.moved(-5.0) == (2.0, 0.0)
    assert row.moved(5.0) == (0.0, 2.0)


def test_certificate_as_json(accounts: tuple[Ledger, Ledger, Certificate]) -> None:
    certificate = accounts[2]
    assert Certificate.from_json(certificate.to_json()) == certificate
    for text in ("{}", "[]", '{"ok": true}'):
        with pytest.raises(ValueError, match="not a certificate"):
            Certificate.from_json(text)


def test_an_error_that_is_no_number_is_the_largest(accounts: tuple[Ledger, Ledger, Certificate]) -> None:
    broken = dataclasses.replace(accounts[2].boundaries[0], error=math.nan)
    for boundaries in ((broken, *accounts[2].boundaries), (*accounts[2].boundaries, broken)):
        certificate = dataclasses.replace(accounts[2], boundaries=boundaries)
        assert not certificate.ok
        assert "FAIL behind each of" in str(certificate)


def test_a_broken_forward_is_measured() -> None:
    (model, x), gm = vit(), sides()[0]
    with torch.no_grad():
        changed = timm.create_model("test_vit").double().eval()
        changed.load_state_dict(model.state_dict())
        changed.head.bias[0] += 1e-13
    found = lg.verify(changed, gm, x, 3)
    assert not found.ok
    assert not found.forward_equal
    assert found.max_ulp >= 1
    assert 0 < found.max_abs_difference < 1e-12
    assert "FAIL forward" in str(found)


def test_infinite_values_without_gradient_count_nothing() -> None:
    a, g = torch.tensor([math.inf, 2.0]), torch.tensor([0.0, 3.0])
    assert dot(a, g) == 6.0
    assert math.isinf(dot(a, torch.tensor([1.0, 0.0])))


def test_sites_of_a_plain_trace_hold_all_that_sees_the_input() -> None:
    made = decided("fused_attention")
    balanced = {s.node for s in rewritten(made).record.sites}
    assert balanced < {s.node for s in plain(made).record.sites}


def test_an_error_is_measured_by_the_account_however_small() -> None:
    """A millionth that is lost of a millionth is not rounding: nothing is held against 1."""
    leak = Ledger(rows=(), output=1e-6, input=4e-7, bias=0.0)
    assert tolerance_of((), (torch.zeros(1),), {}, leak) < leak.completeness_error


class Looked(torch.nn.Module):
    """Rows that are computed from the input, taken from places that are fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(4, 4)
        self.register_buffer("at", torch.tensor([0, 2, 1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.nn.functional.embedding(self.get_buffer("at"), self.fc(x))
        return torch.nn.functional.gelu(rows).sum(0, keepdim=True)


def test_the_proof_goes_on_behind_an_embedding_whose_table_carries() -> None:
    """Such a lookup starts no signal, it passes one on: what stands behind it has to be balanced."""
    model, x = Looked().double(), torch.randn(3, 4, dtype=torch.float64)
    proved = prove(balance(decide(model, x)))
    assert (proved.nodes, proved.open) == (4, ())
    kept = prove(balance(decide(model, x, "ali_lrp")))
    assert [f.node for f in kept.open] == ["gelu"]


# --- the graph that runs is proved as well (C11)


def _runs_open(module: Any) -> tuple[Any, ...]:
    assert module.lean is not None
    return prove(module, as_run=True).open


@pytest.mark.parametrize("name", EACH)
def test_what_runs_is_proved(name: str) -> None:
    module = balance(decided(name))
    assert prove(module).open == _runs_open(module) == ()
    assert _runs_open(pickle.loads(pickle.dumps(module))) == _runs_open(copy.deepcopy(module)) == ()


def _spoil(module: Any) -> None:
    """A twin of the graph that runs is its plain op again."""
    node = next(
        n for n in module.lean.nodes if getattr(n.target, "aten_op", None) is torch.ops.aten.gelu.default
    )
    node.target = node.target.aten_op


def test_a_spoilt_graph_that_runs_is_named() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 3)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    module = lg.transform(model, x)
    assert lg.verify(model, module, x, 0).ok
    _spoil(module)
    assert prove(module).open == ()
    certificate = lg.verify(model, module, x, 0)
    assert not certificate.ok
    assert any("gelu" in name for name in certificate.unbalanced)
