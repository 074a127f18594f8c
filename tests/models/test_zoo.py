"""Networks that no rule names: balanced without a special case, and broken by any missing row."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

import libragrad_fx as lg
from libragrad_fx.account.ledger import ledger
from libragrad_fx.capture.examples import example_call
from libragrad_fx.capture.export import capture
from libragrad_fx.capture.normal import normalize
from libragrad_fx.decide import rulebook
from libragrad_fx.decide.plan import plan
from libragrad_fx.decide.roles import analyze
from libragrad_fx.errors import GateOutputWarning, UnknownOpError
from libragrad_fx.rewrite.edits import rewrite
from libragrad_fx.types import Action, PolicyRow, Trace
from tests.between import fast_of
from tests.models.zoo import ZOO, build

TOLERANCE = 1e-9
BROKEN = 1e-3  # what counts as broken, relative to max(1, |f|): a million times the tolerance
BOOK = rulebook.load()

# which network shows that a policy row is needed
NEEDED = {
    "attention/gate": "fused_attention",
    "gated/value": "every_fused_op",
    "gated/gate": "modulated",
    "normaliser/value": "every_fused_op",
    "normaliser/gate": "modulated",
    "product/gate": "mixture_of_experts",
    "product/denominator": "layer_norm_by_hand",
    "product/values": "linear_attention",
    "gate_source/value": "sigmoid_mlp",
    "recurrent/value": "recurrent",
    "linear/gate": "modulated",
    "homogeneous/gate": "live_slope",
}


FAST = ("tanh_gelu", "rms_norm", "fused_attention", "modulated")


@pytest.mark.parametrize("name", fast_of(ZOO, FAST))
def test_balanced(name: str) -> None:
    model, x = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GateOutputWarning)
        gm = lg.transform(model, x)
    certificate = lg.verify(model, gm, x, target=1)
    assert certificate.ok, str(certificate)
    assert certificate.completeness_error <= TOLERANCE * max(1, abs(certificate.output))
    assert certificate.worst_residual <= TOLERANCE * max(1, abs(certificate.output))
    assert abs(certificate.input_share) > 1e-3  # stopping everything would be complete as well


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_plain_gradient_is_not(name: str) -> None:
    model, x = build(name)
    account = lg.audit(model, x, target=1)
    assert account.completeness_error > 1e-3 * max(1, abs(account.output))


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.slow  # float64 is in the certificate of ``test_balanced``
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_bits(name: str, dtype: torch.dtype) -> None:
    model, x = build(name, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GateOutputWarning)
        # attention logits of 1e8 (``every_fused_op``): no float32 account of such a network closes
        gm = lg.transform(model, x, check=False)
    x = x.requires_grad_()
    assert torch.equal(gm(x), model(x))


@pytest.mark.slow
def test_training_mode_batch_norm() -> None:
    model, x = build("every_fused_op")
    model.train()
    gm = lg.transform(model, x)
    certificate = lg.verify(model, gm, x, target=1)
    assert certificate.ok, str(certificate)


def test_softmax_head_warns() -> None:
    model, x = build("softmax_head")
    with pytest.warns(GateOutputWarning, match="logits"):
        lg.transform(model, x)


@functools.cache
def _trace(name: str) -> tuple[Trace, torch.Tensor]:
    model, x = build(name)
    return normalize(model, capture(model, *example_call(model, x))), x


@pytest.mark.parametrize("row", [
    pytest.param(r, marks=() if r.name in ("attention/gate", "gated/gate") else pytest.mark.slow)
    for r in BOOK.rows if r.action is not Action.KEEP
], ids=lambda r: r.name)  # fmt: skip
def test_no_row_is_dead(row: PolicyRow) -> None:
    """The control: without the row, its network's completeness breaks by a large margin."""
    trace, x = _trace(NEEDED[row.name])
    errors = []
    for book in (BOOK, BOOK.without(row)):
        analysis = analyze(trace, book)
        made = plan(trace, analysis, book, on_unknown="keep")
        gm = rewrite(trace, made, analysis)
        account = ledger(gm, x, target=1)
        errors.append(account.completeness_error / max(1, abs(account.output)))
    assert errors[0] <= TOLERANCE
    assert errors[1] > BROKEN


FAST_ROWS = {  # of networks that are captured quickly
    "attention/gate", "gated/gate", "linear/gate", "normaliser/gate", "homogeneous/gate",
    "gate_source/value", "embedding/value",
}  # fmt: skip


@pytest.mark.parametrize("row", [
    pytest.param(r, marks=() if r.name in FAST_ROWS else pytest.mark.slow) for r in BOOK.rows
], ids=lambda r: r.name)  # fmt: skip
def test_a_missing_row_is_refused(row: PolicyRow) -> None:
    """Silence is no decision: a site without a row is an error that names the row to add."""
    names = {**NEEDED, "attention/value": "every_fused_op", "saturating/value": "every_fused_op"}
    names |= {"homogeneous/value": "squeeze_excite", "linear/value": "cosine_attention"}
    if row.name == "embedding/value":
        trace, _ = _embedding()
    else:
        trace, _ = _trace(names.get(row.name, "tanh_mlp"))
    book = BOOK.without(row)
    with pytest.raises(UnknownOpError, match=f"kind: {row.kind}, site: {row.site}"):
        plan(trace, analyze(trace, book), book)


def _embedding() -> tuple[Trace, torch.Tensor]:
    model = torch.nn.Sequential(
        torch.nn.Embedding(10, 8), torch.nn.Flatten(), torch.nn.Linear(24, 4)
    )
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    return normalize(model, capture(model, *example_call(model, ids))), ids
