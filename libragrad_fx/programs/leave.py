"""A program leaves Python, or at least this package: files that PyTorch, C++ or an ONNX runtime loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from libragrad_fx.errors import InputError, LibraGradError
from libragrad_fx.extras import need, writing
from libragrad_fx.models import first_line
from libragrad_fx.module.captured import CapturedModule
from libragrad_fx.programs.flat import Flat
from libragrad_fx.programs.forms import ONNX, OPS, Forms
from libragrad_fx.programs.modes import Plain, require_close
from libragrad_fx.programs.stack import Axes

Tensor = torch.Tensor
Write = Callable[[Path, torch.export.ExportedProgram, Sequence[str], Sequence[str]], Any]
Run = Callable[[Sequence[Tensor]], Tensor]


class Standalone(torch.nn.Module):
    """A flat graph and its tensors as a module: called as ``(*inputs, target)``."""

    def __init__(self, made: Flat, module: CapturedModule, forms: Forms) -> None:
        super().__init__()
        state = made.state(module)
        self.made, self.count, self.forms = made, len(state), forms
        for i, t in enumerate(state):
            self.register_buffer(f"t{i}", t.detach())

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        state = [self.get_buffer(f"t{i}") for i in range(self.count)]
        with torch.no_grad():
            return tuple(Plain(self.made.graph, self.forms).run(*state, *given))


def exported(
    made: Flat, module: CapturedModule, given: Sequence[Tensor], free: Sequence[Axes], form: str
) -> torch.export.ExportedProgram:
    """The program as ``torch.export`` knows it, for any batch of more than one where that is free."""
    batch, tensors = Dim("batch", min=2), given[: len(given) - made.indexed]
    serves = [()] * len(tensors) if made.batch or not free else free
    dims = [dict.fromkeys((a for a in axes if t.shape[a] > 1), batch)
            for t, axes in zip(tensors, serves, strict=True)]  # fmt: skip
    if made.indexed:
        dims.append({0: batch} if any(dims) else {})
    shapes = (tuple(dims),)
    return torch.export.export(
        Standalone(made, module, _FORMS[form].ops).eval(), tuple(given), dynamic_shapes=shapes
    )


def _pt2(path: Path, program: torch.export.ExportedProgram, *_: Any) -> Run:
    torch.export.save(program, path)
    return lambda given: torch.export.load(path).module()(*given)[0]  # type: ignore[no-any-return]


def _package(path: Path, program: torch.export.ExportedProgram, *_: Any) -> Run:
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return lambda given: torch._inductor.aoti_load_package(str(path))(*given)[0]


def _onnx(
    path: Path, program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]
) -> Run:
    require_onnx()
    import onnxruntime

    made = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=[*inputs], output_names=[*outputs]
    )
    assert made is not None
    made.save(str(path))

    def run(given: Sequence[Tensor]) -> Tensor:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        named = zip(inputs, given, strict=True)
        read = {n.name for n in session.get_inputs()}
        (found, *_) = session.run(None, {n: t.cpu().numpy() for n, t in named if n in read})
        return torch.as_tensor(found)

    return run


@dataclasses.dataclass(frozen=True)
class _Form:
    ending: str
    write: Write
    ops: Forms = dataclasses.field(default_factory=lambda: OPS)


_FORMS = {
    "save": _Form(".pt2", _pt2),
    "package": _Form(".pt2", _package),
    "to_onnx": _Form(".onnx", _onnx, {**OPS, **ONNX}),
}


def require_ending(form: str, path: Path, ending: str = "") -> None:
    """``ending``: of a form that is not written here."""
    ending = ending or _FORMS[form].ending
    if path.suffix != ending:
        raise InputError(f"{form} writes {ending}, got {path.name!r}")


def require_onnx() -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        need(module, "onnx")


def write(
    form: str, path: Path, program: torch.export.ExportedProgram, given: Sequence[Tensor],
    want: Tensor, scale: float, inputs: Sequence[str], outputs: Sequence[str],
) -> Path:  # fmt: skip
    """Write the file, load it, run it, and compare its map with ``want``; ``scale``: see ``require_close``.

    Raises:
        InputError: a path that cannot be written.
        LibraGradError: an op that the format lacks, or a file that its own runtime does not load.
        VerificationError: another map than the program's.
    """
    dtype = next((t.dtype for t in program.state_dict.values() if t.is_floating_point()), want.dtype)
    try:
        with writing(path):
            run = _FORMS[form].write(path, program, inputs, outputs)
        require_close(run(given).to(want), want, f"the map of {path.name}", dtype, scale)
    except InputError:
        raise
    except Exception as e:
        path.unlink(missing_ok=True)  # a file that is not right
        if isinstance(e, LibraGradError):
            raise
        raise LibraGradError(f"{form} cannot write this program: {_said(e)}") from e
    return path


def _said(error: BaseException) -> str:
    """What an exporter says of the error that it began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
