"""The reference checks itself before anything is checked against it."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.models import reference as ref

TARGET = 3
BATCH = 2
FAST = ("vit", "eva02")  # a GELU, and a GLU
CASES = [
    pytest.param(row, id=row[0], marks=() if row[0] in FAST else pytest.mark.slow)
    for row in (*ref.FAMILIES, *ref.VARIANTS, *ref.DEEP)
]
GLU_FAMILIES = {"eva02", "eva02_inner_norms", "gmixer"}


@dataclass(frozen=True)
class Case:
    """One model with random weights, its input ``(B, 3, height, width)``, its stock logits."""

    name: str
    model: nn.Module
    x: Tensor
    logits: Tensor
    libra: ref.Reference


# One model in memory at a time; pytest groups the tests of this module by parameter.
@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    name, architecture, kwargs = request.param
    model = ref.create(architecture, **kwargs).double()
    ref.randomise(model, seed=0)
    x = _image(model)
    with torch.no_grad():
        logits = model(x)
    return Case(
        name=name,
        model=model,
        x=x,
        logits=logits,
        libra=ref.reference(model, x, TARGET),
    )


def _image(model: nn.Module) -> Tensor:
    embed = model.stem if hasattr(model, "stem") else model.patch_embed
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 3, *embed.img_size, generator=generator, dtype=torch.float64)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().clamp_min(1e-30)
    return float((actual - expected).abs().max() / scale)


def test_the_forward_is_the_stock_models(case: Case) -> None:
    assert _relative_error(case.libra.logit, case.logits[:, TARGET]) <= 1e-10


def test_random_weights_give_a_usable_signal(case: Case) -> None:
    assert 0.1 < float(case.logits.std()) < 10.0
    assert float((case.logits[0] - case.logits[1]).abs().max()) > 1e-2
    for name, parameter in case.model.named_parameters():
        assert float(parameter.detach().std()) > 1e-3, name


@pytest.mark.slow
def test_without_rules_every_gradient_is_the_stock_models(case: Case) -> None:
    plain = ref.reference(case.model, case.x, TARGET, rules=ref.ORDINARY)
    leaf, named = case.x.clone().requires_grad_(True), dict(case.model.named_parameters())
    of_input, *grads = torch.autograd.grad(
        case.model(leaf)[:, TARGET].sum(), [leaf, *named.values()]
    )
    largest = max(float(g.abs().max()) for g in grads)
    assert _relative_error(plain.grad_input, of_input) <= 1e-9
    assert plain.grads.keys() == named.keys()
    for (name, grad), stock in zip(plain.grads.items(), grads, strict=True):
        # Key biases have a zero gradient in exact arithmetic, so the scale is the model's.
        assert float((grad - stock).abs().max()) <= 1e-10 * largest, name


def test_input_and_biases_sum_to_the_logit(case: Case) -> None:
    gap = ref.completeness_gap(case.model, case.x, case.libra)
    assert abs(gap) <= 1e-9 * max(1.0, abs(float(case.libra.logit.sum())))


@pytest.mark.slow
def test_each_rule_is_needed(case: Case) -> None:
    needed = ["norm", "activation"]
    needed += [] if hasattr(case.model, "stem") else ["attention"]
    needed += ["halve"] if case.name in GLU_FAMILIES else []
    for rule in needed:
        rules = replace(ref.LIBRA, **{rule: False})
        partial = ref.reference(case.model, case.x, TARGET, rules=rules)
        assert abs(ref.completeness_gap(case.model, case.x, partial)) > 1e-3, rule


def test_what_acts_through_the_probabilities_gets_nothing(case: Case) -> None:
    cut = (
        "q_bias",
        "relative_position_bias_table",
        "attn_pool.latent",
        "attn_pool.q.weight",
        "attn_pool.q.bias",
        "q_proj.weight",
        "q_proj.bias",
        "k_proj.weight",
        "q_norm.weight",
        "k_norm.weight",
    )
    for name, grad in case.libra.grads.items():
        if name.endswith(cut):
            assert not grad.any(), name
        elif name.endswith(("qkv.weight", "qkv.bias")):
            query, key, value = grad.chunk(3)
            assert not query.any(), name
            assert not key.any(), name
            assert value.any(), name
        else:
            assert grad.any(), name


# ---------------------------------------------------------------- the rules, by their closed form


def _draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_norm_rule_by_hand() -> None:
    module = nn.LayerNorm(7, dtype=torch.float64)
    nn.init.normal_(module.weight)
    x, dy = _draw(4, 7).requires_grad_(True), _draw(7, 4).T
    y = ref._norm(module, x, ref.LIBRA)
    torch.testing.assert_close(y, module(x))
    (dx,) = torch.autograd.grad(y, x, dy)
    u = dy * module.weight
    root = (x.var(-1, correction=0, keepdim=True) + module.eps).sqrt()
    torch.testing.assert_close(dx, (u - u.mean(-1, keepdim=True)) / root)
    torch.testing.assert_close(dx.sum(-1), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("module", [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU()], ids=str)
def test_activation_rule_by_hand(module: nn.Module) -> None:
    x = torch.linspace(-3.0, 3.0, 13, dtype=torch.float64, requires_grad=True)
    y = ref._activation(module, x, ref.LIBRA)
    torch.testing.assert_close(y, module(x))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert x[6] == 0.0
    assert dx[6] == 0.5
    torch.testing.assert_close(dx * x, module(x))


def test_product_rule_by_hand() -> None:
    a, b, dy = _draw(5).requires_grad_(True), _draw(1, 5)[0].requires_grad_(True), _draw(5)
    y = ref._product(a, b, ref.LIBRA)
    assert torch.equal(y, a * b)
    da, db = torch.autograd.grad(y, (a, b), dy)
    torch.testing.assert_close(da, 0.5 * b * dy)
    torch.testing.assert_close(db, 0.5 * a * dy)


def test_attention_rule_by_hand() -> None:
    q, k, v = (part.requires_grad_(True) for part in _draw(3, 1, 2, 5, 4).unbind(0))
    bias, dy = _draw(2, 5, 5).requires_grad_(True), _draw(1, 5, 8)
    y = ref._attend(q, k, v, bias, ref.LIBRA)
    grads = torch.autograd.grad(y, (q, k, bias, v), dy, allow_unused=True)
    assert grads[:3] == (None, None, None)
    probabilities = (q @ k.mT / 2.0 + bias).softmax(-1)
    per_head = dy.reshape(1, 5, 2, 4).transpose(1, 2)
    torch.testing.assert_close(grads[3], probabilities.mT @ per_head)


# ---------------------------------------------------------------- scope


def test_constant_buffers_survive_randomise() -> None:
    model = ref.create("eva02_tiny_patch14_224", img_size=56, num_classes=2)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    ref.randomise(model, seed=0)
    assert before
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_an_unknown_architecture_is_refused() -> None:
    model = ref.create("deit_tiny_distilled_patch16_224", img_size=32, num_classes=2)
    with pytest.raises(TypeError, match="VisionTransformerDistilled"):
        ref.reference(model, torch.zeros(1, 3, 32, 32), 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ref.PAPER_CHECKPOINTS)
def test_the_papers_checkpoints_have_a_reference(name: str) -> None:
    with torch.device("meta"):
        model = ref.create(name)
        size = model.pretrained_cfg["input_size"]
        logits = ref.logits(model, torch.zeros(1, *size), ref.LIBRA)
    assert logits.shape == (1, 1000)


def test_the_reference_does_not_import_the_code_under_test() -> None:
    tree = ast.parse(Path(ref.__file__).read_text(encoding="utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported.isdisjoint({"libragrad_fx"})
