"""What a policy keeps is accounted for: the ledger follows the gradient over it, and nothing is lost."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import libragrad_fx as lg
from libragrad_fx.account.observe import flat_arguments
from libragrad_fx.decide.rulebook import rules_folder
from libragrad_fx.errors import GateOutputWarning
from libragrad_fx.graph.notes import note
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.ops.insert import is_scale
from libragrad_fx.target import dot, select
from tests.between import fast_first

X = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[0, 1, 2, 3, 4], [4, 4, 0, 2, 1]])


class Kind(nn.Module):
    """``body`` between projections; weights need no gradient, so what needs one leads to the input."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.norm, self.words, self.head = nn.LayerNorm(8), nn.Embedding(5, 8), nn.Linear(8, 3)
        self.cell = nn.LSTMCell(8, 8)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.body = body
        self.double().eval().requires_grad_(False)

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Any:
        y = self.body(self, x) if ids is None else self.body(self, x, ids)
        return (self.head(y[0].mean(1)), *y[1:]) if isinstance(y, tuple) else self.head(y.mean(1))


def _attention(m: Kind, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x))


def _written_out(m: Kind, x: Tensor) -> Tensor:
    return (m.q(x) @ m.k(x).mT).softmax(-1) @ m.v(x)


def _weights_too(m: Kind, x: Tensor) -> tuple[Tensor, Tensor]:
    weights = (m.q(x) @ m.k(x).mT).softmax(-1)
    return weights @ m.v(x), weights


def _cell(m: Kind, x: Tensor) -> Tensor:
    state, cell = m.cell(x[:, 0])
    return (state + cell)[:, None]


def _chosen(m: Kind, x: Tensor, ids: Tensor) -> Tensor:
    return m.v(x) * m.words(ids).sigmoid()


KEPT: dict[str, tuple[Callable[..., Any], str]] = {
    "attention, q and k": (_attention, "attention/gate"),
    "softmax(q k) v": (_written_out, "product/gate"),
    "softmax(q k) v, gates too": (_written_out, "product/gate product/values"),
    "a denominator": (lambda m, x: m.v(x) / (1 + m.q(x).square().mean(-1, True)), "product/denominator"),
    "a norm that divides": (lambda m, x: m.v(x) / m.q(x).norm(dim=-1, keepdim=True), "product/denominator"),
    "a constant divided": (lambda m, x: m.v(1 / (3 + m.q(x).sigmoid())), "gate_source/value"),
    "two values": (lambda m, x: F.silu(m.q(x)) * m.v(x), "product/values"),
    "two values and an offset": (lambda m, x: torch.addcmul(m.k(x), m.q(x), m.v(x)), "product/values"),
    "a layer norm": (lambda m, x: m.norm(m.v(x)), "normaliser/value"),
    "a layer norm in a gate": (lambda m, x: m.v(x) * m.norm(m.q(x)).sigmoid(), "product/gate"),
    "its weight as a gate": (lambda m, x: F.layer_norm(m.v(x), (8,), m.q(x)[0, 0]), "normaliser/gate"),
    "an interpolation": (lambda m, x: torch.lerp(m.v(x), m.k(x), m.q(x).sigmoid()), "linear/gate"),
    "a slope": (lambda m, x: F.prelu(m.v(x).mT, m.q(x)[0, 0]).mT, "homogeneous/gate"),
    "an activation": (lambda m, x: F.gelu(m.v(x)), "gated/value"),
    "a tanh that carries": (lambda m, x: m.q(x).tanh(), "gate_source/value"),
    "a recurrent cell": (_cell, "recurrent/value"),
    "an embedding in a gate": (_chosen, "product/gate"),
    "an activation in a gate": (lambda m, x: m.v(x) * F.gelu(m.q(x)).sigmoid(), "product/gate"),
    "no rule": (lambda m, x: torch.linalg.matrix_exp(m.q(x).mT @ m.k(x) / 9), "product/values"),
    "a gate that is returned": (_weights_too, ""),
    "everything": (lambda m, x: m.norm(x + _written_out(m, F.gelu(m.norm(x)))), r"\w+/\w+"),
}  # fmt: skip
"""A body, and the rows of the policy that keep autograd's gradient."""
EACH = dict.fromkeys(("two values", "attention, q and k", "a layer norm", *KEPT))


def _policy(kept: str, folder: Path) -> Path:
    """``libra`` with action ``keep`` in the rows that are named."""
    text = (rules_folder() / "libra.yaml").read_text("utf-8")
    for name in kept.split():
        kind, _, site = name.partition("/")
        text, found = re.subn(rf"(kind: {kind}, site: {site}, action: )\w+", r"\1keep", text)
        assert found
    file = folder / "kept.yaml"
    file.write_text(text, "utf-8")
    return file


def _target(output: Any) -> Tensor:
    ys = output if isinstance(output, tuple) else (output,)
    weights = [torch.arange(y.numel()).view_as(y).cos() for y in ys]
    return sum(
        ((y * w).flatten(1).sum(1) for y, w in zip(ys, weights, strict=True)), torch.zeros(2)
    )


def _measured(gm: CapturedModule, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """By node, ⟨y, g⟩ - Σ⟨a, r(g)⟩ over all that it reads: each node's backward is run by itself."""
    env: dict[str, Any] = {}
    calls: dict[str, tuple[Any, Any]] = {}
    words = {n.name for n in gm.graph.nodes if n.target is torch.ops.aten.embedding.default}

    class Run(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            calls[n.name] = self.fetch_args_kwargs_from_env(n)
            y = super().run_node(n)
            if n.name in words:
                y = y.detach().requires_grad_()
            if isinstance(y, tuple):  # an output that another is made of has two gradients
                y = tuple(t.view_as(t) for t in y)
            for t in pytree.tree_leaves(y):
                if isinstance(t, Tensor) and t.requires_grad:
                    t.retain_grad()
            env[n.name] = y
            return y

    output = Run(gm).run(*flat_arguments(gm, inputs, {}))
    select(output, _target).backward()
    found: dict[str, float] = defaultdict(float)
    for n in gm.graph.nodes:
        ys = pytree.tree_leaves(env[n.name])
        got = [i for i, y in enumerate(ys) if isinstance(y, Tensor) and y.grad is not None]
        if n.op != "call_function" or not got or n.name in words:
            continue
        leaves: list[Tensor] = []

        def local(x: Any, leaves: list[Tensor] = leaves) -> Any:
            if isinstance(x, Tensor) and x.requires_grad:
                leaves.append(x.detach().requires_grad_())
                return leaves[-1]
            return x

        args, kwargs = pytree.tree_map(local, calls[n.name])
        outputs = pytree.tree_leaves(n.target(*args, **kwargs))
        gs = [ys[i].grad for i in got]
        sent = torch.autograd.grad([outputs[i] for i in got], leaves, gs, allow_unused=True)
        host = note(n).host if is_scale(n) else n.name
        found[host] += sum(dot(ys[i].detach(), ys[i].grad) for i in got)
        found[host] -= sum(
            dot(a.detach(), r) for a, r in zip(leaves, sent, strict=True) if r is not None
        )
    return found


def _transformed(name: str, kept: str, folder: Path) -> tuple[Kind, Any, tuple[Tensor, ...]]:
    body, _ = KEPT[name]
    model, inputs = Kind(body), (X, IDS) if body is _chosen else (X,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GateOutputWarning)
        gm = lg.transform(model, inputs, policy=_policy(kept, folder), on_unknown="keep")
    return model, gm, inputs


@pytest.mark.parametrize("name", fast_first(EACH, 3))
def test_the_account_of_what_is_kept_closes(name: str, tmp_path: Path) -> None:
    """output = input + bias + Σ residuals, and each residual is what its node really loses or creates."""
    _, gm, inputs = _transformed(name, KEPT[name][1], tmp_path)
    account = lg.audit(gm, inputs, _target)
    size = 1e-12 * (1 + max(abs(r.out) for r in account.rows))
    rest = account.output - account.input - account.bias - sum(r.residual for r in account.rows)
    assert abs(rest) <= size, str(account)
    assert abs(account.worst(1)[0].residual) > 1e-3
    measured = _measured(gm, tuple(x.clone().requires_grad_(x.is_floating_point()) for x in inputs))
    rows = {r.node: r.residual + r.bias for r in account.rows if r.node != "output"}
    for node in measured.keys() | rows.keys():
        assert abs(rows.get(node, 0.0) - measured.get(node, 0.0)) <= size, f"{node}\n{account}"


@pytest.mark.parametrize("name", fast_first(EACH, 2))
def test_who_keeps_everything_has_autograds_account(name: str, tmp_path: Path) -> None:
    """A policy that keeps every row changes nothing: its ledger is the plain one."""
    model, gm, inputs = _transformed(name, r"\w+/\w+", tmp_path)
    assert not gm.plan.edits
    assert lg.audit(gm, inputs, _target) == lg.audit(model, inputs, _target)
