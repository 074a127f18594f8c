"""Which row holds where: modules, what makes an operand, the first that fits; and a row without a site."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import libragrad_fx as lg
from libragrad_fx.decide import rulebook
from libragrad_fx.decide.rulebook import in_scope, rules_folder
from libragrad_fx.errors import CutWarning, RuleError, UnknownOpError
from tests.between import fast_first
from tests.decide.test_policies import Net, X

LIBRA = (rules_folder() / "libra.yaml").read_text("utf-8")


def policy(folder: Path, *rows: str, base: str = LIBRA) -> Path:
    """A policy with these rows before all others."""
    file = folder / "mine.yaml"
    file.write_text(
        base.replace("rows:\n", "rows:\n" + "".join(f"- {{{r}, cite: c}}\n" for r in rows)), "utf-8"
    )
    return file


def actions(made: lg.Plan) -> dict[str, str]:
    return {e.node: str(e.action) for e in made.edits if e.rule == "gated/value"}


@pytest.mark.parametrize(
    ("scope", "module", "holds"),
    [
        ("blocks.*.mlp", "blocks.0.mlp", True),
        ("blocks.*.mlp", "blocks.0.mlp.act", True),
        ("blocks.*.mlp", "blocks.0", False),
        ("blocks.*.mlp", "encoder.blocks.0.mlp", False),
        ("*.mlp", "encoder.blocks.0.mlp.act", True),
        ("blocks.0", "blocks.01", False),
        ("blocks.[01]", "blocks.1.norm", True),
        ("Blocks.*", "blocks.0", False),
        ("*", "", True),
        ("blocks", "", False),
    ],
)
def test_a_scope_is_a_module_and_what_it_holds(scope: str, module: str, holds: bool) -> None:
    assert in_scope(scope, module) is holds


@given(
    path=st.lists(st.sampled_from(["a", "b", "0", "1"]), min_size=1, max_size=4), depth=st.integers(1, 4)
)
def test_a_path_is_in_the_scope_of_what_holds_it(path: list[str], depth: int) -> None:
    outer = path[:depth]
    assert in_scope(".".join(outer), ".".join(path))
    assert in_scope(".".join("*" for _ in outer), ".".join(path))
    assert not in_scope(".".join([*path, "c"]), ".".join(path))


def test_a_row_holds_in_its_modules(tmp_path: Path) -> None:
    net = Net(gated=False, fused=True)
    row = "kind: gated, site: value, action: keep, optional: false"
    made = lg.plan(net, X, policy=policy(tmp_path, row + ', where: "blocks.1"'))
    assert actions(made) == {"gelu": "secant"}
    assert [f.node for f in made.unbalanced] == ["gelu_1"]


def test_the_first_row_that_fits_holds(tmp_path: Path) -> None:
    row = "kind: gated, site: value, action:"
    inner, outer = f"{row} secant, where: blocks.0", f'{row} keep, where: "blocks.*"'
    net = Net(gated=False, fused=True)
    assert actions(lg.plan(net, X, policy=policy(tmp_path, inner, outer))) == {"gelu": "secant"}
    assert actions(lg.plan(net, X, policy=policy(tmp_path, outer, inner))) == {}


def test_the_digest_knows_which_row_is_first(tmp_path: Path) -> None:
    one, other = (
        f"kind: gated, site: value, action: {a}, where: {w}" for a, w in (("keep", "a"), ("secant", "b"))
    )
    digests = {rulebook.load(policy(tmp_path, *rows)).digest for rows in ((one, other), (other, one))}
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("row", "words"),
    fast_first([
        ("kind: product, site: gate, of: aten.sigmoid, action: keep", "row product/gate of aten.sigmoid"),
        ('kind: gated, site: value, action: keep, where: "layers.*"', r"row gated/value in 'layers\.\*'"),
        ("kind: recurrent, site: value, action: keep, where: blocks", "row recurrent/value in 'blocks'"),
        ("kind: gated, site: value, of: aten.silu, action: keep", "row gated/value of aten.silu"),
        ("kind: product, site: behind, of: aten.mul, action: keep", "row product/behind of aten.mul"),
    ], 1),
)  # fmt: skip
def test_a_row_without_a_site_is_an_error(row: str, words: str, tmp_path: Path) -> None:
    net, file = Net(gated=False, fused=True, depth=1), policy(tmp_path, row + ", optional: false")
    line = file.read_text("utf-8").splitlines().index(f"- {{{row}, optional: false, cite: c}}") + 1
    for call in (lg.plan, lg.transform):
        with pytest.raises(RuleError, match=f"^{file}:{line}: {words} has no site.*\n.*'optional: true'"):
            call(net, X, policy=file)
    assert lg.plan(net, X, policy=policy(tmp_path, row)).edits


def test_rows_are_not_optional_unless_they_say_so(tmp_path: Path) -> None:
    file = policy(tmp_path, base=LIBRA.replace("optional: true\n", ""))
    with pytest.raises(RuleError) as caught:
        lg.plan(Net(gated=False, fused=True, depth=1), X, policy=file)
    said = str(caught.value).splitlines()
    assert any("row recurrent/value" in s for s in said)
    assert not any("row gated/value" in s for s in said)


class Cut(nn.Module):
    """Two graphs: GELU in the one, SiLU in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.gelu(self.first(x))
        return self.last(nn.functional.silu(y) if y.sum() > 0 else y)


def test_a_row_may_have_its_site_in_any_graph_of_a_model(tmp_path: Path) -> None:
    model, x = Cut(), torch.ones(2, 8)
    with torch.no_grad():
        model.first.bias.fill_(1)
    row = "kind: gated, site: value, action: keep, optional: false, of:"
    with pytest.warns(CutWarning):
        gm = lg.transform(model, x, policy=policy(tmp_path, f"{row} aten.silu"))
    assert [f.op for f in gm.plan.unbalanced] == ["aten.silu.default"]
    with pytest.raises(RuleError, match=r"of aten\.mish"):
        lg.transform(model, x, policy=policy(tmp_path, f"{row} aten.mish"))


class Gates(nn.Module):
    """Attention written out beside a norm written out: two products whose gates are of other ops."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        weights = nn.functional.dropout((self.q(x) @ self.k(x).mT).softmax(-1), 0.1, self.training)
        return (weights @ self.v(x)).mean(1)


def test_a_gate_is_told_by_what_makes_it() -> None:
    """Seen through a dropout; what is behind the one gate is ruled, what is behind the other is not."""
    made = lg.plan(Gates().eval(), X.float(), policy="relp")
    assert [(e.op, e.operands) for e in made.edits] == [("aten.mul.Tensor", ("other",))]
    assert [f.op for f in made.unbalanced] == [
        "aten.matmul.default",
        "aten.softmax.int",
        "aten.matmul.default",
    ]
    made = lg.plan(Gates().eval(), X.float(), policy="libra_no_norm")
    assert [(e.op, e.operands) for e in made.edits] == [("aten.matmul.default", ("self",))]
    assert {f.op for f in made.unbalanced} == {
        "aten.mul.Tensor",
        "aten.rsqrt.default",
        "aten.square.default",
    }


def test_what_is_behind_a_live_gate_needs_a_row(tmp_path: Path) -> None:
    """Silence is an error there as well: ``q kᵀ`` and softmax are ruled by no row of libra."""
    row = "kind: product, site: gate, of: aten.softmax, action: keep"
    with pytest.raises(UnknownOpError, match="no row for gate_source/behind") as caught:
        lg.transform(Gates().eval(), X.float(), policy=policy(tmp_path, row))
    assert "no row for product/behind" in str(caught.value)


def test_not_every_factor_can_be_stopped() -> None:
    class Both(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.silu(x) * nn.functional.gelu(x)

    with pytest.raises(UnknownOpError, match="would stop every factor"):
        lg.transform(Both(), X, policy="cp_lrp")
    made = lg.plan(Both(), X, policy="cp_lrp")  # keeps what it does not know: the factors are ruled
    assert actions(made) == {"silu": "secant", "gelu": "secant"}


def test_only_softmax_has_a_temperature(tmp_path: Path) -> None:
    rows = (
        "kind: product, site: gate, of: aten.sigmoid, action: keep",
        "kind: gate_source, site: behind, action: {temper: 2}",
    )

    class Gated(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (2 * x).sigmoid()

    with pytest.raises(UnknownOpError, match="which is for softmax"):
        lg.transform(Gated(), X, policy=policy(tmp_path, *rows))


def test_a_number_is_named_by_the_proof(tmp_path: Path) -> None:
    """Attention with its weights held, and v by a half: no law, though the twin is balanced."""
    row = "kind: attention, site: value, action: {scale: 0.5}"
    net = Net(gated=False, fused=True)
    base = LIBRA.replace("kind: attention, site: value, action: keep", row)
    gm = lg.transform(net, X, policy=policy(tmp_path, base=base))
    certificate = lg.verify(net, gm, X, 1)
    assert not certificate.ok
    assert len(certificate.unbalanced) == 2
    assert "scale value by 0.5" in str(gm.plan)
