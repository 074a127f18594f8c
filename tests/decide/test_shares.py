"""LRP-γ, z⁺ and the z-box rule as rows of a policy, on a vision transformer and a convolutional network."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import libragrad_fx as lg
from libragrad_fx.decide.rulebook import in_scope, rules_folder
from libragrad_fx.errors import CutWarning, RuleError, UnknownOpError
from tests.decide.test_policies import _norm
from tests.decide.test_scope import policy

X = torch.rand(3, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Rule = Callable[[Tensor, Tensor], Tensor]
"""(terms' values x, weights) -> coefficients: what of x, times x, gets a share of the sum."""
Rules = dict[str, Rule]
"""By the path of a module. What is not there has autograd's gradient."""


def _drawn(net: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    for b in net.buffers():
        b.copy_(torch.rand(b.shape) + 0.5)
    return net.double().eval()


class Vit(nn.Module):
    """Pixels that the model normalises, a patch convolution, one MLP, the mean of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(2, 6, 4, 4), nn.LayerNorm(6)
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(6, 9), nn.Linear(9, 6)]) for _ in range(2))
        self.head = nn.Linear(6, 4)
        _drawn(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.by(x, {}, False)

    def by(self, x: Tensor, rules: Rules, held: bool = True) -> Tensor:
        at = functools.partial(through, self, rules)
        x = at("patch", (x - 0.5) / 0.25).flatten(2).transpose(1, 2)
        for i in range(2):
            h = at(f"blocks.{i}.0", _norm(self.norm, x, True) if held else self.norm(x))
            h = h * ((1 + torch.erf(h / 2**0.5)) / 2).detach() if held else F.gelu(h)
            x = x + at(f"blocks.{i}.1", h)
        return at("head", x.mean(1))


class Cnn(nn.Module):
    """Strides, padding, groups and a batch norm in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(2, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.second, self.head = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), nn.Linear(6, 4)
        _drawn(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.by(x, {})

    def by(self, x: Tensor, rules: Rules, held: bool = True) -> Tensor:
        at = functools.partial(through, self, rules)
        x = F.relu(self.bn(at("first", x)))
        return at("head", F.relu(at("second", x)).mean((2, 3)))


# --- the formulas


def gamma(number: float) -> Rule:
    def rule(x: Tensor, w: Tensor) -> Tensor:
        terms = x * w
        z = terms.sum(-1, keepdim=True)
        conforms = (terms.sign() == z.sign()).double()
        raised = conforms if math.isinf(number) else 1 + number * conforms
        return w * raised * (z / (terms * raised).sum(-1, keepdim=True)).nan_to_num()

    return rule


def box(low: list[float], high: list[float], size: int) -> Rule:
    ends = [torch.tensor(e).double().repeat_interleave(size) for e in (low, high)]

    def rule(x: Tensor, w: Tensor) -> Tensor:
        inside = x != 0  # no element of a picture is 0, and a border is
        low, high = (e * inside for e in ends)
        terms = x * w - low * w.clamp(min=0) - high * w.clamp(max=0)
        z = (x * w).sum(-1, keepdim=True)
        return (terms / terms.sum(-1, keepdim=True) * z / x).nan_to_num(posinf=0, neginf=0)

    return rule


def through(net: nn.Module, rules: Rules, path: str, x: Tensor) -> Tensor:
    """A layer whose input gets its gradient by a rule, and weight and bias autograd's."""
    m = net.get_submodule(path)
    if path not in rules:
        return m(x)
    if isinstance(m, nn.Linear):
        shared = by_rule(rules[path], x, m.weight)
    else:
        unfolded = [
            F.unfold(part, m.kernel_size, padding=m.padding, stride=m.stride).mT
            for part in x.chunk(m.groups, 1)
        ]
        parts = zip(unfolded, m.weight.flatten(1).chunk(m.groups), strict=True)
        shared = torch.cat([by_rule(rules[path], p, w) for p, w in parts], -1).mT
    y = m(x.detach())
    return y + (shared - shared.detach()).reshape(y.shape)


def by_rule(rule: Rule, x: Tensor, w: Tensor) -> Tensor:
    x = x.unsqueeze(-2)
    return (x * rule(x, w).detach()).sum(-1)


# --- policies on networks

BOX = "kind: product, site: value, reads: input, action: {box: [[-2, -2.5], [2, 2.25]]}, optional: false"
RANGE = 'kind: product, site: value, where: "blocks.{1..3}", action: {gamma: 2}, optional: false'
ALL = "kind: product, site: value, action: z_plus, optional: false"
POLICIES: dict[str, tuple[str, ...]] = {
    "libra": (), "libra_pixels": (), "lrp_gamma": (), "box": (BOX,), "range": (RANGE,), "all": (ALL,),
}  # fmt: skip
LINEAR = [f"blocks.{i}.{j}" for i in range(2) for j in range(2)]
Z_PLUS = gamma(math.inf)
RULES: dict[tuple[str, str], Rules] = {
    ("vit", "libra"): {},
    ("vit", "libra_pixels"): {"patch": Z_PLUS},
    ("vit", "lrp_gamma"): {"patch": gamma(0.25), **dict.fromkeys([*LINEAR, "head"], gamma(0.05))},
    ("vit", "box"): {"patch": box([-2, -2.5], [2, 2.25], 16)},
    ("vit", "range"): dict.fromkeys(LINEAR[2:], gamma(2)),
    ("vit", "all"): dict.fromkeys(["patch", *LINEAR, "head"], Z_PLUS),
    ("cnn", "libra"): {},
    ("cnn", "libra_pixels"): {"first": Z_PLUS},
    ("cnn", "lrp_gamma"): {"first": gamma(0.25), "second": gamma(0.25), "head": gamma(0.05)},
    ("cnn", "box"): {"first": box([-2, -2.5], [2, 2.25], 9)},
    ("cnn", "all"): dict.fromkeys(["first", "second", "head"], Z_PLUS),
}
FAST = {("cnn", "box"), ("vit", "range")}
CASES = [
    pytest.param(*case, id=", ".join(case), marks=() if case in FAST else pytest.mark.slow)
    for case in RULES
]


@functools.cache
def net_of(name: str) -> nn.Module:
    return {"vit": Vit, "cnn": Cnn}[name]()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policies")


def file_of(name: str, folder: Path) -> str | Path:
    if name not in ("box", "range", "all"):
        return name
    (at := folder / name).mkdir(exist_ok=True)
    return policy(at, *POLICIES[name])


@pytest.fixture(scope="module")
def made(folder: Path) -> Callable[[str, str], nn.Module]:
    @functools.cache
    def transformed(net: str, name: str) -> nn.Module:
        return lg.transform(net_of(net), X, policy=file_of(name, folder))

    return transformed


def _gradients(net: nn.Module, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    x = X.clone().requires_grad_()
    y = (run(x) * torch.tensor([1.0, -2.0, 0.5, 0.25])).sum()
    return list(torch.autograd.grad(y, [x, *net.parameters()]))


@pytest.mark.parametrize(("net", "name"), CASES)
def test_a_policy_is_its_formula(net: str, name: str, made: Callable[[str, str], nn.Module]) -> None:
    """Input and parameters; the forward to the bit; copied and pickled as well."""
    gm, plain = made(net, name), net_of(net)
    x = X.clone().requires_grad_()
    assert torch.equal(gm(x), plain(x))
    assert torch.equal(gm(X), plain(X))
    wanted = _gradients(plain, lambda x: plain.by(x, RULES[net, name]))
    for again in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        for a, b in zip(_gradients(again, again), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("net", "name"), CASES)
def test_a_batch_is_its_samples(net: str, name: str, made: Callable[[str, str], nn.Module]) -> None:
    gm = made(net, name)

    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(gm(x)[:, 1].sum(), x)[0]

    torch.testing.assert_close(
        gradient(X), torch.cat([gradient(x) for x in X.split(1)]), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(("net", "name"), CASES)
def test_the_law_holds_and_the_proof_says_why(
    net: str, name: str, made: Callable[[str, str], nn.Module]
) -> None:
    gm = made(net, name)
    certificate = lg.verify(net_of(net), gm, X, 1)
    assert certificate.ok, str(certificate)
    assert not gm.plan.unbalanced
    shared = {k: n for k, n in certificate.proof.items() if "shared among its terms" in k}
    assert sum(shared.values()) == len(RULES[net, name])
    assert all(("if no element that it reads is 0" in k) is (name == "box") for k in shared)


def test_the_ledger_says_what_a_box_loses(made: Callable[[str, str], nn.Module]) -> None:
    """An element that is 0 gets a share that no gradient carries."""
    gm = made("cnn", "box")
    x = X.clone()
    x[:, :, 2:6, 2:6] = 0
    account = lg.audit(gm, x, 1)
    lost = {r.op for r in account.rows if abs(r.residual) > 1e-9}
    assert lost == {"aten.conv2d.default"}
    rest = account.output - account.input - account.bias - sum(r.residual for r in account.rows)
    assert abs(rest) < 1e-12
    assert not lg.verify(net_of("cnn"), gm, x, 1).ok


@pytest.mark.slow
def test_a_black_picture_is_no_trouble(made: Callable[[str, str], nn.Module]) -> None:
    for net, name in RULES:
        x = torch.zeros_like(X, requires_grad=True)
        (dx,) = torch.autograd.grad(made(net, name)(x)[:, 0].sum(), x)
        assert dx.isfinite().all()


def test_the_plan_says_it(folder: Path) -> None:
    for name, said in (
        ("lrp_gamma", "gamma input by 0.25"),
        ("libra_pixels", "z_plus input"),
        ("box", "-2.5"),
    ):
        made = lg.plan(net_of("vit"), X, policy=file_of(name, folder))
        assert said in str(made)
        assert '"share"' in made.to_json()


# --- which ops read the input


class Stems(nn.Module):
    """Reads its input by several first layers, one of them behind a nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.flat, self.late, self.after, self.mixed = (nn.Linear(4, 4) for _ in range(5))
        self.square, self.inverse = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.rand(4))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        shifted = (x - 0.5) / self.scale
        a = self.conv(shifted)
        b = self.flat(F.pad(x.flip(-1), (1, -1)).unflatten(-1, (2, 2)).flatten(-2) * 2)
        c = self.late(F.relu(x))
        d = self.square(x * x) + self.inverse(1 / (1 + x))
        return self.after(a) + b + c + d + self.mixed(x + a)


def test_what_reads_the_input(tmp_path: Path) -> None:
    """Moved, shifted and scaled it still is the input; behind a weight or a nonlinearity it is not."""
    x, row = torch.rand(2, 4).double(), "kind: product, site: value, reads: input, action: z_plus"
    made = lg.plan(Stems(), x, policy=policy(tmp_path, row))
    assert [e.module for e in made.edits if e.action == "z_plus"] == ["conv", "flat"]


def test_reads_is_for_any_kind(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(F.gelu(2 * x))

    row = "kind: gated, site: value, reads: input, action: keep, optional: false"
    made = lg.plan(Twice(), torch.rand(2, 4), policy=policy(tmp_path, row))
    assert [f.node for f in made.unbalanced] == ["gelu"]


class Cut(nn.Module):
    """Two graphs; the second begins with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if x.sum() > -1e9 else x


def test_the_second_graph_of_a_model_does_not_read_its_input(tmp_path: Path) -> None:
    row = "kind: product, site: value, reads: input, action: z_plus, optional: false"
    with pytest.warns(CutWarning):
        gm = lg.transform(Cut().double(), torch.rand(2, 4).double(), policy=policy(tmp_path, row))
    assert [(e.node.partition("/")[0], str(e.action)) for e in gm.plan.edits] == [("graph0", "z_plus")]
    assert len(gm.captured_graphs) == 2


@pytest.mark.parametrize(
    ("module", "holds"),
    [
        ("blocks.0", False),
        ("blocks.2.fc", True),
        ("blocks.11", True),
        ("blocks.12", False),
        ("blocks", False),
    ],
)
def test_a_range_of_blocks(module: str, holds: bool) -> None:
    assert in_scope("blocks.{2..11}", module) is holds
    assert in_scope("*.{2..3}.{4..4}", "a.3.4.b")


# --- where a row fits


def test_a_weight_must_be_constant_and_its_terms_summed(tmp_path: Path) -> None:
    """Attention written out has no constant weight, a scale of elements no terms: the next row holds."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v, self.scale = nn.Linear(4, 4), nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT).softmax(-1) @ self.v(x) * self.scale

    row = "kind: product, site: value, action: {gamma: 1}"
    x = torch.rand(2, 3, 4).double()
    made = lg.plan(Mixed().double(), x, policy=policy(tmp_path, row))
    assert [e.op for e in made.edits if e.action == "gamma"] == ["aten.linear.default"]
    bare = (
        (rules_folder() / "libra.yaml")
        .read_text("utf-8")
        .replace('action: keep, cite: "linear in its one', 'action: {gamma: 1}, cite: "one')
    )
    with pytest.raises(UnknownOpError, match=r"has no row for product/value"):
        lg.transform(Mixed().double(), x, policy=policy(tmp_path, base=bare))


def test_a_box_by_channels_needs_channels(tmp_path: Path) -> None:
    row = "kind: product, site: value, reads: input, action: {box: [[0, 0, 0], [1, 1, 1]]}"
    with pytest.raises(UnknownOpError, match=r"no axis of 3 channels.*product/value"):
        lg.transform(net_of("cnn"), X, policy=policy(tmp_path, row))


def test_no_stem_no_site(tmp_path: Path) -> None:
    """A row that must have a site, where no weight reads the input."""
    net = nn.Sequential(nn.GELU(), nn.Linear(4, 4))
    with pytest.raises(
        RuleError, match=r"mine.yaml:\d+: row product/value that reads the input has no site"
    ):
        lg.plan(net, torch.rand(2, 4), policy=policy(tmp_path, BOX))


def test_a_negative_factor_of_the_sum_is_left_to_the_next_row(tmp_path: Path) -> None:
    """It would swap the weights' signs, and the ends of a box with them."""

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.b, x, self.w, alpha=-2) + torch.addmm(self.b, x, self.w, alpha=3)

    made = lg.plan(Added(), torch.rand(2, 4), policy=policy(tmp_path, ALL))
    assert [e.node for e in made.edits] == ["addmm_1"]


def test_complex_values_are_left_to_the_next_row(tmp_path: Path) -> None:
    class Fourier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(torch.complex128) @ self.w).real

    row = "kind: product, site: value, action: {gamma: 1}"
    gm = lg.transform(Fourier(), torch.rand(2, 4).double(), policy=policy(tmp_path, row))
    assert not gm.plan.edits
