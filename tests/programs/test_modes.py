"""Programs in modes other than eager: compiled, and on a GPU recorded as one CUDA graph."""

from __future__ import annotations

import pytest
import torch

import libragrad_fx as lg
from libragrad_fx.errors import InputError, VerificationError
from libragrad_fx.programs.modes import Mode, require_close
from tests.programs.test_program import Tiny

NEAR = 1e-5  # of the largest value, in float32


def tiny(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tiny, torch.Tensor]:
    torch.manual_seed(0)
    return Tiny().to(device, dtype).eval(), torch.randn(3, 3, 16, 16, device=device, dtype=dtype)


def close(program: lg.Program, model: Tiny, x: torch.Tensor, near: float = NEAR) -> torch.Tensor:
    """The program's map is that of ``attribute``."""
    target = [i % 5 for i in range(len(x))]
    method = program.options["method"]
    want = lg.attribute(lg.transform(model, x), x, target, method=method).values
    got = program(x, target).values
    torch.testing.assert_close(got, want, rtol=0, atol=near * float(want.abs().max()))
    return got


@pytest.mark.slow
@pytest.mark.parametrize("method", ["input_x_gradient", "attcat", "gradcam_plus"])
def test_compiled(method: str) -> None:
    """For each size by itself; parameters that change count."""
    model, x = tiny()
    program = lg.program(model, x, method=method, mode="compile")
    assert program.difference(x) < NEAR
    for batch in (x, x[:1], x[:2] + 1):
        close(program, model, batch)
    before = program(x, 1).values
    with torch.no_grad():
        model.head.weight.mul_(2)
    torch.testing.assert_close(program(x, 1).values, 2 * before)


def test_refusals() -> None:
    model, x = tiny()
    with pytest.raises(InputError, match="eager, cuda_graph or compile, not 'fast'"):
        lg.program(model, x, mode="fast")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="needs a GPU, and the model is on cpu: use mode='compile'"):
        lg.program(model, x, mode="cuda_graph")


def test_maps_are_close_by_what_they_are_sums_of() -> None:
    """Of a map that is what rounding leaves of shares which cancel, other roundings are as good."""
    want = torch.tensor([1.0, -1.0]) * 1e-6
    found, eps = want + 1e-7, torch.finfo(torch.float32).eps
    with pytest.raises(VerificationError, match=r"the map differs .* by 0\.1 of its largest value"):
        require_close(found, want, "the map", torch.float32, 1e-6)
    assert require_close(found, want, "the map", torch.float32, 1.0) == pytest.approx(0.1, rel=1e-3)
    with pytest.raises(VerificationError):
        require_close(want + 2e3 * eps, want, "the map", torch.float32, 1.0)
    with pytest.raises(VerificationError):
        require_close(want * torch.nan, want, "the map", torch.float32, 1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestCuda:
    @pytest.mark.parametrize("mode", ["eager", "cuda_graph", "compile"])
    @pytest.mark.parametrize("method", ["input_x_gradient", "fullgrad_plus", "genatt"])
    def test_every_mode(self, mode: Mode, method: str) -> None:
        model, x = tiny("cuda")
        program = lg.program(model, x, method=method, mode=mode)
        first = close(program, model, x)
        kept = first.clone()
        close(program, model, x + 1)
        assert torch.equal(first, kept)  # a later call wrote over nothing
        close(program, model, x[:2])

    @pytest.mark.parametrize("mode", ["eager", "cuda_graph", "compile"])
    def test_parameters_are_the_models(self, mode: Mode) -> None:
        """Changed in place, and replaced."""
        model, x = tiny("cuda")
        program = lg.program(model, x, mode=mode)
        before = program(x, 1).values
        with torch.no_grad():
            model.head.weight.mul_(2)
        torch.testing.assert_close(program(x, 1).values, 2 * before)
        old = model.head.weight.detach()
        model.head.weight = torch.nn.Parameter(old * 2)
        torch.testing.assert_close(program(x, 1).values, 4 * before)
        assert torch.equal(old * 2, model.head.weight)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        model, x = tiny("cuda", dtype)
        for mode in ("eager", "cuda_graph"):
            close(lg.program(model, x, mode=mode), model, x, near=8 * torch.finfo(dtype).eps)
