"""A program leaves Python: as an ONNX file, and as machine code."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import libragrad_fx as lg
from libragrad_fx.errors import InputError, LibraGradError
from libragrad_fx.programs import leave
from libragrad_fx.programs.forms import ONNX
from tests.programs.test_modes import tiny
from tests.programs.test_program import KINDS, PICTURED, pictured
from zoo.small import small

aten = torch.ops.aten


def single(name: str) -> tuple[torch.nn.Module, Any]:
    made = small(name)
    narrow = lambda t: t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t  # noqa: E731
    return made.model.float(), pytree.tree_map(narrow, made.inputs)


@functools.cache
def plain() -> tuple[lg.Program, torch.Tensor]:
    """For tests that change nothing."""
    model, x = tiny()
    return lg.program(model, x), x


@pytest.mark.slow
def test_onnx_serves_any_batch(tmp_path: Path) -> None:
    """The file's inputs and outputs have names, its batch is free, and it has the model's own answer."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, x = tiny()
    program = lg.program(model, x, method="fullgrad_plus")
    path = program.to_onnx(tmp_path / "vit.onnx", x)
    session = runtime.InferenceSession(path)
    assert [n.name for n in session.get_inputs()] == ["input", "target"]
    assert [n.name for n in session.get_outputs()] == program.outputs(x)
    other = torch.randn(5, 3, 16, 16)
    for targets in ([3, 1, 0, 2, 4], None):
        index = np.array(targets or [-1] * 5)
        given = {"input": other.numpy(), "target": index}
        found = dict(zip(program.outputs(x), session.run(None, given), strict=True))
        want = program(other, targets)
        top = float(want.values.abs().max())
        np.testing.assert_allclose(found["values"], want.values, rtol=0, atol=1e-5 * top)
        if targets is None:
            assert np.array_equal(found["chosen"], model(other).argmax(1))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_in_onnx(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, inputs = single(name)
    lg.program(model, inputs).to_onnx(tmp_path / "x.onnx", inputs)  # compares its map


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURED)
def test_pictures_leave_in_any_batch(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, x = pictured(name)
    program, target = lg.program(model, x[:2]), torch.ones(len(x), dtype=torch.long)
    want = lg.attribute(model, x, 1, method="input_x_gradient").values
    near = {"rtol": 0, "atol": 1e-5 * float(want.abs().max())}
    path = program.save(tmp_path / "x.pt2", x[:2])
    torch.testing.assert_close(torch.export.load(path).module()(x, target)[0], want, **near)
    session = runtime.InferenceSession(program.to_onnx(tmp_path / "x.onnx", x[:2]))
    found, *_ = session.run(None, {"input": x.numpy(), "target": target.numpy()})
    torch.testing.assert_close(torch.as_tensor(found), want, **near)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "eva02", "mixer", "swin", "convnext", "bert", "llama"])
def test_every_kind_as_machine_code(name: str, tmp_path: Path) -> None:
    """It runs in a process where this package is not imported."""
    model, inputs = single(name)
    program = lg.program(model, inputs)
    path = program.package(tmp_path / "x.pt2", inputs)
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
    batch, sizes = len(tensors[0]), program.fitting(program._batch(inputs).call).flat.sizes
    first = (0,) * len(sizes)
    want = program(inputs, [first] * batch).values
    given = [*tensors, torch.zeros(batch, dtype=torch.long)]
    torch.save((given, want), tmp_path / "case.pt")
    code = (
        "import sys, torch; given, want = torch.load(sys.argv[2]);"
        "found = torch._inductor.aoti_load_package(sys.argv[1])(*given)[0];"
        "assert 'libragrad_fx' not in sys.modules;"
        "torch.testing.assert_close(found, want, rtol=0, atol=1e-4 * float(want.abs().max()))"
    )
    args = [sys.executable, "-c", code, str(path), str(tmp_path / "case.pt")]
    subprocess.run(args, check=True)


@pytest.mark.slow
def test_machine_code_runs_in_cpp(tmp_path: Path) -> None:
    """The program of the page."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    model, x = tiny()
    program = lg.program(model, x)
    path = program.package(tmp_path / "x.pt2", x)
    page = Path("docs/programs.md").read_text("utf-8")
    (tmp_path / "explain.cpp").write_text(page.partition("```cpp\n")[2].partition("```")[0])
    where = Path(torch.__file__).parent
    includes = [f"-I{where}/include", f"-I{where}/include/torch/csrc/api/include"]
    libraries = [f"-L{where}/lib", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{where}/lib"]
    made, source = str(tmp_path / "explain"), str(tmp_path / "explain.cpp")
    subprocess.run([compiler, "-std=c++20", source, *includes, *libraries, "-o", made], check=True)
    said = subprocess.run([made, str(path), "16"], check=True, capture_output=True, text=True).stdout
    want = program(torch.ones(2, 3, 16, 16)).values
    assert said.startswith(f"map {list(want.shape)}"), said
    assert float(said.rpartition(" ")[2]) == pytest.approx(float(want.sum()), rel=1e-4)


@pytest.mark.slow
def test_a_signature_says_what_a_file_takes() -> None:
    program, x = plain()
    assert program.signature(x) == {"input": "float32 (B, 3, 16, 16)", "target": "int64 (B)"}
    assert program.signature(x[:1]) == {"input": "float32 (1, 3, 16, 16)", "target": "int64 (1)"}


@pytest.mark.slow
def test_refusals(tmp_path: Path) -> None:
    program, x = plain()
    forms = {"save": ("x.onnx", ".pt2"), "package": ("x.so", ".pt2"), "to_onnx": ("x.pt2", ".onnx")}
    for form, (wrong, ending) in forms.items():
        with pytest.raises(InputError, match=f"{form} writes {ending}, got '{wrong}'"):
            getattr(program, form)(tmp_path / wrong, x)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        program.save(tmp_path / "file" / "x.pt2", x)


def test_what_a_format_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 5, 3), torch.nn.Flatten())
    x = torch.randn(2, 3, 5, 5)
    program = lg.program(model.eval(), x)
    without = leave._Form(".onnx", leave._onnx)
    monkeypatch.setattr(leave, "_FORMS", {"to_onnx": without})
    with pytest.raises(LibraGradError, match=r"to_onnx cannot write this program: .*convolution_backward"):
        program.to_onnx(tmp_path / "x.onnx", x)
    assert not (tmp_path / "x.onnx").exists()


sizes = st.integers(1, 3)


@given(size=sizes, stride=sizes, padding=st.integers(0, 1), dilation=st.integers(1, 2),
       groups=st.sampled_from([1, 2]), more=st.integers(0, 2), transposed=st.booleans())  # fmt: skip
def test_the_gradient_of_a_convolution(
    size: int, stride: int, padding: int, dilation: int, groups: int, more: int, transposed: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, dilation * (size - 1) + 1 + more, 7, dtype=torch.float64)
    weight = torch.randn(4, 4 // groups, size, size, dtype=torch.float64)
    how = [stride] * 2, [padding] * 2, [dilation] * 2, transposed, [0, 0], groups
    try:
        g = torch.randn_like(aten.convolution.default(x, weight, None, *how))
    except RuntimeError:  # nothing is left of the picture
        return
    args = g, x, weight, None, *how, [True, False, False]
    want = aten.convolution_backward.default(*args)[0]
    torch.testing.assert_close(ONNX[aten.convolution_backward.default](*args)[0], want)


@given(size=sizes, stride=sizes, ceil=st.booleans(), pads=st.booleans(), padding=st.integers(0, 1),
       divisor=st.sampled_from([None, 5]))  # fmt: skip
def test_the_gradient_of_pooling(
    size: int, stride: int, ceil: bool, pads: bool, padding: int, divisor: int | None
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    how = [size] * 2, [stride] * 2, [min(padding, size // 2)] * 2, ceil, pads, divisor
    g = torch.randn_like(aten.avg_pool2d.default(x, *how))
    want = aten.avg_pool2d_backward.default(g, x, *how)
    torch.testing.assert_close(ONNX[aten.avg_pool2d_backward.default](g, x, *how), want)
