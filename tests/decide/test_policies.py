"""Each shipped policy against its authors' formula, written out with ``detach`` alone, in float64."""

from __future__ import annotations

import dataclasses
import functools
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import libragrad_fx as lg
from libragrad_fx.decide import rulebook
from tests.between import fast_first, fast_of

X = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.5).softmax(-1) @ v


class Block(nn.Module):
    """Pre-norm attention and MLP: LayerNorm and GELU, or RMSNorm, norms of q and k, and SwiGLU."""

    def __init__(self, gated: bool, fused: bool) -> None:
        super().__init__()
        self.gated, self.fused = gated, fused
        norm = nn.RMSNorm if gated else nn.LayerNorm
        self.norm1, self.norm2 = norm(8), norm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.q_norm, self.k_norm = (nn.RMSNorm(4), nn.RMSNorm(4)) if gated else (nn.Identity(),) * 2
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.gate = nn.Linear(8, 12) if gated else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        attend = F.scaled_dot_product_attention if self.fused else written_out
        y = attend(q, k, v)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        h = F.silu(self.gate(h)) * self.up(h) if self.gated else F.gelu(self.up(h))
        return x + self.down(h)


class Net(nn.Module):
    def __init__(self, gated: bool, fused: bool, depth: int = 2) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(Block(gated, fused) for _ in range(depth))
        self.head = nn.Linear(8, 3)
        for p in self.parameters():
            nn.init.normal_(p, std=0.7)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


# --- the formulas


@dataclasses.dataclass(frozen=True)
class Formula:
    """method.md: what is held of norms and activations, the factors of the gradients of q, k, v and of
    a GLU's product, the temperature at which softmax goes back, and the γ of linear layers."""

    norm: bool = True
    activation: bool = True
    qk: float = 0.0
    v: float = 1.0
    glu: float = 0.5
    gate_branch: bool = True
    temperature: float = 1.0
    gamma: float = 0.0
    open: frozenset[str] = frozenset()
    """The ops that keep a residual on the four networks."""


ATTENTION = frozenset({"scaled_dot_product_attention", "softmax", "matmul"})
ACTIVATION, GLU = frozenset({"gelu", "silu"}), frozenset({"mul"})
FORMULAS = {
    "libra": Formula(),
    "ali_lrp": Formula(activation=False, glu=1, open=ACTIVATION | GLU),
    "cp_lrp": Formula(glu=1, gate_branch=False),
    "attn_lrp": Formula(qk=0.25, v=0.5, open=ATTENTION - {"matmul"}),
    "relp": Formula(qk=1, open=ATTENTION),
    "gim": Formula(
        activation=False, qk=0.25, v=0.5, glu=1, temperature=2,
        open=ATTENTION - {"matmul"} | ACTIVATION | GLU,
    ),
    "decompx": Formula(glu=1, open=GLU),
    "libra_no_attention": Formula(qk=1, open=ATTENTION),
    "libra_no_norm": Formula(norm=False, open=frozenset({"layer_norm", "rms_norm"})),
    "libra_no_activation": Formula(activation=False, open=ACTIVATION),
    "libra_no_gate": Formula(glu=1, open=GLU),
    "libra_pixels": Formula(),  # every linear layer reads a norm's output
    "lrp_gamma": Formula(gamma=0.05),
}  # fmt: skip


def scaled(x: Tensor, factor: float) -> Tensor:
    return x * factor + (x - x * factor).detach()


def _norm(m: nn.Module, x: Tensor, hold: bool) -> Tensor:
    if isinstance(m, nn.Identity):
        return x
    centred = x - x.mean(-1, keepdim=True) if isinstance(m, nn.LayerNorm) else x
    eps = m.eps if isinstance(m, nn.LayerNorm) else torch.finfo(x.dtype).eps
    sigma = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    y = centred / (sigma.detach() if hold else sigma) * m.weight
    return y + m.bias if isinstance(m, nn.LayerNorm) else y


def _softmax(x: Tensor, temperature: float) -> Tensor:
    """The gradient of T softmax(x / T) is s (g - <g, s>), s at T."""
    other = temperature * (x / temperature).softmax(-1)
    return x.softmax(-1).detach() + other - other.detach()


def _linear(m: nn.Module, x: Tensor, gamma: float) -> Tensor:
    """W x + b; of W x, a term with the sign of its sum counts 1 + γ times."""
    if not (gamma and isinstance(m, nn.Linear)):
        return m(x)
    terms = x.unsqueeze(-2) * m.weight
    more = 1 + gamma * (terms.sign() == terms.sum(-1, keepdim=True).sign()).double()
    ratio = terms.sum(-1) / (terms * more).sum(-1)
    shared = (x.unsqueeze(-2) * (m.weight * more * ratio.unsqueeze(-1)).detach()).sum(-1)
    return m(x.detach()) + shared - shared.detach()


def by_formula(net: Net, x: Tensor, rule: Formula) -> Tensor:
    def held(gate: Tensor) -> Tensor:
        return gate.detach() if rule.activation else gate

    def by(m: nn.Module, x: Tensor) -> Tensor:
        return _linear(m, x, rule.gamma)

    for b in net.blocks:
        q, k, v = by(b.qkv, _norm(b.norm1, x, rule.norm)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        q, k, v = scaled(q, 1), scaled(k, 1), scaled(v, rule.v)
        q, k = (scaled(_norm(m, z, rule.norm), rule.qk) for m, z in ((b.q_norm, q), (b.k_norm, k)))
        y = _softmax(q @ k.mT * 0.5, rule.temperature) @ v
        x = x + by(b.proj, y.transpose(1, 2).flatten(2))
        h = _norm(b.norm2, x, rule.norm)
        up = by(b.up, h)
        if b.gated:
            gate = by(b.gate, h)
            gate = gate * held(torch.sigmoid(gate))
            h = scaled((gate if rule.gate_branch else gate.detach()) * up, rule.glu)
        else:
            h = up * held((1 + torch.erf(up / 2**0.5)) / 2)
        x = x + by(b.down, h)
    return by(net.head, x[:, 0])


def gradients(net: nn.Module, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    x = X.clone().requires_grad_()
    wanted = [x, *net.parameters()]
    y = (run(x) * torch.tensor([1.0, -2.0, 0.5])).sum()
    return list(torch.autograd.grad(y, wanted, allow_unused=True, materialize_grads=True))


FAST = ("libra", "attn_lrp")  # a law, and one that leaves residuals
NETS = [(g, f) for g in (True, False) for f in (False, True)]


def _named(gated: bool, fused: bool) -> str:
    return f"{'gated' if gated else 'plain'}, {'fused' if fused else 'written out'}"


# a gated MLP has every site that a plain one has
EACH = [
    pytest.param(
        policy, gated, fused, id=f"{policy}, {_named(gated, fused)}",
        marks=() if gated and fused and policy in FAST else pytest.mark.slow,
    )
    for policy in FORMULAS
    for gated, fused in NETS
]  # fmt: skip


@functools.cache
def transformed(policy: str, gated: bool, fused: bool) -> tuple[Net, nn.Module]:
    net = Net(gated, fused)
    return net, lg.transform(net, X, policy=policy)


@functools.cache
def ops(gated: bool, fused: bool) -> frozenset[str]:
    """The ops of a network's plain account."""
    return frozenset(r.op.split(".")[1] for r in lg.audit(Net(gated, fused), X, 1).rows if "." in r.op)


@functools.cache
def certified(policy: str, gated: bool, fused: bool) -> lg.Certificate:
    return lg.verify(*transformed(policy, gated, fused), X, 1)


def test_every_shipped_policy_has_a_formula() -> None:
    shipped = set(rulebook.policies())
    assert shipped == set(FORMULAS)


@pytest.mark.parametrize(("policy", "gated", "fused"), EACH)
def test_a_policy_is_its_formula(policy: str, gated: bool, fused: bool) -> None:
    """Input and parameters; the forward to the bit; and again behind a pickle."""
    net, gm = transformed(policy, gated, fused)
    assert torch.equal(gm(X), net(X))
    wanted = gradients(net, lambda x: by_formula(net, x, FORMULAS[policy]))
    assert torch.equal(gm(X.clone().requires_grad_()), net(X.clone().requires_grad_()))
    for found in (gradients(net, gm), gradients(copy := pickle.loads(pickle.dumps(gm)), copy)):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("gated", [True])
@pytest.mark.parametrize("fused", fast_first([True, False], 1))
@pytest.mark.parametrize("policy", fast_of(FORMULAS, FAST))
def test_the_ledger_says_what_a_policy_leaves(policy: str, gated: bool, fused: bool) -> None:
    """The account closes with its residuals; these are where the policy is no law, and verify says so."""
    _, gm = transformed(policy, gated, fused)
    account = lg.audit(gm, X, 1)
    rest = account.output - account.input - account.bias - sum(r.residual for r in account.rows)
    size = max(abs(r.out) for r in account.rows)
    assert abs(rest) < 1e-12 * size
    left = {r.op.split(".")[1] for r in account.rows if abs(r.residual) > 1e-9 * size}
    expected = FORMULAS[policy].open & ops(gated, fused) - (set() if gated else {"mul"})
    assert left == expected
    certificate = certified(policy, gated, fused)
    assert certificate.erased_equal
    assert certificate.forward_equal
    assert certificate.ok is not bool(expected), str(certificate)
    nodes = {r.node: r.op.split(".")[1] for r in account.rows if "." in r.op}
    assert {nodes[n] for n in certificate.unbalanced} == expected


@pytest.mark.parametrize(("policy", "gated", "fused"), EACH)
def test_the_plan_names_what_the_proof_leaves_open(policy: str, gated: bool, fused: bool) -> None:
    _, gm = transformed(policy, gated, fused)
    assert {f.node for f in gm.plan.unbalanced} == set(certified(policy, gated, fused).unbalanced)


def test_policies_that_are_equal_say_so() -> None:
    for one, other in (("relp", "libra_no_attention"), ("decompx", "libra_no_gate")):
        assert rulebook.load(one).digest == rulebook.load(other).digest
        assert f"Equal to {other}" in " ".join(
            (rulebook.rules_folder() / f"{one}.yaml").read_text().split()
        )
