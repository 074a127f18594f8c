"""The balanced backward survives what PyTorch users do to a module, in every transformation."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import libragrad_fx as lg
from libragrad_fx.errors import ModeError
from libragrad_fx.module.captured import CapturedModule
from tests.between import fast_first

SMALL = {"img_size": 32, "patch_size": 8, "num_classes": 5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {**SMALL, "embed_dim": 24, "num_heads": 2, "depth": 2}),
    "eva02": ("eva02_tiny_patch14_224", {**SMALL, "embed_dim": 24, "num_heads": 2, "depth": 2}),
    "gmixer": ("gmixer_24_224", {"img_size": 224, "num_classes": 5, "embed_dim": 16}),
}


class Case:
    """A randomised model, its transform, an input, and the balanced gradient."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        architecture, kwargs = MODELS[name]
        self.model = timm.create_model(architecture, **kwargs).eval()
        for p in self.model.parameters():
            nn.init.normal_(p, 0, 0.2)
        self.x = torch.randn(2, 3, kwargs["img_size"], kwargs["img_size"])
        self.gm: CapturedModule = lg.transform(self.model, self.x)
        self.gradient = gradient(self.gm, self.x)
        self.plain = gradient(self.model, self.x)


def gradient(f: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x)[:, 3].sum(), x)[0]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to float32 rounding of the largest entry."""
    return float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


@pytest.fixture(scope="module", params=[pytest.param("vit", marks=pytest.mark.slow), "eva02"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_it_differs_from_autograds(case: Case) -> None:
    assert not close(case.gradient, case.plain)  # what every test below would notice


@pytest.mark.slow
@pytest.mark.parametrize("backend", fast_first(["eager", "aot_eager"], 1))
def test_compile(case: Case, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(case.gm, fullgraph=True, backend=backend)
    assert torch.equal(compiled(case.x), case.gm(case.x))
    assert close(gradient(compiled, case.x), case.gradient)


@pytest.mark.slow
def test_compile_in_a_fresh_process() -> None:
    """Where nothing has imported Dynamo before capture did."""
    code = (
        "import torch, libragrad_fx as lg\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())\n"
        "x = torch.randn(2, 4)\n"
        "gm = lg.transform(model, x)\n"
        "compiled = torch.compile(gm, fullgraph=True, backend='aot_eager')\n"
        "assert torch.equal(compiled(x), gm(x))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_func_grad_and_vmap_are_the_loop(case: Case) -> None:
    def logit(x: torch.Tensor) -> torch.Tensor:
        return case.gm(x[None])[0, 3]

    for i in range(2):
        assert close(torch.func.grad(logit)(case.x[i]), case.gradient[i])
    assert close(torch.func.vmap(torch.func.grad(logit))(case.x), case.gradient)


def test_forward_mode_is_refused(case: Case) -> None:
    with pytest.raises(ModeError, match="forward-mode"):
        torch.func.jvp(case.gm, (case.x,), (case.x,))
    with forward_ad.dual_level(), pytest.raises(ModeError, match="forward-mode"):
        case.gm(forward_ad.make_dual(case.x, case.x))


@pytest.mark.parametrize("strict", fast_first([False, True], 1))
def test_exported_again_it_stays_balanced(case: Case, strict: bool) -> None:
    program = torch.export.export(case.gm, (case.x,), strict=strict)
    assert close(gradient(program.module(), case.x), case.gradient)
    assert close(gradient(program.run_decompositions({}).module(), case.x), case.gradient)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    assert close(gradient(torch.export.load(buffer).module(), case.x), case.gradient)


def test_deepcopy(case: Case) -> None:
    twin = copy.deepcopy(case.gm)
    assert torch.equal(gradient(twin, case.x), case.gradient)
    assert twin.code == case.gm.code
    assert next(twin.parameters()) is not next(case.gm.parameters())
    assert lg.verify(case.model, twin, case.x, target=3).ok


@pytest.mark.slow
def test_saved_and_loaded_in_a_fresh_process(case: Case, tmp_path: Path) -> None:
    file = tmp_path / "saved.pt"
    torch.save((case.gm, case.model, case.x, case.gm(case.x), case.gradient), file)
    code = (
        "import torch, sys, libragrad_fx as lg\n"
        "torch.set_num_threads(1)  # as here: a sum over threads has other bits\n"
        "gm, model, x, y, g = torch.load(sys.argv[1], weights_only=False)\n"
        "z = x.clone().requires_grad_(); out = gm(z)\n"
        "assert torch.equal(out, y)\n"
        "assert torch.equal(torch.autograd.grad(out[:, 3].sum(), z)[0], g)\n"
        "assert lg.verify(model, gm, x, target=3).ok\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_checkpointing(case: Case) -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(case.gm, x, use_reentrant=False)

    assert torch.equal(gradient(run, case.x), case.gradient)


def test_conversion_leaves_the_users_model_alone(case: Case) -> None:
    before = {n: (p, p.dtype) for n, p in case.model.named_parameters()}
    gm = copy.deepcopy(case.gm) if case.gm.record.dtype_pins else lg.transform(case.model, case.x)
    if gm.record.dtype_pins:
        with pytest.raises(ModeError, match=r"transform\(model.to\(dtype\)\)"):
            gm.to(torch.float64)
    else:
        gm.to(torch.float64)
        x = case.x.double()
        assert torch.equal(gm(x), copy.deepcopy(case.model).double()(x))
    assert all(p is q and p.dtype == d for (p, d), q in
               zip(before.values(), case.model.parameters(), strict=True))  # fmt: skip


def test_state_dict_round_trip(case: Case) -> None:
    gm = copy.deepcopy(case.gm)
    changed = {k: v + 0.1 if v.is_floating_point() else v for k, v in gm.state_dict().items()}
    gm.load_state_dict(changed)
    model = copy.deepcopy(case.model)
    model.load_state_dict(changed)
    x = case.x.clone().requires_grad_()
    assert torch.equal(gm(x), model(x))


def test_other_batch_sizes(case: Case) -> None:
    for n in (1, 5):
        x = torch.randn(n, *case.x.shape[1:], requires_grad=True)
        assert torch.equal(case.gm(x), case.model(x))


def test_what_make_fx_traces_runs() -> None:
    case = Case("vit")
    traced = make_fx(case.gm)(case.x)
    assert torch.equal(traced(case.x.clone().requires_grad_()), case.model(case.x))
